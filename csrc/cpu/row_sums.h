// Pass A over one row or a segment of it: like all passes, a template over storage types and divergences.
//
// It takes blocks of kBlock classes. While a block is in L1 its exps are computed relative to an offset,
// summed, and written to a scratch that stays in L2; the gradient is then computed from the scratch, so
// memory is read once. The offset is the maximum of the first classes and stays as long as no block's sums
// leave the range in which fp32 is exact enough; such a block takes its own maximum and is computed again.
// So no pass for the maxima is needed, and any sums that carry their offset can be merged: blocks,
// segments, shards.
#pragma once

#include "classifiers.h"
#include "metric_sums.h"

namespace kdfast {
namespace {

// fp32 sums are exact enough, and leave room for later blocks' terms, below this. False for NaN.
KD_INLINE bool is_in_range(const Sums<double>& x, bool teacher) {
  return x.student_total < 0x1p40 && x.hard_total < 0x1p40 && (!teacher || x.teacher_total < 0x1p40);
}

struct SumsOptions {
  int64_t without = -1;           // a class that is left out
  double* logits = nullptr;       // gets the sum of the logits
  MetricSums* metrics = nullptr;  // kKeep only
};

// Pass A over n classes of a row; blocks[i] gets the i-th block's offsets.
template <class P, bool kKeep>
KD_NOINLINE Sums<double> row_sums(const typename P::S* row_s, const typename P::T* row_t, int64_t n,
                                  const RowScale& scale, Scratch<typename P::C> scratch, Block* blocks,
                                  const SumsOptions& options = {}) {
  const bool near = sizeof(typename P::S) == 2 || n > kFitsL2;
  typename P::C about = options.logits ? load_one(row_s) : 0;
  if (!std::isfinite(about)) about = 0;
  Sums<double> total{};
  double so = -kInfinity, to = P::kProbs ? 0 : -kInfinity;
  for (int64_t at = 0; at < n; at += kBlock) {
    const int m = n - at < kBlock ? n - at : kBlock;
    const typename P::S* s = row_s + at;
    const typename P::T* t = row_t + at;
    if constexpr (std::is_same_v<typename P::D, ForwardKL>) {  // which decoupled KD is
      if (at <= options.without && options.without < at + m) {
        s = copy_without(s, m, options.without - at, false);
        t = copy_without(t, m, options.without - at, P::kProbs);
      }
    }
    if (so == -kInfinity) so = first_offset<P>(s, m, scale.exp2_scale);
    if constexpr (P::kMSE) {
      if (at == 0) to = mean_difference<P>(s, t, m, scale);
    } else if constexpr (P::kSoft && !P::kProbs) {
      if (to == -kInfinity) to = first_offset<P>(t, m, scale.teacher_exp2_scale);
    }
    Sums<double> more = block_sums<P, kKeep>(s, t, m, scale, so, to, scratch, near);
    if (!is_in_range(more, P::kSoft && !P::kProbs)) {
      so = offset_at_max<P>(s, m, scale.exp2_scale);
      if constexpr (P::kSoft && !P::kProbs) to = offset_at_max<P>(t, m, scale.teacher_exp2_scale);
      more = block_sums<P, kKeep>(s, t, m, scale, so, to, scratch, near);
    }
    if (options.logits) *options.logits += block_sum(row_s + at, m, about) + m * (double)about;
    if constexpr (kKeep && !P::kMSE) {
      if (options.metrics) {
        MetricSums part = block_metric_sums<typename P::S, typename P::T, P::kSoft, P::kProbs>(s, t, m, scale,
                                                                                               more, scratch);
        part.student_block = part.teacher_block = at;
        if (at == 0)
          *options.metrics = part;
        else
          merge(*options.metrics, total, part, more);
      }
    }
    merge<typename P::D>(total, more);
    if constexpr (kKeep) {
      *blocks++ = {so, to};
      scratch = scratch + kBlock;
    }
  }
  return total;
}

}  // namespace
}  // namespace kdfast
