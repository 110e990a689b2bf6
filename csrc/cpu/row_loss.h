// The loss of a row, its metrics, and its gradient's coefficients, from its sums.
#pragma once

#include "row.h"
#include "row_sums.h"

namespace kdfast {
namespace {

// Adds to the sums what they have of all logits, for label smoothing.
void add_logits(const LossArgs& a, const RowScale& scale, const Label& label, Sums<double>& x) {
  if (a.label_smoothing != 0)
    x.exponents = (label.logits - x.classes * finite(x.student_offset)) * scale.hard;
}

// The label's exponents to base 2.
KD_INLINE double student_exponent(const RowScale& scale, const Label& label, double offset) {
  return (label.student - finite(offset)) * scale.student;
}
KD_INLINE double teacher_exponent(const LossArgs& a, const RowScale& scale, const Label& label,
                                  double offset) {
  return teacher_is_probs(a) ? std::log2(label.teacher) : (label.teacher - finite(offset)) * scale.teacher;
}

// V, N: as RowTerms has them, doubles, or vectors for short rows.
template <class V, class N>
KD_INLINE RowTerms<V, N> row_terms(const LossArgs& a, V temperature, V factor, V unit, V excess) {
  return {temperature,
          factor,
          unit,
          excess,
          (N)a.alpha,
          (N)a.hard_weight,
          (N)a.label_smoothing,
          (N)a.z_loss,
          (N)a.beta,
          (N)(1 - a.beta),
          (N)(a.softcap == 0 ? a.logit_scale : 1),
          a.t_squared,
          teacher_is_softmaxed(a),
          a.target == Target::kLogits || teacher_is_softmaxed(a),
          a.needs_label()};
}

// The row's loss, and what pass C needs, from the sums of all of its classes. soft_at_label: decoupled KD's.
KD_NOINLINE RowLoss<double> row_loss_and_coefficients(const LossArgs& a, int64_t row, const Sums<double>& x,
                                                      const RowScale& scale, const Label& label,
                                                      Coefficients<double>& c, double& soft_at_label) {
  const double weight = a.weight(row);
  const double excess = round_to_compute(a, 1 / x.student_total) * x.student_total - 1;
  const auto terms =
      row_terms<double, double>(a, scale.temperature, weight * a.scale, scale.student_unit, excess);
  RowLoss<double> out{};
  dispatch_divergence(a.divergence, [&](auto d) {
    if constexpr (std::is_same_v<decltype(d), DKD>) {
      const double ys = student_exponent(scale, label, x.student_offset);
      const double yt = teacher_exponent(a, scale, label, x.teacher_offset);
      out = dkd_loss_and_coefficients(a, x, terms, ys, yt, c, soft_at_label);
    } else {
      out = loss_and_coefficients<decltype(d)>(x, terms, c);
    }
  });
  c.teacher_unit = scale.teacher_unit;
  out.loss *= weight;
  return out;
}

// What return_metrics reports of a row. T: of the teacher, if there is one.
template <class S, class T, bool kTeacher>
KD_NOINLINE RowMetrics row_metrics(const LossArgs& a, const S* s, const T* t, const RowScale& scale,
                                   Sums<double> x, MetricSums m, const Label& label,
                                   const RowLoss<double>& terms) {
  const bool decoupled = a.divergence == Divergence::kDKD;  // then the sums are without the label
  if (decoupled) {
    const double so = std::fmax(x.student_offset, label.student);
    const double to = teacher_is_softmaxed(a) ? std::fmax(x.teacher_offset, label.teacher) : 0;
    rescale(m, x, so, to, scale);
    rescale<NoDivergence>(x, so, to, scale);
    const double ys = student_exponent(scale, label, so), yt = teacher_exponent(a, scale, label, to);
    const double q = std::exp2(ys), p = std::exp2(yt);
    x.student_total += q;
    x.teacher_total += p;
    m.divergence += masked(p, yt - ys);
    m.teacher_log += masked(p, yt);
    m.student_log += masked(q, ys);
  }
  auto argmax = [&](const auto* z, double high, int64_t block, double label_logit) {
    const int64_t left = a.vocab - block;
    const int64_t i = block + first_index(z + block, left < kBlock ? left : kBlock, high);
    return decoupled && (label_logit > high || (label_logit == high && label.index < i)) ? label.index : i;
  };
  RowMetrics out{terms.soft, terms.hard, kNaN, kNaN, kNaN, kNaN, kNaN};
  const int64_t best = argmax(s, m.student_max, m.student_block, label.student);
  const double log_student = std::log2(x.student_total);
  out.student_entropy = kLn2 * (log_student - m.student_log / x.student_total);
  if (a.labels) out.accuracy = best == label.index;
  if constexpr (kTeacher) {
    const double total = teacher_is_softmaxed(a) ? x.teacher_total : 1;
    const double log_total = std::log2(total), mass = x.teacher_total / total;
    out.kl = kLn2 * (m.divergence / total + mass * (log_student - log_total));
    out.teacher_entropy = kLn2 * (mass * log_total - m.teacher_log / total);
    out.agreement = best == argmax(t, m.teacher_max, m.teacher_block, label.teacher);
  }
  return out;
}

void write_dropped_row(const LossArgs& a, int64_t row) {
  a.losses[row] = 0;
  if (a.metrics) a.row_metrics[row] = {kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN};
  if (a.table || a.wide_table) store_coefficients(a, row, {});
}

// The same coefficients for offsets as a table of fp32 has them.
void round_offsets(const LossArgs& a, const RowScale& scale, Coefficients<double>& c) {
  if (!a.table) return;
  const double student = offset_change(c.student_offset, (float)c.student_offset);
  c.student_total = scaled(c.student_total, student * scale.student);
  c.hard_total = scaled(c.hard_total, student * scale.hard);
  if (a.divergence == Divergence::kLogitMSE) return;  // its teacher_offset is no logit's
  const double teacher = offset_change(c.teacher_offset, (float)c.teacher_offset);
  c.teacher_total = scaled(c.teacher_total, teacher * scale.teacher);
}

// ---- kernels over sums alone, which no Spec changes ----

void merge(const LossArgs& a, int64_t segments) {
  dispatch_divergence(a.divergence, [&](auto d) {
    for (int64_t row = 0; row < a.rows; ++row) {
      Sums<double>* sums = (Sums<double>*)a.sums + row * segments;
      const RowScale scale = row_scale(a, row);
      for (int64_t k = 1; k < segments; ++k) merge<decltype(d)>(sums[0], sums[k], scale);
    }
  });
}

void losses_and_coefficients(const LossArgs& a, int64_t segments) {
  for (int64_t row = 0; row < a.rows; ++row) {
    if (!a.is_kept(row)) {
      write_dropped_row(a, row);
      continue;
    }
    const Sums<double>& sums = ((const Sums<double>*)a.sums)[row * segments];
    Coefficients<double> c;
    double soft_at_label;
    a.losses[row] = row_loss_and_coefficients(a, row, sums, row_scale(a, row), {}, c, soft_at_label).loss;
    store_coefficients(a, row, c);
  }
}

}  // namespace
}  // namespace kdfast
