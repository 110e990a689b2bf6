// Every kernel here has one seeded fault.
#include <cooperative_groups.h>
namespace cg = cooperative_groups;

__global__ void no_sync(const float* x, float* y) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[127 - threadIdx.x];  // reads another warp's value
}
__global__ void no_sync_loop(const float* x, float* y, int n) {
  __shared__ float s[64];
  float acc = 0.f;
  for (int i = 0; i < n; i++) {
    s[threadIdx.x] = x[i * 64 + threadIdx.x];
    __syncthreads();
    acc += s[63 - threadIdx.x];  // next round overwrites while others read
  }
  y[threadIdx.x] = acc;
}
__global__ void no_syncwarp(int* y) {
  __shared__ int s[32];
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = *(s + (threadIdx.x ^ 1));
}
__global__ void off_by_one(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i] = x[i];
}
__global__ void negative_index(const float* x, float* y) { y[threadIdx.x] = x[(int)threadIdx.x - 1]; }
__global__ void misaligned(const float* x, float4* y) {
  y[threadIdx.x] = *reinterpret_cast<const float4*>(x + 1 + 4 * threadIdx.x);
}
__global__ void shared_oob(float* y, int k) {
  extern __shared__ float d[];
  d[threadIdx.x + k] = 1.f;
  __syncthreads();
  y[threadIdx.x] = d[31 - (31 - k)];
}
__global__ void uninitialised(float* y) {
  __shared__ float s[64];
  if (threadIdx.x < 32) s[threadIdx.x] = 1.f;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
__global__ void divergent(float* y) {
  if (threadIdx.x < 16) {
    y[threadIdx.x] = 1.f;
    __syncthreads();
    y[threadIdx.x] += 1.f;
  } else {
    y[threadIdx.x] = 2.f;
    __syncthreads();
    y[threadIdx.x] -= 1.f;
  }
}
__global__ void early_exit(float* y, int n) {
  if (threadIdx.x >= n) return;
  __syncthreads();
  y[threadIdx.x] = 1.f;
}
__global__ void dead_lock(float* y) {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;");
  else
    asm volatile("bar.sync 2, 64;");
  y[threadIdx.x] = 1.f;
}
__global__ void endless(volatile int* flag) {
  while (*flag == 0) {
  }
}
__global__ void block_race(float* y) { y[threadIdx.x] = blockIdx.x; }
__global__ void block_race_read(float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float v = y[(i + blockDim.x) % n];
  y[i] = v + 1.f;
}
__global__ void no_fence(float* part, unsigned* ticket, float* out) {
  if (threadIdx.x == 0) {
    part[blockIdx.x] = 1.f;
    if (atomicAdd(ticket, 1u) == gridDim.x - 1) {
      float t = 0.f;
      for (int i = 0; i < gridDim.x; i++) t += part[i];
      *out = t;
    }
  }
}
__global__ void copy_no_wait(const float4* x, float4* y) {
  __shared__ float4 s[32];
  unsigned d = (unsigned)__cvta_generic_to_shared(&s[threadIdx.x]);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n cp.async.commit_group;" ::"r"(d),
               "l"(x + threadIdx.x)
               : "memory");
  __syncthreads();
  y[threadIdx.x] = s[31 - threadIdx.x];
}
__global__ void traps(int* y) {
  if (y[threadIdx.x] == 3) __trap();
}
__global__ void half_warp_shuffle(int* y) {
  int v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_sync(0x0000ffffu, v, 20);
  y[threadIdx.x] = v;
}
#if __CUDA_ARCH__ >= 900
__global__ void __cluster_dims__(2, 1, 1) cluster_no_sync(int* y) {
  __shared__ int s;
  auto cl = cg::this_cluster();
  if (threadIdx.x == 0) s = blockIdx.x;
  __syncthreads();
  y[blockIdx.x * blockDim.x + threadIdx.x] = *cl.map_shared_rank(&s, cl.block_rank() ^ 1);
  cl.sync();
}
__global__ void __cluster_dims__(2, 1, 1) cluster_early_exit(int* y) {
  __shared__ int s;
  auto cl = cg::this_cluster();
  if (threadIdx.x == 0) s = blockIdx.x;
  cl.sync();
  y[blockIdx.x * blockDim.x + threadIdx.x] = *cl.map_shared_rank(&s, cl.block_rank() ^ 1);
}
#endif

#if __CUDA_ARCH__ >= 900
// as in kernels.cu, but blocks of the next cluster read the number too, which none of them has met
__global__ void __cluster_dims__(2, 1, 1) cluster_write_seen_elsewhere(int* y) {
  auto cl = cg::this_cluster();
  const int x = *y;
  cl.sync();
  if (blockIdx.x == 3 && threadIdx.x == 0) *y = x + 1;
}
#endif
