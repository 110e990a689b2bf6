// What the launchers know of a device, and which one is current.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "arguments.h"

namespace kdfast {
namespace {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("kdfast: ") + what + ": " + cudaGetErrorString(error) +
                             " (perhaps of an earlier kernel)");
}

constexpr int kPortableBlocks = 8;  // of a cluster

struct Device {
  int capability, multiprocessors;
  int64_t shared, of_multiprocessor, cache;  // bytes: shared memory, the most of a block, and all; the L2's
  // Of a cluster; 16 is not portable, and those with little shared memory have 8.
  int most_blocks() const { return capability < 90 ? 1 : shared > 128 << 10 ? kMostBlocks : kPortableBlocks; }
};

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "reading a device's attributes");
  return value;
}
inline const Device& device_properties(int device) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const Device properties{10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                              attribute(cudaDevAttrComputeCapabilityMinor, device),
                          attribute(cudaDevAttrMultiProcessorCount, device),
                          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                          attribute(cudaDevAttrL2CacheSize, device)};
  return known.emplace(device, properties).first->second;
}

// Makes a device the current one of this thread, for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (before_ == device) before_ = -1;
    if (before_ >= 0) check(cudaSetDevice(device), "choosing a device");
  }
  ~DeviceGuard() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_;
};

}  // namespace
}  // namespace kdfast
