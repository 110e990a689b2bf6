// A row as the passes take it: its logits, the thread's scratch, where its gradient goes, and its label.
#pragma once

#include "teachers.h"

namespace kdfast {
namespace {

// A unit of work: all classes of a row, or a segment of a split one.
struct Segment {
  int64_t row, first, classes;
  KD_INLINE Segment(const LossArgs& a, int64_t segments, int64_t unit)
      : row(unit / segments),
        first(segments == 1 ? 0 : unit % segments * kSegment),
        classes(a.vocab - first) {
    if (segments > 1 && classes > kSegment) classes = kSegment;
  }
};

template <class S_, class T_>
struct Row {
  using S = S_;
  using T = T_;
  using C = Compute<S>;
  const S* s;
  const T* t;
  S* out;           // where pass C writes a block
  void* final_out;  // where the row ends: from `out` on, unless the student was widened or capped
  Scratch<C> scratch;
  Block* blocks;
};
template <class P>
using RowOf = Row<typename P::S, typename P::T>;

// Classes [begin, begin + n) of a row, in the thread's buffer where they cannot be read in place.
template <class S, class T, bool kTeacher>
KD_NOINLINE Row<S, T> open_row(const LossArgs& a, int64_t row, int64_t begin, int64_t n,
                               const RowScale& scale) {
  using C = Compute<S>;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  // The arrays are not a power of two apart, which would share cache sets, nor do their places agree modulo
  // 4096 for a store and the loads soon after it, which would wait for it: pass B's of psi, and of exps.
  const int64_t padded = blocks * kBlock + 656;
  const bool direct = sizeof(S) == bytes_of(a.student.dtype) && a.softcap == 0;
  C* at = (C*)thread_buffer(padded * sizeof(C) * 8 + blocks * sizeof(Block));
  Row<S, T> r{};
  r.blocks = (Block*)(at + 8 * padded);
  r.scratch = {at, at + padded, at + 2 * padded, at + padded};
  if (a.divergence == Divergence::kSkewForwardKL) r.scratch.psi = at + 7 * padded;  // P may be wanted again
  r.final_out =
      a.grad ? (char*)a.grad + (a.grad_layout.offset(row) + begin) * bytes_of(a.student.dtype) : nullptr;
  if (direct) {
    r.s = (const S*)row_data(a.student, row) + begin;
    r.out = (S*)r.final_out;
  } else if constexpr (std::is_same_v<S, C>) {
    const char* from = row_data(a.student, row) + begin * bytes_of(a.student.dtype);
    if (a.softcap != 0) {
      const char* teacher =
          kTeacher ? row_data(a.teachers[0], row) + begin * bytes_of(a.teachers[0].dtype) : nullptr;
      softcap_row(from, a.student.dtype, n, a.logit_scale, a.softcap, at + 3 * padded, teacher);
    } else {
      widen(from, a.student.dtype, n, at + 3 * padded);
    }
    r.s = at + 3 * padded;
    r.out = at + 4 * padded;
  }
  if constexpr (kTeacher) {
    if constexpr (!std::is_same_v<T, C>) {
      r.t = (const T*)row_data(a.teachers[0], row) + begin;
    } else {
      r.t = mix_teachers(a, row, begin, n, scale, at + 5 * padded, at + 6 * padded);
    }
  }
  return r;
}
template <class P>
RowOf<P> open_row(const LossArgs& a, int64_t row, int64_t begin, int64_t n, const RowScale& scale) {
  return open_row<typename P::S, typename P::T, P::kReadsTeacher>(a, row, begin, n, scale);
}

KD_NOINLINE void zero_gradient(const LossArgs& a, int64_t row, int64_t begin, int64_t end) {
  const int64_t size = bytes_of(a.student.dtype);
  std::memset((char*)a.grad + (a.grad_layout.offset(row) + begin) * size, 0, (end - begin) * size);
}

struct Label {  // the class, its logits as the passes read them, and the sum of all of the student's
  int64_t index = -1;
  double student = 0, teacher = 0, logits = 0;
};

// Of a row's classes [begin, begin + n); index -1 where it is not among them, or not needed.
template <class S, class T>
KD_NOINLINE Label find_label(const LossArgs& a, int64_t row, const Row<S, T>& r, int64_t begin, int64_t n) {
  if (!a.needs_label() && a.divergence != Divergence::kDKD) return {};
  Label label{a.labels[row] - begin};
  if (label.index < 0 || label.index >= n) return {};
  label.student = load_one(r.s + label.index);
  if (a.divergence == Divergence::kDKD) label.teacher = load_one(r.t + label.index);
  return label;
}

// ---- the table of coefficients ----

KD_INLINE Coefficients<double> load_coefficients(const LossArgs& a, int64_t row) {
  Coefficients<double> c;
  for (int k = 0; k < kCoefficients; ++k) {
    ((double*)&c)[k] = a.table ? a.table[row * a.columns() + k] : a.wide_table[row * a.columns() + k];
  }
  return c;
}
KD_INLINE void store_coefficients(const LossArgs& a, int64_t row, const Coefficients<double>& c) {
  for (int k = 0; k < kCoefficients; ++k) {
    const double value = ((const double*)&c)[k];
    if (a.table) a.table[row * a.columns() + k] = value;
    if (a.wide_table) a.wide_table[row * a.columns() + k] = value;
  }
}

// The coefficients of a gradient that is `factor` times as large.
template <class V>
KD_INLINE void scale_gradient(Coefficients<V>& c, V factor) {
  for (V* x : {&c.level, &c.slope, &c.teacher, &c.soft, &c.hard, &c.label, &c.uniform, &c.tilt, &c.at_label})
    *x *= factor;
}

}  // namespace
}  // namespace kdfast
