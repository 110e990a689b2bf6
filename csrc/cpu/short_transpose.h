// Rows of few classes, to and from vectors that hold one class of each row: four classes of all rows of a
// group at a time.
#pragma once

#include "storage.h"

namespace kdfast {
namespace {

// Four classes, from i on, of the rows first[0], first[4], first[8], ...: each row fills a quarter of the
// vector.
#if defined(__AVX512F__)
KD_INLINE FloatV load_quarters(const float* const* first, int64_t i) {
  __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(first[0] + i));
  x = _mm512_insertf32x4(x, _mm_loadu_ps(first[4] + i), 1);
  x = _mm512_insertf32x4(x, _mm_loadu_ps(first[8] + i), 2);
  return (FloatV)_mm512_insertf32x4(x, _mm_loadu_ps(first[12] + i), 3);
}
KD_INLINE void store_quarters(FloatV v, float* const* first, int64_t i) {
  const __m512 x = (__m512)v;
  _mm_storeu_ps(first[0] + i, _mm512_castps512_ps128(x));
  _mm_storeu_ps(first[4] + i, _mm512_extractf32x4_ps(x, 1));
  _mm_storeu_ps(first[8] + i, _mm512_extractf32x4_ps(x, 2));
  _mm_storeu_ps(first[12] + i, _mm512_extractf32x4_ps(x, 3));
}
#define KDFAST_LANES(operation) _mm512_##operation
#elif defined(__AVX2__)
KD_INLINE FloatV load_quarters(const float* const* first, int64_t i) {
  return (FloatV)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(first[0] + i)),
                                      _mm_loadu_ps(first[4] + i), 1);
}
KD_INLINE void store_quarters(FloatV v, float* const* first, int64_t i) {
  _mm_storeu_ps(first[0] + i, _mm256_castps256_ps128((__m256)v));
  _mm_storeu_ps(first[4] + i, _mm256_extractf128_ps((__m256)v, 1));
}
#define KDFAST_LANES(operation) _mm256_##operation
#else
KD_INLINE FloatV load_quarters(const float* const* first, int64_t i) { return load(first[0] + i); }
KD_INLINE void store_quarters(FloatV v, float* const* first, int64_t i) { store(first[0] + i, v); }
#define KDFAST_LANES(operation) _mm_##operation
#endif

// Transposes the 4 x 4 numbers that each quarter of the four vectors holds.
KD_INLINE void transpose_quarters(FloatV (&x)[4]) {
#if defined(__x86_64__)
  const auto a = KDFAST_LANES(unpacklo_ps)(x[0], x[1]), b = KDFAST_LANES(unpackhi_ps)(x[0], x[1]);
  const auto c = KDFAST_LANES(unpacklo_ps)(x[2], x[3]), d = KDFAST_LANES(unpackhi_ps)(x[2], x[3]);
  x[0] = KDFAST_LANES(shuffle_ps)(a, c, 0x44);
  x[1] = KDFAST_LANES(shuffle_ps)(a, c, 0xee);
  x[2] = KDFAST_LANES(shuffle_ps)(b, d, 0x44);
  x[3] = KDFAST_LANES(shuffle_ps)(b, d, 0xee);
#else
  const FloatV rows[4] = {x[0], x[1], x[2], x[3]};
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 4; ++k) x[i][k] = rows[k][i];
#endif
}
#undef KDFAST_LANES

// Calls f with the first of four classes, until all of n >= 4 had their turn; the last ones may have two.
template <class F>
KD_INLINE void for_four_classes(int64_t n, F f) {
  for (int64_t i = 0; i < n; i += 4) f(i = i < n - 4 ? i : n - 4);
}

// Copies n classes of a group's rows to their lanes, or back.
KD_INLINE void to_lanes(const float* const* rows, int64_t n, float* lanes) {
  constexpr int kLanes = Types<float>::kLanes;
  if (n < 4) {
    for (int64_t i = 0; i < n; ++i)
      for (int r = 0; r < kLanes; ++r) lanes[i * kLanes + r] = rows[r][i];
    return;
  }
  for_four_classes(n, [&](int64_t i) __attribute__((always_inline)) {
    FloatV x[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) x[k] = load_quarters(rows + k, i);
    transpose_quarters(x);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) store(lanes + (i + k) * kLanes, x[k]);
  });
}
KD_INLINE void from_lanes(const float* lanes, int64_t n, float* const* rows) {
  constexpr int kLanes = Types<float>::kLanes;
  if (n < 4) {
    for (int64_t i = 0; i < n; ++i)
      for (int r = 0; r < kLanes; ++r) rows[r][i] = lanes[i * kLanes + r];
    return;
  }
  for_four_classes(n, [&](int64_t i) __attribute__((always_inline)) {
    FloatV x[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) x[k] = load(lanes + (i + k) * kLanes);
    transpose_quarters(x);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) store_quarters(x[k], rows + k, i);
  });
}

}  // namespace
}  // namespace kdfast
