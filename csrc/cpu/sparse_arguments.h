// A sparse teacher's arguments as the kernels take them, and the checks of its entries.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "parallel.h"
#include "tensors.h"

namespace kdfast {
namespace {

inline Missing missing_of(const std::string& name) {
  return name == "tail"          ? Missing::kTail
         : name == "conditional" ? Missing::kConditional
         : name == "renormalize" ? Missing::kRenormalize
                                 : Missing::kTruncate;
}

// log_probs, indices: (..., K), readable and contiguous; they are to be kept.
inline EntryArgs entry_args(const Tensor& log_probs, const Tensor& indices, Divergence divergence,
                            const std::string& missing) {
  return {classes_of(indices),
          indices.const_data_ptr(),
          indices.scalar_type() == ScalarType::Long,
          matrix(log_probs),
          divergence,
          missing_of(missing)};
}

// f(entry, class) for each entry of a row that is present. Bits: of a log-probability; absent: those of -inf.
template <class Index, class Bits, class F>
void for_present(const EntryArgs& a, int64_t row, Bits absent, const F& f) {
  const Index* index = (const Index*)a.indices + row * a.count;
  const Bits* log_p = (const Bits*)a.log_probs.data + a.log_probs.offset(row);
  for (int64_t k = 0; k < a.count; ++k) {
    if (log_p[k] != absent) f(k, (int64_t)index[k]);
  }
}
template <class Index, class F>
void for_present(const EntryArgs& a, int64_t row, const F& f) {
  switch (a.log_probs.dtype) {
    case DType::kDouble:
      return for_present<Index, uint64_t>(a, row, 0xfff0000000000000, f);
    case DType::kFloat:
      return for_present<Index, uint32_t>(a, row, 0xff800000, f);
    case DType::kBFloat16:
      return for_present<Index, uint16_t>(a, row, 0xff80, f);
    case DType::kHalf:
      return for_present<Index, uint16_t>(a, row, 0xfc00, f);
  }
}
template <class F>
void for_present(const EntryArgs& a, int64_t row, const F& f) {
  a.wide ? for_present<int64_t>(a, row, f) : for_present<int32_t>(a, row, f);
}

inline void keep_least(std::atomic<int64_t>& least, int64_t x) {
  int64_t old = least;
  while (x < old && !least.compare_exchange_weak(old, x)) {
  }
}

[[noreturn]] inline void fail_out_of_range(const LossArgs& a, int64_t row) {
  for_present(a.entries, row, [&](int64_t k, int64_t index) {
    if ((uint64_t)index < (uint64_t)a.vocab) return;
    fail<std::out_of_range>("teacher.indices: ", index, " in row ", row, ", entry ", k,
                            " is out of range: with V = ", a.vocab, " it must be in [0, ", a.vocab - 1,
                            "]; a log-probability of -inf marks an entry as absent");
  });
  fail<std::out_of_range>("teacher.indices: changed while they were checked");
}
[[noreturn]] inline void fail_twice(const LossArgs& a, int64_t row) {
  std::vector<std::pair<int64_t, int64_t>> entries;  // class and entry
  for_present(a.entries, row, [&](int64_t k, int64_t index) { entries.push_back({index, k}); });
  std::sort(entries.begin(), entries.end());
  size_t i = 1;
  while (i + 1 < entries.size() && entries[i].first != entries[i - 1].first) ++i;
  fail<std::invalid_argument>("teacher.indices: class ", entries[i].first, " is twice in row ", row,
                              ", as entries ", entries[i - 1].second, " and ", entries[i].second);
}

// Raises for a class out of range and for one that is there twice, of rows that are kept. Errors are raised
// here, because they would be lost in a thread.
inline void check_entries(const LossArgs& a) {
  std::atomic<int64_t> out_of_range{a.rows}, twice{a.rows};
  in_parallel(a.rows, a.entries.count, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> seen(a.vocab / 64 + 1);
    for (int64_t row = begin; row < end; ++row) {
      if (!a.is_kept(row)) continue;
      bool is_in_range = true, is_twice = false;
      for_present(a.entries, row, [&](int64_t, int64_t index) {
        if ((uint64_t)index >= (uint64_t)a.vocab) {
          is_in_range = false;
          return;
        }
        uint64_t& word = seen[index / 64];
        const uint64_t bit = (uint64_t)1 << index % 64;
        is_twice |= (word & bit) != 0;
        word |= bit;
      });
      for_present(a.entries, row, [&](int64_t, int64_t index) {
        if ((uint64_t)index < (uint64_t)a.vocab) seen[index / 64] = 0;
      });
      if (!is_in_range) keep_least(out_of_range, row);
      if (is_twice) keep_least(twice, row);
    }
  });
  if (out_of_range < a.rows) fail_out_of_range(a, out_of_range);
  if (twice < a.rows) fail_twice(a, twice);
}

}  // namespace
}  // namespace kdfast
