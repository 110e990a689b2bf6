// What stands between passes A and C: from a row's sums its loss, its metrics, and the coefficients of its
// gradient.
#pragma once

#include "convert.h"
#include "row_sums.h"

namespace kdfast {
namespace {

// ---- the table ----

KD_INLINE Coefficients<double> coefficients_of(const LossArgs& a, int64_t row) {
  Coefficients<double> c;
  for (int k = 0; k < kCoefficients; ++k) {
    ((double*)&c)[k] = a.table ? a.table[row * kCoefficients + k] : a.wide_table[row * kCoefficients + k];
  }
  return c;
}
KD_INLINE void keep(const LossArgs& a, int64_t row, const Coefficients<double>& c) {
  for (int k = 0; k < kCoefficients; ++k) {
    const double value = ((const double*)&c)[k];
    if (a.table) a.table[row * kCoefficients + k] = value;
    if (a.wide_table) a.wide_table[row * kCoefficients + k] = value;
  }
}

// The same for a gradient that is `factor` times as large.
template <class V>
KD_INLINE void scale_gradient(Coefficients<V>& c, V factor) {
  for (V* x : {&c.level, &c.slope, &c.teacher, &c.soft, &c.hard, &c.label, &c.uniform, &c.tilt, &c.at_label})
    *x *= factor;
}

// ---- the label ----

struct Label {  // the class, its logits as the passes have them, and the sum of the student's over all
                // classes
  int64_t index = -1;
  double student = 0, teacher = 0, logits = 0;
};

// What the sums have of the label, and of all logits for label smoothing.
template <class P>
void add_label(const LossArgs& a, const RowScale& scale, const Label& label, Sums<double>& x) {
  using C = typename P::C;
  const double offset = finite(x.hard_offset), so = finite(x.student_offset);
  const auto exponents = [&](double logits, double classes) {
    return P::kOwn ? logits * (C)kLog2E - classes * offset
                   : scale.power * (logits * (C)scale.student - classes * so);
  };
  x.label = label.index < 0 ? -kInfinity : exponents(label.student, 1);
  x.exponents = a.label_smoothing == 0 ? 0 : exponents(label.logits, x.classes);
}

// ---- the loss ----

// f of the divergence's struct.
template <class F>
void with_divergence_named(const LossArgs& a, F f) {
  switch (a.divergence) {
#define X(name, Type)       \
  case Divergence::k##Type: \
    return f(Type{});
    KDFAST_DIVERGENCES
#undef X
    case Divergence::kNone:
      return f(NoDivergence{});
  }
}

template <class C>
KD_INLINE RowTerms<double, double> terms_of(const LossArgs& a, int64_t row, const Sums<double>& x,
                                            const RowScale& scale) {
  const double factor = at_row(a.row_weight, 1, row) * a.scale;
  return {scale.temperature,
          factor,
          scale.student_unit,
          (C)(1 / x.student_total) * x.student_total - 1,
          a.alpha,
          a.hard_weight,
          a.label_smoothing,
          a.z_loss,
          a.beta,
          a.t_squared,
          teacher_is_softmaxed(a),
          a.labelled()};
}

// By the divergence's own formula, whatever a kernel is compiled for.
KD_NOINLINE RowLoss<double> dispatch_loss_and_coefficients(const LossArgs& a, const Sums<double>& x,
                                                           const RowTerms<double, double>& terms,
                                                           Coefficients<double>& c) {
  RowLoss<double> out{};
  with_divergence_named(a, [&](auto d) { out = loss_and_coefficients<decltype(d)>(x, terms, c); });
  return out;
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

// Decoupled KD: D and its gradient's coefficients, from forward KL's sums without the label, whose exponents
// are ys and yt. With p^ and q^ over the other classes alone, and what both of its gradient's parts have in
// common in brackets,
//
//   dD/ds_i = (q^_i [w_0 (p_y (1 - q_y) - (1 - p_y) q_y) + w_1] - w_1 p^_i) / T
//   dD/ds_y = -w_0 (p_y (1 - q_y) - (1 - p_y) q_y) / T
KD_NOINLINE double dkd_loss_and_coefficients(const LossArgs& a, const Sums<double>& x, double ys, double yt,
                                             double weight, Coefficients<double>& c) {
  const Split q = softmaxed_split(ys, std::log2(x.student_total));
  Split p = softmaxed_split(yt, std::log2(x.teacher_total));
  if (!teacher_is_softmaxed(a)) {
    const double y = std::exp2(yt + x.teacher_offset), others = x.teacher_total * std::exp2(x.teacher_offset);
    p = {y, others, std::log2(y), std::log2(others)};
  }
  const double target =
      masked(p.of_label, p.log_label - q.log_label) + masked(p.of_others, p.log_others - q.log_others);
  const double w = a.dkd_target, pull = p.of_label * q.of_others - p.of_others * q.of_label;
  c.at_label = -weight * w * pull;
  if (x.student_total == 0) {  // no class is left for the student
    c.student_total = 1;
  } else {
    c.level = weight * w * pull;
  }
  if (x.teacher_total == 0) {  // nor for the teacher
    c.teacher_total = 1;
    return kLn2 * masked(w, target);
  }
  c.teacher = weight * a.dkd_others;
  if (x.student_total != 0) c.level += c.teacher;
  const double among = x.student_total == 0 ? kInfinity
                                            : x.over_teacher / x.teacher_total + std::log2(x.student_total) -
                                                  std::log2(x.teacher_total);
  return kLn2 * (masked(w, target) + masked(a.dkd_others, among));  // a weight of 0 meets no infinity
}

// The row's loss, and what pass C needs, from the sums of all of its classes.
template <class P>
KD_NOINLINE RowLoss<double> row_loss_and_coefficients(const LossArgs& a, int64_t row, const Sums<double>& x,
                                                      const RowScale& scale, const Label& label,
                                                      Coefficients<double>& c, double& soft_at_label) {
  const RowTerms<double, double> terms = terms_of<typename P::C>(a, row, x, scale);
  const double n = x.classes, t = scale.temperature;
  RowLoss<double> out{};
  if (std::is_same_v<typename P::D, ForwardKL> && a.divergence == Divergence::kDKD) {
    using C = typename P::C;
    const double ys = label.student * (C)scale.student - finite(x.student_offset);
    const double yt =
        P::kProbs ? std::log2(label.teacher) : label.teacher * (C)scale.teacher - finite(x.teacher_offset);
    const double weight = terms.factor * a.alpha * (a.t_squared ? t : 1 / t) * scale.student_unit;
    Sums<double> with_label = x;
    if (a.hard()) {
      const double up = x.hard_total == 0 ? x.label : std::fmax(x.label, 0.);
      with_label.hard_offset = finite(x.hard_offset) + up;
      with_label.hard_total = scaled(x.hard_total, -up) + std::exp2(x.label - up);
      with_label.label = x.label - up;
      with_label.exponents = x.exponents - n * up;
    }
    out = loss_and_coefficients<NoDivergence>(with_label, terms, c);
    const double at_label = masked(c.hard, std::exp2(with_label.label) / with_label.hard_total) - c.label;
    out.soft = (a.t_squared ? t * t : 1) * dkd_loss_and_coefficients(a, x, ys, yt, weight, c);
    out.loss += a.alpha * out.soft;
    soft_at_label = c.at_label;
    c.at_label += at_label;
  } else {
    out = dispatch_loss_and_coefficients(a, x, terms, c);
  }
  c.teacher_unit = scale.teacher_unit;
  if (a.standardize && n == 1) c.level = c.slope = c.teacher = c.soft = 0;  // else 1e7 times their rounding
  out.loss *= at_row(a.row_weight, 1, row);
  return out;
}

// What return_metrics reports of a row. T: of the teacher, if there is one.
template <class S, class T, bool kTeacher, bool kProbs>
KD_NOINLINE void measure(const LossArgs& a, int64_t row, const S* s, const T* t, const RowScale& scale,
                         Measures x, const Label& label, const RowLoss<double>& terms) {
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
  RowMetrics& m = a.row_metrics[row];
  m = {terms.soft, terms.hard, kNaN, kNaN, kNaN, kNaN, kNaN};
  const int64_t best = first(s, x.student_max, x.student_block, label.student);
  const double log_student = std::log2(x.student_sum);
  m.student_entropy = kLn2 * (log_student - x.student_log / x.student_sum);
  if (a.labels) m.accuracy = best == label.index;
  if constexpr (kTeacher) {
    const bool softmaxed = teacher_is_softmaxed(a);
    const double total = softmaxed ? x.teacher_sum : std::exp2(-x.teacher_offset);
    const double log_total = softmaxed ? std::log2(total) : -x.teacher_offset, mass = x.teacher_sum / total;
    m.kl = kLn2 * (x.divergence / total + mass * (log_student - log_total));
    m.teacher_entropy = kLn2 * (mass * log_total - x.teacher_log / total);
    m.agreement = best == first(t, x.teacher_max, x.teacher_block, label.teacher);
  }
}

}  // namespace
}  // namespace kdfast
