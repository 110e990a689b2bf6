// The row kernel for whatever a call may ask for beside the plain case: tensors of several types that lie
// anyhow, softcaps, standardized logits, label smoothing, ensembles, probabilities as targets, DKD, metrics.
// A row by a block, or by the blocks of a cluster, each of which keeps its part of the prepared logits in
// shared memory; or by one block that prepares them anew in each sweep.
//
// The sweeps are one loop, so that what prepares the logits is compiled once.
#pragma once

#include "measures.cuh"
#include "prepared.cuh"
#include "row_kernels.cuh"

namespace kdfast {
namespace {

enum Sweep { kSumsSweep, kPointwiseSweep, kMeasuresSweep, kSpreadSweep, kGradientSweep, kSweeps };

struct Logits {
  float student, teacher;
};
template <class D>
struct GeneralShared {
  Lines<Statistics<D, true>::kCount> lines;
  RowNumbers row;
  Scaling scalings[kMostTeachers + 1];
  Logits first, label;
};

// What standardized rows, and teachers each with a softmax of its own, need before anything else is known.
template <class L>
__device__ inline void measure_tensors(BlockTeam& team, const PreparedRow& row, const RowOf& r,
                                       const Part<BlockTeam>& part, L& lines, Scaling* scalings) {
  const RowsArgs& a = row.a;
  if (team.thread() <= kMostTeachers) scalings[team.thread()] = {0, 1, 0, 0, 0};
  __syncthreads();
  if (r.n == 0) return;
  const bool softmaxed = row.mixed() && a.target == Target::kLogits;
  for (int job = a.standardize ? 0 : a.n_teachers + 1; job < (softmaxed ? 2 : 1) * (a.n_teachers + 1);
       ++job) {
    const bool sums = job > a.n_teachers;
    const int k = sums ? job - a.n_teachers - 1 : job;
    if (sums && k == 0) continue;  // the student has none
    float first[1];
    row.capped(first, k, 0);
    Moments moments = Moments::nothing();
    LogSum sum = LogSum::nothing();
    auto add = [&](const auto& x) { sums ? sum.add(x, row.member_slope) : moments.add(x, first[0]); };
    for (int i = team.thread(); i < part.count; i += team.threads()) {
      float x[8];
      row.standardized(x, k, part.head + (part.first + i) * 8);
      add(x);
    }
    if (part.end >= 0) {
      float x[1];
      row.standardized(x, k, part.end);
      add(x);
    }
    if (sums) {
      const LogSum found = team.join(sum, lines, r.scale);
      if (team.thread() == 0)
        scalings[k].high = finite(found.value[0]), scalings[k].log_sum = log2f(found.value[1]);
    } else {
      const Scaling found = scaling_of(team.join(moments, lines, r.scale), first[0]);
      if (team.thread() == 0) scalings[k] = found;
    }
    team.meet();
  }
}

template <class D>
__global__ void __launch_bounds__(kMostThreads, 1) general_rows(const __grid_constant__ RowsArgs a) {
  using Stats = Statistics<D, true>;
  extern __shared__ uint4 kept_bytes[];
  float4* const kept = (float4*)kept_bytes;  // the student's halves of packs, then the teacher's
  __shared__ GeneralShared<D> shared;
  BlockTeam team;
  for (int64_t index = team.first_row(); index < a.rows; index += team.rows_at_once()) {
    const RowNumbers numbers = team.numbers(shared.row, [&] { return numbers_of<General, D>(a, index); });
    RowOf r = row_of(a, index, numbers);
    RowScale& scale = r.scale;
    void* const grad = a.grad.data ? row_start(a.grad, index) : nullptr;
    const PreparedRow row{a, index, shared.scalings, scale.teacher_slope};
    const Part<BlockTeam> part(team, row_start(a.student, index), (int)bytes_of(a.student.dtype), 8, r.n);
    measure_tensors(team, row, r, part, shared.lines, shared.scalings);
    scale.given = row.given();
    scale.as_probabilities = row.as_probabilities();
    scale.teacher_slope = row.teacher_slope();

    // the thread's end and, by one thread for all, the row's first class and the label's
    float s_end[1] = {-kInf}, t_end[1] = {scale.as_probabilities ? 0 : -kInf};
    if (threadIdx.x == 0) shared.first = shared.label = {0, 0};
    for (int i = 0; i < (threadIdx.x == 0 ? 3 : 1); ++i) {
      const int at = i == 0 ? part.end : i == 1 ? scale.label : r.n ? 0 : -1;
      if (at < 0) continue;
      float s[1], t[1];
      row(at, s, t);
      if (i == 0) s_end[0] = s[0], t_end[0] = t[0];
      if (i == 1) shared.label = {s[0], t[0]};
      if (i == 2) shared.first = {s[0], t[0]};
    }
    __syncthreads();
    const float label_s = shared.label.student, label_t = shared.label.teacher;
    const float first_s = shared.first.student, first_t = shared.first.teacher;
    if (a.standardize) {
      const Scaling student = shared.scalings[0];
      scale.mean = student.mean, scale.inverse = student.inverse, scale.spread = student.spread;
      if (!Stats::kMSE) {
        scale.slope *= scale.inverse;
        scale.hard_ratio /= scale.inverse;
      }
    }
    if (Stats::kMSE) scale.shift = (first_s - scale.mean) * scale.inverse - first_t;
    scale.first = first_s == -kInf ? 0 : first_s;

    Stats statistics = Stats::nothing();
    PointwiseSums sums{}, through{};
    Measures measures = Measures::nothing();
    Scales scales{};
    Terms terms{};
    for (int sweep = 0; sweep < kSweeps; ++sweep) {
      if (sweep == kPointwiseSweep && !D::kPointwise) continue;
      if (sweep == kMeasuresSweep && (Stats::kMSE || !a.metrics)) continue;
      if (sweep == kSpreadSweep && !(grad && a.standardize)) continue;
      if (sweep == kGradientSweep && !grad) continue;

      auto visit = [&](int at, auto& s, const auto& t) {
        constexpr int kN = sizeof(s) / sizeof(s[0]);
        if (sweep == kSumsSweep) {
          statistics.add(s, t, at, at >= 0, scale);
        } else if (sweep == kPointwiseSweep) {
          if constexpr (D::kPointwise) sums.template add<D, true>(s, t, scales, scale);
        } else if (sweep == kMeasuresSweep) {
          measures.add(s, t, at, terms.whole, scale);
        } else if (sweep == kSpreadSweep) {
#pragma unroll
          for (int i = 0; i < kN; ++i)
            through.value[0] += soft_gradient<D, true>(s[i], t[i], at + i, terms.c, scales, scale) *
                                ((s[i] - scale.mean) * scale.inverse);
        } else {
#pragma unroll
          for (int i = 0; i < kN; ++i)
            s[i] = gradient<D, true>(s[i], t[i], at + i, terms.c, scales, scale, a.softcap);
        }
      };
      const int rounds = (part.count + team.threads() - 1) / team.threads();
      for (int k = 0; k < rounds; ++k) {
        const int i = (sweep & 1 ? rounds - 1 - k : k) * team.threads() + team.thread();
        if (i >= part.count) continue;
        const int at = part.head + (part.first + i) * 8;
        float s[8], t[8];
        if (a.keep && sweep > 0) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float4 x = kept[j * part.part + i], y = kept[(j + 2) * part.part + i];
            s[4 * j] = x.x, s[4 * j + 1] = x.y, s[4 * j + 2] = x.z, s[4 * j + 3] = x.w;
            t[4 * j] = y.x, t[4 * j + 1] = y.y, t[4 * j + 2] = y.z, t[4 * j + 3] = y.w;
          }
        } else {
          row(at, s, t);
          if (a.keep) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              kept[j * part.part + i] = float4{s[4 * j], s[4 * j + 1], s[4 * j + 2], s[4 * j + 3]};
              kept[(j + 2) * part.part + i] = float4{t[4 * j], t[4 * j + 1], t[4 * j + 2], t[4 * j + 3]};
            }
          }
        }
        visit(at, s, t);
        if (sweep == kGradientSweep) store_eight(s, grad, a.grad.dtype, at);
      }
      if (part.end >= 0) {
        float s[1] = {s_end[0]};
        visit(part.end, s, t_end);
        if (sweep == kGradientSweep) set_element(grad, a.grad.dtype, part.end, s[0]);
      }

      if (sweep == kSumsSweep) {
        statistics = team.join(statistics, shared.lines, scale);
        scales = scales_of(statistics, scale);
      } else if (sweep == kPointwiseSweep) {
        sums = team.join(sums, shared.lines, scale);
      } else if (sweep == kMeasuresSweep) {
        measures = team.join(measures, shared.lines, scale);
        if (team.leads()) measures.write(a, index, r.kept && !r.bad, scale.label, terms, a.n_teachers != 0);
      } else if (sweep == kSpreadSweep) {
        terms.c.spread = team.join(through, shared.lines, scale).value[0] * scale.spread;
      }
      if (sweep == (D::kPointwise ? kPointwiseSweep : kSumsSweep)) {
        terms = finish(statistics, sums, scales, label_s, label_t, scale, a, r.factor);
        if (team.leading_warp()) write_row(a, r, statistics, sums, terms);
        if (Stats::kMSE && a.metrics && team.leads())
          a.metrics[index] = r.kept && !r.bad ? terms.soft : nanf("");
      }
      team.meet();  // before the lines are written again
    }
    if (grad) zero_from(grad, a.grad.dtype, r.n, a.width, team);
  }
}

}  // namespace
}  // namespace kdfast
