// Backward's factor.
#include "launch.h"
#include "packs.cuh"

namespace kdfast {
namespace {

template <class S>
__global__ void __launch_bounds__(kMostThreads) scale(const __grid_constant__ ScaleArgs a) {
  const float factor = *a.factor;
  if (factor == 1) return;
  for (int64_t index = blockIdx.x; index < a.rows; index += gridDim.x) {
    S* row = row_at<S>(a.grad, index);
    const int head = head_of(row, sizeof(S), a.width), packs = (a.width - head) / kVec<S>;
    const int tail = head + kVec<S> * packs;
    uint4* whole = (uint4*)(row + head);
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
      Wide<S> x = widened<S>(__ldcg(whole + i));
#pragma unroll
      for (int j = 0; j < kVec<S>; ++j) x.x[j] *= factor;
      __stcs(whole + i, narrowed_pack<S>(x));
    }
    const int end = threadIdx.x < kHead ? (int)threadIdx.x : tail + (int)threadIdx.x - kHead;
    if (threadIdx.x < kHead ? end < head : end < a.width) row[end] = narrowed<S>(factor * widened(row[end]));
  }
}

}  // namespace

Kernel scale_kernel(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return {(const void*)&scale<__nv_bfloat16>, "scale"};
    case DType::kHalf:
      return {(const void*)&scale<__half>, "scale"};
    default:
      return {(const void*)&scale<float>, "scale"};
  }
}

}  // namespace kdfast
