// The row kernels: loss and gradient of a row by a warp, a block, or a cluster of blocks.
//
// A row is divided among the blocks of a cluster, each of which keeps its part in shared memory (kKeep), so
// that every logit is read once; or one block goes over it in sweeps, each from the end where the one before
// it stopped, for the last classes read are those that the caches still hold.
//
// S is the type of all logits, and student and teacher lie alike: the vectors of one are those of the other.
//
// A row's classes before the first multiple of 32 bytes, and those after the last whole vector, are "ends":
// of one thread each, of the first block.
#pragma once

#include "measures.cuh"

namespace kdfast {
namespace {

constexpr int kAhead = 4;  // pairs of packs in flight per thread, from global to shared memory
// Blocks of a multiprocessor, whose registers are shared out accordingly: with 80 each jsd spills on sm_80.
template <class D>
constexpr int kBlocksAtOnce = D::kPointwise ? 2 : 3;

// A row's own numbers.
struct RowOf {
  int64_t index;
  bool kept, bad;  // bad: a label out of range, whose row is NaN
  int n;           // classes that are looked at: none where the row drops out
  float share;     // of the loss: what its loss and its gradient are multiplied by
  RowScale scale;
};

// What a row has beside its logits; one thread of a block reads it for all, for each warp's reads count.
struct RowNumbers {
  int64_t label;
  float weight, temperature, teacher_temperature, share, grad_loss;
  float label_s, first_s, first_t;
};

__device__ inline float weight_of(const RowsArgs& a, int64_t index) {
  if (!a.row_weight) return 1;
  switch (a.row_weight_type) {
    case Number::kFloat:
      return ((const float*)a.row_weight)[index];
    case Number::kBFloat16:
      return widened(((const __nv_bfloat16*)a.row_weight)[index]);
    case Number::kHalf:
      return widened(((const __half*)a.row_weight)[index]);
    default:
      return ((const bool*)a.row_weight)[index];
  }
}

template <class S, class D>
__device__ inline RowNumbers numbers_of(const RowsArgs& a, int64_t index) {
  RowNumbers x{};
  if (a.labels) x.label = a.labels[index];
  x.weight = weight_of(a, index);
  x.temperature = a.temperatures ? a.temperatures[index] : a.temperature;
  x.teacher_temperature = a.teacher_temperatures ? a.teacher_temperatures[index] : a.teacher_temperature;
  if (a.table) {
    x.grad_loss = a.grad_loss[index * a.grad_loss_step];
    return x;
  }
  x.share = x.weight * a.scale;
  if (a.divisor) x.share *= *a.divisor == 0 ? 0 : 1 / *a.divisor;
  const S* student = row_at<const S>(a.student, index);
  if (a.labels && x.label >= 0 && x.label < a.vocab && x.weight != 0) x.label_s = widened(student[x.label]);
  if (Statistics<D>::kMSE || a.label_smoothing != 0) x.first_s = widened(student[0]);
  if (Statistics<D>::kMSE) x.first_t = widened(row_at<const S>(a.teacher, index)[0]);
  return x;
}

__device__ inline RowOf row_of(const RowsArgs& a, int64_t index, const RowNumbers& x) {
  RowOf r;
  r.index = index;
  r.share = x.share;
  r.kept = x.weight != 0;
  const bool inside = x.label >= 0 && x.label < a.vocab;
  r.bad = r.kept && a.labels && !inside;
  r.n = r.kept ? a.vocab : 0;
  r.scale = {kLog2E / x.temperature, kLog2E / x.teacher_temperature, x.temperature, a.beta};
  r.scale.shift = x.first_s - x.first_t;
  r.scale.smoothed = a.label_smoothing != 0;
  r.scale.first = x.first_s == -kInf ? 0 : x.first_s;
  r.scale.label = a.labels && r.kept && inside ? (int)x.label : -1;
  return r;
}

__device__ inline RowTerms<float, float> terms_of(const RowsArgs& a, const RowOf& r,
                                                  const Sums<float>& sums) {
  return {r.scale.temperature,
          r.bad ? nanf("") : r.share,
          1,
          __fmaf_rn(1 / sums.student_total, sums.student_total, -1.f),
          a.alpha,
          a.hard_weight,
          a.label_smoothing,
          a.z_loss,
          a.beta,
          a.t_squared,
          true,
          a.labels != nullptr};
}

using Columns = float[kCoefficients];

// A row's loss and coefficients, by the lanes of the leading warp. In the table, which every backend may
// read, exps at temperature 1 are relative to the hard offset, in the kernels to T times the student's.
__device__ inline void write_row(const RowsArgs& a, const RowOf& r, const RowLoss<float>& row,
                                 Coefficients<float> c) {
  const int lane = threadIdx.x & 31;
  if (a.losses && lane == 0) a.losses[r.index] = r.kept ? (r.bad ? nanf("") : r.share * row.loss) : 0;
  if (!a.new_table) return;
  c.hard_total *= exp2f(hard_shift(c, r.scale.temperature));
  float mine = 0;  // the lane's column
#pragma unroll
  for (int i = 0; i < kCoefficients; ++i) mine = lane == i ? reinterpret_cast<const Columns&>(c)[i] : mine;
  if (lane < kCoefficients) a.new_table[r.index * kCoefficients + lane] = r.kept ? mine : 0;
}
template <class Team>
__device__ inline Coefficients<float> read_row(const RowsArgs& a, const RowOf& r, const Team& team,
                                               Columns& shared) {
  Coefficients<float> c;
  team.fetch(reinterpret_cast<Columns&>(c), shared, a.table + r.index * kCoefficients);
  c.hard_total *= exp2f(-hard_shift(c, r.scale.temperature));
  return c;
}

// Zeros from class n on: padding, or a row that drops out. By the threads of all its blocks.
template <class S, class Team>
__device__ inline void zero_from(S* row, int n, int width, const Team& team) {
  const int thread = team.rank() * team.threads() + team.thread(), threads = team.blocks() * team.threads();
  const int head = n + head_of(row + n, sizeof(S), width - n), packs = (width - head) / kVec<S>;
  for (int i = n + thread; i < head; i += threads) row[i] = narrowed<S>(0);
  for (int i = thread; i < packs; i += threads) __stcs((uint4*)(row + head) + i, uint4{0, 0, 0, 0});
  for (int i = head + packs * kVec<S> + thread; i < width; i += threads) row[i] = narrowed<S>(0);
}

// ---- a team's part of a row: its packs, as they come from global memory by way of shared memory, where they
// stay, or each time from global memory. Each thread meets none but its own. ----

template <class Team>
struct Part {
  int head, tail;    // classes before the first pack of the row; the first after the last
  int first, count;  // the block's packs
  int part;          // of which there is room for so many
  int end;           // the thread's end class, -1: none

  __device__ Part(const Team& team, const void* student, int bytes, int vec, int n) {
    head = head_of(student, bytes, n);
    const int packs = (n - head) / vec;
    tail = head + packs * vec;
    part = part_of(packs, team.blocks());
    first = min(team.rank() * part, packs);
    count = min(part, packs - first);
    const int at = team.thread() < kHead ? team.thread() : tail + team.thread() - kHead;
    const bool there = team.rank() == 0 && (team.thread() < kHead ? at < head : at < n);
    end = there ? at : -1;
  }
};

template <class Team, class S, bool kKeep>
struct Packs : Part<Team> {
  static constexpr int kN = kVec<S>;
  using Part<Team>::head, Part<Team>::first, Part<Team>::count, Part<Team>::part, Part<Team>::end;
  const S *student, *teacher;
  S* grad;
  bool by_vectors;  // whether the gradient's are those of the logits
  uint4 *kept_student, *kept_teacher;

  __device__ Packs(const Team& team, const RowsArgs& a, const RowOf& r, uint4* kept)
      : Part<Team>(team, row_at<const S>(a.student, r.index), sizeof(S), kN, r.n),
        student(row_at<const S>(a.student, r.index)),
        teacher(a.teacher.data ? row_at<const S>(a.teacher, r.index) : nullptr),
        grad(a.grad.data ? row_at<S>(a.grad, r.index) : nullptr),
        by_vectors(((uintptr_t)grad - (uintptr_t)student) % 16 == 0),
        kept_student(kept),
        kept_teacher(kept + part) {}

  // f(first class, student's, teacher's) for the thread's packs. sweep: how many were before this one;
  // kFirst: none.
  template <bool kFirst, class F>
  __device__ void each(const Team& team, int sweep, F f) const {
    const int threads = team.threads(), thread = team.thread();
    const uint4 *s = (const uint4*)(student + head) + first,
                *t = teacher ? (const uint4*)(teacher + head) + first : nullptr;
    auto call = [&](int i, uint4 a, uint4 b) {
      f(head + (first + i) * kN, widened<S>(a).x, widened<S>(b).x);
    };
    if constexpr (kKeep && !kFirst) {
      for (int i = thread; i < count; i += threads) call(i, kept_student[i], kept_teacher[i]);
    } else if constexpr (kKeep) {
      int next = thread;
      auto fetch = [&] {
        if (next < count) {
          copy_async(kept_student + next, s + next);
          if (t) copy_async(kept_teacher + next, t + next);
          next += threads;
        }
        commit_copies();  // empty where there is nothing left, so that the count of groups is right
      };
#pragma unroll
      for (int k = 0; k < kAhead; ++k) fetch();
      for (int i = thread; i < count; i += threads) {
        await_copies<kAhead - 1>();
        call(i, kept_student[i], kept_teacher[i]);
        fetch();
      }
    } else {
      const int rounds = (count + threads - 1) / threads;
      for (int k = 0; k < rounds; ++k) {
        const int i = (sweep & 1 ? rounds - 1 - k : k) * threads + thread;
        if (i < count) call(i, __ldcg(s + i), t ? __ldcg(t + i) : uint4{0, 0, 0, 0});
      }
    }
  }
  __device__ void load_end(float (&s)[1], float (&t)[1]) const {
    s[0] = widened(student[end]);
    if (teacher) t[0] = widened(teacher[end]);
  }
  __device__ void store(int at, const Wide<S>& g) const {
    if (by_vectors) {
      __stcs((uint4*)(grad + at), narrowed_pack<S>(g));
    } else {
#pragma unroll
      for (int i = 0; i < kN; ++i) grad[at + i] = narrowed<S>(g.x[i]);
    }
  }
  __device__ void store_end(float g) const { grad[end] = narrowed<S>(g); }
};

// What all blocks' threads share beside the kept logits.
struct Shared {
  Lines<8> statistics;
  Lines<PointwiseSums::kCount> sums;
  Lines<7> measures;
  float columns[kCoefficients];
  RowNumbers row;
};

template <class Team, class S, class D, bool kKeep>
__device__ inline void rows_of_team(const RowsArgs& a, uint4* kept, Shared& shared) {
  Team team;
  for (int64_t index = team.first_row(); index < a.rows; index += team.rows_at_once()) {
    const RowNumbers numbers = team.numbers(shared.row, [&] { return numbers_of<S, D>(a, index); });
    const RowOf r = row_of(a, index, numbers);
    const Packs<Team, S, kKeep> packs(team, a, r, kept);
    float s_end[1] = {-kInf}, t_end[1] = {-kInf};
    if (packs.end >= 0) packs.load_end(s_end, t_end);

    Gradient<D> gradient;
    int sweep = 0;
    if (a.table) {
      gradient = {read_row(a, r, team, shared.columns), numbers.grad_loss};
      if constexpr (kKeep) packs.template each<true>(team, sweep++, [](int, const auto&, const auto&) {});
    } else {
      Statistics<D> statistics = Statistics<D>::nothing();
      PointwiseSums sums{};
      packs.template each<true>(
          team, sweep++, [&](int, const auto& s, const auto& t) { statistics.add(s, t, true, r.scale); });
      statistics.add(s_end, t_end, packs.end >= 0, r.scale);
      statistics = team.join(statistics, shared.statistics, r.scale);
      const Scales<float> scales = scales_of(statistics);
      if constexpr (D::kPointwise) {
        packs.template each<false>(team, sweep++, [&](int, const auto& s, const auto& t) {
          sums.template add<D>(s, t, scales, r.scale);
        });
        if (packs.end >= 0) sums.template add<D>(s_end, t_end, scales, r.scale);
        sums = team.join(sums, shared.sums, r.scale);
      }

      const Sums<float> of_row = sums_of(statistics, sums, numbers.label_s, (float)a.vocab, r.scale);
      Coefficients<float> coefficients;
      const RowLoss<float> row = loss_and_coefficients<D>(of_row, terms_of(a, r, of_row), coefficients);
      gradient = {coefficients, 1};
      if (team.leading_warp()) write_row(a, r, row, coefficients);
      if (a.metrics) {
        Measures<D> measures = Measures<D>::nothing();
        if constexpr (!D::kDifference) {  // whose others are of softmaxes: see call.h
          packs.template each<false>(team, sweep++, [&](int at, const auto& s, const auto& t) {
            measures.add(s, t, at, scales, r.scale);
          });
          if (packs.end >= 0) measures.add(s_end, t_end, packs.end, scales, r.scale);
          measures = team.join(measures, shared.measures, r.scale);
        }
        if (team.leads()) measures.write(a, index, r.kept && !r.bad, r.scale.label, row);
      }
    }
    if (packs.grad) {
      packs.template each<false>(team, sweep, [&](int at, const auto& s, const auto& t) {
        Wide<S> g;
#pragma unroll
        for (int i = 0; i < kVec<S>; ++i) g.x[i] = gradient(s[i], t[i], r.scale);
        if ((unsigned)(r.scale.label - at) < (unsigned)kVec<S>) {  // one pack of the row has the label
#pragma unroll
          for (int i = 0; i < kVec<S>; ++i) g.x[i] -= at + i == r.scale.label ? gradient.label : 0;
        }
        packs.store(at, g);
      });
      if (packs.end >= 0) {
        const float g = gradient(s_end[0], t_end[0], r.scale);
        packs.store_end(packs.end == r.scale.label ? g - gradient.label : g);
      }
      zero_from(packs.grad, r.n, a.width, team);
    }
    team.meet();  // before the next row's statistics are written to the same lines
  }
}

template <class S, class D>
__global__ void __launch_bounds__(kWarpThreads, 4) warp_rows(const __grid_constant__ RowsArgs a) {
  extern __shared__ uint4 kept_bytes[];
  __shared__ Shared unused;
  rows_of_team<WarpTeam, S, D, true>(a, kept_bytes + (threadIdx.x >> 5) * 2 * (a.vocab / kVec<S>), unused);
}

template <class S, class D, bool kKeep>
__global__ void __launch_bounds__(kMostThreads, kBlocksAtOnce<D>)
    block_rows(const __grid_constant__ RowsArgs a) {
  extern __shared__ uint4 kept_bytes[];
  __shared__ Shared shared;
  rows_of_team<BlockTeam, S, D, kKeep>(a, kept_bytes, shared);
}

}  // namespace
}  // namespace kdfast
