// 2^y and log2(y) on vectors. Both are right for every input: 2^-inf = 0, 2^(>= 128) = inf, log2(0) = -inf,
// and NaN stays NaN, so that the kernels need no guards of their own.
#pragma once

#include "storage.h"

namespace kdfast {
namespace {

#if !defined(__AVX512DQ__)
// Of y within [-127, 128]. seen: the bits of all integers y was rounded to, shifted.
KD_INLINE FloatV exp2_of_clamped(FloatV y, Types<float>::U& seen) {
  using U = Types<float>::U;
  const FloatV shifted = y + (0x1.8p23f + 127);  // rounds to an integer; the low bits hold it and the bias
  const FloatV f = y - (shifted - (0x1.8p23f + 127));
  seen |= bits<U>(shifted);
  FloatV p = splat(0x1.5bba14p-10f);
  p = p * f + 0x1.3cea88p-7f;
  p = p * f + 0x1.c6b752p-5f;
  p = p * f + 0x1.ebf9bcp-3f;
  p = p * f + 0x1.62e42ap-1f;
  p = p * f + 1;
  return p * bits<FloatV>(bits<U>(shifted) << 23);  // 2^-127 is 0 here, 2^128 infinity
}
#endif

// Minimax in the relative error (0.9e-7 before rounding, 1.7e-7 after) among the polynomials that are 1 at 0.
KD_INLINE FloatV exp2(FloatV y) {
#if defined(__AVX512DQ__)
  // 2^f for f = y - floor(y); both instructions are right for infinities
  const FloatV f = (FloatV)_mm512_reduce_ps((__m512)y, _MM_FROUND_TO_NEG_INF);
  FloatV p = splat(0x1.e974fap-10f);
  p = p * f + 0x1.277856p-7f;
  p = p * f + 0x1.c91ce6p-5f;
  p = p * f + 0x1.ebdb56p-3f;
  p = p * f + 0x1.62e4bap-1f;
  p = p * f + 1;
  return (FloatV)_mm512_scalef_ps((__m512)p, (__m512)y);
#else
  y = max(splat(-127.f), min(splat(128.f), y));  // in this order NaN stays NaN
  Types<float>::U seen{};
  return exp2_of_clamped(y, seen);
#endif
}

// Whether exponents were all within [-127, 128], where exp2 need not clamp them.
struct SeenExponents {
#if defined(__AVX512DQ__)  // there it never does
  static constexpr bool kAreChecked = false;
  KD_INLINE bool are_in_range() const { return true; }
#else
  static constexpr bool kAreChecked = true;
  Types<float>::U shifted{};
  // 0 to 255 of them leave all other bits alone; NaN, infinities and all other numbers do not
  KD_INLINE bool are_in_range() const { return !any((shifted & ~0xffu) != 0x4b400000u); }
#endif
};
KD_INLINE FloatV exp2(FloatV y, [[maybe_unused]] SeenExponents& seen) {
#if defined(__AVX512DQ__)
  return exp2(y);
#else
  return exp2_of_clamped(y, seen.shifted);
#endif
}

KD_INLINE double exp2(double y) { return std::exp2(y); }
KD_INLINE double log2(double x) { return std::log2(x); }

KD_INLINE DoubleV exp2(DoubleV y) {
  using I = Types<double>::I;
  y = y < -1023 ? DoubleV{} - 1023 : y;
  y = y > 1024 ? DoubleV{} + 1024 : y;
  const DoubleV shifted = y + 0x1.8p52;
  const DoubleV x = (y - (shifted - 0x1.8p52)) * 0x1.62e42fefa39efp-1;
  DoubleV p = splat(1. / 6227020800);  // Taylor: |x| <= ln(2) / 2, so the first term left out is below 2^-56
  const double coefficients[] = {
      1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040, 1. / 720,
      1. / 120,       1. / 24,       1. / 6,       1. / 2,      1.,         1.};
  for (double c : coefficients) p = p * x + c;
  return p * bits<DoubleV>((bits<I>(shifted) + 1023) << 52);
}

// log(1 + f) - f = -f^2/2 + f^3 * P(f) for 1 + f in [sqrt(1/2), sqrt(2)), P as in Cephes' logf.
KD_INLINE FloatV log_rest(FloatV f) {
  FloatV p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return f * f * (p * f - 0.5f);
}

// x = 2^e * m, m in [sqrt(1/2), sqrt(2)).
KD_INLINE FloatV log2(FloatV x) {
  using I = Types<float>::I;
  const I tiny = x < 0x1p-126f;
  const FloatV scaled = tiny ? x * 0x1p24f : x;
  const I e = (bits<I>(scaled) - 0x3f3504f3) >> 23;
  const FloatV f = bits<FloatV>(bits<I>(scaled) - (e << 23)) - 1;
  const FloatV rest = log_rest(f);
  const FloatV exponent = __builtin_convertvector(e, FloatV) - (tiny ? splat(24.f) : FloatV{});
  FloatV y = exponent + (f * 0x1.715476p+0f + rest * 0x1.715476p+0f);
  y = x == 0 ? splat(-std::numeric_limits<float>::infinity()) : y;
  y = x < 0 ? splat(std::numeric_limits<float>::quiet_NaN()) : y;
  return (x != x) | (x == std::numeric_limits<float>::infinity()) ? x : y;
}

KD_INLINE DoubleV log2(DoubleV x) {  // rare: only fp64 probabilities come here
  for (int i = 0; i < Types<double>::kLanes; ++i) x[i] = std::log2(x[i]);
  return x;
}

// a / b of numbers >= 0; 0 where both are.
KD_INLINE FloatV ratio(FloatV a, FloatV b) {
  return a * (1 / max(splat(std::numeric_limits<float>::min()), b));
}
KD_INLINE DoubleV ratio(DoubleV a, DoubleV b) {
  return a / max(splat(std::numeric_limits<double>::min()), b);
}

struct LogRatio {  // log(a / b) = exponent + s (2 + more)
  FloatV exponent, s, more;
  FloatV difference;       // of a and the power of 2 times b that is near it: 2 a s is difference (1 + s)
  Types<float>::I is_far;  // where that power is not 1
  KD_INLINE FloatV rest() const { return exponent + s * more; }
};
KD_INLINE LogRatio split_log_ratio(FloatV a, FloatV b, FloatV difference) {
  using I = Types<float>::I;
  a = max(splat(std::numeric_limits<float>::min()), a);
  // a / b is 2^(e / 2^23) times a number in [2/3, 3/2]
  const I e = (bits<I>(a) - (bits<I>(b) - 0x4afb0d)) & (int)0xff800000;
  const FloatV scaled = bits<FloatV>(bits<I>(b) + e);  // > 0 where b is 0, too
  const I is_far = e != 0;
  difference = is_far ? a - scaled : difference;
  const FloatV s = difference / (a + scaled), z = s * s;
  FloatV p = splat(0x1.39e6c4p-2f);  // of log = 2 atanh(s), minimax, 5e-9
  p = p * z + 0x1.990476p-2f;
  p = p * z + 0x1.5555e8p-1f;
  return {__builtin_convertvector(e, FloatV) * 0x1.62e43p-24f, s, p * z, difference, is_far};
}

// log(a / b) of numbers >= 0 whose difference a - b is given: near equality its digits are those of the
// difference. It is for products with a: where a is 0, or b next to nothing, or either NaN, it is some
// number.
KD_INLINE FloatV log_ratio(FloatV a, FloatV b, FloatV difference) {
  const LogRatio log = split_log_ratio(a, b, difference);
  return log.exponent + log.s * (2 + log.more);
}

// log(a / b) - beta (a - b) / b, as log_ratio; rest = 1 - beta. What is of first order in the difference
// cancels where beta is near 1: 2 s - difference / b is -s difference / b.
KD_INLINE FloatV log_excess(FloatV a, FloatV b, FloatV difference, FloatV beta, FloatV rest) {
  const LogRatio log = split_log_ratio(a, b, difference);
  const FloatV u = ratio(difference, b);
  return log.rest() + (log.is_far ? (log.s + log.s) - beta * u : (rest - log.s) * u);
}

// a log(a / b) - (a - b), whose first-order terms cancel: near equality the last difference here is 0.
KD_INLINE FloatV kl_term(FloatV a, FloatV b, FloatV difference) {
  const LogRatio log = split_log_ratio(a, b, difference);
  return a * log.rest() + (log.difference * log.s + (log.difference - difference));
}

KD_INLINE DoubleV log_ratio(DoubleV a, DoubleV b, DoubleV difference) {
  DoubleV y{};
  for (int i = 0; i < Types<double>::kLanes; ++i) {
    if (a[i] == 0 || b[i] < std::numeric_limits<double>::min()) continue;
    const double f = difference[i] / b[i];
    y[i] = std::abs(f) < 0.5 ? std::log1p(f) : std::log(a[i] / b[i]);
  }
  return y;
}

KD_INLINE DoubleV log_excess(DoubleV a, DoubleV b, DoubleV difference, DoubleV beta, DoubleV) {
  return log_ratio(a, b, difference) - beta * ratio(difference, b);
}
KD_INLINE DoubleV kl_term(DoubleV a, DoubleV b, DoubleV difference) {
  return a * log_ratio(a, b, difference) - difference;
}

KD_INLINE FloatV sqrt(FloatV x) {
#if defined(__AVX512DQ__)
  // a step of Newton's: the instruction for roots takes as long as ten others. 0 and infinity are their roots
  const __mmask16 others = ~_mm512_fpclass_ps_mask((__m512)x, 0x0e);
  const FloatV r = (FloatV)_mm512_rsqrt14_ps((__m512)x);
  const FloatV y = (FloatV)_mm512_mask_mul_ps((__m512)x, others, (__m512)x, (__m512)r);
  const FloatV more = 0.5f - y * (0.5f * r);
  return (FloatV)_mm512_mask_fmadd_ps((__m512)y, others, (__m512)more, (__m512)y);
#elif defined(__AVX2__)
  return (FloatV)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (FloatV)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < Types<float>::kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}
KD_INLINE DoubleV sqrt(DoubleV x) {
  for (int i = 0; i < Types<double>::kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

}  // namespace
}  // namespace kdfast
