// How values lie in memory: 16-bit floats, whole vectors, parts of them, and two at once.
#pragma once

#include <type_traits>

#include "simd.h"

namespace kdfast {
namespace {

// Storage types: the bits of a 16-bit float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type in which values of storage type S are computed.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// ---- 16-bit storage ----

KD_INLINE FloatV widen(Types<float>::H h, bf16) {
#if defined(__AVX512F__)  // which GCC makes several instructions of
  return (FloatV)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#endif
  return bits<FloatV>(__builtin_convertvector(h, Types<float>::U) << 16);
}

KD_INLINE FloatV widen(Types<float>::H h, f16) {
#if defined(__AVX512F__)
  return (FloatV)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (FloatV)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  typedef __fp16 Half __attribute__((vector_size(8)));
  return __builtin_convertvector(bits<Half>(h), FloatV);
#else
  using U = Types<float>::U;
  const U wide = __builtin_convertvector(h, U);
  // shifts exponent and mantissa; the product corrects the exponent's bias, of denormals too
  const FloatV magnitude = bits<FloatV>((wide & 0x7fff) << 13) * 0x1p112f;
  const U special = (wide & 0x7c00) == 0x7c00 ? U{} + 0x7f800000 : U{};
  return bits<FloatV>(bits<U>(magnitude) | special | (wide & 0x8000) << 16);
#endif
}

KD_INLINE Types<float>::H narrow(FloatV x, bf16) {
#if defined(__AVX512BF16__)
  return (Types<float>::H)_mm512_cvtneps_pbh((__m512)x);
#else
  using U = Types<float>::U;
  const U u = bits<U>(x);
  const U rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;  // to nearest, ties to even
  const U quiet = U{} + 0x7fc0;
  return __builtin_convertvector((x == x) ? rounded : quiet, Types<float>::H);
#endif
}

KD_INLINE Types<float>::H narrow(FloatV x, f16) {
#if defined(__AVX512F__)
  return (Types<float>::H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (Types<float>::H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  typedef __fp16 Half __attribute__((vector_size(8)));
  return bits<Types<float>::H>(__builtin_convertvector(x, Half));
#else
  using U = Types<float>::U;
  const U sign = bits<U>(x) & 0x80000000u, u = bits<U>(x) ^ sign;
  const FloatV a = bits<FloatV>(u);
  // normal: rebias and round the 13 bits that go; subnormal: adding 0.5 leaves the rounded result in the low
  // bits
  const U normal = (u + 0xc8000fffu + (u >> 13 & 1)) >> 13;
  const U small = bits<U>(a + 0.5f) - 0x3f000000u;
  U half = u < 0x38800000u ? small : normal;
  half = u >= 0x47800000u ? (u > 0x7f800000u ? U{} + 0x7e00 : U{} + 0x7c00) : half;
  return __builtin_convertvector(half | sign >> 16, Types<float>::H);
#endif
}

// ---- loads and stores: kLanes elements, or the first n of them; and two vectors at once ----

KD_INLINE FloatV load(const float* p) {
  FloatV v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
KD_INLINE DoubleV load(const double* p) {
  DoubleV v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class S>
KD_INLINE FloatV load(const S* p) {
  Types<float>::H h;
  std::memcpy(&h, p, sizeof(h));
  return widen(h, S{});
}

KD_INLINE void store(float* p, FloatV v) { std::memcpy(p, &v, sizeof(v)); }
KD_INLINE void store(double* p, DoubleV v) { std::memcpy(p, &v, sizeof(v)); }
template <class S>
KD_INLINE void store(S* p, FloatV v) {
  const auto h = narrow(v, S{});
  std::memcpy(p, &h, sizeof(h));
}

template <class S>
KD_INLINE auto load_part(const S* p, int n, Compute<S> fill) {
  using C = Compute<S>;
  constexpr int kLanes = Types<C>::kLanes;
#if defined(__AVX512F__)
  const __mmask16 first = (__mmask16)((1u << n) - 1);
  if constexpr (sizeof(S) == 4) return (FloatV)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first, p);
  if constexpr (sizeof(S) == 2) {
    const FloatV v = widen((Types<float>::H)_mm256_maskz_loadu_epi16(first, p), S{});
    return (FloatV)_mm512_mask_mov_ps(_mm512_set1_ps(fill), first, (__m512)v);
  }
#endif
  S part[kLanes] = {};
  std::memcpy(part, p, n * sizeof(S));
  auto v = load(part);
  for (int i = n; i < kLanes; ++i) v[i] = fill;
  return v;
}

template <class S, class V>
KD_INLINE void store_part(S* p, V v, int n) {
#if defined(__AVX512F__)
  const __mmask16 first = (__mmask16)((1u << n) - 1);
  if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(p, first, (__m512)v);
  if constexpr (sizeof(S) == 2) return _mm256_mask_storeu_epi16(p, first, (__m256i)narrow(v, S{}));
#endif
  S part[sizeof(V) / sizeof(v[0])];
  store(part, v);
  std::memcpy(p, part, n * sizeof(S));
}

// 2 * kLanes elements as two vectors: the first and the second half. Of 16-bit floats: those at even and at
// odd places, which are the halves of 32-bit words and need no shuffle; all between a load2 and a store2 has
// that order.
template <class V>
struct Two {
  V a, b;
};

template <class C>
KD_INLINE auto load2(const C* p) {
  return Two<typename Types<C>::V>{load(p), load(p + Types<C>::kLanes)};
}
KD_INLINE auto load2(const bf16* p) {
  Types<float>::U u;
  std::memcpy(&u, p, sizeof(u));
  return Two<FloatV>{bits<FloatV>(u << 16), bits<FloatV>(u & 0xffff0000u)};
}
template <class S>
KD_INLINE auto load2_part(const S* p, int n, S fill) {
#if defined(__AVX512BW__)
  const __mmask32 first = (1u << n) - 1;
  if constexpr (std::is_same_v<S, float>) {
    const __m512 filled = _mm512_set1_ps(fill);
    return Two<FloatV>{(FloatV)_mm512_mask_loadu_ps(filled, (__mmask16)first, p),
                       (FloatV)_mm512_mask_loadu_ps(filled, (__mmask16)(first >> 16), p + 16)};
  }
  if constexpr (std::is_same_v<S, bf16>) {
    bf16 part[32];
    _mm512_storeu_si512(part, _mm512_mask_loadu_epi16(_mm512_set1_epi16((short)fill.bits), first, p));
    return load2(part);
  }
#endif
  S part[2 * Types<Compute<S>>::kLanes];
  for (S& x : part) x = fill;
  std::memcpy(part, p, n * sizeof(S));
  return load2(part);
}

KD_INLINE Types<float>::U narrow2(Two<FloatV> v) {
  using U = Types<float>::U;
#if defined(__AVX512BF16__)
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a);
  const U even = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (U)_mm512_permutexvar_epi16((__m512i)(even | (even + 16) << 16), halves);
#else
  // NaN stays NaN without a test: what comes of bf16 values has no payload in the bits that the rounding
  // carries from
  auto rounded = [](FloatV x) __attribute__((always_inline)) {
    const U u = bits<U>(x);
    return u + 0x7fff + (u >> 16 & 1);
  };
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (U)_mm256_blend_epi16((__m256i)(rounded(v.a) >> 16), (__m256i)rounded(v.b), 0xaa);
#else
  return rounded(v.a) >> 16 | (rounded(v.b) & 0xffff0000u);
#endif
#endif
}
template <class C, class V>
KD_INLINE void store2(C* p, Two<V> v) {
  store(p, v.a);
  store(p + sizeof(V) / sizeof(C), v.b);
}
KD_INLINE void store2(bf16* p, Two<FloatV> v) {
  const auto u = narrow2(v);
  std::memcpy(p, &u, sizeof(u));
}
template <class S, class V>
KD_INLINE void store2_part(S* p, Two<V> v, int n) {
#if defined(__AVX512BW__)
  const __mmask32 first = (1u << n) - 1;
  if constexpr (std::is_same_v<S, bf16>) return _mm512_mask_storeu_epi16(p, first, (__m512i)narrow2(v));
  if constexpr (std::is_same_v<S, float>) {
    _mm512_mask_storeu_ps(p, (__mmask16)first, (__m512)v.a);
    return _mm512_mask_storeu_ps(p + 16, (__mmask16)(first >> 16), (__m512)v.b);
  }
#endif
  S part[2 * sizeof(V) / sizeof(v.a[0])];
  store2(part, v);
  std::memcpy(p, part, n * sizeof(S));
}

// One element as C, through the vector conversions, so that there is one of each.
template <class S>
KD_INLINE Compute<S> load_one(const S* p) {
  return load_part(p, 1, 0)[0];
}

}  // namespace
}  // namespace kdfast
