// Logits as the terms see them, where a call asks for more than two tensors of logits that lie alike.
//
//   softcap        s' = c tanh(s / c), of a masked class still -inf
//   standardize    z = (s' - mean) / (1e-7 + sd),  sd^2 = sum (s' - mean)^2 / (V - 1)
//   teachers       one's logits; the weighted mean of several (a geometric ensemble); or probabilities, as
//                  given or as the weighted mean of those given, or of the teachers' softmaxes
#pragma once

#include "statistics.cuh"

namespace kdfast {
namespace {

// Of a tensor's logits over one row: count, mean and sum of squares about it, less `first`, joined as Chan et
// al. (1979) do: equal logits must have a deviation of exactly 0.
struct Moments {
  static constexpr int kCount = 3;
  float value[kCount];
  __device__ static Moments nothing() { return {}; }

  __device__ void merge(float count, float mean, float squares) {
    const float total = value[0] + count, d = mean - value[1], share = count / fmaxf(total, 1.f);
    value[2] += squares + d * d * (value[0] * share);
    value[1] += d * share;
    value[0] = total;
  }
  template <class R>
  __device__ Moments joined(const R&) const {
    Moments x = *this;
    for (int d = 16; d; d >>= 1) {
      float other[3];
      for (int i = 0; i < 3; ++i) other[i] = __shfl_xor_sync(~0u, x.value[i], d);
      // in one order for both lanes, or they would differ in the last bits
      const bool second = threadIdx.x & d;
      Moments low = second ? Moments{other[0], other[1], other[2]} : x,
              high = second ? x : Moments{other[0], other[1], other[2]};
      low.merge(high.value[0], high.value[1], high.value[2]);
      x = low;
    }
    return x;
  }
  template <int N>
  __device__ void add(const float (&x)[N], float first) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += x[i] - first;
    const float mean = sum / N;
#pragma unroll
    for (int i = 0; i < N; ++i) squares += (x[i] - first - mean) * (x[i] - first - mean);
    merge(N, mean, squares);
  }
};

// The logarithm, to base 2, of a sum of exps.
struct LogSum {
  static constexpr int kCount = 2;
  float value[kCount];
  __device__ static LogSum nothing() { return {-kInf, 0}; }
  __device__ void move(float high) {
    value[1] *= value[0] == -kInf ? 1 : fast_exp2(value[0] - finite(high));
    value[0] = high;
  }
  template <class R>
  __device__ LogSum joined(const R&) const {
    LogSum x = *this;
    x.move(warp_max(value[0]));
    x.value[1] = warp_sum(x.value[1]);
    return x;
  }
  template <int N>
  __device__ void add(const float (&x)[N], float slope) {
    float high = value[0];
#pragma unroll
    for (int i = 0; i < N; ++i) high = fmaxf(high, x[i] * slope);
    move(high);
#pragma unroll
    for (int i = 0; i < N; ++i) value[1] += fast_exp2(__fmaf_rn(x[i], slope, -finite(high)));
  }
};

struct Scaling {  // of a tensor's logits over one row
  float mean, inverse, spread;
  float high, log_sum;  // the logarithm of its sum of exps, as two terms: one alone would round large logits
};
__device__ inline Scaling scaling_of(const Moments& x, float first) {
  const float freedom = fmaxf(x.value[0] - 1, 1.f), deviation = sqrtf(x.value[2] / freedom);
  return {first + x.value[1], 1 / (deviation + 1e-7f), deviation == 0 ? 0 : 1 / (freedom * deviation), 0, 0};
}

// A row of all tensors, of which the student's has number 0 and the k-th teacher's k + 1.
struct PreparedRow {
  const RowsArgs& a;
  int64_t index;
  const Scaling* scalings;  // of each, in shared memory
  float member_slope;       // log2(e) / T of each teacher's logits

  __device__ bool mixed() const { return a.n_teachers > 1 && !a.geometric; }
  __device__ bool as_probabilities() const {
    return mixed() || (a.n_teachers == 1 && a.target == Target::kProbs);
  }
  __device__ bool given() const { return mixed() || (a.n_teachers == 1 && a.target != Target::kLogits); }
  // What the prepared teacher's logits are multiplied by.
  __device__ float teacher_slope() const {
    return a.target == Target::kLogits ? member_slope : a.target == Target::kLogProbs ? kLog2E : 1;
  }

  // Eight classes of one tensor, or one, softcapped.
  template <int N>
  __device__ void capped(float (&x)[N], int k, int first) const {
    const Matrix& m = k ? a.teachers[k - 1] : a.student;
    if constexpr (N == 1) {
      x[0] = element(row_start(m, index), m.dtype, first);
    } else {
      load_eight(x, row_start(m, index), m.dtype, first);
    }
    const float cap = k ? a.teacher_softcap : a.softcap;
    if (cap != 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = softcapped(x[i], cap);
    }
  }
  // And standardized, as far as the scaling is known.
  template <int N>
  __device__ void standardized(float (&x)[N], int k, int first) const {
    capped(x, k, first);
    if (a.standardize) {
      const Scaling scaling = scalings[k];
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = (x[i] - scaling.mean) * scaling.inverse;
    }
  }

  // The student's classes, softcapped, and the teacher's.
  template <int N>
  __device__ void operator()(int first, float (&s)[N], float (&t)[N]) const {
    capped(s, 0, first);
#pragma unroll
    for (int i = 0; i < N; ++i) t[i] = 0;
    for (int k = 0; k < a.n_teachers; ++k) {
      const float w = a.n_teachers == 1 ? 1 : a.teacher_weights[k];
      if (w == 0) continue;
      float x[N];
      standardized(x, k + 1, first);
      const float high = scalings[k + 1].high, log_sum = scalings[k + 1].log_sum;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (mixed()) {
          x[i] = a.target == Target::kLogits     ? fast_exp2(__fmaf_rn(x[i], member_slope, -high) - log_sum)
                 : a.target == Target::kLogProbs ? fast_exp2(x[i] * kLog2E)
                                                 : x[i];
        } else if (a.target == Target::kProbs && a.n_teachers > 1) {
          x[i] = log2f(x[i]);
        }
        t[i] = k == 0 ? w * x[i] : __fmaf_rn(w, x[i], t[i]);
      }
    }
  }
};

}  // namespace
}  // namespace kdfast
