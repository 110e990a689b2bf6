// Logit Standardization: what it changes before pass A and adds before pass C.
#pragma once

#include "row_gradient.h"

namespace kdfast {
namespace {

template <class P>
void set_units(RowScale& scale, double student, double teacher) {
  scale.student_unit = student;
  scale.teacher_unit = teacher;
  if constexpr (!P::kMSE) {
    scale.student *= student;
    scale.teacher *= teacher;
    scale.hard /= student;
  }
}

// What standardised logits change: the slopes, whose softmax knows no mean. Several teachers were
// standardised when they were mixed.
template <class P>
KD_NOINLINE void standardize(const LossArgs& a, const Row<P>& r, int64_t n, RowScale& scale,
                             Moments& of_student) {
  of_student = moments(r.s, n);
  double of_teacher = 1;
  if constexpr (P::kSoft || P::kMSE) {
    if (a.n_teachers == 1) of_teacher = moments(r.t, n).per_unit();
  }
  set_units<P>(scale, of_student.per_unit(), of_teacher);
}

// The standard deviation's part of the gradient: with g the soft term's gradient at a fixed deviation d, it
// is
// -(s_i - mean) / (d (n - 1) deviation) * sum g_j (s_j - mean).
template <class P>
KD_NOINLINE void add_tilt(const LossArgs& a, const Row<P>& r, int64_t n, const RowScale& scale,
                          const Moments& of_student, const Label& label, double soft_at_label,
                          Coefficients<double>& c) {
  c.mean = of_student.mean;
  Coefficients<double> soft = c;
  soft.hard = soft.uniform = 0;
  const Scales<double> x = scales_of(c);
  Block<P> current{NAN, NAN};
  Gradient<P, true> gradient;
  double total = 0;
  for (int64_t at = 0; at < n; at += kBlock) {
    const Block<P>& block = r.blocks[at / kBlock];
    if (!(block == current)) {
      current = block;
      gradient = Gradient<P, true>(scale, soft, at_offsets<P>(x, scale, current));
    }
    total += gradient.dot(r.s + at, r.t + at, r.scratch.after(at), n - at < kBlock ? n - at : kBlock);
  }
  if (a.divergence == Divergence::kDKD) total += soft_at_label * (label.student - of_student.mean);
  const double deviation = of_student.deviation;
  if (deviation != 0) c.tilt = -total * of_student.per_unit() / ((n - 1) * deviation);
}

}  // namespace
}  // namespace kdfast
