// Log-probabilities of given classes, entropy, the log of the rest, and their gradient; see
// kdfast/reference_tokens.py. The ids' classes are left out of the sums over a row, so that both parts, and
// 1 - q of a confident token, are sums and no differences.
#pragma once

#include "others.h"

namespace kdfast {
namespace {

KD_INLINE void put(void* to, bool wide, int64_t at, double x) {
  wide ? void(((double*)to)[at] = x) : void(((float*)to)[at] = x);
}
KD_INLINE double get(const void* from, bool wide, int64_t at) {
  return wide ? ((const double*)from)[at] : ((const float*)from)[at];
}

// The ids' exps relative to an exponent `up` above an offset, and what follows. All sums are relative to it.
struct IdSums {
  double up;
  double others;    // the sum over the classes that are no ids
  double ids;       // over the ids' classes, each once
  int64_t largest;  // the entry of the largest exp; -1: there is none
  double below;     // all of the sum but the largest's
  double total;     // of all classes
  double log2_total;
  double at_largest;  // log2 q of the largest, which has its digits near 0
};

// log2_elsewhere: of the exps of ids that other processes have.
KD_NOINLINE IdSums id_sums(const Entries& e, const int64_t* first, double offset, double others_total,
                           double log2_elsewhere, const RowScale& scale) {
  IdSums x{};
  x.largest = -1;
  double common = common_offset(e, offset, others_total != 0);
  if (log2_elsewhere != -kInfinity)
    common = std::fmax(common, finite(offset) + log2_elsewhere / scale.student);
  x.up = (common - finite(offset)) * scale.student;
  set_exponents(e, common, scale.student);
  double high = -kInfinity;
  for (int64_t k = 0; k < e.count; ++k) {
    e.value[k] = e.y[k];  // the exponents are wanted too
    if (e.y[k] > high) high = e.y[k], x.largest = k;
  }
  exps_of_exponents(e);
  x.others = scaled_sum(others_total, -x.up);
  x.ids = log2_elsewhere == -kInfinity ? 0 : std::exp2(log2_elsewhere - x.up);
  x.below = x.others + x.ids;
  for (int64_t k = 0; k < e.count; ++k) {
    if (first[k] != k) continue;
    x.ids += e.y[k];
    if (k != x.largest) x.below += e.y[k];
  }
  x.total = x.others + x.ids;
  x.log2_total = std::log2(x.total);
  if (x.largest >= 0) {
    const double e_k = e.y[x.largest], log_sum = std::log1p(x.below / e_k) / kLn2;
    x.at_largest = -log_sum;
    if (x.below < e_k) x.log2_total = e.value[x.largest] + log_sum;
    if (!(x.below < e_k)) x.at_largest = e.value[x.largest] - x.log2_total;
  }
  return x;
}

// log2 q of an entry, whose exponent is e.value.
KD_INLINE double log2_q(const IdSums& x, const Entries& e, const int64_t* first, int64_t k) {
  return x.largest >= 0 && first[k] == x.largest ? x.at_largest : e.value[k] - x.log2_total;
}

// For each entry the first of its class: first[k]; -1 where it is absent. owner: (n), what it holds is of no
// matter: an owner counts if it owns the class.
KD_NOINLINE void find_first(const Entries& e, int64_t* first, int32_t* owner) {
  for (int64_t k = 0; k < e.count; ++k) {
    const int64_t class_ = e.index[k];
    first[k] = -1;
    if (class_ < 0) continue;
    const int64_t before = e.count == 1 ? k : owner[class_];
    if (0 <= before && before < k && e.index[before] == class_) {
      first[k] = before;
    } else {
      first[k] = k;
      if (e.count > 1) owner[class_] = k;
    }
  }
}

KD_INLINE int32_t* owners(const TokenArgs& a) {
  return a.entries.count == 1 ? nullptr : (int32_t*)thread_buffer(a.vocab * sizeof(int32_t), kSmallRow);
}
// The ids of a row. Returns find_first's, in the place of log_p.
KD_NOINLINE int64_t* open_ids(const TokenArgs& a, int64_t row, const Entries& e, int32_t* owner) {
  load_entries(a.entries, row, false, e);
  int64_t* first = (int64_t*)e.log_p;
  find_first(e, first, owner);
  return first;
}

KD_NOINLINE void store_stats(const TokenArgs& a, int64_t row, const Entries& e, const int64_t* first,
                             const Sums<double>& others, const IdSums& x) {
  for (int64_t k = 0; k < e.count; ++k) {
    put(a.log_probs, a.wide, row * e.count + k, e.index[k] < 0 ? -kInfinity : kLn2 * log2_q(x, e, first, k));
  }
  double log_rest = -kInfinity;
  if (x.others > x.ids) {
    log_rest = -std::log1p(x.ids / x.others);
  } else if (others.student_total != 0) {
    log_rest = kLn2 * (std::log2(others.student_total) - x.up - x.log2_total);
  }
  put(a.log_rest, a.wide, row, log_rest);
  double entropy = 0;
  if (a.has_entropy) {  // -sum Q log Q / Z + log Z, over exponents less `up`
    double logs = scaled_sum(others.over_student, -x.up) - masked(x.others, x.up);
    for (int64_t k = 0; k < e.count; ++k) {
      if (first[k] == k) logs += masked(e.y[k], e.value[k]);
    }
    entropy = not_below_0(kLn2 * (x.log2_total - logs / x.total));
    put(a.entropy, a.wide, row, entropy);
  }
  const double stats[] = {others.student_total == 0 ? -kInfinity : others.student_offset,
                          scaled_sum(x.ids, x.up), std::log2(others.student_total), entropy, -kInfinity};
  for (int k = 0; k < kTokenStats; ++k) put(a.stats, a.wide, row * kTokenStats + k, stats[k]);
}

KD_NOINLINE void store_ignored(const TokenArgs& a, int64_t row) {
  const int64_t count = a.entries.count;
  for (int64_t k = 0; k < count; ++k) put(a.log_probs, a.wide, row * count + k, 0);
  put(a.log_rest, a.wide, row, 0);
  if (a.has_entropy) put(a.entropy, a.wide, row, 0);
  for (int k = 0; k < kTokenStats; ++k) put(a.stats, a.wide, row * kTokenStats + k, 0);
}

KD_NOINLINE void token_row_stats(const TokenArgs& a, const OthersPasses& passes, int64_t begin, int64_t end) {
  const Entries e = new_entries(a.entries.count, a.vocab);
  int32_t* owner = owners(a);
  for (int64_t row = begin; row < end; ++row) {
    if (a.is_ignored(row)) {
      store_ignored(a, row);
      continue;
    }
    const RowScale scale = row_scale(a, row);
    const int64_t* first = open_ids(a, row, e, owner);
    AnyRow r;
    Label none;
    Sums<double> others;
    if (!passes.sums(a, row, scale, e, false, r, none, others)) {
      this_set().token_stats(in_doubles(a), row, row + 1);
      continue;
    }
    gather_logits(a, row, e);  // which are in the cache now
    if (!a.wide)
      rescale<OthersWithEntropy>(others, (float)others.student_offset, 0, scale);  // as the table has it
    store_stats(a, row, e, first, others,
                id_sums(e, first, others.student_offset, others.student_total, -kInfinity, scale));
  }
}

// With q_rest the sum of q over the classes that are no ids, A the sum of the ids' gradients, R that of the
// rest and E the entropy's, over T:
//
//   of a class that is no id        Q_j / sum_rest Q (R (1 - q_rest) - q_rest (A + E (H + log q_j)))
//   of an id's                      g_i - q_i (A + R + E (H + log q_i)),      g_i the sum of its own
//
// The coefficients of the first, and the second in e.value. False: all is 0.
KD_NOINLINE bool token_coefficients(const TokenArgs& a, int64_t row, const RowScale& scale,
                                    const double* stats, const int64_t* first, const Entries& e,
                                    Coefficients<double>& c) {
  const double factor = a.logit_scale / scale.temperature;
  const double g_rest = a.grad_log_rest ? a.grad_log_rest[row] * factor : 0;
  const double g_entropy = a.grad_entropy ? a.grad_entropy[row] * factor : 0;
  double* own = (double*)e.small;  // each class's, at its first entry
  double all = 0;
  bool any = g_rest != 0 || g_entropy != 0;
  for (int64_t k = 0; k < e.count; ++k) {
    own[k] = 0;
    if (first[k] < 0 || !a.grad_log_probs) continue;
    const double g = a.grad_log_probs[row * e.count + k] * factor;
    own[first[k]] += g;
    all += g;
    any |= g != 0;
  }
  if (a.grad_elsewhere) {
    const double g = a.grad_elsewhere[row] * factor;
    all += g;
    any |= g != 0;
  }
  if (!any) return false;
  gather_logits(a, row, e);
  const double h = stats[3], others_total = std::exp2(stats[2]);
  const IdSums x = id_sums(e, first, stats[0], others_total, stats[4], scale);
  for (int64_t k = 0; k < e.count; ++k) {
    if (first[k] != k) continue;
    const double log_q = kLn2 * log2_q(x, e, first, k), q = std::exp(log_q);
    const double rest_of_q = k == x.largest ? x.below / x.total : 1 - q;
    e.value[k] = own[k] * rest_of_q - q * (all - own[k] + g_rest) - masked(q, g_entropy * (h + log_q));
  }
  for (int64_t k = 0; k < e.count; ++k) {
    if (first[k] >= 0) e.value[k] = e.value[first[k]];
  }
  c.student_offset = finite(stats[0]);
  c.student_total = c.teacher_total = c.hard_total = 1;
  if (others_total == 0) return true;
  const double q_rest = x.others / x.total, log_q_rest = kLn2 * (stats[2] - x.up - x.log2_total);
  c.student_total = others_total;
  c.level = g_rest * (x.ids / x.total) - q_rest * all - masked(q_rest, g_entropy * (h + log_q_rest));
  c.slope = -q_rest * g_entropy;
  return true;
}

KD_NOINLINE void token_row_grad(const TokenArgs& a, const OthersPasses& passes, int64_t begin, int64_t end) {
  const Entries e = new_entries(a.entries.count, a.vocab);
  int32_t* owner = owners(a);
  for (int64_t row = begin; row < end; ++row) {
    if (a.is_ignored(row)) {
      zero_gradient(a, row, 0, a.width);
      continue;
    }
    const RowScale scale = row_scale(a, row);
    double stats[kTokenStats];
    for (int k = 0; k < kTokenStats; ++k) stats[k] = get(a.stats, a.wide, row * kTokenStats + k);
    if (passes.fuses && scale.is_huge(finite(stats[0]), 0)) {
      this_set().token_grad(in_doubles(a), row, row + 1);
      continue;
    }
    const int64_t* first = open_ids(a, row, e, owner);
    Coefficients<double> c{};
    if (token_coefficients(a, row, scale, stats, first, e, c)) {
      passes.gradient(a, row, scale, nullptr, c);
      if (a.vocab < a.width) zero_gradient(a, row, a.vocab, a.width);
      store_values(a, row, e);
    } else {
      zero_gradient(a, row, 0, a.width);
    }
  }
}

template <class P>
struct TokenRows {
  static void token_stats(const TokenArgs& a, int64_t begin, int64_t end) {
    token_row_stats(a, OthersPassesOf<P>::get(), begin, end);
  }
  static void token_grad(const TokenArgs& a, int64_t begin, int64_t end) {
    token_row_grad(a, OthersPassesOf<P>::get(), begin, end);
  }
};

}  // namespace
}  // namespace kdfast
