// What follows pass A: a divergence's own sums (B), and the gradient (C); between them is row_math.h.
#pragma once

#include "statistics.cuh"

namespace kdfast {
namespace {

template <class D>
__device__ inline Scales<float> scales_of(const Statistics<D>& x) {
  Scales<float> scales{finite(x[kStudentOffset]), 0, 0, 1 / x[kStudentSum], 1, 1, -log2f(x[kStudentSum]), 0};
  if (Statistics<D>::kSoft) {
    scales.teacher_offset = finite(x[kTeacherOffset]);
    scales.to_p = 1 / x[kTeacherSum];
    scales.log_to_p = -log2f(x[kTeacherSum]);
  }
  return scales;
}

struct Pair {  // of one class
  float q, p, log_q, log_p;
  __device__ Pair(float s, float t, const Scales<float>& x, const RowScale& row) {
    const float y = __fmaf_rn(s, row.slope, -x.student_offset);
    const Exp teacher = teacher_exp(t, x.teacher_offset, row);
    q = fast_exp2(y) * x.to_q;
    p = teacher.exp * x.to_p;
    log_q = y + x.log_to_q;
    log_p = teacher.log + x.log_to_p;
  }
};

// Pass B: sums of phi and psi by threads, joined by adding.
struct PointwiseSums {
  static constexpr int kCount = 2;
  float value[kCount];
  __device__ static PointwiseSums nothing() { return {}; }
  template <class R>
  __device__ PointwiseSums joined(const R&) const {
    return {warp_sum(value[0]), warp_sum(value[1])};
  }

  template <class D, int N>
  __device__ void add(const float (&s)[N], const float (&t)[N], const Scales<float>& x, const RowScale& row) {
    float phi = 0, psi = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Pair pair(s[i], t[i], x, row);
      phi += D::phi(pair.p, pair.q, row.beta);
      psi += D::psi(pair.p, pair.q, row.beta);
    }
    value[0] += phi;
    value[1] += psi;
  }
};

// What loss_and_coefficients takes, of all classes: in the kernels exps at temperature 1 are relative to T times the offset.
template <class D>
__device__ inline Sums<float> sums_of(const Statistics<D>& x, const PointwiseSums& pointwise, float label_s,
                                      float classes, const RowScale& row) {
  const float offset = finite(x[kStudentOffset]), t = row.temperature;
  const auto exponent = [&](float s) { return __fmaf_rn(s, row.slope, -offset) * t; };
  Sums<float> sums{};
  sums.student_offset = x[kStudentOffset];
  sums.student_total = x[kStudentSum];
  sums.teacher_offset = D::kDifference ? row.shift : x[kTeacherOffset];
  sums.teacher_total = x[kTeacherSum];
  sums.hard_offset = x[kStudentOffset] == -kInf ? -kInf : offset * t;
  sums.hard_total = x[kHardSum];
  sums.over_teacher = x[kOverTeacher];
  sums.over_student = x[kOverStudent];
  sums.label = exponent(label_s);
  sums.exponents = classes * exponent(row.first) + x[kLogits] * kLog2E;
  sums.classes = classes;
  sums.phi = pointwise.value[0];
  sums.psi = pointwise.value[1];
  return sums;
}

// T times the student's offset less the hard one, which is that product rounded, or another backend's.
__device__ inline float hard_shift(const Coefficients<float>& c, float t) {
  return __fmaf_rn(finite(c.student_offset), t, -finite(c.hard_offset));
}

// What the gradient's terms are multiplied by, of exps as they are: the normalisers are in it, and grad_loss.
struct Factors {
  float student_offset, teacher_offset, to_q, to_p;
  float level, slope, teacher;  // linear divergences
  float soft, center;           // the others', and logit_mse's
  float hard, label, uniform;
};
template <class D>
__device__ inline Factors factors_of(const Coefficients<float>& c, float grad_loss) {
  Factors f{finite(c.student_offset), finite(c.teacher_offset), 1 / c.student_total, 1 / c.teacher_total};
  if constexpr (D::kDifference) {
    f.soft = grad_loss * c.soft;
    f.center = c.teacher_offset + c.center;
  } else if constexpr (kHasSoftmax<D> && D::kPointwise) {
    f.soft = grad_loss * c.soft;
    f.center = c.center;
  } else if constexpr (kHasSoftmax<D>) {
    const float above = log2f(c.teacher_total) - log2f(c.student_total), slope = c.slope * kLn2;
    f.level = grad_loss * (c.slope == 0 ? c.level : c.level + slope * above) * f.to_q;
    f.slope = grad_loss * slope * f.to_q;
    f.teacher = grad_loss * c.teacher * f.to_p;
  }
  f.hard = c.hard == 0 ? 0 : grad_loss * c.hard / c.hard_total;
  f.label = grad_loss * c.label;
  f.uniform = grad_loss * c.uniform;
  return f;
}

// dl/ds of one class, but for what the label has of its own.
//
//   linear        Q * (level + slope * log2(Q / P)) - P * teacher
//   pointwise     soft * (psi - q * center)
//   logit_mse     soft * (s - t - center)                               and + E * hard - uniform
template <class D>
__device__ inline float gradient(float s, float t, const Factors& f, const RowScale& row) {
  const float y = __fmaf_rn(s, row.slope, -f.student_offset);
  float g = -f.uniform;
  if constexpr (D::kDifference) {
    g = __fmaf_rn(f.soft, s - t - f.center, g);
  } else if constexpr (kHasSoftmax<D>) {
    const float exp = fast_exp2(y);
    const Exp p = teacher_exp(t, f.teacher_offset, row);
    if constexpr (D::kPointwise) {
      const float q = exp * f.to_q;
      g = __fmaf_rn(f.soft, D::psi(p.exp * f.to_p, q, row.beta) - q * f.center, g);
    } else {
      float per_exp = f.level;
      if constexpr (D::kStudent) per_exp += f.slope * (exp == 0 ? 0 : fminf(y - p.log, 3e38f));
      g = __fmaf_rn(exp, per_exp, g);
      if constexpr (D::kTeacher) g -= p.exp * f.teacher;
    }
  }
  return g + hard_exp(y, row) * f.hard;
}

}  // namespace
}  // namespace kdfast
