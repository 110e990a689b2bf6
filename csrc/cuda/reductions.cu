// Kernels of one number for many: the mean's denominator, a reduced loss, metrics; and backward's factor.
// Sums are of a fixed order, by one block: the same bits at every run.
#include "launch.h"
#include "packs.cuh"
#include "reduce.cuh"

namespace kdfast {
namespace {

template <int kCount_>
struct Sums {
  static constexpr int kCount = kCount_;
  float value[kCount];
  __device__ static Sums nothing() { return {}; }
  template <class R>
  __device__ Sums joined(const R&) const {
    Sums x;
#pragma unroll
    for (int i = 0; i < kCount; ++i) x.value[i] = warp_sum(value[i]);
    return x;
  }
};

// The weight with which a row enters the mean: 0 for those that drop out.
__device__ inline float weight_of(const ReduceArgs& a, int64_t row) {
  const float w = a.weight ? a.weight[row] : 1;
  return a.labels && a.labels[row] == a.ignore_index ? 0 : w;
}

__global__ void __launch_bounds__(kMostThreads) count(const __grid_constant__ ReduceArgs a) {
  __shared__ Lines<1> lines;
  Sums<1> sum{};
  for (int64_t row = threadIdx.x; row < a.rows; row += blockDim.x) sum.value[0] += weight_of(a, row);
  sum = BlockTeam().join(sum, lines, 0);
  if (threadIdx.x == 0) *a.out = sum.value[0];
}

__global__ void __launch_bounds__(kMostThreads) reduce(const __grid_constant__ ReduceArgs a) {
  __shared__ Lines<1> lines;
  Sums<1> sum{};
  for (int64_t row = threadIdx.x; row < a.rows; row += blockDim.x) sum.value[0] += a.by_row[row];
  sum = BlockTeam().join(sum, lines, 0);
  if (threadIdx.x == 0) {
    const float by = a.divisor ? *a.divisor == 0 ? 0 : a.scale / *a.divisor : a.scale;
    *a.out = sum.value[0] * by;
  }
}

__global__ void __launch_bounds__(kMostThreads) average(const __grid_constant__ ReduceArgs a) {
  __shared__ Lines<kMetrics + 1> lines;
  Sums<kMetrics + 1> sums{};
  for (int64_t row = threadIdx.x; row < a.rows; row += blockDim.x) {
    const float w = weight_of(a, row);
    if (w == 0) continue;  // its metrics are NaN
#pragma unroll
    for (int k = 0; k < kMetrics; ++k) sums.value[k] += w * a.by_row[(int64_t)a.rows * k + row];
    sums.value[kMetrics] += w;
  }
  sums = BlockTeam().join(sums, lines, 0);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < kMetrics; ++k)
      a.out[k] = sums.value[k] / sums.value[kMetrics];  // 0 / 0: no row is kept
  }
}

__global__ void __launch_bounds__(kMostThreads) scale(const __grid_constant__ ScaleArgs a) {
  const float factor = *a.factor;
  if (factor == 1) return;
  const DType dtype = a.grad.dtype;
  const int bytes = (int)bytes_of(dtype);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    char* at = row_start(a.grad, row);
    const int head = head_of(at, bytes, a.width), packs = (a.width - head) / 8, tail = head + 8 * packs;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
      float x[8];
      load_eight(x, at, dtype, head + 8 * i);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] *= factor;
      store_eight(x, at, dtype, head + 8 * i);
    }
    const int end = threadIdx.x < kHead ? (int)threadIdx.x : tail + (int)threadIdx.x - kHead;
    if (threadIdx.x < kHead ? end < head : end < a.width)
      set_element(at, dtype, end, factor * element(at, dtype, end));
  }
}

}  // namespace

Kernel count_kernel() { return {(const void*)&count, "count"}; }
Kernel reduce_kernel() { return {(const void*)&reduce, "reduce"}; }
Kernel average_kernel() { return {(const void*)&average, "average"}; }
Kernel scale_kernel() { return {(const void*)&scale, "scale"}; }

}  // namespace kdfast
