// Tensors as rows, for the torch glue of every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "rows.h"

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

// An operator's string. torch's own conversion to std::string (2.10 to 2.13) leaks one at each call.
inline std::string taken(StringHandle handle) {
  size_t length;
  const char* data;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
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

// kernels: whose, for the message.
inline Divergence divergence_of(const std::string& name, const char* kernels) {
#define X(known, Type) \
  if (name == #known) return Divergence::k##Type;
  KDFAST_DIVERGENCES
#undef X
  fail<std::invalid_argument>("divergence: no ", kernels, " kernel for '", name, "'");
}

inline Target target_of(const std::string& name) {
  return name == "logits" ? Target::kLogits : name == "probs" ? Target::kProbs : Target::kLogProbs;
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

}  // namespace
}  // namespace kdfast

// The functions of these names in kdfast as the operators.
#define KDFAST_REGISTER_LOSS(m)                         \
  m.impl("loss_grad_", TORCH_BOX(&kdfast::loss_grad_)); \
  m.impl("stats", TORCH_BOX(&kdfast::stats));           \
  m.impl("grad_", TORCH_BOX(&kdfast::grad_));           \
  m.impl("scale_", TORCH_BOX(&kdfast::scale_))
