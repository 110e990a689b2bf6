// What follows pass A: a divergence's own sums (B), and the gradient (C); between them is row_math.h.
#pragma once

#include "row_sums.cuh"

namespace kdfast {
namespace {

template <class D>
__device__ inline Scales<float> scales_of(const RowSums<D>& x) {
  const bool soft = RowSums<D>::kSoft;
  return scales_of(Coefficients<float>{finite(x.student_offset), x.student_total,
                                       soft ? finite(x.teacher_offset) : 0, soft ? x.teacher_total : 1, 0,
                                       1});
}

struct Probabilities {  // of one class
  float q, p, log_q, log_p;
  __device__ Probabilities(float s, float t, const Scales<float>& x, const RowScale& row) {
    const float y = __fmaf_rn(s, row.exp2_scale, -x.student_offset);
    const Exp teacher = teacher_exp(t, x.teacher_offset, row);
    q = fast_exp2(y) * x.to_q;
    p = teacher.exp * x.to_p;
    log_q = y + x.log_to_q;
    log_p = teacher.log + x.log_to_p;
  }
};

// Pass B: sums of phi and psi by threads.
struct PointwiseSums {
  float phi, psi;
  __device__ static PointwiseSums identity() { return {}; }
  template <class R>
  __device__ PointwiseSums warp_reduce(const R&) const {
    return {warp_sum(phi), warp_sum(psi)};
  }

  template <class D, int N>
  __device__ void add(const float (&s)[N], const float (&t)[N], const Scales<float>& scales,
                      const RowScale& row) {
    float of_phi = 0, of_psi = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Probabilities x(s[i], t[i], scales, row);
      of_phi += D::phi(x.p, x.q, row.beta);
      of_psi += D::psi(x.p, x.q, row.beta);
    }
    phi += of_phi;
    psi += of_psi;
  }
};

// What loss_and_coefficients takes, of all classes.
template <class D>
__device__ inline Sums<float> to_sums(const RowSums<D>& x, const PointwiseSums& pointwise, float label_logit,
                                      float classes, const RowScale& row) {
  const float offset = finite(x.student_offset), t = row.temperature;
  const auto exponent = [&](float s) { return __fmaf_rn(s, row.exp2_scale, -offset) * t; };
  Sums<float> sums{};
  sums.student_offset = x.student_offset;
  sums.student_total = x.student_total;
  sums.teacher_offset = D::kDifference ? row.shift : x.teacher_offset;
  sums.teacher_total = x.teacher_total;
  sums.hard_offset = x.student_offset == -kInf ? -kInf : offset * t;
  sums.hard_total = x.hard_total;
  sums.over_teacher = x.over_teacher;
  sums.over_student = x.over_student;
  sums.label = exponent(label_logit);
  sums.exponents = classes * exponent(row.first_logit) + x.logits * row.logit_scale * kLog2E;
  sums.classes = classes;
  sums.phi = pointwise.phi;
  sums.psi = pointwise.psi;
  return sums;
}

// dl/ds of one class, but for what the label has of its own; the coefficients are multiplied by grad_loss.
// See PerExp, and for logit_mse:  soft (difference - center) + E hard - uniform
template <class D>
struct Gradient {
  float student_offset, teacher_offset, label;
  PerExp<float> per;

  Gradient() = default;
  __device__ Gradient(Coefficients<float> c, float grad_loss)
      : student_offset(finite(c.student_offset)), teacher_offset(finite(c.teacher_offset)) {
    for (float* x : {&c.level, &c.slope, &c.teacher, &c.soft, &c.hard, &c.label, &c.uniform}) *x *= grad_loss;
    if constexpr (D::kDifference) c.center += c.teacher_offset;
    label = c.label;
    // only the slope's term has the logarithms of the totals
    per = per_exp<float>(c, D::kStudent ? scales_of(c) : scales_with(c, 0.f, 0.f));
  }

  __device__ float operator()(float s, float t, const RowScale& row) const {
    const float y = __fmaf_rn(s, row.exp2_scale, -student_offset);
    float g = -per.uniform;
    if constexpr (D::kDifference) {
      g = __fmaf_rn(per.soft, difference(s, t, per.center, row), g);
    } else if constexpr (kHasSoftmax<D>) {
      const float exp = fast_exp2(y);
      const Exp p = teacher_exp(t, teacher_offset, row);
      if constexpr (D::kPointwise) {
        const float q = exp * per.to_q;
        g = __fmaf_rn(per.soft, D::psi(p.exp * per.to_p, q, row.beta) - q * per.center, g);
      } else {
        float per_exp = per.level;
        if constexpr (D::kStudent) per_exp += per.slope * (exp == 0 ? 0 : fminf(y - p.log, 3e38f));
        g = __fmaf_rn(exp, per_exp, g);
        if constexpr (D::kTeacher) g -= p.exp * per.teacher;
      }
    }
    return g + hard_exp(y, row) * per.hard;
  }
};

}  // namespace
}  // namespace kdfast
