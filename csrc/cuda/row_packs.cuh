// A team's part of a row: packs of 16 bytes, which come from global memory by way of shared memory, where
// they stay (kKeep), or each time from global memory. Each thread reads only what it has copied itself.
#pragma once

#include "row_numbers.cuh"

namespace kdfast {
namespace {

constexpr int kAhead = 4;  // pairs of packs in flight per thread, from global to shared memory

template <class Team, class S, bool kKeep>
struct RowPacks {
  static constexpr int kN = kVec<S>;
  const Team& team;
  const S *student, *teacher;
  S* grad;
  bool has_grad_vectors;  // whether the gradient's are those of the logits
  int prefix;             // classes before the row's first pack
  int first, count;       // the block's packs
  int end;                // the thread's class before or after all packs, -1: none
  float end_s[1] = {-kInf}, end_t[1] = {-kInf};
  uint4 *kept_student, *kept_teacher;
  int sweeps = 0;  // done so far

  __device__ RowPacks(const Team& its_team, const RowsArgs& a, const Row& row, uint4* kept)
      : team(its_team),
        student(row_data<const S>(a.student, row.index)),
        teacher(a.teacher.data ? row_data<const S>(a.teacher, row.index) : nullptr),
        grad(a.grad.data ? row_data<S>(a.grad, row.index) : nullptr),
        has_grad_vectors(((uintptr_t)grad - (uintptr_t)student) % 16 == 0),
        prefix(prefix_classes(student, sizeof(S), row.classes)) {
    const int packs = (row.classes - prefix) / kN, part = packs_per_block(packs, team.blocks());
    first = min(team.rank() * part, packs);
    count = min(part, packs - first);
    kept_student = kept;
    kept_teacher = kept + part;
    end = team.rank() == 0 ? end_class(team.thread(), prefix, packs * kN, row.classes) : -1;
    if (end < 0) return;
    end_s[0] = widen(student[end]);
    if (teacher) end_t[0] = widen(teacher[end]);
  }

  // The first sweep: f(first class, student's, teacher's) of the thread's classes, as arrays of kVec<S>, or
  // of 1.
  template <class F>
  __device__ void read(F f) {
    if constexpr (kKeep) {
      copy_packs(f);
      if (end >= 0) f(end, end_s, end_t);
      ++sweeps;
    } else {
      reread(f);
    }
  }

  // A later one. What is not kept is read from the end where the sweep before it stopped.
  template <class F>
  __device__ void reread(F f) {
    const int threads = team.threads(), thread = team.thread();
    if constexpr (kKeep) {
      for (int i = thread; i < count; i += threads) call(f, i, kept_student[i], kept_teacher[i]);
    } else {
      const uint4 *s = packs_of(student), *t = packs_of(teacher);
      const int rounds = (count + threads - 1) / threads;
      for (int k = 0; k < rounds; ++k) {
        const int i = (sweeps & 1 ? rounds - 1 - k : k) * threads + thread;
        if (i < count) call(f, i, __ldcg(s + i), t ? __ldcg(t + i) : uint4{0, 0, 0, 0});
      }
    }
    if (end >= 0) f(end, end_s, end_t);
    ++sweeps;
  }

  template <int N>
  __device__ void store(int at, const float (&g)[N]) const {
    if constexpr (N == kN) {
      if (has_grad_vectors) return __stcs((uint4*)(grad + at), narrow<S>(g));
    }
#pragma unroll
    for (int i = 0; i < N; ++i) grad[at + i] = narrow<S>(g[i]);
  }

 private:
  __device__ const uint4* packs_of(const S* row) const {
    return row ? (const uint4*)(row + prefix) + first : nullptr;
  }
  template <class F>
  __device__ void call(F f, int i, uint4 s_pack, uint4 t_pack) const {
    float s[kN], t[kN];
    widen<S>(s_pack, s);
    widen<S>(t_pack, t);
    f(prefix + (first + i) * kN, s, t);
  }

  template <class F>
  __device__ void copy_packs(F f) {
    const int threads = team.threads(), thread = team.thread();
    const uint4 *s = packs_of(student), *t = packs_of(teacher);
    int next = thread;
    auto copy_next = [&] {
      if (next < count) {
        copy_async(kept_student + next, s + next);
        if (t) copy_async(kept_teacher + next, t + next);
        next += threads;
      }
      commit_copies();  // empty where there is nothing left, so that the count of groups is right
    };
#pragma unroll
    for (int k = 0; k < kAhead; ++k) copy_next();
    for (int i = thread; i < count; i += threads) {
      wait_for_copies<kAhead - 1>();
      call(f, i, kept_student[i], kept_teacher[i]);
      copy_next();
    }
  }
};

// Zeros from class n on: padding, or a dropped row. By the threads of all its blocks.
template <class S, class Team>
__device__ inline void write_zeros(S* row, int n, int width, const Team& team) {
  const int thread = team.rank() * team.threads() + team.thread(), threads = team.blocks() * team.threads();
  const int begin = n + prefix_classes(row + n, sizeof(S), width - n), packs = (width - begin) / kVec<S>;
  for (int i = n + thread; i < begin; i += threads) row[i] = narrow<S>(0);
  for (int i = thread; i < packs; i += threads) __stcs((uint4*)(row + begin) + i, uint4{0, 0, 0, 0});
  for (int i = begin + packs * kVec<S> + thread; i < width; i += threads) row[i] = narrow<S>(0);
}

}  // namespace
}  // namespace kdfast
