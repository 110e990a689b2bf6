// The launchers: which kernel a call gets, and how many threads; no torch here. They throw std::runtime_error
// where CUDA has an error.
#pragma once

#include <string>

#include "arguments.h"

namespace kdfast {

struct Kernel {
  const void* function;  // null: there is none
  const char* name;
};
// A row by a warp; by blocks that keep it in shared memory; by one in sweeps.
enum class Shape { kWarp, kKept, kSwept };

// Of rows.cu, compiled for each type of logits.
Kernel row_kernel_bf16(Divergence, Shape);
Kernel row_kernel_fp16(Divergence, Shape);
Kernel row_kernel_fp32(Divergence, Shape);

// Of scale.cu.
Kernel scale_kernel(DType);  // ScaleArgs: the gradient times the factor; nothing where that is 1

// 1000 * major + 10 * minor: of the runtime, which is a part of this library, and the latest that the driver
// knows.
int cuda_version();
int driver_version();
// Why the kernels do not start on a device: they have no code for it, or it is newer than the driver. Else
// empty.
std::string device_failure(int device);

struct Stream {
  int device;
  void* handle;
};
void launch_rows(RowsArgs, const Stream&);
void launch_scale(const ScaleArgs&, const Stream&);

}  // namespace kdfast
