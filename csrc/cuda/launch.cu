// Which kernel a call gets, and how many threads, blocks and bytes of shared memory.
//
// Warps. Rows of up to 1024 classes by a warp each: 4 KB of a bf16 pair, summed by shuffles alone.
//
// Clusters. Longer rows are kept in shared memory, by enough blocks that none keeps more than 64 KB, and
// three fit into a multiprocessor (two of those with many registers): one reads while another writes. For a
// bf16 pair that is a block to V = 16384, 2 to 32768, 4 to 65536, 8 to 131072, and 16, the most there is,
// beyond: of V = 262144 each keeps 64 KB, of an fp32 pair 128 KB. Few rows are divided further, so that every
// multiprocessor has a part of one. Devices before sm_90 have no clusters: a block keeps what its shared
// memory holds, 163 KB on an A100 (V to 41 thousand of a bf16 pair), 99 KB on sm_86. A block that leaves no
// room for another one has twice the threads.
//
// Sweeps. What is longer is read twice, three times by divergences with a pass of their own, and the second
// sweep finds it in the L2 only if all rows in flight fit into it. So there are as many blocks as rows fit
// into three quarters of it, but at least one for each multiprocessor and at most two.
#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "device.h"
#include "launch.h"

namespace kdfast {
namespace {

constexpr int kWarpRows = kWarpThreads / 32;
constexpr int kFewPacks = 512;           // a row is not divided further for the sake of idle multiprocessors
constexpr int64_t kFewBytes = 48 << 10;  // kept by half of the threads, for a reduction costs each the same
constexpr int kWarpClasses = 1024;
constexpr int64_t kBlockBytes = 64 << 10;
constexpr int kStaticBytes = 3 << 10;    // the most that a kernel declares of shared memory
constexpr int kReservedBytes = 1 << 10;  // of each block, by the system

struct Launch {
  int grid, block, cluster;
  int64_t shared;
};

constexpr int kDefaultShared = 48 << 10;  // of both kinds, without asking

// Always the most that the device has: another thread may be launching the kernel. The carveout is what a
// multiprocessor gives to shared memory of what it shares with the L1: all, for the L1 has nothing to keep.
void allow(const Kernel& kernel, const Launch& l, const Device& device) {
  if (l.shared + kStaticBytes > kDefaultShared)
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               (int)device.shared - kStaticBytes),
          kernel.name);
  if (l.shared)
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          kernel.name);
  if (l.cluster > kPortableBlocks)
    check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          kernel.name);
}

struct Config {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};
  Config(const Launch& l, const Stream& stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = l.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.gridDim = dim3(l.grid);
    config.blockDim = dim3(l.block);
    config.dynamicSmemBytes = l.shared;
    config.stream = (cudaStream_t)stream.handle;
    config.attrs = &cluster;
    config.numAttrs = l.cluster > 1;
  }
  Config(const Config&) = delete;
};

// How many such clusters the device runs at once: of 16 blocks each needs as many neighbouring
// multiprocessors, which small parts, and slices of large ones, lack. What is no answer is asked again.
int clusters_at_once(const Kernel& kernel, const Launch& l, const Device& device, const Stream& stream) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int, int64_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel.function, stream.device, l.block, l.cluster, l.shared);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  allow(kernel, l, device);
  Config config(l, stream);
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel.function, &config.config);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next check of another library reports it
    if (error != cudaErrorInvalidClusterSize) return 0;
    clusters = 0;
  }
  return known[key] = clusters;
}

template <class Args>
void run(const Kernel& kernel, const Launch& l, const Args& args, const Device& device,
         const Stream& stream) {
  allow(kernel, l, device);
  Config config(l, stream);
  void* pointers[] = {(void*)&args};
  check(cudaLaunchKernelExC(&config.config, kernel.function, pointers), kernel.name);
}

// ---- which kernel ----

Kernel row_kernel(const RowsArgs& a, Shape shape) {
  switch (a.student.dtype) {
    case DType::kBFloat16:
      return row_kernel_bf16(a.divergence, shape);
    case DType::kHalf:
      return row_kernel_fp16(a.divergence, shape);
    default:
      return row_kernel_fp32(a.divergence, shape);
  }
}

// ---- how many threads, blocks and bytes ----

Launch warp_launch(const RowsArgs& a, int packs) {
  return {(int)(((int64_t)a.rows + kWarpRows - 1) / kWarpRows), kWarpThreads, 1,
          (int64_t)kWarpRows * packs * kPairBytes};
}

Launch cluster_launch(const RowsArgs& a, int packs, int most_blocks, const Device& device) {
  const int64_t each = device.of_multiprocessor / 3 - kStaticBytes - kReservedBytes;
  const int64_t most_bytes = std::min(kBlockBytes, each);
  int blocks = 1;
  const auto is_idle = [&] {
    return 2 * (int64_t)a.rows * blocks <= device.multiprocessors && packs >= 2 * kFewPacks * blocks;
  };
  while (blocks < most_blocks && ((int64_t)packs * kPairBytes > most_bytes * blocks || is_idle()))
    blocks *= 2;
  const int64_t kept = (int64_t)packs_per_block(packs, blocks) * kPairBytes;
  const bool alone = 2 * (kept + kStaticBytes + kReservedBytes) > device.of_multiprocessor;
  const int64_t most = 0x7fffffff / kMostBlocks;
  const int threads = alone ? kMostThreads : kept <= kFewBytes ? kBlockThreads / 2 : kBlockThreads;
  return {(int)std::min<int64_t>(a.rows, most) * blocks, threads, blocks, kept};
}

// By clusters, if rows find room there: the launch, or a grid of 0. A cluster of 16 gives way to one of 8 of
// which more blocks run at once.
Launch kept_launch(const RowsArgs& a, int packs, const Kernel& kernel, const Device& device,
                   const Stream& stream) {
  Launch best{};
  int64_t most_running = 0;
  for (int most = device.most_blocks(); most >= 1; most /= 2) {
    const Launch launch = cluster_launch(a, packs, most, device);
    if (launch.shared + kStaticBytes > device.shared) break;
    const int at_once = launch.cluster == 1 ? a.rows : clusters_at_once(kernel, launch, device, stream);
    const int64_t running = (int64_t)std::min(a.rows, at_once) * launch.cluster;
    if (running > most_running) best = launch;
    most_running = std::max(most_running, running);
    if (best.grid && most <= kPortableBlocks) break;
  }
  return best;
}

Launch sweep_launch(const RowsArgs& a, const Device& device) {
  const int64_t row = (a.teacher.data ? 2 : 1) * bytes_of(a.student.dtype) * a.vocab;
  const int64_t fitting = device.cache * 3 / 4 / row, least = device.multiprocessors;
  const int64_t blocks = std::min<int64_t>(a.rows, std::max(least, std::min(2 * least, fitting)));
  return {(int)std::max<int64_t>(1, blocks), kBlockThreads, 1, kAhead * kBlockThreads * kPairBytes};
}

}  // namespace

int cuda_version() { return CUDART_VERSION; }
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// All kernels are compiled for the same devices, and this one is the least to load.
std::string device_failure(int device) {
  try {
    const DeviceGuard scope(device);
    cudaFuncAttributes attributes;
    const Kernel kernel = scale_kernel(DType::kFloat);
    check(cudaFuncGetAttributes(&attributes, kernel.function), "loading a kernel");
    return "";
  } catch (const std::runtime_error& error) {
    cudaGetLastError();  // or the next check of another library reports it
    return error.what();
  }
}

void launch_rows(RowsArgs a, const Stream& stream) {
  const DeviceGuard scope(stream.device);
  const Device& device = device_properties(stream.device);
  if (a.divergence == Divergence::kReverseKL) {
    a.beta = 0;
    a.divergence = Divergence::kSymmetricKL;
  }
  const int packs = a.vocab / (16 / (int)bytes_of(a.student.dtype));
  if (a.vocab <= kWarpClasses)
    return run(row_kernel(a, Shape::kWarp), warp_launch(a, packs), a, device, stream);
  const Kernel kept = row_kernel(a, Shape::kKept);
  const Launch launch = kept_launch(a, packs, kept, device, stream);
  if (launch.grid) return run(kept, launch, a, device, stream);
  run(row_kernel(a, Shape::kSwept), sweep_launch(a, device), a, device, stream);
}

void launch_scale(const ScaleArgs& args, const Stream& stream) {
  const DeviceGuard scope(stream.device);
  const Device& device = device_properties(stream.device);
  run(scale_kernel(args.grad.dtype), {std::min(args.rows, 8 * device.multiprocessors), kBlockThreads, 1, 0},
      args, device, stream);
}

}  // namespace kdfast
