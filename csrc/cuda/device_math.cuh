// Powers and logarithms of two, and what divergences.h asks for beside arithmetic.
#pragma once

#include <cmath>

namespace kdfast {
namespace {

constexpr float kLn2 = 0.6931471805599453f, kLog2E = 1.4426950408889634f, kInf = INFINITY;

// 2 ulp; what is below the normal numbers is 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float ratio(float a, float b) { return b == 0 ? 0 : __fdividef(a, b); }

// log(a / b) from a - b too, whose digits it has near equality; 0 where b, and with it a, is next to nothing.
__device__ inline float log_ratio(float a, float b, float difference) {
  const float w = __fdividef(difference, a + b), w2 = w * w;  // 2 atanh(w); |w| < 1/8: 4 terms
  const float series = w2 * (1.f / 3 + w2 * (1.f / 5 + w2 * (1.f / 7 + w2 * (1.f / 9))));
  const float far = fast_log2(__fdividef(a, b)) * kLn2;
  const float log = fabsf(w) < 0.125f ? 2 * (w + w * series) : far;
  return b < 1e-37f ? 0 : log == -kInf ? -87.f : log;  // a is 0 there, which it is multiplied with
}

}  // namespace
}  // namespace kdfast
