// Memory as the row kernels touch it: 16 bytes a thread, widened to fp32 in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "arguments.h"

namespace kdfast {
namespace {

// Classes in 16 bytes.
template <class S>
constexpr int kVec = 16 / (int)sizeof(S);

template <class S>
struct Wide {  // a pack's numbers
  float x[kVec<S>];
};

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widened(__half x) { return __half2float(x); }

template <class S>
__device__ inline S narrowed(float x);
template <>
__device__ inline float narrowed<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 narrowed<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half narrowed<__half>(float x) {
  return __float2half_rn(x);
}

template <class S>
__device__ inline Wide<S> widened(uint4 pack) {
  const uint32_t word[4] = {pack.x, pack.y, pack.z, pack.w};
  Wide<S> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(S) == 4) {
      out.x[i] = __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {  // the upper half of an fp32
      out.x[2 * i] = __uint_as_float(word[i] << 16);
      out.x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    } else {
      const float2 two = __half22float2(*(const __half2*)&word[i]);
      out.x[2 * i] = two.x;
      out.x[2 * i + 1] = two.y;
    }
  }
  return out;
}

template <class S>
__device__ inline uint4 narrowed_pack(const Wide<S>& in) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(S) == 4) {
      word[i] = __float_as_uint(in.x[i]);
    } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
      const __nv_bfloat162 two = __floats2bfloat162_rn(in.x[2 * i], in.x[2 * i + 1]);
      word[i] = *(const uint32_t*)&two;
    } else {
      const __half2 two = __floats2half2_rn(in.x[2 * i], in.x[2 * i + 1]);
      word[i] = *(const uint32_t*)&two;
    }
  }
  return {word[0], word[1], word[2], word[3]};
}

// 16 bytes from global to shared memory without a register in between; past the L1, which holds nothing that
// is wanted twice.
__device__ inline void copy_async(uint4* to, const uint4* from) {
  const uint32_t shared = (uint32_t)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ inline void await_copies() {  // all groups of this thread but the last kLeft
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

template <class S>
__device__ inline S* row_at(const Matrix& m, int64_t index) {
  return (S*)m.data + m.offset(index);
}

// Classes before the first that lies at a multiple of 32 bytes, which is what memory moves; fewer than kHead.
constexpr int kHead = 16;
__device__ inline int head_of(const void* row, int bytes, int n) {
  const int head = (int)((32 - ((uintptr_t)row & 31)) & 31) / bytes;
  return head < n ? head : n;
}

// ---- tensors whose type, or alignment, is known at run time only ----

struct General {};  // in place of a storage type
template <class S>
constexpr bool kGeneral = std::is_same_v<S, General>;

__device__ inline char* row_start(const Matrix& m, int64_t index) {
  return (char*)m.data + m.offset(index) * bytes_of(m.dtype);
}

__device__ inline float element(const void* row, DType dtype, int i) {
  return dtype == DType::kFloat      ? ((const float*)row)[i]
         : dtype == DType::kBFloat16 ? widened(((const __nv_bfloat16*)row)[i])
                                     : widened(((const __half*)row)[i]);
}
__device__ inline void set_element(void* row, DType dtype, int i, float x) {
  if (dtype == DType::kFloat) {
    ((float*)row)[i] = x;
  } else if (dtype == DType::kBFloat16) {
    ((__nv_bfloat16*)row)[i] = narrowed<__nv_bfloat16>(x);
  } else {
    ((__half*)row)[i] = narrowed<__half>(x);
  }
}

// Eight classes from class `first` on, in 16-byte pieces where they lie so.
__device__ inline void load_eight(float (&x)[8], const void* row, DType dtype, int first) {
  const char* at = (const char*)row + first * bytes_of(dtype);
  if ((uintptr_t)at & 15) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = element(at, dtype, i);
  } else if (dtype == DType::kFloat) {
    const Wide<float> a = widened<float>(__ldcg((const uint4*)at)),
                      b = widened<float>(__ldcg((const uint4*)at + 1));
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = a.x[i], x[4 + i] = b.x[i];
  } else {
    const uint4 pack = __ldcg((const uint4*)at);
    const Wide<__nv_bfloat16> a = widened<__nv_bfloat16>(pack);
    const Wide<__half> b = widened<__half>(pack);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = dtype == DType::kBFloat16 ? a.x[i] : b.x[i];
  }
}
__device__ inline void store_eight(const float (&x)[8], void* row, DType dtype, int first) {
  char* at = (char*)row + first * bytes_of(dtype);
  if ((uintptr_t)at & 15) {
#pragma unroll
    for (int i = 0; i < 8; ++i) set_element(at, dtype, i, x[i]);
  } else if (dtype == DType::kFloat) {
    __stcs((float4*)at, float4{x[0], x[1], x[2], x[3]});
    __stcs((float4*)at + 1, float4{x[4], x[5], x[6], x[7]});
  } else {
    Wide<__nv_bfloat16> a;
    Wide<__half> b;
#pragma unroll
    for (int i = 0; i < 8; ++i) a.x[i] = b.x[i] = x[i];
    __stcs((uint4*)at,
           dtype == DType::kBFloat16 ? narrowed_pack<__nv_bfloat16>(a) : narrowed_pack<__half>(b));
  }
}

}  // namespace
}  // namespace kdfast
