// Tensors as the CPU kernels take them: per-row values as doubles, checked; scalars; memory.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../tensors.h"
#include "row_kernels.h"

namespace kdfast {
namespace {

// A new contiguous tensor. torch::stable::new_empty looks its operator up by name and boxes its arguments,
// which takes as long as all of a small call's arithmetic.
template <class Sizes>
inline Tensor empty_tensor(const Sizes& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes[d])) strides[d] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// One value per row as contiguous doubles.
inline Tensor as_doubles(const Tensor& values) {
  return as_contiguous(torch::stable::to(values, ScalarType::Double));
}
// A temperature must be > 0, a weight >= 0.
inline bool is_row_value(double value, bool zero_allowed) {
  return (zero_allowed ? value >= 0 : value > 0) && !std::isinf(value);
}
[[noreturn]] inline void fail_row_value(const char* name, double value, int64_t row, bool zero_allowed) {
  fail<std::invalid_argument>(name, ": ", value, " in row ", row, ", but it must be finite and ",
                              zero_allowed ? ">= 0" : "> 0");
}

inline double scalar(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return *(const float*)t.const_data_ptr();
    case ScalarType::Double:
      return *(const double*)t.const_data_ptr();
    default: {
      const Tensor wide = torch::stable::to(t, ScalarType::Double);
      return *(const double*)wide.const_data_ptr();
    }
  }
}

// Mapping and zeroing new pages costs more than the kernel that fills them; huge pages halve it. Tensors
// below the size that glibc always maps anew mostly reuse mapped memory, and are not advised.
inline void advise_huge_pages(const Tensor& t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20, kMapped = 32 << 20;
  const uintptr_t begin = (uintptr_t)t.data_ptr();
  const uintptr_t end = begin + t.numel() * bytes_of(dtype_of(t));
  if (end - begin < kMapped) return;
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace kdfast
