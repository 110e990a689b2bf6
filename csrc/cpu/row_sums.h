// Pass A over one row or a segment of it: like all passes, a template over storage types and divergences.
//
// It takes blocks of kBlock classes. While a block is in L1 its exps are computed relative to an offset,
// summed, and written to a scratch that stays in L2; the gradient is then computed from the scratch, so
// memory is read once. The offset is the maximum of the first classes and stays as long as no block's sums
// tell of a class far above it; such a block takes its own maximum and is computed again, for exponents keep
// the digits that a confident row needs near 0 alone.
// So no pass for the maxima is needed, and any sums that carry their offset can be merged: blocks,
// segments, shards.
#pragma once

#include "classifiers.h"
#include "entries.h"
#include "metric_sums.h"

namespace kdfast {
namespace {

// Whether the classes are not far above their offset, by the mean of their exps. False for NaN.
KD_INLINE bool is_in_range(const Sums<double>& x, bool teacher) {
  const double most = 2 * x.classes;
  return x.student_total < most && x.hard_total < 0x1p40 && (!teacher || x.teacher_total < most);
}

// Of a number > 0; std::ilogb would be a call.
KD_INLINE int exponent_of(double x) { return (int)(bits<int64_t>(x) >> 52) - 1023; }

struct SumsOptions {
  int64_t label = -1;                // the class, if it is among these
  bool without_label = false;        // whether the sums leave it out
  const Entries* without = nullptr;  // Others only: the entries, which the sums leave out
  bool given = false;                // whether the teacher's exps are its probabilities
  double* logits = nullptr;          // gets the sum of the logits
  MetricSums* metrics = nullptr;     // kKeep only
  bool* is_huge = nullptr;           // gets whether the sums are to be computed in doubles
};

// Pass A over n classes of a row; blocks[i] gets the i-th block's offsets.
template <class P, bool kKeep>
KD_NOINLINE Sums<double> row_sums(const typename P::S* row_s, const typename P::T* row_t, int64_t n,
                                  const RowScale& scale, Scratch<typename P::C> scratch, Block* blocks,
                                  const SumsOptions& options = {}) {
  const bool near = sizeof(typename P::S) == 2 || n > kFitsL2;
  typename P::C about = options.logits ? load_one(row_s) : 0;
  if (!std::isfinite(about)) about = 0;
  const bool own_offset = P::kSoft && !P::kProbs && !options.given;  // of the teacher
  using C = typename P::C;
  Patches<P> patches{};
  if constexpr (P::D::kOthers) patches = {(typename P::S*)options.without->block, options.without->is_copied};
  Sums<double> total{}, later;
  [[maybe_unused]] bool guarded = false;  // for the rest of the row
  double so = -kInfinity, to = own_offset ? -kInfinity : 0;
  for (int64_t at = 0; at < n; at += kBlock) {
    const int m = n - at < kBlock ? n - at : kBlock;
    const typename P::S* s = row_s + at;
    const typename P::T* t = row_t + at;
    const bool labelled = at <= options.label && options.label < at + m;
    if constexpr (std::is_same_v<typename P::D, ForwardKL>) {  // which decoupled KD is
      if (labelled && options.without_label) {
        const int32_t place = options.label - at;
        s = copy_without(s, m, &place, 1, false);
        t = copy_without(t, m, &place, 1, P::kProbs);
      }
    }
    BlockEntries e{};
    if constexpr (P::D::kOthers) {
      e = options.without->in_block(at / kBlock);
      patches.set(s, m, e.places, e.count);
    }
    const auto without_entries = [&] { return e.count ? copy_without(s, m, e.places, e.count, false) : s; };
    if (so == -kInfinity)
      so = representable<C>(first_offset(without_entries(), m), scale.student, scale.inverse_student);
    if constexpr (P::kMSE) {
      if (at == 0) to = mean_difference<P>(s, t, m, scale);
    } else if constexpr (P::kSoft && !P::kProbs) {
      if (to == -kInfinity) to = representable<C>(first_offset(t, m), scale.teacher, scale.inverse_teacher);
    }
    Sums<double>& more = at == 0 ? total : later;
    const auto add_up = [&] {
      if constexpr (kTriesUnguarded<P>) {  // what is guarded always keeps its exps: one instance less
        if (!guarded) {
          block_sums<P, kKeep, false>(s, t, m, scale, so, to, scratch, near, more);
          guarded = std::isnan(more.over_teacher + more.over_student);
        }
        if (guarded) block_sums<P, true>(s, t, m, scale, so, to, scratch, near, more);
      } else {
        block_sums<P, kKeep>(s, t, m, scale, so, to, scratch, near, more, patches);
      }
    };
    add_up();
    if (!is_in_range(more, own_offset)) {
      so = representable<C>(block_max(without_entries(), m), scale.student, scale.inverse_student);
      if constexpr (P::kSoft && !P::kProbs)
        to = own_offset ? representable<C>(block_max(t, m), scale.teacher, scale.inverse_teacher) : 0;
      add_up();
    }
    if constexpr (P::D::kOthers) patches.unset(e.places, e.count);
    if (labelled) {
      const C logit = load_one(row_s + options.label);
      more.label = ((double)logit - finite(so)) * scale.hard;
      // A confident row's loss is the difference of both logarithms, next to nothing.
      if (std::fabs(more.label) < 100 && more.label > exponent_of(more.hard_total) - 2)
        more.label = Exponents<P>(scale, so, to).log_hard_exp(logit);
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
          merge(*options.metrics, total, part, more, scale);
      }
    }
    if constexpr (kFuses<C>) {
      if (scale.is_huge(so, own_offset ? to : 0)) *options.is_huge = true;
    }
    if (at != 0) merge<typename P::D>(total, later, scale);
    if constexpr (kKeep) {
      *blocks++ = {so, to};
      scratch = scratch + kBlock;
    }
  }
  return total;
}

}  // namespace
}  // namespace kdfast
