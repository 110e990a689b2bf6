// What follows pass A: a divergence's own sums (B), and the gradient (C); between them is row_math.h.
#pragma once

#include "row_sums.cuh"

namespace kdfast {
namespace {

// psi is q's share of phi, and both are computed from what their logarithms have in common.
template <class D>
constexpr bool kHasMixtureLogs = std::is_same_v<D, JSD>;

template <class D>
__device__ inline Scales<float> scales_of(const RowSums<D>& x) {
  const float teacher_total = 1 + (kHasSoftmax<D> ? x.teacher_others : 0);
  return scales_of(
      Coefficients<float>{x.student_offset, 1 + x.student_others, x.teacher_offset, teacher_total, 1});
}

struct Probabilities {  // of one class
  float q, p, log_q, log_p;
  __device__ Probabilities(float s, float t, const Scales<float>& x, const RowScale& row) {
    const Exp student = student_exp(s, x.student_offset, row);
    const Exp teacher = teacher_exp(t, x.teacher_offset, row);
    q = student.exp * x.to_q;
    p = teacher.exp * x.to_p;
    log_q = student.log + x.log_to_q;
    log_p = teacher.log + x.log_to_p;
  }
};

// An exp as a probability; ln_to: the logarithm of what it is multiplied by, not to base 2.
__device__ inline Probability probability(Exp x, float to, float ln_to) {
  return {x.exp * to, __fmaf_rn(x.log, kLn2, ln_to)};
}

// Pass B: sums by threads, of phi, of psi, and of psi_apart where there is one.
template <class D>
struct PointwiseSums {
  float of[D::kHasPsiApart ? 3 : 2];
  __device__ static PointwiseSums identity() { return {}; }
  template <class R>
  __device__ PointwiseSums warp_reduce(const R&) const {
    PointwiseSums x = *this;
#pragma unroll
    for (float& sum : x.of) sum = warp_sum(sum);
    return x;
  }

  template <class P>
  __device__ void add(const P& s, const P& t, const Scales<float>& scales, const RowScale& row) {
    float of_phi = 0, of_psi = 0, of_apart = 0;
#pragma unroll
    for (int i = 0; i < P::kN; ++i) {
      const Exp student = student_exp(s[i], scales.student_offset, row);
      const Exp teacher = teacher_exp(t[i], scales.teacher_offset, row);
      const Probability q = probability(student, scales.to_q, scales.log_to_q * kLn2);
      const Probability p = probability(teacher, scales.to_p, scales.log_to_p * kLn2);
      if constexpr (kHasMixtureLogs<D>) {  // phi less psi
        const MixtureLogs logs(p, q, row.beta, row.rest);
        of_phi = __fmaf_rn(row.beta * p.x, logs.of_p, of_phi);
        of_psi = __fmaf_rn(row.rest * q.x, logs.of_q, of_psi);
      } else {
        const Probability beta = row.beta, rest = row.rest;
        of_phi += D::phi(p, q, beta, rest).x;
        of_psi += D::psi(p, q, beta, rest).x;
        if constexpr (D::kHasPsiApart) of_apart += D::psi_apart(p, q, beta, rest).x;
      }
    }
    of[0] += kHasMixtureLogs<D> ? of_phi + of_psi : of_phi;
    of[1] += of_psi;
    if constexpr (D::kHasPsiApart) of[2] += of_apart;
  }
};

// What loss_and_coefficients takes, of all classes.
template <class D>
__device__ inline Sums<float> to_sums(const RowSums<D>& x, const PointwiseSums<D>& pointwise,
                                      float label_logit, float classes, const RowScale& row) {
  const auto exponent = [&](float s) { return (s - x.student_offset) * row.hard_exp2_scale; };
  const auto known = [](float offset, float others) { return others == -1 ? -kInf : offset; };
  Sums<float> sums{};
  sums.student_offset = known(x.student_offset, x.student_others);
  sums.student_total = 1 + x.student_others;
  sums.teacher_offset = D::kDifference ? row.shift : known(x.teacher_offset, x.teacher_others);
  sums.teacher_total = x.teacher_others + (kHasSoftmax<D> ? 1 : 0);
  sums.hard_total = 1 + (row.temperature == 1 ? x.student_others : x.hard_others);
  sums.over_teacher = x.over_teacher;
  sums.over_student = x.over_student;
  if constexpr (D::kHasPsiApart) sums.over_student = pointwise.of[2];
  sums.label = exponent(label_logit);
  // NaN of two infinities where a logit is too far from the others
  sums.exponents = fmaxf(classes * exponent(row.first_logit) + x.logits * row.hard_exp2_scale, -kInf);
  sums.classes = classes;
  sums.phi = pointwise.of[0];
  sums.psi = pointwise.of[1];
  return sums;
}

// dl/ds of one class, but for what the label has of its own; the coefficients are multiplied by grad_loss.
// See PerExp, and for logit_mse:  soft (difference - center) + E hard - uniform
template <class D>
struct Gradient {
  float student_offset, teacher_offset, label;
  float ln_to_q, ln_to_p;
  float squares;  // per square of Q
  bool is_apart;  // whether psi is the other one
  PerExp<float> per;

  Gradient() = default;
  __device__ Gradient(Coefficients<float> c, float grad_loss, const RowScale& row)
      : student_offset(finite(c.student_offset)), teacher_offset(finite(c.teacher_offset)) {
    for (float* x : {&c.level, &c.slope, &c.teacher, &c.soft, &c.hard, &c.label, &c.uniform}) *x *= grad_loss;
    // another backend's table may have another offset
    if (D::kDifference && c.teacher_offset != row.shift) c.center += c.teacher_offset - row.shift;
    label = c.label;
    is_apart = D::kHasPsiApart && c.slope != 0;
    // only these have the logarithms of the totals
    const Scales<float> scales = D::kStudent || D::kPointwise ? scales_of(c) : scales_with(c, 0.f, 0.f);
    per = per_exp<float>(c, scales);
    ln_to_q = scales.log_to_q * kLn2;
    ln_to_p = scales.log_to_p * kLn2;
    squares = row.temperature == 2 ? per.hard : 0;
    if constexpr (D::kPointwise) {
      per.level = kHasMixtureLogs<D> ? -per.soft * per.center * per.to_q : 0;
      per.slope = kHasMixtureLogs<D> ? per.soft * row.rest * per.to_q : 0;  // psi = rest q log(q / m)
    }
    if (row.temperature == 1) per.level += per.hard;
  }

  template <class P>
  __device__ void operator()(const P& s, const P& t, const RowScale& row, float (&g)[P::kN]) const {
#pragma unroll
    for (int i = 0; i < P::kN; ++i) {
      const Exp student = student_exp(s[i], student_offset, row);
      float per_exp = __fmaf_rn(student.exp, squares, per.level);
      g[i] = -per.uniform;
      if constexpr (D::kDifference) g[i] = __fmaf_rn(per.soft, difference(s[i], t[i], per.center, row), g[i]);
      if constexpr (kHasSoftmax<D>) {
        const Exp teacher = teacher_exp(t[i], teacher_offset, row);
        if constexpr (D::kPointwise) {
          const Probability q = probability(student, per.to_q, ln_to_q);
          const Probability p = probability(teacher, per.to_p, ln_to_p);
          if constexpr (kHasMixtureLogs<D>) {
            per_exp = __fmaf_rn(per.slope, MixtureLogs(p, q, row.beta, row.rest).of_q, per_exp);
          } else {
            const Probability beta = row.beta, rest = row.rest;
            Probability psi = D::psi(p, q, beta, rest);
            if constexpr (D::kHasPsiApart) {
              if (is_apart) psi = D::psi_apart(p, q, beta, rest);
            }
            g[i] = __fmaf_rn(per.soft, psi.x - q.x * per.center, g[i]);
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
      for (int i = 0; i < P::kN; ++i)
        g[i] = __fmaf_rn(hard_exp(s[i], opaque(student_offset), row), per.hard, g[i]);
    }
  }
};

}  // namespace
}  // namespace kdfast
