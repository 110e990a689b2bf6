// Powers and logarithms of two, and what divergences.h asks for beside arithmetic.
#pragma once

#include <cfloat>
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

// The same number, of which the compiler does not know it.
__device__ inline float opaque(float x) {
  asm("" : "+f"(x));
  return x;
}
__device__ inline float fast_reciprocal(float x) {  // 1 ulp; of what is below the normal numbers inf
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A probability with its logarithm, which the exponent tells, as divergences.h's functions take it; their
// results have none.
struct Probability {
  float x, log;
  __device__ Probability(float number = 0, float its_log = 0) : x(number), log(its_log) {}
};
__device__ inline Probability operator+(Probability a, Probability b) { return a.x + b.x; }
__device__ inline Probability operator-(Probability a, Probability b) { return a.x - b.x; }
__device__ inline Probability operator*(Probability a, Probability b) { return a.x * b.x; }
__device__ inline Probability operator/(Probability a, Probability b) { return a.x / b.x; }
__device__ inline Probability operator-(Probability a) { return -a.x; }
__device__ inline bool operator==(Probability a, Probability b) { return a.x == b.x; }
__device__ inline bool operator<(Probability a, Probability b) { return a.x < b.x; }
__device__ inline bool operator>(Probability a, Probability b) { return a.x > b.x; }
__device__ inline Probability sqrt(Probability a) { return ::sqrtf(a.x); }

constexpr float kNothing = 1e-37f;  // divisors below it become it: what they divide is 0 but for rounding

__device__ inline Probability ratio(Probability a, Probability b) {
  return a.x * fast_reciprocal(fmaxf(b.x, kNothing));
}

// (log(1 + u) - u) / u^2 for |u| < 1/8; u^2 times it is off by 2e-8 of u
__device__ inline float log_series(float u) {
  float series = __fmaf_rn(u, -0.1700691f, 0.20339628f);
  series = __fmaf_rn(u, series, -0.24997411f);
  series = __fmaf_rn(u, series, 0.33331334f);
  return __fmaf_rn(u, series, -0.50000005f);
}
// The one for |u| < 1/8, or the other. As a condition it becomes a branch, and warps part.
__device__ inline float select_near(float u, float near, float far) {
  float x;
  asm("{\n\t.reg .pred near;\n\tsetp.lt.f32 near, %1, 0f3E000000;\n\tselp.f32 %0, %2, %3, near;\n\t}"
      : "=f"(x)
      : "f"(fabsf(u)), "f"(near), "f"(far));
  return x;
}
// log(1 + u), which is `far` where u is not small: a is 0 where that is -inf, and what it is multiplied with.
__device__ inline float log_near_1(float u, float far) {
  return select_near(u, __fmaf_rn(u * u, log_series(u), u), fmaxf(far, -1e30f));
}

// log(a / b) of a probability a: near equality from a - b, whose digits it has, else from a's logarithm.
__device__ inline float far_log_ratio(Probability a, float divisor) {
  return fmaxf(__fmaf_rn(fast_log2(divisor), -kLn2, a.log), -1e30f);
}
__device__ inline Probability log_ratio(Probability a, Probability b, Probability difference) {
  const float divisor = fmaxf(b.x, kNothing), u = difference.x * fast_reciprocal(divisor);
  return log_near_1(u, far_log_ratio(a, divisor));
}
__device__ inline Probability log_excess(Probability a, Probability b, Probability difference,
                                         Probability beta, Probability rest) {
  const float divisor = fmaxf(b.x, kNothing), u = difference.x * fast_reciprocal(divisor);
  return select_near(u, u * __fmaf_rn(u, log_series(u), rest.x),
                     __fmaf_rn(-beta.x, u, far_log_ratio(a, divisor)));
}
// With S = log_series(u): (1 + u) log(1 + u) - u = u^2 (1 + S + S u), times b
__device__ inline Probability kl_term(Probability a, Probability b, Probability difference) {
  const float divisor = fmaxf(b.x, kNothing), u = difference.x * fast_reciprocal(divisor);
  const float series = log_series(u), near = difference.x * u * (__fmaf_rn(series, u, series) + 1);
  return select_near(u, near, __fmaf_rn(a.x, far_log_ratio(a, divisor), -difference.x));
}

// log(p / m) and log(q / m) of jsd's m = beta p + rest q, from what they share.
struct MixtureLogs {
  float of_p, of_q;
  __device__ MixtureLogs(Probability p, Probability q, float beta, float rest) {
    const float m = fmaxf(__fmaf_rn(beta, p.x, rest * q.x), kNothing), log_m = fast_log2(m) * kLn2;
    const float u = (q.x - p.x) * fast_reciprocal(m);
    of_p = log_near_1(-rest * u, p.log - log_m);
    of_q = log_near_1(beta * u, q.log - log_m);
  }
};

}  // namespace
}  // namespace kdfast
