// The product of two matrices with float sums, for processors on which PyTorch's is slow or rounds them.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace kdfast {

struct Factor {
  const void* data;
  DType dtype;               // not double
  int64_t stride, k_stride;  // of the result's rows or columns, and of the sum's terms: one of the two is 1
};

// out[m, n] (+)= the sum over k of a[m, k] * b[k, n], of which k >= 1
struct MatmulArgs {
  Factor a, b;
  int64_t m, n, k;
  float* out;
  int64_t out_stride;  // of rows; columns are contiguous
  bool add;

  // The units that threads take: blocks of the result, ordered along its longer side, so that a thread's are
  // nearly a rectangle.
  int64_t row_units() const { return (m + kUnitRows - 1) / kUnitRows; }
  int64_t column_units() const { return (n + kUnitColumns - 1) / kUnitColumns; }
  int64_t units() const { return row_units() * column_units(); }

  static constexpr int64_t kUnitRows = 60, kUnitColumns = 32;
};

}  // namespace kdfast
