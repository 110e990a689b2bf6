// What return_metrics needs of a row's classes beside pass A's sums, block by block, and its merge rule.
#pragma once

#include "block_sums.h"

namespace kdfast {
namespace {

// What the metrics sum, over exps at T relative to these offsets.
struct Measures {
  double student_offset, teacher_offset, student_sum, teacher_sum;
  double divergence, teacher_log, student_log;  // sums of P (yt - ys), P yt and Q ys
  double student_max, teacher_max;              // of the logits, and the blocks that hold the first of them
  int64_t student_block, teacher_block;
};

// Of a block whose exps are in the scratch; its sums are pass A's.
template <class S, class T, bool kTeacher, bool kProbs>
KD_NOINLINE Measures block_measures(const S* s, const T* t, int n, const RowScale& scale,
                                    const Sums<double>& x, Scratch<Compute<S>> kept) {
  using C = Compute<S>;
  using V = typename Types<C>::V;
  constexpr int kLanes = Types<C>::kLanes, kStep = 2 * kLanes;
  constexpr C kMasked = -std::numeric_limits<C>::infinity();
  // a probability of 0 adds 0, and NaN stays
  const V slope = splat((C)scale.student), teacher_slope = splat((C)scale.teacher), least = splat((C)-1e30);
  const V so = splat((C)finite(x.student_offset)), to = splat((C)finite(x.teacher_offset));
  V divergence{}, teacher_log{}, student_log{}, student_max = splat(kMasked), teacher_max = splat(kMasked);
  V divergence_part{}, teacher_part{}, student_part{};
  auto add = [&](V si, V ti, int at) __attribute__((always_inline)) {
    const V ys = multiply_subtract(si, slope, so), q = load(kept.student + at);
    student_part += q * max(least, ys);
    student_max = max(si, student_max);
    if constexpr (kTeacher) {
      const V yt = kProbs ? log2(ti) : multiply_subtract(ti, teacher_slope, to), p = load(kept.teacher + at);
      const V above = max(least, yt);
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
  return {x.student_offset,
          x.teacher_offset,
          x.student_total,
          x.teacher_total,
          sum(divergence + divergence_part),
          sum(teacher_log + teacher_part),
          sum(student_log + student_part),
          max_lane(student_max),
          max_lane(teacher_max)};
}

void shift(Measures& x, double student_offset, double teacher_offset) {
  const double ds = x.student_offset == student_offset ? 0 : x.student_offset - student_offset;
  const double dt = x.teacher_offset == teacher_offset ? 0 : x.teacher_offset - teacher_offset;
  x.divergence = x.teacher_sum == 0 ? 0 : scaled(x.divergence + x.teacher_sum * (dt - ds), dt);
  x.teacher_log = x.teacher_sum == 0 ? 0 : scaled(x.teacher_log + x.teacher_sum * dt, dt);
  x.student_log = x.student_sum == 0 ? 0 : scaled(x.student_log + x.student_sum * ds, ds);
  x.teacher_sum = scaled(x.teacher_sum, dt);
  x.student_sum = scaled(x.student_sum, ds);
  x.student_offset = student_offset;
  x.teacher_offset = teacher_offset;
}

void add(Measures& total, Measures more) {
  const double so = more.student_offset < total.student_offset ? total.student_offset : more.student_offset;
  const double to = more.teacher_offset < total.teacher_offset ? total.teacher_offset : more.teacher_offset;
  shift(total, so, to);
  shift(more, so, to);
  total.student_sum += more.student_sum;
  total.teacher_sum += more.teacher_sum;
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
