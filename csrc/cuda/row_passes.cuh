// What follows pass A: a divergence's own sums (B), a row's loss, and the gradient (C); csrc/cpu/row_loss.h
// and row_gradient.h say the same for the CPU.
#pragma once

#include "statistics.cuh"

namespace kdfast {
namespace {

// How exps become probabilities: relative to these offsets.
struct Scales {
  float student_offset, teacher_offset;
  float to_q, to_p;          // factors
  float log_to_q, log_to_p;  // their logarithms to base 2
};

template <class D>
__device__ inline Scales scales_of(const Statistics<D>& x) {
  Scales scales{finite(x[kStudentOffset]), 0, 1 / x[kStudentSum], 1, -log2f(x[kStudentSum]), 0};
  if (Statistics<D>::kSoft) {
    scales.teacher_offset = finite(x[kTeacherOffset]);
    scales.to_p = 1 / x[kTeacherSum];
    scales.log_to_p = -log2f(x[kTeacherSum]);
  }
  return scales;
}

struct Pair {  // of one class
  float q, p, log_q, log_p;
  __device__ Pair(float s, float t, const Scales& x, const RowScale& row) {
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
  __device__ void add(const float (&s)[N], const float (&t)[N], const Scales& x, const RowScale& row) {
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

// What the gradient's terms are multiplied by; see below.
struct Coefficients {
  float student, log_student, level, teacher;  // linear divergences
  float soft, psi_sum;                         // the others, and logit_mse
  float hard, label;
  float uniform;  // of label smoothing
};

// A row's terms, and the coefficients of its gradient, which is `factor` times that of the loss.
struct Terms {
  float loss;        // without the row's weight
  float soft, hard;  // without theirs
  Coefficients c;
};

template <class D>
__device__ inline Terms finish(const Statistics<D>& x, const PointwiseSums& sums, const Scales& scales,
                               float label_s, const RowScale& row, const RowsArgs& a, float factor) {
  const float t = row.temperature, n = (float)a.vocab;
  Terms terms{};
  Coefficients& c = terms.c;
  if constexpr (Statistics<D>::kMSE) {
    const float mean = x[kTeacherSum] / n;
    terms.soft = (x[kOverTeacher] - x[kTeacherSum] * mean) / (2 * n);
    c.soft = factor * a.alpha / n;
    c.psi_sum = row.shift + (terms.soft == terms.soft ? mean : terms.soft);  // an infinity: NaN throughout
  } else if constexpr (Statistics<D>::kSoft) {
    const float mass = x[kTeacherSum] / x[kTeacherSum];  // 1, or NaN
    float divergence = 0, psi_sum = 0;
    c.soft = factor * a.alpha * (a.t_squared ? t : 1 / t);
    if constexpr (D::kPointwise) {
      divergence = sums.value[0] + D::constant(mass, row.beta);
      // for q as it is rounded: its sum is not quite 1, and the gradient's is to be 0
      psi_sum = sums.value[1] - sums.value[1] * __fmaf_rn(scales.to_q, x[kStudentSum], -1.f);
      c.psi_sum = psi_sum;
    } else {
      const float above = scales.log_to_q - scales.log_to_p;
      // where a share is 0 there may be an infinity that is none of the loss's
      if constexpr (D::kTeacher) {
        const float share = D::teacher_share(row.beta);
        if (share != 0)
          divergence +=
              share * (x[kOverTeacher] * scales.to_p + D::over_teacher(mass, scales.log_to_q, above));
        psi_sum -= share * mass;
        c.teacher = c.soft * share * scales.to_p;
      }
      float student = 0;
      if constexpr (D::kStudent) {
        const float share = D::student_share(row.beta);
        if (share != 0) {
          student = share * (x[kOverStudent] * scales.to_q + D::over_student(1.f, above));
          c.student = c.soft * share * kLn2 * scales.to_q;
          c.log_student = above;
        }
      }
      divergence = (divergence + student) * kLn2;
      psi_sum += student * kLn2;
      c.level = c.student * c.log_student - c.soft * scales.to_q * psi_sum;
    }
    terms.soft = divergence * (a.t_squared ? t * t : 1);
  }
  if (a.alpha != 0) terms.loss = a.alpha * terms.soft;

  const auto hard_exponent = [&](float z) { return __fmaf_rn(z, row.slope, -scales.student_offset) * t; };
  const float log_total = log2f(x[kHardSum]), e = a.label_smoothing;
  if (a.labels) {
    const float of_label = log_total - hard_exponent(label_s);
    terms.hard = of_label * kLn2;
    if (row.smoothed) {
      const float of_first = log_total - hard_exponent(row.first);
      terms.hard = ((1 - e) * of_label + e * of_first) * kLn2 - e * (x[kLogits] / n);
    }
  }
  if (a.hard_weight != 0) {
    terms.loss += a.hard_weight * terms.hard;
    c.hard = factor * a.hard_weight;
    c.label = c.hard * (1 - e);
    c.uniform = c.hard * e / n;
  }
  if (a.z_loss != 0) {
    float lse = (log_total + scales.student_offset * t) * kLn2;
    lse = lse == -kInf ? nanf("") : lse;  // every class is masked
    terms.loss += a.z_loss * lse * lse;
    c.hard += factor * 2 * a.z_loss * lse;
  }
  if (c.hard != 0) c.hard /= x[kHardSum];
  return terms;
}

// dl/ds of one class, but for what the label has of its own.
//
//   linear        Q * (level + student * log2(Q / P)) - P * teacher
//   pointwise     soft * (psi - q * psi_sum)
//   logit_mse     soft * (s - t - psi_sum)                               and + E * hard - uniform
template <class D>
__device__ inline float gradient(float s, float t, const Coefficients& c, const Scales& x,
                                 const RowScale& row) {
  const float y = __fmaf_rn(s, row.slope, -x.student_offset);
  float g = -c.uniform;
  if constexpr (Statistics<D>::kMSE) {
    g = __fmaf_rn(c.soft, s - t - c.psi_sum, g);
  } else if constexpr (Statistics<D>::kSoft) {
    const float q = fast_exp2(y);
    const Exp p = teacher_exp(t, x.teacher_offset, row);
    if constexpr (D::kPointwise) {
      g = __fmaf_rn(c.soft, D::psi(p.exp * x.to_p, q * x.to_q, row.beta) - q * x.to_q * c.psi_sum, g);
    } else {
      float per_exp = c.level;
      if constexpr (D::kStudent) per_exp += c.student * (q == 0 ? 0 : fminf(y - p.log, 3e38f));
      g = __fmaf_rn(q, per_exp, g);
      if constexpr (D::kTeacher) g -= p.exp * c.teacher;
    }
  }
  return g + hard_exp(y, row) * c.hard;
}

}  // namespace
}  // namespace kdfast
