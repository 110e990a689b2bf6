// Vectors of one instruction set: the compiler's vector extensions, which have operators on every machine,
// and intrinsics where the compiler would not find the instruction. Compiled once per instruction set, which
// the compiler's macros name; all of it in an anonymous namespace.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define KD_INLINE __attribute__((always_inline)) inline
#define KD_NOINLINE __attribute__((noinline))

namespace kdfast {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// A vector of C (float or double), its integers of the same width, and its lanes' 16-bit halves.
template <class C>
struct Types;
template <>
struct Types<float> {
  static constexpr int kLanes = kVectorBytes / 4;
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t H __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct Types<double> {
  static constexpr int kLanes = kVectorBytes / 8;
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
};
using FloatV = Types<float>::V;
using DoubleV = Types<double>::V;

template <class To, class From>
KD_INLINE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <class C>
KD_INLINE typename Types<C>::V splat(C x) {
  return x - typename Types<C>::V{};  // + would be an instruction, for it makes 0 of -0
}

// a * b - c, rounded once
template <class V>
KD_INLINE V multiply_subtract(V a, V b, V c) {
#if !defined(__FMA__) && !defined(__aarch64__)
  if constexpr (sizeof(a[0]) == 4) {
    typedef double Wide __attribute__((vector_size(2 * kVectorBytes)));
    auto wide = [](V v) __attribute__((always_inline)) { return __builtin_convertvector(v, Wide); };
    return __builtin_convertvector(wide(a) * wide(b) - wide(c), V);
  }
#endif
  return a * b - c;  // the compiler's flags make one instruction of it
}

// (a > b) ? a : b, so b where either is NaN; the same holds for min
KD_INLINE FloatV max(FloatV a, FloatV b) {
#if defined(__AVX512F__)
  return (FloatV)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (FloatV)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (FloatV)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
KD_INLINE DoubleV max(DoubleV a, DoubleV b) { return a > b ? a : b; }
KD_INLINE FloatV min(FloatV a, FloatV b) {
#if defined(__AVX512F__)
  return (FloatV)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (FloatV)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (FloatV)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
KD_INLINE DoubleV min(DoubleV a, DoubleV b) { return a < b ? a : b; }

KD_INLINE FloatV masked(FloatV p, FloatV x) { return p * (p == 0 ? FloatV{} : x); }
KD_INLINE DoubleV masked(DoubleV p, DoubleV x) { return p * (p == 0 ? DoubleV{} : x); }

// A condition that does not change in a loop: keeps the compiler from making two loops of it.
KD_INLINE bool hide_from_optimizer(bool condition) {
  asm("" : "+r"(condition));
  return condition;
}

// Whether any lane of a comparison holds.
template <class I>
KD_INLINE bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_movepi8_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  auto found = mask[0];
  for (unsigned i = 1; i < sizeof(I) / sizeof(mask[0]); ++i) found |= mask[i];
  return found != 0;
#endif
}

// Whether any lane of a is not at most that of b; NaN is not.
KD_INLINE bool any_above(FloatV a, FloatV b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLE_UQ) != 0;
#else
  return any(~(a <= b));
#endif
}

template <class V>
KD_INLINE double sum(V v) {  // lane by lane in a fixed order
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4) return _mm512_reduce_add_ps((__m512)v);
#endif
  double total = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) total += v[i];
  return total;
}
template <class V>
KD_INLINE auto max_lane(V v) {  // of numbers
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4) return _mm512_reduce_max_ps((__m512)v);
#endif
  auto high = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) high = v[i] > high ? v[i] : high;
  return high;
}

}  // namespace
}  // namespace kdfast
