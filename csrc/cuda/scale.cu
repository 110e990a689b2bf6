// Backward's factor.
#include "launch.h"
#include "packs.cuh"

namespace kdfast {
namespace {

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

Kernel scale_kernel() { return {(const void*)&scale, "scale"}; }

}  // namespace kdfast
