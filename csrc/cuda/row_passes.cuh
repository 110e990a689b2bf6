// What follows pass A: a divergence's own sums (B), and the gradient (C); between them is row_math.h.
#pragma once

#include "statistics.cuh"

namespace kdfast {
namespace {

template <class D>
__device__ inline Scales<float> scales_of(const Statistics<D>& x) {
  const bool soft = Statistics<D>::kSoft;
  return scales_of(Coefficients<float>{finite(x[kStudentOffset]), x[kStudentSum],
                                       soft ? finite(x[kTeacherOffset]) : 0, soft ? x[kTeacherSum] : 1, 0,
                                       1});
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

// What loss_and_coefficients takes, of all classes: in the kernels exps at temperature 1 are relative to T
// times the offset.
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

// dl/ds of one class, but for what the label has of its own; the coefficients are multiplied by grad_loss.
// See PerExp, and for logit_mse:  soft (s - t - center) + E hard - uniform
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
    const float y = __fmaf_rn(s, row.slope, -student_offset);
    float g = -per.uniform;
    if constexpr (D::kDifference) {
      g = __fmaf_rn(per.soft, s - t - per.center, g);
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
