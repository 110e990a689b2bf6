// What return_metrics reports of a row beside its terms, in a sweep of its own once p and q are known.
#pragma once

#include "row_passes.cuh"

namespace kdfast {
namespace {

template <class D>
struct Measures {
  static constexpr bool kTaught = Statistics<D>::kSoft || Statistics<D>::kMSE;
  static constexpr int kCount =
      7;  // 3 sums; the largest logit and, as its bits, its class: student's, teacher's
  float value[kCount];

  __device__ static Measures nothing() {
    return {0, 0, 0, -kInf, __int_as_float(INT32_MAX), -kInf, __int_as_float(INT32_MAX)};
  }

  __device__ void keep_larger(int i, float x, float at_bits) {
    const bool better =
        x > value[i] || (x == value[i] && __float_as_int(at_bits) < __float_as_int(value[i + 1]));
    value[i] = better ? x : value[i];
    value[i + 1] = better ? at_bits : value[i + 1];
  }
  template <class R>
  __device__ Measures joined(const R&) const {
    Measures x = *this;
    for (int i = 0; i < 3; ++i) x.value[i] = warp_sum(x.value[i]);
    for (int d = 16; d; d >>= 1) {
      float other[4];
      for (int i = 0; i < 4; ++i) other[i] = __shfl_xor_sync(~0u, x.value[3 + i], d);
      x.keep_larger(3, other[0], other[1]);
      x.keep_larger(5, other[2], other[3]);
    }
    return x;
  }

  template <int N>
  __device__ void add(const float (&s)[N], const float (&t)[N], int first, const Scales<float>& scales,
                      const RowScale& row) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Pair pair(s[i], t[i], scales, row);
      value[2] += masked(pair.q, pair.log_q);
      keep_larger(3, s[i], __int_as_float(first + i));
      if constexpr (kTaught) {
        value[0] += masked(pair.p, pair.log_p - pair.log_q);
        value[1] += masked(pair.p, pair.log_p);
        keep_larger(5, t[i], __int_as_float(first + i));
      }
    }
  }

  // NaN where there is nothing to measure. Of logit_mse `soft` alone: see call.h.
  __device__ void write(const RowsArgs& a, int64_t index, bool kept, int label,
                        const RowLoss<float>& row) const {
    const float nan = nanf("");
    const int of_student = __float_as_int(value[4]), of_teacher = __float_as_int(value[6]);
    const float columns[kMetrics] = {kTaught ? row.soft : nan,
                                     a.labels ? row.hard : nan,
                                     kTaught ? value[0] * kLn2 : nan,
                                     -value[2] * kLn2,
                                     kTaught ? -value[1] * kLn2 : nan,
                                     kTaught ? (float)(of_student == of_teacher) : nan,
                                     a.labels ? (float)(of_student == label) : nan};
#pragma unroll
    for (int k = 0; k < (Statistics<D>::kMSE ? 1 : kMetrics); ++k)
      a.metrics[(int64_t)a.rows * k + index] = kept ? columns[k] : nan;
  }
};

}  // namespace
}  // namespace kdfast
