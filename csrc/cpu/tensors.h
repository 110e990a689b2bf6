// Tensors as the kernels take them: rows, per-row values as doubles, checked.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "row_kernels.h"

namespace kdfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(
      message.str());  // torch's bindings make IndexError of out_of_range, ValueError of invalid_argument
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::Double:
      return DType::kDouble;
    default:
      fail<std::runtime_error>("kdfast: logits must be float32, bfloat16, float16 or float64");
  }
}

inline int64_t classes_of(const Tensor& t) { return t.sizes()[t.dim() - 1]; }
inline int64_t rows_of(const Tensor& t) { return t.numel() / std::max<int64_t>(1, classes_of(t)); }

// The rows of a (..., V) tensor: dimensions that lie in memory as one are one. False where more than three
// are left or the classes are not contiguous.
inline bool lay_out(const Tensor& t, Matrix& m) {
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t last = t.dim() - 1;
  m = {t.data_ptr(), dtype_of(t), {1, 1, 1}, {0, 0, classes_of(t)}};
  if (sizes[last] > 1 && strides[last] != 1) return false;
  int at = 2;
  m.size[2] = -1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (m.size[2] == -1) {
      m.size[at] = sizes[d];
      m.stride[at] = strides[d];
    } else if (strides[d] == m.stride[at] * m.size[at]) {
      m.size[at] *= sizes[d];
    } else {
      if (--at < 0) return false;
      m.size[at] = sizes[d];
      m.stride[at] = strides[d];
    }
  }
  if (m.size[2] == -1) m.size[2] = 1;
  return true;
}

// The tensor itself or, where its rows cannot be read as they lie, a contiguous copy.
inline Tensor readable(const Tensor& t) {
  Matrix m;
  return lay_out(t, m) ? t : torch::stable::contiguous(t);
}
inline Matrix matrix(const Tensor& t) {
  Matrix m;
  lay_out(t, m);
  return m;
}

// One value per row as contiguous doubles; a temperature must be > 0, a weight >= 0.
inline std::optional<Tensor> row_values(const char* name, const std::optional<Tensor>& values,
                                        bool zero_allowed) {
  if (!values) return std::nullopt;
  Tensor wide = torch::stable::contiguous(torch::stable::to(*values, ScalarType::Double));
  const double* v = (const double*)wide.const_data_ptr();
  for (int64_t row = 0; row < wide.numel(); ++row) {
    if (!(zero_allowed ? v[row] >= 0 : v[row] > 0) || std::isinf(v[row])) {
      fail<std::invalid_argument>(name, ": ", v[row], " in row ", row, ", but it must be finite and ",
                                  zero_allowed ? ">= 0" : "> 0");
    }
  }
  return wide;
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

// Mapping and zeroing fresh pages costs more than the kernel that fills them; 512 times fewer of them cost
// half. Smaller tensors than glibc always maps afresh mostly come from memory that is there already, and are
// left alone.
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
