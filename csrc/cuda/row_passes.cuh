// What follows pass A: a divergence's own sums (B), a row's loss, and the gradient (C); csrc/cpu/row_loss.h
// and row_gradient.h say the same for the CPU.
#pragma once

#include "statistics.cuh"

namespace kdfast {
namespace {

// The numbers of a call, the same for all rows.
struct Numbers {
  Layout student, teacher, grad;
  int64_t ignore_index;
  int rows, vocab, width;  // width: of the gradient, which is 0 beyond vocab
  float temperature, teacher_temperature;
  float alpha, hard_weight, z_loss;
  float beta, scale;  // scale: of the sum of the row losses
  int power, t_squared;
};

// How exps become probabilities: relative to these offsets.
struct Scales {
  float student_offset, teacher_offset;
  float to_q, to_p;          // factors
  float log_to_q, log_to_p;  // their logarithms to base 2
};

template <class D>
__device__ inline Scales scales_of(const Statistics<D>& x) {
  Scales scales{finite(x[kStudentOffset]), 0, 1 / x[kStudentSum], 0, -log2f(x[kStudentSum]), 0};
  if constexpr (Statistics<D>::kSoft) {
    scales.teacher_offset = finite(x[kTeacherOffset]);
    scales.to_p = 1 / x[kTeacherSum];
    scales.log_to_p = -log2f(x[kTeacherSum]);
  }
  return scales;
}

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
      const float q = fast_exp2(__fmaf_rn(s[i], row.slope, -x.student_offset)) * x.to_q;
      const float p = fast_exp2(__fmaf_rn(t[i], row.teacher_slope, -x.teacher_offset)) * x.to_p;
      phi += D::phi(p, q, row.beta);
      psi += D::psi(p, q, row.beta);
    }
    value[0] += phi;
    value[1] += psi;
  }
};

// What the gradient's terms are multiplied by; see Gradient.
struct Coefficients {
  float student, log_student, level, teacher;  // linear divergences
  float soft, psi_sum;                         // the others, and logit_mse
  float hard, label;
};

// A row's loss without its weight, and the coefficients of its gradient, which is `factor` times the loss's.
template <class D>
__device__ inline float finish(const Statistics<D>& x, const PointwiseSums& sums, const Scales& scales,
                               float label_logit, const RowScale& row, const Numbers& a, bool labelled,
                               float factor, Coefficients& c) {
  const float t = row.temperature, n = (float)a.vocab;
  float loss = 0;
  c = {};
  if constexpr (Statistics<D>::kMSE) {
    const float mean = x[kTeacherSum] / n;
    const float term = (x[kOverTeacher] - x[kTeacherSum] * mean) / (2 * n);
    loss = a.alpha * term;
    c.soft = factor * a.alpha / n;
    c.psi_sum = row.shift + (term == term ? mean : term);  // a row with an infinity is NaN throughout
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
      if constexpr (D::kTeacher) {
        const float share = D::teacher_share(row.beta);
        divergence +=
            share * (x[kOverTeacher] / x[kTeacherSum] + D::over_teacher(mass, scales.log_to_q, above));
        psi_sum -= share * mass;
        c.teacher = c.soft * share * scales.to_p;
      }
      float student = 0;
      if constexpr (D::kStudent) {
        const float share = D::student_share(row.beta);
        if (share != 0) {  // else there may be an infinity that is none of the loss's
          student = share * (x[kOverStudent] / x[kStudentSum] + D::over_student(1.f, above));
          c.student = c.soft * share * kLn2 * scales.to_q;
          c.log_student = above;
        }
      }
      divergence = (divergence + student) * kLn2;
      psi_sum += student * kLn2;
      c.level = c.student * c.log_student - c.soft * scales.to_q * psi_sum;
    }
    loss = a.alpha * divergence * (a.t_squared ? t * t : 1);
  }
  const float log_total = log2f(x[kHardSum]), offset = scales.student_offset * (float)row.power;
  if (labelled) {
    const float y = __fmaf_rn(label_logit, row.slope, -scales.student_offset) * (float)row.power;
    loss += a.hard_weight * ((log_total - y) * kLn2);
    c.label = factor * a.hard_weight;
    c.hard = c.label;
  }
  if (a.z_loss != 0) {
    float lse = (log_total + offset) * kLn2;
    lse = lse == -kInf ? nanf("") : lse;  // every class is masked
    loss += a.z_loss * lse * lse;
    c.hard += factor * 2 * a.z_loss * lse;
  }
  if (c.hard != 0) c.hard /= x[kHardSum];
  return loss;
}

// dl/ds of one class.
//
//   linear        Q * (level + student * log2(Q / P)) - P * teacher
//   pointwise     soft * (psi - q * psi_sum)
//   logit_mse     soft * (s - t - psi_sum)
template <class D>
__device__ inline float gradient(float s, float t, bool is_label, const Coefficients& c, const Scales& x,
                                 const RowScale& row) {
  const float ys = __fmaf_rn(s, row.slope, -x.student_offset), q = fast_exp2(ys);
  float g = whole_power(q, row.power) * c.hard;
  if constexpr (Statistics<D>::kMSE) {
    g += c.soft * (s - t - c.psi_sum);
  } else if constexpr (Statistics<D>::kSoft) {
    const float yt = __fmaf_rn(t, row.teacher_slope, -x.teacher_offset), p = fast_exp2(yt);
    if constexpr (D::kPointwise) {
      g += c.soft * (D::psi(p * x.to_p, q * x.to_q, row.beta) - q * x.to_q * c.psi_sum);
    } else {
      float per_exp = c.level;
      if constexpr (D::kStudent) per_exp += c.student * (q == 0 ? 0 : fminf(ys - yt, 3e38f));
      g += q * per_exp;
      if constexpr (D::kTeacher) g -= p * c.teacher;
    }
  }
  return is_label ? g - c.label : g;
}

}  // namespace
}  // namespace kdfast
