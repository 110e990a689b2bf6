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

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class S>
__device__ inline S narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

template <class S>
__device__ inline void widen(uint4 pack, float (&x)[kVec<S>]) {
  const uint32_t word[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(S) == 4) {
      x[i] = __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {  // the upper half of an fp32
      x[2 * i] = __uint_as_float(word[i] << 16);
      x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    } else {
      const float2 two = __half22float2(*(const __half2*)&word[i]);
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
}

template <class S>
__device__ inline uint32_t narrow_pair(float low, float high) {
  if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *(const uint32_t*)&two;
  } else {
    const __half2 two = __floats2half2_rn(low, high);
    return *(const uint32_t*)&two;
  }
}

template <class S>
__device__ inline uint4 narrow(const float (&x)[kVec<S>]) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(S) == 4)
      word[i] = __float_as_uint(x[i]);
    else
      word[i] = narrow_pair<S>(x[2 * i], x[2 * i + 1]);
  }
  return {word[0], word[1], word[2], word[3]};
}

// The larger ones of two pairs, as fmaxf has it.
template <class S>
__device__ inline uint32_t max_of_pairs(uint32_t a, uint32_t b) {
  uint32_t max;
  if constexpr (std::is_same_v<S, __nv_bfloat16>)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
  return max;
}

// A pack of logits, in fp32 too.
template <class S>
struct Pack {
  static constexpr int kN = kVec<S>;
  uint4 words;
  float x[kN];
  __device__ explicit Pack(uint4 pack) : words(pack) { widen<S>(pack, x); }
  __device__ float operator[](int i) const { return x[i]; }

  // Whether one is above a logit of this type. NaN never is.
  __device__ bool exceeds(float logit) const {
    if constexpr (sizeof(S) == 4) {
      return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])) > logit;
    } else {
      const uint32_t pair = narrow_pair<S>(logit, logit);
      const uint32_t a = max_of_pairs<S>(words.x, words.y), b = max_of_pairs<S>(words.z, words.w);
      return max_of_pairs<S>(max_of_pairs<S>(a, b), pair) != pair;
    }
  }
};
// A logit by itself.
struct End {
  static constexpr int kN = 1;
  float x;
  __device__ float operator[](int) const { return x; }
  __device__ bool exceeds(float logit) const { return x > logit; }
};

// 16 bytes from global to shared memory without a register in between; past the L1, which holds nothing that
// is wanted twice.
__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
// A pointer to shared memory that the compiler keeps in a register, and does not compute again.
__device__ inline uint4* kept_pointer(uint4* p) {
  uint32_t address = shared_address(p);
  asm("" : "+r"(address));
  return (uint4*)__cvta_shared_to_generic(address);
}
__device__ inline void copy_async(uint4* to, const uint4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ inline void wait_for_copies() {  // all groups of this thread but the last kLeft
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

template <class S>
__device__ inline S* row_data(const Matrix& m, int64_t index) {
  return (S*)m.data + m.offset(index);
}

// f of a number of the gradient's type, which is that of the logits, or of fp32 logits a 16-bit one.
template <class S, class F>
__device__ inline void with_gradient_type(DType dtype, F f) {
  if constexpr (sizeof(S) == 4) {
    if (dtype == DType::kBFloat16) return f(__nv_bfloat16{});
    if (dtype == DType::kHalf) return f(__half{});
  }
  f(S{});
}

// A pack's numbers, to where their vector begins.
template <class G>
__device__ inline void store_vector(G* to, const float (&x)[kVec<G>]) {
  __stcs((uint4*)to, narrow<G>(x));
}
template <class G>
__device__ inline void store_vector(G* to, const float (&x)[kVec<G> / 2]) {
  __stcs((uint2*)to, uint2{narrow_pair<G>(x[0], x[1]), narrow_pair<G>(x[2], x[3])});
}

// Classes of a row of n before the first at a multiple of 32 bytes, which is what memory moves.
constexpr int kPrefix = 16;  // there are fewer
__device__ inline int prefix_classes(const void* row, int bytes, int n) {
  const int prefix = (int)((32 - ((uintptr_t)row & 31)) & 31) / bytes;
  return prefix < n ? prefix : n;
}
// A thread's class of those before or after the packs; -1: none.
__device__ inline int end_class(int thread, int prefix, int in_packs, int n) {
  if (thread < kPrefix) return thread < prefix ? thread : -1;
  const int end = prefix + in_packs + thread - kPrefix;
  return end < n ? end : -1;
}

}  // namespace
}  // namespace kdfast
