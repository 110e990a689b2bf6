// Backward's factor.
#include "launch.h"
#include "packs.cuh"

namespace kdfast {
namespace {

template <class S>
__global__ void __launch_bounds__(kBlockThreads) scale(const __grid_constant__ ScaleArgs a) {
  const float factor = *a.factor;
  if (factor == 1) return;
  for (int64_t index = blockIdx.x; index < a.rows; index += gridDim.x) {
    S* row = row_data<S>(a.grad, index);
    const int prefix = prefix_classes(row, sizeof(S), a.width), packs = (a.width - prefix) / kVec<S>;
    uint4* vectors = (uint4*)(row + prefix);
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
      float x[kVec<S>];
      widen<S>(__ldcg(vectors + i), x);
#pragma unroll
      for (int j = 0; j < kVec<S>; ++j) x[j] *= factor;
      __stcs(vectors + i, narrow<S>(x));
    }
    const int end = end_class(threadIdx.x, prefix, packs * kVec<S>, a.width);
    if (end >= 0) row[end] = narrow<S>(factor * widen(row[end]));
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
