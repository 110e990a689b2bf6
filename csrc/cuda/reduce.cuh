// How the threads that share a row add up their sums: lanes of a warp, warps of a block, blocks of a cluster,
// by the same rule at each level and in a fixed order.
//
// A is a struct of floats alone with warp_reduce(row), which gives each lane the sums of all, and with
// A::identity(), the sums of no class; row: what all threads know of it.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace kdfast {
namespace {

constexpr int kMostWarps = kMostThreads / 32;

// A struct of floats as an array.
template <class A>
constexpr int kFloats = sizeof(A) / sizeof(float);
template <class A>
__device__ inline float (&floats(A& x)) [kFloats<A>] { return reinterpret_cast<float (&)[kFloats<A>]>(x); }

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
// Where the block has nothing that another one reads after it: it waits for no store.
__device__ inline void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Writes to the shared memory of another block, at the same offset.
__device__ inline void store_in_block(float* address, int rank, float x) {
#if __CUDA_ARCH__ >= 900
  const uint32_t mine = (uint32_t)__cvta_generic_to_shared(address);
  uint32_t theirs;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(mine), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(theirs), "f"(x) : "memory");
#endif
}

// Shared memory for one all_reduce at a time.
template <class A>
struct ReduceBuffer {
  float warps[kFloats<A>][kMostWarps];
  float blocks[kMostBlocks][kFloats<A> | 1];  // written by a block at a time; odd, against bank conflicts
};

// ---- teams: the threads that share a row ----

struct WarpTeam {
  static constexpr bool kShort = true;  // its rows
  __device__ int thread() const { return threadIdx.x & 31; }
  __device__ int threads() const { return 32; }
  __device__ int rank() const { return 0; }
  __device__ int blocks() const { return 1; }
  __device__ uint32_t first_row() const { return blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); }
  __device__ uint32_t row_stride() const { return gridDim.x * (blockDim.x >> 5); }
  __device__ bool is_first_warp() const { return true; }
  __device__ bool is_first_thread() const { return thread() == 0; }
  __device__ void sync() const { __syncwarp(); }
  __device__ void wait_for_start() const {}

  // What read() returns, in every thread; here each reads.
  template <class N, class F>
  __device__ N broadcast(N&, F read) const {
    return read();
  }
  // The same in two steps, between which there is an all_reduce, and other work while memory answers.
  template <class F>
  __device__ float read_ahead(F read) const {
    return read();
  }
  __device__ void publish(float&, float) const {}
  __device__ float published(const float&, float mine) const { return mine; }
  // The same numbers of global memory, in every thread.
  template <int N>
  __device__ void load(float (&to)[N], float (&)[N], const float* from) const {
    const int lane = threadIdx.x & 31;
    const float mine = lane < N ? from[lane] : 0;
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = __shfl_sync(~0u, mine, i);
  }

  template <class A, class R>
  __device__ A all_reduce(const A& x, ReduceBuffer<A>&, const R& row) {
    __syncwarp();  // the gradient may go where the logits are, of which all lanes have read the label's
    return x.warp_reduce(row);
  }
};

// A block, or the blocks of a cluster. All of them must have started before one writes into another.
struct BlockTeam {
  static constexpr bool kShort = false;
  __device__ BlockTeam() {
    if (blocks() > 1) cluster_arrive_relaxed();
  }
  __device__ int thread() const { return threadIdx.x; }
  __device__ int threads() const { return blockDim.x; }
  __device__ int rank() const { return cluster_rank(); }
  __device__ int blocks() const { return cluster_blocks(); }
  __device__ uint32_t first_row() const { return blockIdx.x / blocks(); }
  __device__ uint32_t row_stride() const { return gridDim.x / blocks(); }
  __device__ void wait_for_start() const {
    if (blocks() > 1) cluster_wait();
  }
  __device__ bool is_first_thread() const { return rank() == 0 && thread() == 0; }
  __device__ bool is_first_warp() const { return rank() == 0 && thread() < 32; }
  // After it the buffers of earlier reductions may be written again.
  __device__ void sync() const {
    __syncthreads();
    if (blocks() == 1) return;
    cluster_arrive();
    cluster_wait();
  }

  template <class N, class F>
  __device__ N broadcast(N& shared, F read) const {
    if (threadIdx.x == 0) shared = read();
    __syncthreads();
    return shared;
  }
  template <class F>
  __device__ float read_ahead(F read) const {
    return threadIdx.x == 0 ? read() : 0;
  }
  __device__ void publish(float& shared, float mine) const {
    if (threadIdx.x == 0) shared = mine;
  }
  __device__ float published(const float& shared, float) const { return shared; }
  template <int N>
  __device__ void load(float (&to)[N], float (&shared)[N], const float* from) const {
    if (threadIdx.x < N) shared[threadIdx.x] = from[threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = shared[i];
  }

  // From every thread's sums those of the row, in every thread.
  template <class A, class R>
  __device__ A all_reduce(A x, ReduceBuffer<A>& buffer, const R& row) {
    constexpr int kCount = kFloats<A>;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = x.warp_reduce(row);
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) buffer.warps[i][warp] = floats(x)[i];
    }
    __syncthreads();
    A y = A::identity();
    if (lane < warps) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) floats(y)[i] = buffer.warps[i][lane];
    }
    y = y.warp_reduce(row);
    if (blocks() == 1) return y;
    float mine = 0;  // the lane's of the floats
#pragma unroll
    for (int i = 0; i < kCount; ++i) mine = lane == i ? floats(y)[i] : mine;
    for (int to = warp; to < blocks(); to += warps) {
      if (lane < kCount) store_in_block(&buffer.blocks[rank()][lane], to, mine);
    }
    cluster_arrive();
    cluster_wait();
    y = A::identity();
    if (lane < blocks()) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) floats(y)[i] = buffer.blocks[lane][i];
    }
    return y.warp_reduce(row);
  }
};

}  // namespace
}  // namespace kdfast
