// Rows of a sparse teacher. Over its K entries and the rest, which is one more class, p and q are
// distributions of K + 1 classes; kdfast/sparse_rows.py says what p is. So D is a dense loss of a row of K +
// 1 logits: those of the entries, and of the rest T * logsumexp(z / T) over its own classes. With G its
// gradient,
//
//   dl/dz_j = G_rest Q_j / sum_rest Q      of a class that is no entry       dl/dz_j = G_k      of an entry
//
// and the terms of all classes, which pass C adds to the first and this file to the second.
#pragma once

#include "others.h"
#include "small_row.h"

namespace kdfast {
namespace {

// Without terms of all classes the conditional form needs the entries' logits alone.
bool reads_others(const LossArgs& a) {
  return a.entries.missing != Missing::kConditional || a.needs_hard_sum();
}

// log p of the rest, for log-probabilities that are taken as they are.
double log_rest_of_teacher(const EntryArgs& a, const Entries& e, int64_t present, int64_t classes) {
  if (present == 0) return 0;  // all is rest
  if (a.missing != Missing::kTail || present == classes) return -kInfinity;
  for (int64_t k = 0; k < e.count; ++k) e.y[k] = e.index[k] < 0 ? -kInfinity : e.log_p[k] / kLn2;
  exps_of_exponents(e);
  double rest = 1;
  for (int64_t k = 0; k < e.count; ++k) rest -= e.y[k];
  return std::log(rest < 0 ? 0 : rest);  // NaN stays
}

struct SoftTerm {
  double loss;     // alpha T^2 D
  double of_rest;  // G_rest
};

// The soft term of a row of weight 1, and its gradient at the entries in e.value, `factor` times as large.
// others: the sums over all classes but the entries, if these are read.
template <class C>
KD_NOINLINE SoftTerm soft_term(const LossArgs& a, const Entries& e, const RowScale& scale,
                               const Sums<double>& others, double factor) {
  SmallRow<C> row(a, e, scale.temperature, factor);
  const bool has_rest = a.entries.missing != Missing::kConditional;
  const double offset = common_offset(e, others.student_offset, has_rest && others.student_total != 0);
  const double z_rest = (finite(others.student_offset) - offset) * scale.logit_scale +
                        scale.temperature * kLn2 * std::log2(others.student_total);
  int64_t present = 0;
  double high = has_rest ? z_rest : -kInfinity;
  for (int64_t k = 0; k < e.count; ++k) {
    e.value[k] = (e.logit[k] - offset) * scale.logit_scale;
    if (e.value[k] > high) high = e.value[k];
    present += e.index[k] >= 0;
  }
  high = finite(high);
  const double log_rest = log_rest_of_teacher(a.entries, e, present, a.vocab);
  for (int64_t k = 0; k < e.count; ++k) {
    row.s[k] = e.value[k] - high;  // relative to the largest, or rounding takes the digits
    row.t[k] = e.index[k] < 0 ? -kInfinity : e.log_p[k];
  }
  row.s[e.count] = has_rest ? z_rest - high : present == 0 ? 0 : -kInfinity;
  row.t[e.count] = log_rest;
  row.run();
  for (int64_t k = 0; k < e.count; ++k) e.value[k] = row.g[k];
  if (a.entries.missing != Missing::kTruncate && row.loss < 0) row.loss = 0;  // by rounding
  return {row.loss, row.g[e.count]};
}

// Adds the entries to the sum at temperature 1, whose offset is raised by `up` exponents: theirs may be far
// above the others. e.y are their exps then.
KD_NOINLINE Sums<double> with_entries(const Entries& e, const RowScale& scale, int64_t label, Sums<double> x,
                                      double& up) {
  const double offset = common_offset(e, x.student_offset, x.hard_total != 0);
  up = (offset - finite(x.student_offset)) * scale.hard;
  set_exponents(e, offset, scale.hard);
  x.label -= up;
  for (int64_t k = 0; k < e.count; ++k) {
    if (label >= 0 && e.index[k] == label) x.label = e.y[k];
  }
  exps_of_exponents(e);
  double total = 0;
  for (int64_t k = 0; k < e.count; ++k) total += e.y[k];
  x.hard_total = scaled_sum(x.hard_total, -up) + total;
  x.exponents -= x.classes * up;
  x.student_offset = offset;
  return x;
}

// The loss of a row's other terms, their coefficients, and their gradient at the entries, which is added.
KD_NOINLINE double hard_terms(const LossArgs& a, int64_t row, const RowScale& scale, const Label& label,
                              const Sums<double>& others, const Entries& e, Coefficients<double>& c) {
  double up = 0, none;
  const bool all = a.needs_hard_sum();
  const Sums<double> x = all ? with_entries(e, scale, label.index, others, up) : others;
  const double loss = row_loss_and_coefficients(a, row, x, scale, label, c, none).loss;
  c.student_offset = others.student_offset;
  c.hard_total = others.hard_total == 0 ? 1 : scaled(x.hard_total, up);
  if (!all) return loss;
  for (int64_t k = 0; k < e.count; ++k) {
    e.value[k] += masked(c.hard, e.y[k] / x.hard_total) - c.uniform;
    if (e.index[k] >= 0 && e.index[k] == label.index) e.value[k] -= c.label;
  }
  return loss;
}

// A row's loss, coefficients and the gradient at its entries. False: it is to be computed in doubles.
KD_NOINLINE bool sparse_losses(const LossArgs& a, int64_t row, const OthersPasses& passes,
                               const RowScale& scale, const Entries& e, bool keep, AnyRow& r,
                               Coefficients<double>& c) {
  Sums<double> others{};
  Label label;
  load_entries(a.entries, row, passes.fuses, e);
  if (reads_others(a) && !passes.sums(a, row, scale, e, keep, r, label, others)) return false;
  gather_logits(a, row, e);  // which are in the cache now
  const double weight = a.weight(row);
  const auto soft = passes.fuses ? soft_term<float> : soft_term<double>;
  const SoftTerm term = soft(a, e, scale, others, weight * a.scale);
  a.losses[row] = weight * term.loss;
  if (reads_others(a)) {
    a.losses[row] += hard_terms(a, row, scale, label, others, e, c);
    c.level = others.student_total == 0 ? 0 * term.of_rest : term.of_rest;
    if (others.student_total == 0) c.student_total = 1;
  }
  return true;
}

KD_NOINLINE void write_sparse_gradient(const LossArgs& a, int64_t row, const OthersPasses& passes,
                                       const RowScale& scale, const AnyRow* r, const Coefficients<double>& c,
                                       const Entries& e) {
  if (reads_others(a)) {
    passes.gradient(a, row, scale, r, c);
  } else {
    zero_gradient(a, row, 0, a.vocab);
  }
  if (a.vocab < a.width) zero_gradient(a, row, a.vocab, a.width);
  store_values(a, row, e);
}

// ---- the kernels of RowKernels ----

KD_NOINLINE void sparse_loss_grad(const LossArgs& a, const OthersPasses& passes, int64_t begin, int64_t end) {
  const Entries e = new_entries(a.entries.count, a.vocab);
  for (int64_t row = begin; row < end; ++row) {
    if (!a.is_kept(row)) {
      zero_gradient(a, row, 0, a.width);
      write_dropped_row(a, row);
      continue;
    }
    const RowScale scale = row_scale(a, row);
    AnyRow r;
    Coefficients<double> c{};
    if (sparse_losses(a, row, passes, scale, e, true, r, c)) {
      write_sparse_gradient(a, row, passes, scale, &r, c, e);
    } else {
      this_set().loss_grad(in_doubles(a), row, row + 1);
    }
  }
}

KD_NOINLINE void sparse_row_losses(const LossArgs& a, const OthersPasses& passes, int64_t begin,
                                   int64_t end) {
  const Entries e = new_entries(a.entries.count, a.vocab);
  for (int64_t row = begin; row < end; ++row) {
    Coefficients<double> c{};
    for (int64_t k = 0; k < e.count; ++k) e.value[k] = 0;
    if (!a.is_kept(row)) {
      write_dropped_row(a, row);
    } else {
      const RowScale scale = row_scale(a, row);
      AnyRow r;
      if (!sparse_losses(a, row, passes, scale, e, false, r, c)) {
        this_set().losses(in_doubles(a), row, row + 1);
        continue;
      }
      round_offsets(a, scale, c);
      store_coefficients(a, row, c);
    }
    const int64_t at = row * a.columns() + kCoefficients;
    for (int64_t k = 0; k < e.count; ++k) {
      if (a.table) a.table[at + k] = e.value[k];
      if (a.wide_table) a.wide_table[at + k] = e.value[k];
    }
  }
}

KD_NOINLINE void sparse_grad(const LossArgs& a, const OthersPasses& passes, int64_t begin, int64_t end) {
  const Entries e = new_entries(a.entries.count, a.vocab);
  for (int64_t row = begin; row < end; ++row) {
    if (!a.is_kept(row)) {
      zero_gradient(a, row, 0, a.width);
      continue;
    }
    const RowScale scale = row_scale(a, row);
    Coefficients<double> c = load_coefficients(a, row);
    if (passes.fuses && scale.is_huge(c.student_offset, 0)) {
      this_set().grad(in_doubles(a), 1, row, row + 1);
      continue;
    }
    const double factor = a.scale * row_value(a.row_scale, 1, row);
    scale_gradient(c, factor);
    load_entries(a.entries, row, passes.fuses, e);
    if (a.softcap != 0) gather_logits(a, row, e);
    const int64_t at = row * a.columns() + kCoefficients;
    for (int64_t k = 0; k < e.count; ++k)
      e.value[k] = factor * (a.table ? a.table[at + k] : a.wide_table[at + k]);
    write_sparse_gradient(a, row, passes, scale, nullptr, c, e);
  }
}

template <class P>
struct SparseRows {
  static const OthersPasses& passes() { return OthersPassesOf<P>::get(); }
  static void loss_grad(const LossArgs& a, int64_t begin, int64_t end) {
    sparse_loss_grad(a, passes(), begin, end);
  }
  static void losses(const LossArgs& a, int64_t begin, int64_t end) {
    sparse_row_losses(a, passes(), begin, end);
  }
  static void grad(const LossArgs& a, int64_t, int64_t begin, int64_t end) {
    sparse_grad(a, passes(), begin, end);
  }
  // Rows with entries are not split, nor sharded here.
  static void sums(const LossArgs&, int64_t, int64_t, int64_t) {}
  static void pointwise_sums(const LossArgs&, int64_t, int64_t) {}
};

}  // namespace
}  // namespace kdfast
