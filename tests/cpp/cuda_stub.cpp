// Stands in for the CUDA runtime and for torch's CUDA library, in the test library of tests/emulated.py. It
// refuses what a device would refuse and hands the launches to Python. The linker (--wrap) also sends it the
// glue's calls of torch's C interface: CPU tensors pass for those of a device, and Python is told of all
// memory that a call may touch.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

// Set by tests/emulated.py.
extern "C" {
// kernel: its mangled name; allowed: its bytes of dynamic shared memory, -1 where nobody asked for more than
// usual. The result is a cudaError_t.
int (*stub_launch)(const char* kernel, int grid, int block, int cluster, int64_t shared, int64_t allowed,
                   void** arguments) = nullptr;
void (*stub_memory)(const void* data, int64_t bytes) = nullptr;  // null: a new call begins
int stub_failures = 0;  // of the next queries, as where memory is short
}

namespace {

constexpr int64_t kUsualShared = 48 << 10;
constexpr int kMostThreads = 1024, kPortableBlocks = 8, kMostBlocks = 16;

struct Device {
  int capability;
  int most_blocks;  // that are neighbours: of the clusters that it has room for
  bool is_small() const { return capability == 86 || capability == 89 || capability >= 120; }
  int64_t shared() const { return (is_small() ? 99 : capability >= 90 ? 227 : 163) << 10; }
};
struct Function {
  std::string name;
  std::map<int, int64_t> shared;  // what is allowed, by device
  std::set<int> non_portable;     // devices
};

// The first is every thread's at the beginning, and nothing may be launched there.
std::vector<Device> devices{{0, 0}};
int tensor_device = 0;
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;

std::map<const void*, Function>& functions() {  // filled before main, by the constructors of other files
  static std::map<const void*, Function> all;
  return all;
}
Function* find(const void* function) {
  const auto found = functions().find(function);
  return found == functions().end() ? nullptr : &found->second;
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}
void* stream_of(int device) { return (void*)(uintptr_t)(0x1000 + device); }

int blocks_of_cluster(const cudaLaunchConfig_t& config) {
  int blocks = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& each = config.attrs[i];
    if (each.id != cudaLaunchAttributeClusterDimension) return -1;
    if (each.val.clusterDim.y != 1 || each.val.clusterDim.z != 1) return -1;
    blocks = (int)each.val.clusterDim.x;
  }
  return blocks;
}

cudaError_t check_launch(const Function* f, const cudaLaunchConfig_t& config) {
  if (!f) return cudaErrorInvalidDeviceFunction;
  if (current != tensor_device) return cudaErrorInvalidDevice;
  if (config.stream != stream_of(current)) return cudaErrorInvalidResourceHandle;
  const unsigned grid = config.gridDim.x, block = config.blockDim.x;
  if (grid < 1 || grid > INT32_MAX || block < 1 || block > kMostThreads) return cudaErrorInvalidConfiguration;
  if (config.gridDim.y * config.gridDim.z * config.blockDim.y * config.blockDim.z != 1)
    return cudaErrorNotSupported;
  const int cluster = blocks_of_cluster(config);
  const int most = devices[current].capability < 90      ? 1
                   : f->non_portable.count(current) == 0 ? kPortableBlocks
                                                         : kMostBlocks;
  if (cluster < 1 || cluster > most || grid % cluster) return cudaErrorInvalidClusterSize;
  const auto allowed = f->shared.find(current);
  const int64_t most_shared = allowed == f->shared.end() ? kUsualShared : allowed->second;
  return (int64_t)config.dynamicSmemBytes > most_shared ? cudaErrorInvalidValue : cudaSuccess;
}

AOTITorchError report_memory(AtenTensorHandle tensor, const void* data, AOTITorchError error) {
  int64_t offset = 0, bytes = 0;
  int32_t type = 0;
  if (error || (error = aoti_torch_get_storage_offset(tensor, &offset)) ||
      (error = aoti_torch_get_storage_size(tensor, &bytes)) || (error = aoti_torch_get_dtype(tensor, &type)))
    return error;
  if (bytes) stub_memory((const char*)data - offset * (int64_t)aoti_torch_dtype_element_size(type), bytes);
  return 0;
}

AOTITorchError current_stream(int32_t device, void** stream) {
  *stream = stream_of(device);
  stub_memory(nullptr, 0);
  return 0;
}
char torch_cuda;  // the handle of torch's CUDA library

}  // namespace

// ---- for tests/emulated.py ----

extern "C" {

// From now on tensors are on such a device, where nothing was allowed to any kernel yet. Each has a number of
// its own, which is returned, because the launchers may remember what they learned of it.
int stub_use(int capability, int most_blocks) {
  for (tensor_device = 1; tensor_device < (int)devices.size(); ++tensor_device) {
    const Device& d = devices[tensor_device];
    if (d.capability == capability && d.most_blocks == most_blocks) break;
  }
  if (tensor_device == (int)devices.size()) devices.push_back({capability, most_blocks});
  for (auto& [_, function] : functions()) {
    function.shared.erase(tensor_device);
    function.non_portable.erase(tensor_device);
  }
  return tensor_device;
}

int stub_device() { return current; }
int stub_shared() { return (int)devices[tensor_device].shared(); }

// ---- the CUDA runtime ----

cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= (int)devices.size()) return result(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string text;
  return (text = "CUDA error " + std::to_string((int)error) + " of the stub").c_str();
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device < 1 || device >= (int)devices.size()) return result(cudaErrorInvalidDevice);
  const Device& d = devices[device];
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor:
      return *value = d.capability / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = d.capability % 10, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = 132, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = (int)d.shared(), cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = (int)d.shared() + 1024, cudaSuccess;
    case cudaDevAttrL2CacheSize:
      return *value = 50 << 20, cudaSuccess;
    default:
      return result(cudaErrorNotSupported);
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* function) {
  if (!find(function)) return result(cudaErrorInvalidDeviceFunction);
  return result(devices[current].capability < 80 ? cudaErrorNoKernelImageForDevice : cudaSuccess);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  Function* f = find(function);
  if (!f) return result(cudaErrorInvalidDeviceFunction);
  switch (which) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > devices[current].shared()) return result(cudaErrorInvalidValue);
      f->shared[current] = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      value ? (void)f->non_portable.insert(current) : (void)f->non_portable.erase(current);
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return result(value >= -1 && value <= 100 ? cudaSuccess : cudaErrorInvalidValue);
    default:
      return result(cudaErrorNotSupported);
  }
}

// 0 clusters where there is no room, or an error for sizes that not every device has.
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                           const cudaLaunchConfig_t* config) {
  const cudaError_t error = check_launch(find(function), *config);
  if (error != cudaSuccess) return result(error);
  if (stub_failures > 0) return --stub_failures, result(cudaErrorMemoryAllocation);
  const int blocks = blocks_of_cluster(*config);
  *clusters = 7 * (devices[current].most_blocks / blocks);
  return result(*clusters == 0 && blocks > kPortableBlocks ? cudaErrorInvalidClusterSize : cudaSuccess);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  const Function* f = find(function);
  const cudaError_t error = check_launch(f, *config);
  if (error != cudaSuccess) return result(error);
  const int cluster = blocks_of_cluster(*config);
  if (cluster > devices[current].most_blocks) return result(cudaErrorInvalidClusterSize);
  const auto allowed = f->shared.find(current);
  return result((cudaError_t)stub_launch(f->name.c_str(), (int)config->gridDim.x, (int)config->blockDim.x,
                                         cluster, (int64_t)config->dynamicSmemBytes,
                                         allowed == f->shared.end() ? -1 : allowed->second, arguments));
}

// ---- what nvcc's own code calls: it registers the kernels; the rest is of <<<>>>, which nobody uses ----

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*,
                            void*, int*) {
  functions()[function].name = name;
}
cudaError_t __cudaPopCallConfiguration(void*, void*, void*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(void*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel() { return cudaErrorNotSupported; }

// ---- torch, as the glue sees it ----

AOTITorchError __real_aoti_torch_get_data_ptr(AtenTensorHandle, void**);
AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);
AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
void* __real_dlopen(const char*, int);
void* __real_dlsym(void*, const char*);

AOTITorchError __wrap_aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_aoti_torch_get_data_ptr(tensor, data);
  return report_memory(tensor, *data, error);
}
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, data);
  return report_memory(tensor, *data, error);
}
AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, data);
  return report_memory(tensor, *data, error);
}
AOTITorchError __wrap_aoti_torch_get_device_index(AtenTensorHandle, int32_t* device) {
  *device = tensor_device;
  return 0;
}
void* __wrap_dlopen(const char* file, int flags) {
  return file && !strcmp(file, "libtorch_cuda.so") ? &torch_cuda : __real_dlopen(file, flags);
}
void* __wrap_dlsym(void* library, const char* name) {
  if (library != &torch_cuda) return __real_dlsym(library, name);
  return strcmp(name, "aoti_torch_get_current_cuda_stream") ? nullptr : (void*)current_stream;
}

}  // extern "C"
