// The row kernel: loss and gradient of a row by a block or by a cluster of blocks.
//
// A row is divided among the blocks of a cluster, each of which keeps its part in shared memory (kKeep), so
// that every logit is read once; or one block goes over it in sweeps, each from the end where the one before
// it stopped, for the last classes read are those that the caches still hold.
//
// A row's classes before the first multiple of 32 bytes, and those after the last whole 16, are "ends": of
// one thread each, of the first block. Student, teacher and gradient lie alike: the vectors of one are those
// of the others.
#pragma once

#include "row_passes.cuh"

namespace kdfast {
namespace {

constexpr int kMostThreads = 32 * kMostWarps;
constexpr int kAhead = 4;  // pairs of packs in flight per thread, from global to shared memory

// A row's own numbers and tensors.
template <class S>
struct RowOf {
  const S *student, *teacher;
  S* grad;
  int64_t index, label;
  bool kept, bad;  // bad: a label out of range, whose row is NaN
  float weight;
  int n;            // classes that are looked at: none where the row drops out
  int head, packs;  // classes before the first pack, and whole packs
  RowScale scale;
  float factor, label_logit;

  __device__ int tail() const { return head + packs * kVec<S>; }
  // The class of an end, by thread; -1 where there is none.
  __device__ int end_class(int thread) const {
    if (thread < head) return thread;
    const int at = tail() + thread - kHead<S>;
    return thread >= kHead<S> && at < n ? at : -1;
  }
};

// What a kernel is given: tensors, (rows) or null but for the first three.
template <class S>
struct Tensors {
  Matrix<const S> student, teacher;
  Matrix<S> grad;  // data null: none is wanted
  float* losses;
  const int64_t* labels;
  const float *weight, *temperatures, *teacher_temperatures, *row_scale;
  const float* divisor;  // 0-dim: of `scale`
};

// A row's label and the student's logit there, which one warp reads for all: a sector each.
struct LabelOf {
  int64_t index;
  float logit;
};
template <class S>
__device__ inline LabelOf label_of(const Tensors<S>& x, const Numbers& a, int64_t index) {
  if (!x.labels) return {0, 0};
  const int64_t label = x.labels[index];
  const bool there = label >= 0 && label < a.vocab && label != a.ignore_index;
  return {label, there ? widened(x.student.row(index)[label]) : 0};
}

template <class S, class D>
__device__ inline RowOf<S> row_of(const Tensors<S>& x, const Numbers& a, int64_t index,
                                  const LabelOf& label) {
  RowOf<S> r;
  r.index = index;
  r.student = x.student.row(index);
  r.teacher = x.teacher.data ? x.teacher.row(index) : nullptr;
  r.grad = x.grad.data ? x.grad.row(index) : nullptr;
  r.label = label.index;
  r.weight = x.weight ? x.weight[index] : 1;
  r.kept = !(x.labels && r.label == a.ignore_index) && r.weight != 0;
  r.bad = r.kept && (r.label < 0 || r.label >= a.vocab);
  r.n = r.kept ? a.vocab : 0;
  r.head = head_of(r.student, r.n);
  r.packs = (r.n - r.head) / kVec<S>;
  const float t = x.temperatures ? x.temperatures[index] : a.temperature;
  const float at = x.teacher_temperatures ? x.teacher_temperatures[index] : a.teacher_temperature;
  r.scale = {kLog2E / t, kLog2E / at, t, a.beta, a.power, 0};
  if (Statistics<D>::kMSE && r.n) r.scale.shift = widened(r.student[0]) - widened(r.teacher[0]);
  float factor = r.weight * a.scale;
  if (x.divisor) factor *= *x.divisor == 0 ? 0 : 1 / *x.divisor;
  if (x.row_scale) factor *= x.row_scale[index];
  r.factor = r.bad ? nanf("") : factor;
  r.label_logit = label.logit;
  return r;
}

template <class S>
__device__ inline void store_loss(const Tensors<S>& x, const RowOf<S>& r, float loss) {
  if (x.losses) x.losses[r.index] = r.kept ? (r.bad ? nanf("") : r.weight * loss) : 0;
}

// Zeros from class n on: padding, or a row that drops out. By the threads of all its blocks.
template <class S>
__device__ inline void zero_from(S* row, int n, int width, int thread, int threads) {
  const int head = n + head_of(row + n, width - n), packs = (width - head) / kVec<S>;
  for (int i = n + thread; i < head; i += threads) row[i] = narrowed<S>(0.f);
  for (int i = thread; i < packs; i += threads) __stcs((uint4*)(row + head) + i, uint4{0, 0, 0, 0});
  for (int i = head + packs * kVec<S> + thread; i < width; i += threads) row[i] = narrowed<S>(0.f);
}

template <class S, class D>
__device__ inline uint4 gradient_pack(uint4 s, uint4 t, int first, const RowOf<S>& r, const Coefficients& c,
                                      const Scales& scales) {
  const Wide<S> ws = widened<S>(s), wt = widened<S>(t);
  Wide<S> g;
  const int label = (int)r.label - first;
#pragma unroll
  for (int i = 0; i < kVec<S>; ++i) g.x[i] = gradient<D>(ws.x[i], wt.x[i], i == label, c, scales, r.scale);
  return narrowed_pack<S>(g);
}

// ---- a row by a block, or by the blocks of a cluster ----

// A block's packs of a row, as they come: from global memory by way of shared memory, where they stay, or
// each time from global memory. Each thread meets none but its own.
template <class S, bool kKeep>
struct Packs {
  const uint4 *student, *teacher;  // the block's first
  uint4 *kept_student, *kept_teacher;
  int count;

  // f(i, student's pack, teacher's pack) for the thread's packs. sweep: which one this is.
  template <class F>
  __device__ void each(int sweep, F f) const {
    const int threads = blockDim.x, thread = threadIdx.x;
    if constexpr (kKeep) {
      if (sweep > 0) {
        for (int i = thread; i < count; i += threads) f(i, kept_student[i], kept_teacher[i]);
        return;
      }
      int next = thread;
      auto fetch = [&] {
        if (next < count) {
          copy_async(kept_student + next, student + next);
          if (teacher) copy_async(kept_teacher + next, teacher + next);
          next += threads;
        }
        commit_copies();  // empty where there is nothing left, so that the count of groups is right
      };
#pragma unroll
      for (int k = 0; k < kAhead; ++k) fetch();
      for (int i = thread; i < count; i += threads) {
        await_copies<kAhead - 1>();
        f(i, kept_student[i], kept_teacher[i]);
        fetch();
      }
    } else {
      const int rounds = (count + threads - 1) / threads;
      for (int k = 0; k < rounds; ++k) {
        const int i = (sweep & 1 ? rounds - 1 - k : k) * threads + thread;
        if (i < count) {
          const uint4 none{0, 0, 0, 0};
          f(i, __ldcg(student + i), teacher ? __ldcg(teacher + i) : none);
        }
      }
    }
  }
};

// A block's packs of a row: whole warps' of them, so that each reads whole sectors.
__host__ __device__ inline int part_of(int packs, int blocks) {
  return blocks == 1 ? packs : ((packs + blocks - 1) / blocks + 31) / 32 * 32;
}

template <class S, class D, bool kKeep>
__global__ void __launch_bounds__(kMostThreads, 1)
    block_rows(const S* student, const S* teacher, S* grad, float* losses, const int64_t* labels,
               const float* weight, const float* temperatures, const float* teacher_temperatures,
               const float* row_scale, const float* divisor, const Numbers a) {
  extern __shared__ uint4 kept[];
  __shared__ Lines<Statistics<D>> statistics_lines;
  __shared__ Lines<PointwiseSums> sums_lines;
  __shared__ LabelOf label;
  const Tensors<S> x{{student, a.student}, {teacher, a.teacher}, {grad, a.grad}, losses, labels, weight,
                     temperatures,         teacher_temperatures, row_scale,      divisor};
  const int rank = cluster_rank(), blocks = cluster_blocks(), thread = threadIdx.x;
  if (blocks > 1) cluster_arrive();
  bool met = blocks == 1;
  for (int64_t index = blockIdx.x / blocks; index < a.rows; index += gridDim.x / blocks) {
    if (thread < 32) {
      const LabelOf read = label_of(x, a, index);
      if (thread == 0) label = read;
    }
    __syncthreads();
    const RowOf<S> r = row_of<S, D>(x, a, index, label);
    const int part = part_of(r.packs, blocks), first = min(rank * part, r.packs);
    const uint4 *s = (const uint4*)(r.student + r.head) + first,
                *t = r.teacher ? (const uint4*)(r.teacher + r.head) + first : nullptr;
    const Packs<S, kKeep> packs{s, t, kept, kept + part, min(part, r.packs - first)};

    const int end = rank == 0 && thread < kHead<S> + kVec<S> ? r.end_class(thread) : -1;
    float s_end[1] = {-kInf}, t_end[1] = {-kInf};
    if (end >= 0) {
      s_end[0] = widened(r.student[end]);
      if (r.teacher) t_end[0] = widened(r.teacher[end]);
    }
    Statistics<D> mine = Statistics<D>::nothing();
    packs.each(0,
               [&](int, uint4 ps, uint4 pt) { mine.add(widened<S>(ps).x, widened<S>(pt).x, true, r.scale); });
    mine.add(s_end, t_end, end >= 0, r.scale);
    if (!met) cluster_wait();
    met = true;
    const Statistics<D> statistics = join_team(mine, statistics_lines, r.scale);
    const Scales scales = scales_of(statistics);

    PointwiseSums sums{};
    if constexpr (D::kPointwise) {
      packs.each(1, [&](int, uint4 ps, uint4 pt) {
        sums.add<D>(widened<S>(ps).x, widened<S>(pt).x, scales, r.scale);
      });
      if (end >= 0) sums.add<D>(s_end, t_end, scales, r.scale);
      sums = join_team(sums, sums_lines, r.scale);
    }

    Coefficients c;
    const float loss = finish<D>(statistics, sums, scales, r.label_logit, r.scale, a,
                                 labels && a.hard_weight != 0, r.factor, c);
    if (rank == 0 && thread == 0) store_loss(x, r, loss);
    if (r.grad) {
      uint4* out = (uint4*)(r.grad + r.head) + first;
      packs.each(D::kPointwise ? 2 : 1, [&](int i, uint4 ps, uint4 pt) {
        const int at = r.head + (first + i) * kVec<S>;
        __stcs(out + i, gradient_pack<S, D>(ps, pt, at, r, c, scales));
      });
      if (end >= 0)
        r.grad[end] = narrowed<S>(gradient<D>(s_end[0], t_end[0], end == r.label, c, scales, r.scale));
      zero_from(r.grad, r.n, a.width, rank * blockDim.x + thread, blocks * blockDim.x);
    }
    __syncthreads();  // before the next row's statistics are written to the same lines
  }
  if (!met) cluster_wait();
}

}  // namespace
}  // namespace kdfast
