// Pass A over one row, or over a segment of it, written, as all passes are, once over storage types and
// divergences.
//
// The row goes by in blocks of kBlock classes. While a block is in L1 its exps are taken relative to an
// offset, kept in a scratch that stays in L2, and summed; the gradient is then made from the scratch, and
// memory is read once. The offset is the maximum of the first classes and stays as long as no block's sums
// leave the range in which fp32 is exact enough; such a block takes its own maximum and is done again. So no
// pass for the maxima is needed, and any sums that carry their offset can be merged: blocks, segments,
// shards.
#pragma once

#include "measures.h"

namespace kdfast {
namespace {

// fp32 sums are exact enough, and leave room for later blocks' terms, below this. False for NaN.
KD_INLINE bool in_range(const Sums<double>& x, bool teacher) {
  return x.student_total < 0x1p40 && x.hard_total < 0x1p40 && (!teacher || x.teacher_total < 0x1p40);
}

struct Wanted {                  // of pass A, beside the sums
  int64_t without = -1;          // a class that is left out
  double* logits = nullptr;      // the sum of the logits
  Measures* measures = nullptr;  // the exps are kept
};

// A copy of a block without one of its classes.
template <class X>
KD_NOINLINE const X* leave_out(const X* x, int n, int without, bool probs) {
  static thread_local X copies[2][kBlock];
  static thread_local int next = 0;  // student and teacher may be of one type
  X* copy = copies[next ^= 1];
  std::memcpy((void*)copy, x, n * sizeof(X));
  copy[without] = filler<X>(probs);
  return copy;
}

// Pass A over n classes of a row; blocks[i] gets the i-th block's offsets.
template <class P, bool kKeep>
KD_NOINLINE Sums<double> row_sums(const typename P::S* row_s, const typename P::T* row_t, int64_t n,
                                  const RowScale& scale, Scratch<typename P::C> keep, Block<P>* blocks,
                                  const Wanted& wanted = {}) {
  const bool near = sizeof(typename P::S) == 2 || n > kFitsL2;
  typename P::C about = wanted.logits ? load_one(row_s) : 0;
  if (!std::isfinite(about)) about = 0;
  Sums<double> total{};
  double so = -kInfinity, to = P::kProbs ? 0 : -kInfinity;
  for (int64_t at = 0; at < n; at += kBlock) {
    const int m = n - at < kBlock ? n - at : kBlock;
    const typename P::S* s = row_s + at;
    const typename P::T* t = row_t + at;
    if constexpr (std::is_same_v<typename P::D, ForwardKL>) {  // which decoupled KD is
      if (at <= wanted.without && wanted.without < at + m) {
        s = leave_out(s, m, wanted.without - at, false);
        t = leave_out(t, m, wanted.without - at, P::kProbs);
      }
    }
    if (so == -kInfinity) so = first_offset<P>(s, m, scale.student);
    if constexpr (P::kMSE) {
      if (at == 0) to = mean_difference<P>(s, t, m, scale);
    } else if constexpr (P::kSoft && !P::kProbs) {
      if (to == -kInfinity) to = first_offset<P>(t, m, scale.teacher);
    }
    Sums<double> more = block_sums<P, kKeep>(s, t, m, scale, so, to, keep, near);
    if (!in_range(more, P::kSoft && !P::kProbs)) {
      so = offset_at_max<P>(s, m, scale.student);
      if constexpr (P::kSoft && !P::kProbs) to = offset_at_max<P>(t, m, scale.teacher);
      more = block_sums<P, kKeep>(s, t, m, scale, so, to, keep, near);
    }
    if (wanted.logits) *wanted.logits += block_sum(row_s + at, m, about) + m * (double)about;
    if constexpr (kKeep && !P::kMSE) {
      if (wanted.measures) {
        Measures part =
            block_measures<typename P::S, typename P::T, P::kSoft, P::kProbs>(s, t, m, scale, more, keep);
        part.student_block = part.teacher_block = at;
        if (at == 0)
          *wanted.measures = part;
        else
          add(*wanted.measures, part);
      }
    }
    merge<typename P::D>(total, more);
    if constexpr (kKeep) {
      *blocks++ = {so, to};
      keep = keep.after(kBlock);
    }
  }
  return total;
}

}  // namespace
}  // namespace kdfast
