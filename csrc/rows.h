// What the torch glue of every device passes to its kernels. No torch here.
#pragma once

#include <cstdint>

#include "divergence_names.h"

// The CPU's kernels are compiled once per instruction set, and the linker must not share a function between
// them: so these are always inlined.
#ifdef __CUDACC__
#define KDFAST_ALWAYS_INLINE __host__ __device__ __forceinline__
#else
#define KDFAST_ALWAYS_INLINE __attribute__((always_inline)) inline
#endif

namespace kdfast {

enum class DType { kFloat, kBFloat16, kHalf, kDouble };
KDFAST_ALWAYS_INLINE int64_t bytes_of(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}
enum class Divergence {
#define X(name, Type) k##Type,
  KDFAST_DIVERGENCES
#undef X
      kNone
};
enum class Target { kLogits, kProbs, kLogProbs };

// A (rows, classes) matrix whose classes are contiguous. Its rows are those of up to three dimensions, since
// a slice such as logits[:, :-1] has no single row stride and is read in place all the same.
struct Matrix {
  const void* data;
  DType dtype;
  int64_t size[3];    // of the dimensions that make up the rows, outermost first
  int64_t stride[3];  // in elements

  KDFAST_ALWAYS_INLINE bool has_one_stride() const { return size[0] == 1 && size[1] == 1; }
  KDFAST_ALWAYS_INLINE int64_t offset(int64_t row) const {
    if (has_one_stride()) return row * stride[2];
    const int64_t outer = row / size[2];
    return (outer / size[1]) * stride[0] + (outer % size[1]) * stride[1] + (row % size[2]) * stride[2];
  }
};

// Numbers of a row, see row_math.h: of its sums, and of its gradient's coefficients.
constexpr int kSums = 12;
constexpr int kCoefficients = 19;
// In place of a label that another shard of the vocabulary has.
constexpr int64_t kOtherShard = INT64_MIN;
// In place of a row's first id where its token is ignored.
constexpr int64_t kIgnoredId = INT64_MIN;

// What return_metrics reports, in this order.
struct RowMetrics {
  double soft, hard, kl, student_entropy, teacher_entropy, agreement, accuracy;
};
constexpr int kMetrics = 7;

}  // namespace kdfast
