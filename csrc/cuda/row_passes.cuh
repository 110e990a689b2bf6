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

// Without DKD's label there may be nothing left, and no class to be NaN for it.
template <class D>
__device__ inline float inverse_of(float total) {
  return std::is_same_v<D, DKD> && total == 0 ? 0 : 1 / total;
}

template <class D, bool G>
__device__ inline Scales scales_of(const Statistics<D, G>& x, const RowScale& row) {
  Scales scales{finite(x[kStudentOffset]), 0, inverse_of<D>(x[kStudentSum]), 1, -log2f(x[kStudentSum]), 0};
  if (Statistics<D, G>::kSoft && !(G && row.given)) {
    scales.teacher_offset = finite(x[kTeacherOffset]);
    scales.to_p = inverse_of<D>(x[kTeacherSum]);
    scales.log_to_p = -log2f(x[kTeacherSum]);
  }
  return scales;
}

template <bool G>
struct Pair {  // of one class
  float q, p, log_q, log_p;
  __device__ Pair(float s, float t, const Scales& x, const RowScale& row) {
    const float y = __fmaf_rn(s, row.slope, -x.student_offset);
    const Exp teacher = teacher_exp<G>(t, x.teacher_offset, row);
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

  template <class D, bool G, int N>
  __device__ void add(const float (&s)[N], const float (&t)[N], const Scales& x, const RowScale& row) {
    float phi = 0, psi = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Pair<G> pair(s[i], t[i], x, row);
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
  // G alone
  float label_soft, label_hard;  // DKD's terms at the label
  float everywhere;              // of label smoothing
  float spread;                  // standardized: of what comes through the deviation
};

// A row's terms, and the coefficients of its gradient, which is `factor` times that of the loss.
struct Terms {
  float loss;        // without the row's weight
  float soft, hard;  // without theirs
  Scales whole;      // DKD's label included
  Coefficients c;
};

// A sum of exps over the rest with the label's 2^y added, relative to an offset that leaves neither above 1
// by far, and their shares.
struct Parted {
  float total, offset, rest, label, log_rest, log_label;
};
__device__ inline Parted parted(float total, float y) {
  const float d = total == 0 ? finite(y) : fmaxf(y, 0.f);
  const float rest = total * exp2f(-d), label = exp2f(y - d), whole = rest + label, log = log2f(whole);
  return {whole, d, rest / whole, label / whole, log2f(total) - d - log, y - d - log};
}

// Decoupled KD: the label's class against the rest, and the classes of the rest among themselves.
//
//   D = w_0 [ p_y log(p_y / q_y) + m log(m / (1 - q_y)) ] + w_1 sum_i p^_i log(p^_i / q^_i)
//
// with m = sum p_i, and p^ and q^ the distributions, over i != y. Its gradient, times T:
//
//   i != y:  q^_i (w_0 (p_y - q_y (p_y + m)) + w_1) - w_1 p^_i          i = y:  w_0 (q_y (p_y + m) - p_y)
template <bool G>
__device__ inline float decoupled(const Statistics<DKD, G>& x, const Scales& scales, float label_s,
                                  float label_t, const RowScale& row, const RowsArgs& a, Terms& terms) {
  const float total = x[kStudentSum], y = __fmaf_rn(label_s, row.slope, -scales.student_offset);
  const Parted q = parted(total, y);
  terms.whole = {scales.student_offset + q.offset, scales.teacher_offset, 1 / q.total, 1, -log2f(q.total), 0};
  const Exp of_label = teacher_exp<G>(label_t, scales.teacher_offset, row);
  float m = x[kTeacherSum], p_y = of_label.exp, log_m = log2f(m), log_p_y = of_label.log, mass = m;
  if (!row.given) {
    const Parted p = parted(x[kTeacherSum], of_label.log);
    m = p.rest, p_y = p.label, log_m = p.log_rest, log_p_y = p.log_label;
    mass = x[kTeacherSum] == 0 ? 0 : 1;  // also where its share is next to nothing
    terms.whole.teacher_offset += p.offset;
    terms.whole.to_p = 1 / p.total;
    terms.whole.log_to_p = -log2f(p.total);
  }
  const float target = masked(p_y, log_p_y - q.log_label) + masked(m, log_m - q.log_rest);
  float others = x[kOverTeacher] * scales.to_p +
                 DKD::over_teacher(mass, scales.log_to_q, scales.log_to_q - scales.log_to_p);
  others = total == 0 ? kInf : others / mass - log2f(mass);
  others = mass == 0 ? 0 : others;
  const bool nothing = mass == 0 || total == 0;
  const float at_label = a.dkd_target * (q.label * (p_y + (total == 0 ? 0 : m)) - p_y);
  Coefficients& c = terms.c;
  c.level = -c.soft * (at_label - (nothing ? 0 : a.dkd_others)) * scales.to_q;
  c.teacher = nothing ? 0 : c.soft * a.dkd_others / mass * scales.to_p;
  c.label_soft = c.soft * at_label;
  return masked(a.dkd_target, target) + masked(a.dkd_others, others);
}

template <class D, bool G>
__device__ inline Terms finish(const Statistics<D, G>& x, const PointwiseSums& sums, const Scales& scales,
                               float label_s, float label_t, const RowScale& row, const RowsArgs& a,
                               float factor) {
  const float t = row.temperature, n = (float)a.vocab;
  Terms terms{};
  Coefficients& c = terms.c;
  terms.whole = scales;
  if constexpr (Statistics<D, G>::kMSE) {
    const float mean = x[kTeacherSum] / n;
    terms.soft = (x[kOverTeacher] - x[kTeacherSum] * mean) / (2 * n);
    c.soft = factor * a.alpha / n;
    c.psi_sum = row.shift + (terms.soft == terms.soft ? mean : terms.soft);  // an infinity: NaN throughout
  } else if constexpr (Statistics<D, G>::kSoft) {
    const float mass = G && row.given ? x[kTeacherSum] : x[kTeacherSum] / x[kTeacherSum];  // 1, or NaN
    float divergence = 0, psi_sum = 0;
    c.soft = factor * a.alpha * (a.t_squared ? t : 1 / t);
    if constexpr (std::is_same_v<D, DKD>) {
      divergence = decoupled(x, scales, label_s, label_t, row, a, terms) * kLn2;
    } else if constexpr (D::kPointwise) {
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

  const auto hard_exponent = [&](float z) {
    return __fmaf_rn(z, row.slope, -scales.student_offset) * row.hard_ratio;
  };
  float total = x[kHardSum], offset = scales.student_offset * row.hard_ratio, y = hard_exponent(label_s);
  float per_exp = 1 / total, raised = 0;  // the offset, by DKD's label
  if constexpr (std::is_same_v<D, DKD>) {
    const Parted hard = parted(total, y);
    total = hard.total, raised = hard.offset, y -= raised;
    per_exp = exp2f(-raised) / total;
  }
  const float log_total = log2f(total);
  if (a.labels) terms.hard = (log_total - y) * kLn2;
  if (G && a.labels && a.label_smoothing != 0) {
    const float e = a.label_smoothing, of_first = hard_exponent(row.first) - raised;
    terms.hard = ((1 - e) * (log_total - y) + e * (log_total - of_first)) * kLn2 - e * (x[kSmooth] / n);
    c.everywhere = factor * a.hard_weight * e / n;
  }
  if (a.hard_weight != 0) {
    terms.loss += a.hard_weight * terms.hard;
    c.label = factor * a.hard_weight;
    c.hard = c.label;
    if (G) c.label *= 1 - a.label_smoothing;
  } else {
    c.everywhere = 0;
  }
  if (a.z_loss != 0) {
    float lse = (log_total + offset + raised) * kLn2;
    lse = lse == -kInf ? nanf("") : lse;  // every class is masked
    terms.loss += a.z_loss * lse * lse;
    c.hard += factor * 2 * a.z_loss * lse;
  }
  c.label_hard = c.hard * exp2f(y - log_total);
  if (c.hard != 0) c.hard *= per_exp;
  return terms;
}

// The soft term's part of dl/ds of one class, s standardized where that is asked for.
//
//   linear        Q * (level + student * log2(Q / P)) - P * teacher
//   pointwise     soft * (psi - q * psi_sum)
//   logit_mse     soft * (s - t - psi_sum)
template <class D, bool G>
__device__ inline float soft_gradient(float s, float t, int at, const Coefficients& c, const Scales& x,
                                      const RowScale& row) {
  if constexpr (Statistics<D, G>::kMSE) {
    return c.soft * ((G ? (s - row.mean) * row.inverse : s) - t - c.psi_sum);
  } else if constexpr (Statistics<D, G>::kSoft) {
    if (Statistics<D, G>::kDKD && at == row.label) return c.label_soft;
    const float y = __fmaf_rn(s, row.slope, -x.student_offset), q = fast_exp2(y);
    const Exp p = teacher_exp<G>(t, x.teacher_offset, row);
    if constexpr (D::kPointwise) {
      return c.soft * (D::psi(p.exp * x.to_p, q * x.to_q, row.beta) - q * x.to_q * c.psi_sum);
    } else {
      float per_exp = c.level;
      if constexpr (D::kStudent) per_exp += c.student * (q == 0 ? 0 : fminf(y - p.log, 3e38f));
      float g = q * per_exp;
      if constexpr (D::kTeacher) g -= p.exp * c.teacher;
      return g;
    }
  }
  return 0;
}

// dl/ds of one class, `at`; without G but for what the label has of its own.
template <class D, bool G>
__device__ inline float gradient(float s, float t, int at, const Coefficients& c, const Scales& x,
                                 const RowScale& row, float softcap) {
  float g = soft_gradient<D, G>(s, t, at, c, x, row);
  const float of_hard = hard_exp(__fmaf_rn(s, row.slope, -x.student_offset), row) * c.hard;
  if constexpr (G) {
    g *= row.inverse;
    if (c.spread != 0) g -= (s - row.mean) * row.inverse * c.spread;
    g += (Statistics<D, G>::kDKD && at == row.label ? c.label_hard
          : c.hard == 0                             ? 0
                                                    : of_hard) -
         c.everywhere;
    if (at == row.label) g -= c.label;
    if (softcap != 0) {
      const float u = s / softcap;
      g *= s == -kInf ? 0 : (1 - u) * (1 + u);
    }
    return g;
  }
  return g + of_hard;
}

}  // namespace
}  // namespace kdfast
