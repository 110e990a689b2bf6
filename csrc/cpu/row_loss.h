// What stands between passes A and C: from a row's sums its loss, its metrics, and the coefficients of its
// gradient.
#pragma once

#include "convert.h"
#include "row_sums.h"

namespace kdfast {
namespace {

// The same for a gradient that is `factor` times as large.
KD_INLINE void scale_gradient(Coefficients& c, bool pointwise, double factor) {
  c.soft *= factor;
  if (!pointwise) {
    c.student *= factor;
    c.teacher *= factor;
  }
  c.hard *= factor;
  c.label *= factor;
  c.uniform *= factor;
  c.label_soft *= factor;
  c.label_hard *= factor;
  c.tilt *= factor;
}

struct Label {  // the class, its logits as the passes have them, and the sum of the student's over all
                // classes
  int64_t index = -1;
  double student = 0, teacher = 0, logits = 0;
};

struct Terms {  // of a row's loss, before their weights
  double soft = kNaN, hard = kNaN;
};

// The exponent of a class at temperature 1.
template <class P>
double hard_exponent(const RowStats& x, const RowScale& scale, double logit) {
  using C = typename P::C;
  const C so = finite(x.student_offset);
  return P::kOwn ? logit * (C)kLog2E - hard_offset<P>(scale, so)
                 : scale.power * (logit * (C)scale.student - so);
}

// CE(y, q1), smoothed; log_sum: the logarithm of the sum of the exps at temperature 1.
template <class P>
double hard_loss(const LossArgs& a, const RowStats& x, const RowScale& scale, double log_sum,
                 double label_logit, double mean_logit) {
  const double e = a.label_smoothing;
  auto loss = [&](double logit) { return kLn2 * (log_sum - hard_exponent<P>(x, scale, logit)); };
  return e == 0 ? loss(label_logit) : (1 - e) * loss(label_logit) + e * loss(mean_logit);
}

// How a row's teacher becomes p.
struct Teacher {
  double sum;      // what P is divided by
  double log_sum;  // its logarithm; a given log p is exp2(y + offset) as it stands
  double mass;     // sum p
};

template <bool kProbs>
Teacher teacher_of(const LossArgs& a, const RowStats& x) {
  if (teacher_is_softmaxed(a))
    return {x.teacher_sum, std::log2(x.teacher_sum), x.teacher_sum / x.teacher_sum};
  if (kProbs) return {1, 0, x.teacher_sum};
  const double sum = std::exp2(-x.teacher_offset);
  return {sum, -x.teacher_offset, x.teacher_sum / sum};
}

struct DivergenceSums {
  double divergence, psi;
};

template <class P>
DivergenceSums linear_sums(const RowStats& x, const Teacher& teacher, double beta) {
  const double log_student = std::log2(x.student_sum);
  const double above = teacher.log_sum - log_student;
  DivergenceSums sums{};
  if constexpr (P::D::kTeacher) {
    const double rest = P::D::over_teacher(teacher.mass, -log_student, above),
                 share = P::D::teacher_share(beta);
    sums.divergence += kLn2 * share * (x.teacher_running / teacher.sum + rest);
    sums.psi -= share * teacher.mass;
  }
  if constexpr (P::D::kStudent) {
    const double part = kLn2 * P::D::student_share(beta) *
                        (x.student_running / x.student_sum + P::D::over_student(1., above));
    sums.divergence += part;
    sums.psi += part;
  }
  return sums;
}

// log2(1 + 2^x)
double log_1_plus_exp2(double x) { return x > 64 ? x : std::log1p(std::exp2(x)) / kLn2; }

// A class's probability and that of all others, with their logarithms to base 2.
struct Split {
  double of_label, of_others, log_label, log_others;
};
Split softmaxed_split(double log_label, double log_others) {
  const double more = log_others - log_label;
  const double a = -log_1_plus_exp2(more), b = -log_1_plus_exp2(-more);
  return {std::exp2(a), std::exp2(b), a, b};
}

// Decoupled KD: D and its gradient's coefficients, from forward KL's sums without the label. With p^ and q^
// over the other classes alone, and what both of its gradient's parts have in common in brackets,
//
//   dD/ds_i = (q^_i [w_0 (p_y (1 - q_y) - (1 - p_y) q_y) + w_1] - w_1 p^_i) / T
//   dD/ds_y = -w_0 (p_y (1 - q_y) - (1 - p_y) q_y) / T
template <class P>
KD_NOINLINE double dkd_sums(const LossArgs& a, const RowStats& x, const RowScale& scale,
                            const Teacher& teacher, const Label& label, Coefficients& c) {
  using C = typename P::C;
  const double ys = label.student * (C)scale.student - finite(x.student_offset);
  const double yt =
      P::kProbs ? std::log2(label.teacher) : label.teacher * (C)scale.teacher - finite(x.teacher_offset);
  const Split q = softmaxed_split(ys, std::log2(x.student_sum));
  Split p = softmaxed_split(yt, std::log2(x.teacher_sum));
  if (!teacher_is_softmaxed(a)) {
    const double y = std::exp2(yt) / teacher.sum;
    p = {y, teacher.mass, std::log2(y), std::log2(teacher.mass)};
  }
  const double target =
      masked(p.of_label, p.log_label - q.log_label) + masked(p.of_others, p.log_others - q.log_others);
  const double w = a.dkd_target, pull = p.of_label * q.of_others - p.of_others * q.of_label;
  c.label_soft = -c.soft * w * pull;
  if (x.teacher_sum == 0) {  // there is no other class, or none that the teacher thinks of
    c.student = x.student_sum == 0 ? 0 : c.soft / x.student_sum;
    c.psi_sum = -w * pull;
    return kLn2 * masked(w, target);
  }
  c.student = x.student_sum == 0 ? 0 : c.soft / x.student_sum;
  c.teacher = c.soft * a.dkd_others / x.teacher_sum;
  c.psi_sum = -(w * pull + a.dkd_others);
  const double among = x.student_sum == 0 ? kInfinity
                                          : x.teacher_running / x.teacher_sum + std::log2(x.student_sum) -
                                                std::log2(x.teacher_sum);
  return kLn2 * (masked(w, target) + masked(a.dkd_others, among));  // a weight of 0 meets no infinity
}

// The row's loss without its weight, and what pass C needs, from merged statistics over n classes.
// `pointwise`: pass B's sums, where the divergence has them.
template <class P>
KD_NOINLINE double finish(const LossArgs& a, int64_t row, const RowStats& x, const RowScale& scale,
                          const DivergenceSums& pointwise, const Label& label, double n, Coefficients& c,
                          Terms& terms) {
  const double t = scale.temperature;
  double loss = 0, log_hard = std::log2(x.hard_sum);
  bool decoupled = false;
  c = {x.student_offset, x.teacher_offset};
  c.student_unit = scale.student_unit;
  c.teacher_unit = scale.teacher_unit;
  if constexpr (P::kMSE) {
    const double mean = x.teacher_sum / n;
    terms.soft = (x.teacher_running - x.teacher_sum * mean) / (2 * n);
    c.soft = a.alpha / n * scale.student_unit;
    c.teacher = c.soft;
    c.shift = terms.soft == terms.soft ? -mean : terms.soft;  // one infinity makes all of a row NaN
  } else if constexpr (P::kSoft) {
    const Teacher teacher = teacher_of<P::kProbs>(a, x);
    c.soft = a.alpha * (a.t_squared ? t : 1 / t) * scale.student_unit;
    if (n == 1) c.soft = 0;  // which a standardised row would make 1e7 times its rounding
    DivergenceSums sums = pointwise;
    if constexpr (std::is_same_v<typename P::D, ForwardKL>) {
      if ((decoupled = a.divergence == Divergence::kDKD)) {
        sums.divergence = dkd_sums<P>(a, x, scale, teacher, label, c);
        const double y = hard_exponent<P>(x, scale, label.student);
        const double high = y < log_hard ? log_hard : y, low = y < log_hard ? y : log_hard;
        log_hard = high + log_1_plus_exp2(low - high);
      }
    }
    if (!decoupled) {
      if constexpr (!P::kPointwise) sums = linear_sums<P>(x, teacher, a.beta);
      const double weight = P::kPointwise ? 1 : c.soft;
      c.student = weight / x.student_sum;
      c.teacher = weight / teacher.sum;
      c.psi_sum = sums.psi;
      // for q as it is rounded: its sum is not quite 1, and the gradient's is to be 0
      if constexpr (P::kPointwise) c.psi_sum /= (typename P::C)c.student * x.student_sum;
    }
    c.log_student = -std::log2(x.student_sum);
    c.log_teacher = -teacher.log_sum;
    terms.soft = (a.t_squared ? t * t : 1) * sums.divergence;
  }
  if constexpr (P::kSoft || P::kMSE) loss = a.alpha * terms.soft;
  if (a.labelled()) terms.hard = hard_loss<P>(a, x, scale, log_hard, label.student, label.logits / n);
  if (a.hard_weight != 0) {
    loss += a.hard_weight * terms.hard;
    c.hard = a.hard_weight;
    c.label = a.hard_weight * (1 - a.label_smoothing);
    c.uniform = a.hard_weight * a.label_smoothing / n;
  }
  if (a.z_loss != 0) {
    double z = kLn2 * (log_hard - hard_exponent<P>(x, scale, 0));
    if (z == -kInfinity) z = kNaN;
    loss += a.z_loss * z * z;
    c.hard += 2 * a.z_loss * z;
  }
  if (decoupled && c.hard != 0) {
    c.label_hard = c.hard * std::exp2(hard_exponent<P>(x, scale, label.student) - log_hard);
    c.hard *= std::exp2(-log_hard);
  } else if (c.hard != 0) {
    c.hard /= x.hard_sum;
  }
  const double w = at_row(a.row_weight, 1, row);
  scale_gradient(c, P::kPointwise, w * a.scale);
  return w * loss;
}

// What return_metrics reports of a row. T: of the teacher, if there is one.
template <class S, class T, bool kTeacher, bool kProbs>
KD_NOINLINE void measure(const LossArgs& a, int64_t row, const S* s, const T* t, const RowScale& scale,
                         Measures x, const Label& label, const Terms& terms) {
  using C = Compute<S>;
  const bool without = a.divergence == Divergence::kDKD;  // then the label is added here
  if (without) {
    const double ys = label.student * (C)scale.student, so = std::fmax(x.student_offset, ys);
    const double yt = kProbs ? std::log2(label.teacher) : label.teacher * (C)scale.teacher;
    const double to = kProbs ? 0 : std::fmax(x.teacher_offset, yt);
    shift(x, so, to);
    const double q = std::exp2(ys - finite(so)), p = std::exp2(yt - finite(to));
    x.student_sum += q;
    x.teacher_sum += p;
    x.divergence += masked(p, (yt - finite(to)) - (ys - finite(so)));
    x.teacher_log += masked(p, yt - finite(to));
    x.student_log += masked(q, ys - finite(so));
  }
  auto first = [&](const auto* z, double high, int64_t block, double of_label) {
    const int64_t left = a.vocab - block,
                  i = block + first_at(z + block, left < kBlock ? left : kBlock, high);
    return without && (of_label > high || (of_label == high && label.index < i)) ? label.index : i;
  };
  RowMetrics& m = a.metrics[row];
  m = {terms.soft, terms.hard, kNaN, kNaN, kNaN, kNaN, kNaN};
  const int64_t best = first(s, x.student_max, x.student_block, label.student);
  const double log_student = std::log2(x.student_sum);
  m.student_entropy = kLn2 * (log_student - x.student_log / x.student_sum);
  if (a.labels) m.accuracy = best == label.index;
  if constexpr (kTeacher) {
    const RowStats stats{x.student_offset, x.teacher_offset, x.student_sum, x.teacher_sum};
    const Teacher teacher = teacher_of<kProbs>(a, stats);
    m.kl = kLn2 * (x.divergence / teacher.sum + teacher.mass * (log_student - teacher.log_sum));
    m.teacher_entropy = kLn2 * (teacher.mass * teacher.log_sum - x.teacher_log / teacher.sum);
    m.agreement = best == first(t, x.teacher_max, x.teacher_block, label.teacher);
  }
}

}  // namespace
}  // namespace kdfast
