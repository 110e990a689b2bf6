// The entries of a row: K of its classes that are kept apart from the sums over all others. They are computed
// in doubles, one by one, for K is small.
#pragma once

#include "convert.h"
#include "exponents.h"

namespace kdfast {
namespace {

struct BlockEntries {
  const int32_t* places;  // classes in the block
  int count;
};

struct Entries {
  int64_t count;    // K
  int64_t* index;   // the class; -1 where the entry is absent
  double* log_p;    // a sparse teacher's
  double* logit;    // as the passes have it: softcapped, but without logit_scale where there is no softcap
  double* y;        // an exponent, then the exp
  double* value;    // the gradient at the class
  int32_t* places;  // block by block; what is `unique` of them comes first
  int64_t* starts;  // of each block's places
  void* small;      // a row of K + 1 classes, see sparse_row.h
  int64_t small_bytes;
  double* block;  // (kBlock) and (kBlock), see Patches
  bool* is_copied;

  BlockEntries in_block(int64_t block) const {
    return {places + starts[block], (int)(starts[block + 1] - starts[block])};
  }
};

constexpr int64_t kEntryPadding = 16;  // numbers after an array, that vectors may run into

// Of n classes, in the thread's memory.
KD_NOINLINE Entries new_entries(int64_t count, int64_t n) {
  const int64_t padded = (count + 1 + kEntryPadding) / 16 * 16 + kEntryPadding,
                blocks = (n + kBlock - 1) / kBlock;
  double* at = (double*)thread_buffer((9 * padded + 2 * kBlock + blocks + 1) * sizeof(double), kEntries);
  Entries e{count, (int64_t*)at};
  e.log_p = at + padded;
  e.logit = at + 2 * padded;
  e.y = at + 3 * padded;
  e.value = at + 4 * padded;
  e.places = (int32_t*)(at + 5 * padded);
  e.small = at + 6 * padded;
  e.small_bytes = padded * sizeof(double);
  e.block = at + 9 * padded;
  e.is_copied = (bool*)(e.block + kBlock);
  std::memset(e.is_copied, 0, kBlock);
  e.starts = (int64_t*)(e.block + 2 * kBlock);
  return e;
}

KD_INLINE int64_t entry_index(const EntryArgs& a, int64_t row, int64_t k) {
  const int64_t at = row * a.count + k;
  return a.wide ? ((const int64_t*)a.indices)[at] : ((const int32_t*)a.indices)[at];
}

// The classes of a row's entries, and their log-probabilities, as floats where a row is computed so.
KD_NOINLINE void load_entries(const EntryArgs& a, int64_t row, bool floats, const Entries& e) {
  for (int64_t k = 0; k < a.count; ++k) {
    e.index[k] = entry_index(a, row, k);
    if (!a.log_probs.data && e.index[k] < 0) e.index[k] = -1;
  }
  if (!a.log_probs.data) return;
  widen(row_data(a.log_probs, row), a.log_probs.dtype, a.count, e.log_p);
  for (int64_t k = 0; k < a.count; ++k) {
    if (floats) e.log_p[k] = (float)e.log_p[k];
    if (e.log_p[k] == -kInfinity) e.index[k] = -1;
  }
}

// Sorts the places of the entries by blocks.
KD_NOINLINE void sort_by_blocks(const Entries& e, int64_t n) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  for (int64_t b = 0; b <= blocks; ++b) e.starts[b] = 0;
  for (int64_t k = 0; k < e.count; ++k) {
    if (e.index[k] >= 0) ++e.starts[(uint64_t)e.index[k] / kBlock];
  }
  int64_t end = 0;
  for (int64_t b = 0; b <= blocks; ++b) e.starts[b] = end += e.starts[b];
  for (int64_t k = 0; k < e.count; ++k) {
    if (e.index[k] >= 0) e.places[--e.starts[(uint64_t)e.index[k] / kBlock]] = (uint64_t)e.index[k] % kBlock;
  }
}

// The logits at the entries, -inf where they are absent.
KD_NOINLINE void gather_logits(const LossArgs& a, int64_t row, const Entries& e) {
  dispatch_storage(a.student.dtype, [&](auto s) {
    const auto* from = (const decltype(s)*)row_data(a.student, row);
    for (int64_t k = 0; k < e.count; ++k)
      e.logit[k] = e.index[k] < 0 ? -kInfinity : load_one(from + e.index[k]);
  });
  if (a.softcap == 0) return;
  for (int64_t k = 0; k < e.count; ++k) {
    if (e.logit[k] != -kInfinity) e.logit[k] = a.softcap * std::tanh(e.logit[k] * a.logit_scale / a.softcap);
  }
}

// `scaled`, whatever d is where there is nothing to scale.
KD_INLINE double scaled_sum(double total, double d) { return total == 0 ? 0 : scaled(total, d); }

// The largest of the entries' logits and, if there are other classes, of their offset: what is relative to it
// keeps its digits.
KD_NOINLINE double common_offset(const Entries& e, double others, bool has_others) {
  double high = has_others ? finite(others) : -kInfinity;
  for (int64_t k = 0; k < e.count; ++k) high = e.logit[k] > high ? e.logit[k] : high;
  return finite(high);
}
KD_NOINLINE void set_exponents(const Entries& e, double offset, double scale) {
  for (int64_t k = 0; k < e.count; ++k) e.y[k] = (e.logit[k] - offset) * scale;
}
KD_NOINLINE void exps_of_exponents(const Entries& e) {
  for (int64_t k = e.count; k % Types<double>::kLanes; ++k) e.y[k] = 0;
  for_vectors(e.y, e.count, [&](DoubleV y, int64_t) { return exp2(y); });
}

// Stores the entries' values in the gradient. What it needs of the logits is in e.logit: these may be
// overwritten.
KD_NOINLINE void store_values(const LossArgs& a, int64_t row, const Entries& e) {
  if (a.softcap != 0) {
    for (int64_t k = 0; k < e.count; ++k) {
      const double x = e.logit[k] / a.softcap;
      e.value[k] = e.logit[k] == -kInfinity ? 0 : e.value[k] * ((1 - x) * (1 + x));
    }
  }
  dispatch_storage(a.student.dtype, [&](auto s) {
    using S = decltype(s);
    S* to = (S*)a.grad + a.grad_layout.offset(row);
    for (int64_t k = 0; k < e.count; ++k) {
      if (e.index[k] < 0) continue;
      if constexpr (sizeof(S) == 2) {
        store_part(to + e.index[k], splat((float)e.value[k]), 1);
      } else {
        to[e.index[k]] = e.value[k];
      }
    }
  });
}

}  // namespace
}  // namespace kdfast
