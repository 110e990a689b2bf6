// A team's part of a row: packs of 16 bytes, which come from global memory by way of shared memory, where
// they stay (kKeep), or again in each sweep, through a few slots. Each thread reads only what it has copied
// itself.
#pragma once

#include "row_numbers.cuh"

namespace kdfast {
namespace {

// Zeros from class n on, which are padding. By the threads of all the row's blocks.
template <class S, class Team>
__device__ inline void write_zeros(S* row, int n, int width, const Team& team) {
  const int thread = team.rank() * team.threads() + team.thread(), threads = team.blocks() * team.threads();
  const int begin = n + prefix_classes(row + n, sizeof(S), width - n), packs = (width - begin) / kVec<S>;
  for (int i = n + thread; i < begin; i += threads) row[i] = narrow<S>(0);
  for (int i = thread; i < packs; i += threads) __stcs((uint4*)(row + begin) + i, uint4{0, 0, 0, 0});
  for (int i = begin + packs * kVec<S> + thread; i < width; i += threads) row[i] = narrow<S>(0);
}

template <class Team, class S, class D, bool kKeep>
struct RowPacks {
  static constexpr int kN = kVec<S>;
  const Team& team;
  const S* student;
  const uint4 *student_packs, *teacher_packs;  // the block's
  char* grad;                                  // of the row; null: none is wanted
  DType grad_type;
  bool has_grad_vectors;  // whether the gradient's are those of the logits
  int prefix;             // classes before the row's first pack
  int first, count;       // the block's packs
  int end;                // the thread's class before or after all packs, -1: none
  End end_s{-kInf}, end_t{-kInf};
  uint4 *kept_student, *kept_teacher;
  // of the next sweep: whether it is from the end, and its rounds that are on the way already
  bool is_backwards = false;
  int begun = 1;

  // The first copies begin here, before it is known whether the row is kept: that is in memory too.
  __device__ RowPacks(const Team& its_team, const RowsArgs& a, int64_t index, uint4* kept)
      : team(its_team),
        student(row_data<const S>(a.student, index)),
        grad(a.grad.data ? (char*)a.grad.data + a.grad.offset(index) * grad_bytes(a) : nullptr),
        grad_type(a.grad.dtype),
        prefix(prefix_classes(student, sizeof(S), a.vocab)) {
    has_grad_vectors = ((uintptr_t)grad + prefix * grad_bytes(a)) % (kN * grad_bytes(a)) == 0;
    const int part = take_all(a);
    const S* teacher = kHasTeacher<D> ? row_data<const S>(a.teacher, index) : nullptr;
    student_packs = (const uint4*)(student + prefix) + first;
    teacher_packs = (const uint4*)(teacher + prefix) + first;
    kept_student = kept_pointer(kept);
    kept_teacher = kept_student + (kKeep ? part : kAhead * team.threads());
    copy(team.thread(), team.thread());
    if (end < 0) return;
    end_s.x = widen(student[end]);
    if constexpr (kHasTeacher<D>) end_t.x = widen(teacher[end]);
  }
  // Of a row that is not kept no class is looked at, and its gradient is 0.
  __device__ void drop() {
    wait_for_copies<0>();
    count = 0;
    end = -1;
  }
  __device__ void store_zeros(const RowsArgs& a) {
    const float zeros[kN] = {}, zero[1] = {};
    take_all(a);
    for (int i = team.thread(); i < count; i += team.threads()) store(class_of(i), zeros);
    if (end >= 0) store(end, zero);
  }
  // And of the padding.
  __device__ void store_zeros_behind(const RowsArgs& a) const {
    with_gradient_type<S>(grad_type,
                          [&](auto g) { write_zeros((decltype(g)*)grad, a.vocab, a.width, team); });
  }
  __device__ float student_logit(int at) const { return widen(student[at]); }

  // The first sweep: f(first class, student's, teacher's) of the thread's classes, each as a Pack or an End.
  template <class F>
  __device__ void read(F f) {
    copy_rounds(f);
    if (end >= 0) f(end, end_s, end_t);
  }

  // A later one. What is not kept is read from the end where the sweep before it stopped.
  template <class F>
  __device__ void reread(F f) {
    if constexpr (kKeep) {
      for (int i = team.thread(); i < count; i += team.threads()) call(f, i, i);
    } else {
      copy_rounds(f);
    }
    if (end >= 0) f(end, end_s, end_t);
  }

  template <int N>
  __device__ void store(int at, const float (&g)[N]) const {
    with_gradient_type<S>(grad_type, [&](auto type) {
      using G = decltype(type);
      G* const to = (G*)grad + at;
      if constexpr (N == kN) {
        if (has_grad_vectors) return store_vector(to, g);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] = narrow<G>(g[i]);
    });
  }

 private:
  __device__ static int grad_bytes(const RowsArgs& a) {
    return sizeof(S) == 4 ? (int)bytes_of(a.grad.dtype) : (int)sizeof(S);
  }
  __device__ int class_of(int i) const { return prefix + (first + i) * kN; }

  // The block's packs and the thread's class beside them, and the most packs that a block has.
  __device__ int take_all(const RowsArgs& a) {
    const int packs = (a.vocab - prefix) / kN, part = packs_per_block(packs, team.blocks());
    first = min(team.rank() * part, packs);
    count = min(part, packs - first);
    end = team.rank() == 0 ? end_class(team.thread(), prefix, packs * kN, a.vocab) : -1;
    return part;
  }
  template <class F>
  __device__ void call(F f, int i, int slot) const {
    f(class_of(i), Pack<S>(kept_student[slot]), Pack<S>(kept_teacher[slot]));
  }

  // A group, empty where there is no such pack, so that the count of groups is right.
  __device__ void copy(int i, int slot) const {
    if ((unsigned)i < (unsigned)count) {
      copy_async(kept_student + slot, student_packs + i);
      if constexpr (kHasTeacher<D>) copy_async(kept_teacher + slot, teacher_packs + i);
    }
    commit_copies();
  }

  // All of the thread's packs, of which kAhead are on the way. What is not kept goes round through as many
  // slots.
  template <class F>
  __device__ void copy_rounds(F f) {
    const int threads = team.threads(), thread = team.thread(), slots = kAhead * threads;
    const int step = is_backwards ? -threads : threads;
    int i = is_backwards ? thread + ((count - thread + threads - 1) / threads - 1) * threads : thread;
    int slot = thread;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (k >= begun) copy(i + k * step, kKeep ? i + k * step : slot + k * threads);
    }
    for (; (unsigned)i < (unsigned)count; i += step) {
      wait_for_copies<kAhead - 1>();
      call(f, i, kKeep ? i : slot);
      copy(i + kAhead * step, kKeep ? i + kAhead * step : slot);
      slot = slot + threads < slots ? slot + threads : thread;
    }
    is_backwards = !kKeep && !is_backwards;
    begun = 0;
  }
};

}  // namespace
}  // namespace kdfast
