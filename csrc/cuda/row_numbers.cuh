// A row's numbers: what it has beside its logits, read before them, and what is written of it.
#pragma once

#include "row_sums.cuh"

namespace kdfast {
namespace {

// Of memory: one thread of a block reads it for all, for each warp's reads count.
struct RowInputs {
  int64_t label;
  float weight, temperature, teacher_temperature, share, grad_loss;
  float first_logit, first_teacher_logit;
};

__device__ inline float load_weight(const RowsArgs& a, int64_t index) {
  if (!a.row_weight) return 1;
  switch (a.row_weight_type) {
    case Number::kFloat:
      return ((const float*)a.row_weight)[index];
    case Number::kBFloat16:
      return widen(((const __nv_bfloat16*)a.row_weight)[index]);
    case Number::kHalf:
      return widen(((const __half*)a.row_weight)[index]);
    default:
      return ((const bool*)a.row_weight)[index];
  }
}

template <class S, class D>
__device__ inline RowInputs load_inputs(const RowsArgs& a, int64_t index) {
  RowInputs x{};
  if (a.labels) x.label = a.labels[index];
  x.weight = load_weight(a, index);
  x.temperature = a.temperatures ? a.temperatures[index] : a.temperature;
  x.teacher_temperature = a.teacher_temperatures ? a.teacher_temperatures[index] : a.teacher_temperature;
  const S* student = row_data<const S>(a.student, index);
  if (D::kDifference) x.first_teacher_logit = widen(row_data<const S>(a.teacher, index)[0]);
  if (D::kDifference || (a.label_smoothing != 0 && !a.table)) x.first_logit = widen(student[0]);
  if (a.table) {
    x.grad_loss = a.grad_loss[index * a.grad_loss_step];
  } else {
    x.share = x.weight / a.divisor;
    if (a.normalizer) x.share *= *a.normalizer == 0 ? 0 : 1 / *a.normalizer;
  }
  return x;
}

struct Row {
  uint32_t index;
  float share;   // of the loss: what its loss and its gradient are multiplied by
  bool is_kept;  // whether it weighs anything
  bool is_bad;   // a label out of range: all of the row is NaN
  RowScale scale;

  __device__ Row(const RowsArgs& a, uint32_t i, const RowInputs& x)
      : index(i), share(x.share), is_kept(x.weight != 0) {
    const bool in_range = x.label >= 0 && x.label < a.vocab;
    is_bad = is_kept && a.labels && !in_range;
    scale = {kLog2E * a.logit_scale / x.temperature,
             kLog2E * a.teacher_logit_scale / x.teacher_temperature,
             kLog2E * a.logit_scale,
             x.temperature,
             a.beta,
             a.rest};
    scale.logit_scale = a.logit_scale;
    scale.teacher_ratio = a.teacher_logit_scale / a.logit_scale;
    scale.shift = a.logit_scale * __fmaf_rn(-scale.teacher_ratio, x.first_teacher_logit, x.first_logit);
    scale.smoothed = a.label_smoothing != 0;
    const bool hard = a.hard_weight != 0 || a.z_loss != 0 || (a.metrics && a.labels);
    scale.powers = hard && x.temperature != 1 && x.temperature != 2;
    scale.rare = scale.powers || scale.smoothed;
    scale.first_logit = x.first_logit == -kInf ? 0 : x.first_logit;
    scale.first_teacher_logit = x.first_teacher_logit;
    scale.first_difference = __fmaf_rn(-scale.teacher_ratio, x.first_teacher_logit, x.first_logit);
    scale.label = a.labels && is_kept && in_range ? (int)x.label : -1;
  }

  __device__ RowTerms<float, float> terms(const RowsArgs& a, const Sums<float>& sums) const {
    RowTerms<float, float> terms{};
    terms.temperature = scale.temperature;
    terms.factor = is_bad ? nanf("") : share;
    terms.unit = 1;
    terms.excess = __fmaf_rn(1 / sums.student_total, sums.student_total, -1.f);
    terms.alpha = a.alpha;
    terms.hard_weight = a.hard_weight;
    terms.label_smoothing = a.label_smoothing;
    terms.z_loss = a.z_loss;
    terms.beta = a.beta;
    terms.rest = scale.rest;
    terms.logit_scale = a.logit_scale;
    terms.t_squared = a.t_squared;
    terms.softmaxed = terms.distributions = true;
    terms.labelled = a.labels;
    return terms;
  }
};

// ---- the table of coefficients, which every backend may read ----

// The row's loss and coefficients, by the lanes of the first warp.
__device__ inline void write_row(const RowsArgs& a, const Row& row, float loss, Coefficients<float> c) {
  const int lane = threadIdx.x & 31;
  if (a.losses && lane == 0)
    a.losses[row.index] = row.is_kept ? (row.is_bad ? nanf("") : row.share * loss) : 0;
  if (!a.new_table) return;
  float mine = 0;  // the lane's column
#pragma unroll
  for (int i = 0; i < kCoefficients; ++i) mine = lane == i ? floats(c)[i] : mine;
  if (lane < kCoefficients) a.new_table[(int64_t)row.index * kCoefficients + lane] = row.is_kept ? mine : 0;
}
template <class Team>
__device__ inline Coefficients<float> load_coefficients(const RowsArgs& a, const Row& row, const Team& team,
                                                        float (&shared)[kCoefficients]) {
  Coefficients<float> c;
  team.load(floats(c), shared, a.table + (int64_t)row.index * kCoefficients);
  return c;
}

}  // namespace
}  // namespace kdfast
