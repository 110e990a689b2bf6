// The sums that metrics need beside the row's loss, in a pass of their own once p and q are known.
#pragma once

#include "row_passes.cuh"

namespace kdfast {
namespace {

template <class D>
struct MetricSums {
  float divergence, teacher_log, student_log;  // sums of p (log p - log q), p log p and q log q, to base 2
  float student_max, student_argmax;           // of the logits; the class as the float's bits
  float teacher_max, teacher_argmax;

  __device__ static MetricSums identity() {
    return {0, 0, 0, -kInf, __int_as_float(INT32_MAX), -kInf, __int_as_float(INT32_MAX)};
  }

  // The first of equal maxima counts.
  __device__ static void update_max(float& max, float& argmax, float x, float x_class) {
    const bool better = x > max || (x == max && __float_as_int(x_class) < __float_as_int(argmax));
    max = better ? x : max;
    argmax = better ? x_class : argmax;
  }
  template <class R>
  __device__ MetricSums warp_reduce(const R&) const {
    MetricSums x = *this;
    x.divergence = warp_sum(x.divergence);
    x.teacher_log = warp_sum(x.teacher_log);
    x.student_log = warp_sum(x.student_log);
    for (int d = 16; d; d >>= 1) {
      float other[4];
      for (int i = 0; i < 4; ++i) other[i] = __shfl_xor_sync(~0u, floats(x)[3 + i], d);
      update_max(x.student_max, x.student_argmax, other[0], other[1]);
      update_max(x.teacher_max, x.teacher_argmax, other[2], other[3]);
    }
    return x;
  }

  template <class P>
  __device__ void add(const P& s, const P& t, int first, const Scales<float>& scales, const RowScale& row) {
#pragma unroll
    for (int i = 0; i < P::kN; ++i) {
      const Probabilities x(s[i], t[i], scales, row);
      student_log += masked(x.q, x.log_q);
      update_max(student_max, student_argmax, s[i], __int_as_float(first + i));
      if constexpr (kHasTeacher<D>) {
        divergence += masked(x.p, x.log_p - x.log_q);
        teacher_log += masked(x.p, x.log_p);
        update_max(teacher_max, teacher_argmax, t[i], __int_as_float(first + i));
      }
    }
  }

  // Row metrics; NaN where there is nothing to measure. Of logit_mse `soft` alone: see call.h.
  __device__ void write_metrics(const RowsArgs& a, int64_t index, bool kept, int label,
                                const RowLoss<float>& row) const {
    const float nan = nanf("");
    const int argmax = __float_as_int(student_argmax);
    const float metrics[kMetrics] = {kHasTeacher<D> ? row.soft : nan,
                                     a.labels ? row.hard : nan,
                                     kHasTeacher<D> ? divergence * kLn2 : nan,
                                     -student_log * kLn2,
                                     kHasTeacher<D> ? -teacher_log * kLn2 : nan,
                                     kHasTeacher<D> ? (float)(argmax == __float_as_int(teacher_argmax)) : nan,
                                     a.labels ? (float)(argmax == label) : nan};
#pragma unroll
    for (int k = 0; k < (D::kDifference ? 1 : kMetrics); ++k)
      a.row_metrics[(int64_t)a.rows * k + index] = kept ? metrics[k] : nan;
  }
};

}  // namespace
}  // namespace kdfast
