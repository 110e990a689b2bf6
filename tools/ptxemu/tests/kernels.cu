// Small kernels without faults.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
namespace cg = cooperative_groups;

__device__ float warp_sum(float v) {
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

template <int THREADS>
__device__ float block_sum(float v) {
  __shared__ float part[THREADS / 32];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  v = threadIdx.x < THREADS / 32 ? part[threadIdx.x] : 0.f;
  if (threadIdx.x < 32) v = warp_sum(v);
  return v;
}

// row sums with 16-byte loads of 8 bf16
template <int THREADS, typename T>
__global__ void row_sum(const T* __restrict__ x, float* __restrict__ y, int n) {
  const uint4* row = reinterpret_cast<const uint4*>(x + (size_t)blockIdx.x * n);
  constexpr int V = 16 / sizeof(T);
  float acc = 0.f;
  for (int i = threadIdx.x; i < n / V; i += THREADS) {
    uint4 v = __ldg(row + i);
    const T* e = reinterpret_cast<const T*>(&v);
#pragma unroll
    for (int k = 0; k < V; k++) acc += static_cast<float>(e[k]);
  }
  acc = block_sum<THREADS>(acc);
  if (threadIdx.x == 0) y[blockIdx.x] = acc;
}
template __global__ void row_sum<128, __nv_bfloat16>(const __nv_bfloat16*, float*, int);
template __global__ void row_sum<256, __half>(const __half*, float*, int);
template __global__ void row_sum<256, float>(const float*, float*, int);

// dynamic shared memory: a copy that reverses twice
extern "C" __global__ void reverse(const float* x, float* y, int n) {
  extern __shared__ float buf[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  buf[threadIdx.x] = i < n ? x[i] : 0.f;
  __syncthreads();
  int j = blockIdx.x * blockDim.x + (blockDim.x - 1 - threadIdx.x);
  if (j < n) y[j] = buf[blockDim.x - 1 - threadIdx.x];
}

__constant__ int table[5] = {3, 1, 4, 1, 5};
__device__ int counter = 7;
__device__ __noinline__ int helper(int a, int b) { return a * table[b % 5] + b; }
__global__ void calls(int* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int r = helper(i, i);
  if (i & 1) r = helper(r, 3);
  o[i] = r;
  atomicAdd(&counter, 1);
}

struct Args {
  int n;
  float scale;
  long long shift[2];
};
__global__ void by_value(const double* x, double* y, Args a, float z) {
  int i = threadIdx.x;
  if (i < a.n) y[i] = x[i] * a.scale + a.shift[i & 1] + z;
}

__global__ void local_array(int* o, int k) {
  int a[16];
  for (int i = 0; i < 16; i++) a[(i * 5 + threadIdx.x) & 15] = i;
  o[threadIdx.x] = a[(k + threadIdx.x) & 15];
}

__global__ void switch_case(int* o) {
  int v = threadIdx.x, r;
  switch (v % 9) {
    case 0:
      r = v * 3;
      break;
    case 1:
      r = v ^ 77;
      break;
    case 2:
      r = v - 5;
      for (int i = 0; i < v; i++) r += i * r;
      break;
    case 3:
      r = __popc(v) * 11;
      break;
    case 4:
      r = v << 3;
      break;
    case 5:
      r = v / 3;
      break;
    case 6:
      r = -v;
      break;
    default:
      r = v % 7;
  }
  o[v] = r;
}

__global__ void histogram(const unsigned char* x, unsigned* h, int n) {
  __shared__ unsigned s[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) s[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    atomicAdd(&s[x[i]], 1u);
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x)
    if (s[i]) atomicAdd(&h[i], s[i]);
}

// float maximum through compare-and-swap
__global__ void cas_max(const float* x, int* m, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int old = *(volatile int*)m;
  while (__int_as_float(old) < x[i]) {
    int seen = atomicCAS(m, old, __float_as_int(x[i]));
    if (seen == old) break;
    old = seen;
  }
}

__global__ void last_block(const float* x, float* part, unsigned* ticket, float* out, int n) {
  __shared__ bool last;
  float s = block_sum<128>(blockIdx.x * 128 + threadIdx.x < n ? x[blockIdx.x * 128 + threadIdx.x] : 0.f);
  if (threadIdx.x == 0) {
    part[blockIdx.x] = s;
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float t = 0.f;
    for (int i = 0; i < gridDim.x; i++) t += __ldcg(part + i);
    *out = t;
  }
}

__global__ void named_barriers(int* o) {
  __shared__ int box[64];
  if (threadIdx.x < 64) {  // producers
    box[threadIdx.x] = threadIdx.x * 7;
    asm volatile("bar.arrive 1, 128;" ::: "memory");
  } else {
    asm volatile("bar.sync 1, 128;" ::: "memory");
    o[threadIdx.x - 64] = box[127 - threadIdx.x];
  }
}

// A box that both warps read, with a barrier in between, before the second one writes it; block 0 has left.
__global__ void read_in_turn(const float* x, float* y) {
  __shared__ float box;
  if (blockIdx.x == 0) return;
  if (threadIdx.x == 0) box = x[blockIdx.x];
  __syncthreads();
  float v = 0.f;
  if (threadIdx.x < 32) {
    asm volatile("" ::: "memory");  // or the compiler lets all threads read
    v = box;
  }
  __syncthreads();
  if (threadIdx.x >= 32) {
    v = box;
    __syncwarp();
    if (threadIdx.x == 32) box = v + 1.f;
  }
  __syncthreads();
  y[blockIdx.x * blockDim.x + threadIdx.x] = v + box;
}

__global__ void barrier_votes(const int* x, int* o) {
  int v = x[threadIdx.x];
  o[threadIdx.x] =
      __syncthreads_count(v > 0) * 100 + __syncthreads_and(v > -100) * 10 + __syncthreads_or(v > 1000);
}

__global__ void warp_exchange(int* o) {
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  __syncwarp();
  o[threadIdx.x] = s[threadIdx.x ^ 1];
}

#if __CUDA_ARCH__ >= 800
__global__ void bf16_math(const __nv_bfloat162* a, const __nv_bfloat162* b, __nv_bfloat162* o) {
  int i = threadIdx.x;
  o[i] = __hfma2(a[i], b[i], __hadd2(a[i], b[i]));
}
#endif

#if __CUDA_ARCH__ >= 900
__global__ void __cluster_dims__(4, 1, 1) cluster_sum(const float* x, float* y, int n) {
  __shared__ float part;
  auto cl = cg::this_cluster();
  int i = blockIdx.x * 128 + threadIdx.x;
  float s = block_sum<128>(i < n ? x[i] : 0.f);
  if (threadIdx.x == 0) part = s;
  cl.sync();
  if (cl.block_rank() == 0 && threadIdx.x == 0) {
    float t = 0.f;
    for (int r = 0; r < 4; r++) t += *cl.map_shared_rank(&part, r);
    y[blockIdx.x / 4] = t;
  }
  cl.sync();
}
// every block adds into the shared memory of block 0 of its cluster
__global__ void __cluster_dims__(2, 1, 1) cluster_atomic(int* y) {
  __shared__ int acc;
  auto cl = cg::this_cluster();
  if (threadIdx.x == 0) acc = 0;
  cl.sync();
  atomicAdd(cl.map_shared_rank(&acc, 0), (int)threadIdx.x);
  cl.sync();
  if (cl.block_rank() == 0 && threadIdx.x == 0) y[blockIdx.x / 2] = acc;
}
#endif

#if __CUDA_ARCH__ >= 900
// all blocks of a cluster read a number, and after they have met one of them writes it
__global__ void __cluster_dims__(4, 1, 1) cluster_read_then_write(int* y) {
  auto cl = cg::this_cluster();
  int* mine = y + blockIdx.x / 4;
  const int x = *mine;
  cl.sync();
  if (cl.block_rank() == 2 && threadIdx.x == 0) *mine = x + 1;
}
#endif
