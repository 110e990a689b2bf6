// Pass A over one row, or over a segment of it: statistics, with the running sum that stands for pass B, and
// the rule by which they are merged; written, as all passes are, once over storage types and divergences.
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
KD_INLINE bool in_range(const RowStats& x, bool teacher) {
  return x.student_sum < 0x1p40 && x.hard_sum < 0x1p40 && (!teacher || x.teacher_sum < 0x1p40);
}

// The same sums relative to other offsets (logit_mse: the same moments about another shift).
template <class P>
KD_NOINLINE void shift(RowStats& x, const RowScale& scale, double student_offset, double teacher_offset,
                       double n) {
  const double ds = x.student_offset == student_offset ? 0 : x.student_offset - student_offset;
  const double dt = x.teacher_offset == teacher_offset ? 0 : x.teacher_offset - teacher_offset;
  if constexpr (P::kMSE) {
    x.teacher_running += 2 * dt * x.teacher_sum + n * dt * dt;
    x.teacher_sum += n * dt;
  } else if constexpr (P::kSoft) {
    if constexpr (P::D::kTeacher) {
      const double moved = P::D::over_teacher(x.teacher_sum, ds, ds - dt);
      x.teacher_running = scaled(x.teacher_running + moved, dt);
    }
    if constexpr (P::D::kStudent) {
      const double moved = P::D::over_student(x.student_sum, ds - dt);
      x.student_running = scaled(x.student_running + moved, ds);
    }
    x.teacher_sum = scaled(x.teacher_sum, dt);
  }
  x.student_sum = scaled(x.student_sum, ds);
  const double dh = ds == 0 ? 0
                    : ds == -kInfinity
                        ? ds
                        : hard_offset<P>(scale, x.student_offset) - hard_offset<P>(scale, student_offset);
  x.hard_sum = scaled(x.hard_sum, dh);
  x.student_offset = student_offset;
  x.teacher_offset = teacher_offset;
}

// The one merge rule: blocks of a segment, segments of a row.
template <class P>
void add(RowStats& total, double n_total, RowStats more, double n_more, const RowScale& scale) {
  if (n_total == 0) {
    total = more;
    return;
  }
  // std::max would do, but for NaN, which must stay
  const double so = more.student_offset < total.student_offset ? total.student_offset : more.student_offset;
  const double to =
      P::kMSE || more.teacher_offset < total.teacher_offset ? total.teacher_offset : more.teacher_offset;
  if (so != total.student_offset || to != total.teacher_offset) shift<P>(total, scale, so, to, n_total);
  if (so != more.student_offset || to != more.teacher_offset) shift<P>(more, scale, so, to, n_more);
  total.student_sum += more.student_sum;
  total.teacher_sum += more.teacher_sum;
  total.hard_sum += more.hard_sum;
  total.teacher_running += more.teacher_running;
  total.student_running += more.student_running;
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
KD_NOINLINE RowStats row_sums(const typename P::S* row_s, const typename P::T* row_t, int64_t n,
                              const RowScale& scale, Scratch<typename P::C> keep, Block<P>* blocks,
                              const Wanted& wanted = {}) {
  const bool near = sizeof(typename P::S) == 2 || n > kFitsL2;
  typename P::C about = wanted.logits ? load_one(row_s) : 0;
  if (!std::isfinite(about)) about = 0;
  RowStats total{};
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
    RowStats more = block_sums<P, kKeep>(s, t, m, scale, so, to, keep, near);
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
    add<P>(total, at, more, m, scale);
    if constexpr (kKeep) {
      *blocks++ = {so, to};
      keep = keep.after(kBlock);
    }
  }
  return total;
}

}  // namespace
}  // namespace kdfast
