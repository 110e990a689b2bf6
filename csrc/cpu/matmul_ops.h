// The operator of matmul.h, which kdfast/products.py defines.
#pragma once

#include "parallel.h"
#include "tensors.h"

namespace kdfast {
namespace {

// A matrix with one stride of 1.
Tensor with_unit_stride(const Tensor& t, const char* name) {
  if (t.dim() != 2 || t.scalar_type() == ScalarType::Double)
    fail<std::invalid_argument>("matmul_: ", name, " must be a matrix of float32, bfloat16 or float16");
  return t.stride(0) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// The strides along the result's dimension and along k; where k is 1, its stride does not matter.
Factor factor(const Tensor& t, int64_t dim) {
  const int64_t k_stride = t.size(1 - dim) == 1 ? 1 : t.stride(1 - dim);
  return {t.const_data_ptr(), dtype_of(t), k_stride == 1 ? t.stride(dim) : 1, k_stride};
}

// out, (m, n) float32, (+)= a b
void matmul_(Tensor out, Tensor a_, Tensor b_, bool add) {
  const Tensor a = with_unit_stride(a_, "a"), b = with_unit_stride(b_, "b");
  const int64_t m = a.size(0), n = b.size(1), k = a.size(1);
  if (out.dim() != 2 || out.scalar_type() != ScalarType::Float || out.size(0) != m || out.size(1) != n ||
      b.size(0) != k || (out.stride(1) != 1 && n > 1))
    fail<std::invalid_argument>(
        "matmul_: out must be (m, n) float32 with contiguous rows, a (m, k), b (k, n)");
  if (!kernels().matmul)
    fail<std::runtime_error>("matmul_: no kernel for the instruction set ", name(chosen_isa()));
  if (k == 0) {
    if (!add) torch::stable::zero_(out);
    return;
  }
  if (!add) advise_huge_pages(out);
  const MatmulArgs args{factor(a, 0),  factor(b, 1), m, n, k, (float*)out.mutable_data_ptr(),
                        out.stride(0), add};
  // in_parallel counts classes, which take about as long as 16 terms of a product
  const int64_t work = MatmulArgs::kUnitRows * MatmulArgs::kUnitColumns / 16 * k;
  in_parallel(args.units(), work, [&](int64_t begin, int64_t end) { kernels().matmul(args, begin, end); });
}

}  // namespace
}  // namespace kdfast
