// How the threads that share a row join what each of them has: lanes of a warp, warps of a block, blocks of a
// cluster, by the same rule at each level and in a fixed order.
//
// A is a bundle of kCount floats, x.value[kCount], with joined(row), which makes of the lanes' bundles that
// of the warp in every lane, and A::nothing(), the bundle of no class at all; row: what all threads know
// alike.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace kdfast {
namespace {

constexpr int kMostWarps = kMostThreads / 32;

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

// ---- blocks of a cluster; one block where the device, or the launch, has none ----

__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return (int)rank;
#else
  return 0;
#endif
}
__device__ inline int cluster_blocks() {
#if __CUDA_ARCH__ >= 900
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return (int)blocks;
#else
  return 1;
#endif
}
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Writes to the same place in the shared memory of another block.
__device__ inline void store_in_block(float* place, int rank, float x) {
#if __CUDA_ARCH__ >= 900
  const uint32_t mine = (uint32_t)__cvta_generic_to_shared(place);
  uint32_t theirs;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(mine), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(theirs), "f"(x) : "memory");
#endif
}

// Shared memory for one joining at a time.
template <int kCount>
struct Lines {
  float of_warp[kCount][kMostWarps];
  float of_block[kMostBlocks][kCount | 1];  // written by a block at a time; odd, against bank conflicts
};

// ---- teams: what shares a row ----

struct WarpTeam {
  static constexpr bool kWarp = true;
  __device__ int thread() const { return threadIdx.x & 31; }
  __device__ int threads() const { return 32; }
  __device__ int rank() const { return 0; }
  __device__ int blocks() const { return 1; }
  __device__ int64_t first_row() const {
    return (int64_t)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  }
  __device__ int64_t rows_at_once() const { return (int64_t)gridDim.x * (blockDim.x >> 5); }
  __device__ bool leading_warp() const { return true; }
  __device__ bool leads() const { return thread() == 0; }
  __device__ void meet() const { __syncwarp(); }
  template <class N, class F>
  __device__ N numbers(N&, F read) const {
    return read();
  }

  // The same numbers of memory, in every thread.
  template <int kCount>
  __device__ void fetch(float (&to)[kCount], float (&)[kCount], const float* from) const {
    const int lane = threadIdx.x & 31;
    const float mine = lane < kCount ? from[lane] : 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = __shfl_sync(~0u, mine, i);
  }

  template <class A, int kCount, class R>
  __device__ A join(const A& x, Lines<kCount>&, const R& row) {
    __syncwarp();  // the gradient may go where the logits are, of which all lanes have read the label's
    return x.joined(row);
  }
};

// A block, or the blocks of a cluster. All of them must have been seen to run before one writes into another.
struct BlockTeam {
  static constexpr bool kWarp = false;
  bool met;

  __device__ BlockTeam() : met(blocks() == 1) {
    if (!met) cluster_arrive();
  }
  __device__ ~BlockTeam() { see_all(); }
  __device__ int thread() const { return threadIdx.x; }
  __device__ int threads() const { return blockDim.x; }
  __device__ int rank() const { return cluster_rank(); }
  __device__ int blocks() const { return cluster_blocks(); }
  __device__ int64_t first_row() const { return blockIdx.x / blocks(); }
  __device__ int64_t rows_at_once() const { return gridDim.x / blocks(); }
  __device__ void see_all() {
    if (!met) cluster_wait();
    met = true;
  }
  __device__ bool leads() const { return rank() == 0 && thread() == 0; }
  __device__ bool leading_warp() const { return rank() == 0 && thread() < 32; }
  // What one thread reads, in every thread.
  template <class N, class F>
  __device__ N numbers(N& shared, F read) const {
    if (threadIdx.x == 0) shared = read();
    __syncthreads();
    return shared;
  }
  template <int kCount>
  __device__ void fetch(float (&to)[kCount], float (&shared)[kCount], const float* from) const {
    if (threadIdx.x < kCount) shared[threadIdx.x] = from[threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = shared[i];
  }
  // After it the lines of earlier joinings may be written again.
  __device__ void meet() const {
    __syncthreads();
    if (blocks() == 1) return;
    cluster_arrive();
    cluster_wait();
  }

  // From every thread's bundle that of the row, in every thread.
  template <class A, int kCount, class R>
  __device__ A join(A x, Lines<kCount>& lines, const R& row) {
    static_assert(A::kCount <= kCount);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = x.joined(row);
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < A::kCount; ++i) lines.of_warp[i][warp] = x.value[i];
    }
    __syncthreads();
    A y = A::nothing();
    if (lane < warps) {
#pragma unroll
      for (int i = 0; i < A::kCount; ++i) y.value[i] = lines.of_warp[i][lane];
    }
    y = y.joined(row);
    if (blocks() == 1) return y;
    see_all();
    float mine = 0;  // the lane's of the values
#pragma unroll
    for (int i = 0; i < A::kCount; ++i) mine = lane == i ? y.value[i] : mine;
    for (int to = warp; to < blocks(); to += warps) {
      if (lane < A::kCount) store_in_block(&lines.of_block[rank()][lane], to, mine);
    }
    cluster_arrive();
    cluster_wait();
    y = A::nothing();
    if (lane < blocks()) {
#pragma unroll
      for (int i = 0; i < A::kCount; ++i) y.value[i] = lines.of_block[lane][i];
    }
    return y.joined(row);
  }
};

}  // namespace
}  // namespace kdfast
