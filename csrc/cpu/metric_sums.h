// What return_metrics needs of a row's classes besides pass A's sums, block by block.
#pragma once

#include "block_sums.h"

namespace kdfast {
namespace {

// Columns next to Sums, over the same exps at T.
struct MetricSums {
  double divergence, teacher_log, student_log;  // sums of P (yt - ys), P yt and Q ys
  double student_max, teacher_max;              // of the logits, and the blocks that hold the first of them
  int64_t student_block, teacher_block;
};

// Of a block whose exps are in the scratch; its sums are pass A's.
template <class S, class T, bool kTeacher, bool kProbs>
KD_NOINLINE MetricSums block_metric_sums(const S* s, const T* t, int n, const RowScale& scale,
                                         const Sums<double>& x, Scratch<Compute<S>> scratch) {
  using C = Compute<S>;
  using V = typename Types<C>::V;
  constexpr int kLanes = Types<C>::kLanes, kStep = 2 * kLanes;
  constexpr C kMasked = -std::numeric_limits<C>::infinity();
  // a probability of 0 adds 0, and NaN stays
  const Exponent<C> student(scale.student, x.student_offset), teacher(scale.teacher, x.teacher_offset);
  const V least = splat((C)-1e30);
  V divergence{}, teacher_log{}, student_log{}, student_max = splat(kMasked), teacher_max = splat(kMasked);
  V divergence_part{}, teacher_part{}, student_part{};
  auto add = [&](V si, V ti, int at) __attribute__((always_inline)) {
    const V ys = student(si), q = load(scratch.student + at);
    student_part += q * max(least, ys);
    student_max = max(si, student_max);
    if constexpr (kTeacher) {
      const V yt = kProbs ? log2(ti) : teacher(ti);
      const V p = load(scratch.teacher + at), above = max(least, yt);
      teacher_part += p * above;
      divergence_part += p == 0 ? V{} : p * (above - ys);
      teacher_max = max(ti, teacher_max);
    }
  };
  for (int i = 0; i < n; i += kStep) {
    const int m = n - i < kStep ? n - i : kStep;
    const auto si = m == kStep ? load2(s + i) : load2_part(s + i, m, filler<S>(false));
    Two<V> ti{};
    if constexpr (kTeacher) ti = m == kStep ? load2(t + i) : load2_part(t + i, m, filler<T>(kProbs));
    add(si.a, ti.a, i);
    add(si.b, ti.b, i + kLanes);
    if (i / kStep % 8 == 7 || m < kStep) {
      divergence += divergence_part;
      teacher_log += teacher_part;
      student_log += student_part;
      divergence_part = teacher_part = student_part = V{};
    }
  }
  return {sum(divergence + divergence_part), sum(teacher_log + teacher_part), sum(student_log + student_part),
          max_lane(student_max), max_lane(teacher_max)};
}

// To other offsets, as row_math.h's rescale. x: the sums, at their offsets until now.
void rescale(MetricSums& m, const Sums<double>& x, double student_offset, double teacher_offset,
             const Exp2Scales& scale) {
  const double ds = offset_change(x.student_offset, student_offset) * scale.student;
  const double dt = offset_change(x.teacher_offset, teacher_offset) * scale.teacher;
  const double p = scaled(x.teacher_total, dt);
  m.divergence = scaled(m.divergence, dt) + masked(p, dt - ds);
  m.teacher_log = scaled(m.teacher_log, dt) + masked(p, dt);
  m.student_log = scaled(m.student_log, ds) + masked(scaled(x.student_total, ds), ds);
}

// To be called before row_math.h's merge of the sums, x and y.
void merge(MetricSums& total, const Sums<double>& x, MetricSums more, const Sums<double>& y,
           const Exp2Scales& scale) {
  const double so = higher(x.student_offset, y.student_offset),
               to = higher(x.teacher_offset, y.teacher_offset);
  rescale(total, x, so, to, scale);
  rescale(more, y, so, to, scale);
  total.divergence += more.divergence;
  total.teacher_log += more.teacher_log;
  total.student_log += more.student_log;
  if (more.student_max > total.student_max) {
    total.student_max = more.student_max;
    total.student_block = more.student_block;
  }
  if (more.teacher_max > total.teacher_max) {
    total.teacher_max = more.teacher_max;
    total.teacher_block = more.teacher_block;
  }
}

}  // namespace
}  // namespace kdfast
