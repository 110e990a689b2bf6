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

// An exp as a probability; ln_to: the logarithm of what it is multiplied by, not to base 2.
__device__ inline Probability probability(Exp x, float to, float ln_to) {
  return {x.exp * to, __fmaf_rn(x.log, kLn2, ln_to)};
}

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
      const Exp student = student_exp(s[i], scales.student_offset, row);
      const Exp teacher = teacher_exp(t[i], scales.teacher_offset, row);
      const Probability q = probability(student, scales.to_q, scales.log_to_q * kLn2), beta = row.beta;
      const Probability p = probability(teacher, scales.to_p, scales.log_to_p * kLn2);
      if constexpr (std::is_same_v<D, JSD>) {  // phi less psi
        const MixtureLogs logs(p, q, row.beta);
        of_phi = __fmaf_rn(row.beta * p.x, logs.of_p, of_phi);
        of_psi = __fmaf_rn((1 - row.beta) * q.x, logs.of_q, of_psi);
      } else {
        of_phi += D::phi(p, q, beta).x;
        of_psi += D::psi(p, q, beta).x;
      }
    }
    phi += std::is_same_v<D, JSD> ? of_phi + of_psi : of_phi;
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
  sums.hard_total = t == 1 ? x.student_total : x.hard_total;
  sums.over_teacher = x.over_teacher;
  sums.over_student = x.over_student;
  sums.label = exponent(label_logit);
  sums.exponents = classes * exponent(row.first_logit) + x.logits * (row.exp2_scale * t);
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
  float ln_to_q, ln_to_p;
  float squares;  // per square of Q
  PerExp<float> per;

  Gradient() = default;
  __device__ Gradient(Coefficients<float> c, float grad_loss, const RowScale& row)
      : student_offset(finite(c.student_offset)), teacher_offset(finite(c.teacher_offset)) {
    for (float* x : {&c.level, &c.slope, &c.teacher, &c.soft, &c.hard, &c.label, &c.uniform}) *x *= grad_loss;
    if constexpr (D::kDifference) c.center += c.teacher_offset;
    label = c.label;
    // only these have the logarithms of the totals
    const Scales<float> scales = D::kStudent || D::kPointwise ? scales_of(c) : scales_with(c, 0.f, 0.f);
    per = per_exp<float>(c, scales);
    ln_to_q = scales.log_to_q * kLn2;
    ln_to_p = scales.log_to_p * kLn2;
    squares = row.temperature == 2 ? per.hard : 0;
    if constexpr (D::kPointwise) {
      const bool is_jsd = std::is_same_v<D, JSD>;  // psi = (1 - beta) q log(q / m)
      per.level = is_jsd ? -per.soft * per.center * per.to_q : 0;
      per.slope = is_jsd ? per.soft * (1 - row.beta) * per.to_q : 0;
    }
    if (row.temperature == 1) per.level += per.hard;
  }

  template <int N>
  __device__ void operator()(const float (&s)[N], const float (&t)[N], const RowScale& row,
                             float (&g)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Exp student = student_exp(s[i], student_offset, row);
      float per_exp = __fmaf_rn(student.exp, squares, per.level);
      g[i] = -per.uniform;
      if constexpr (D::kDifference) g[i] = __fmaf_rn(per.soft, difference(s[i], t[i], per.center, row), g[i]);
      if constexpr (kHasSoftmax<D>) {
        const Exp teacher = teacher_exp(t[i], teacher_offset, row);
        if constexpr (D::kPointwise) {
          const Probability q = probability(student, per.to_q, ln_to_q);
          const Probability p = probability(teacher, per.to_p, ln_to_p);
          if constexpr (std::is_same_v<D, JSD>) {
            per_exp = __fmaf_rn(per.slope, MixtureLogs(p, q, row.beta).of_q, per_exp);
          } else {
            g[i] = __fmaf_rn(per.soft, D::psi(p, q, Probability(row.beta)).x - q.x * per.center, g[i]);
          }
        }
        // finite, for where Q is 0 their product is to be 0
        if constexpr (D::kStudent)
          per_exp = __fmaf_rn(per.slope, fmaxf(fminf(student.log - teacher.log, 1e30f), -1e30f), per_exp);
        if constexpr (D::kTeacher) g[i] = __fmaf_rn(-teacher.exp, per.teacher, g[i]);
      }
      g[i] = __fmaf_rn(student.exp, per_exp, g[i]);
    }
    if (row.powers) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        g[i] = __fmaf_rn(hard_exp(student_exponent(s[i], opaque(student_offset), row), row), per.hard, g[i]);
    }
  }
};

}  // namespace
}  // namespace kdfast
