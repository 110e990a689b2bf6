// The torch glue of the CPU kernels, on torch's stable ABI: it splits the work over torch's threads and
// registers the operators that kdfast/ops.py defines. No Python here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "dispatch.h"
#include "matmul_ops.h"
#include "parallel.h"
#include "token_ops.h"

namespace kdfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Few and long rows are split, so that every thread has work. This depends on the shape alone, so that
// results are the same bits with any number of threads. Pass B, ensembles and some options need whole rows.
int64_t segments_of(const LossArgs& a) {
  bool is_pointwise = false;
  dispatch_divergence(a.divergence, [&](auto d) { is_pointwise = decltype(d)::kPointwise; });
  if (is_pointwise || a.needs_whole_row() || a.n_teachers > 1) return 1;
  if (a.rows >= 32 || a.vocab <= 2 * kSegment) return 1;
  return (a.vocab + kSegment - 1) / kSegment;
}

void run_sums(const LossArgs& a, int64_t segments) {
  in_parallel(a.rows * segments, segments == 1 ? a.vocab : kSegment,
              [&](int64_t begin, int64_t end) { kernels().sums(a, segments, begin, end); });
  if (segments > 1) kernels().merge(a, segments);
}

// The row losses and, for `grad`, the table.
void run_losses(const LossArgs& a) {
  const int64_t segments = segments_of(a);
  if (segments == 1)
    return in_parallel(a.rows, a.vocab, [&](int64_t begin, int64_t end) { kernels().losses(a, begin, end); });
  std::vector<double> sums(a.rows * segments * kSums);
  LossArgs with_sums = a;
  with_sums.sums = sums.data();
  run_sums(with_sums, segments);
  kernels().losses_and_coefficients(with_sums, segments);
}

void run_grad(const LossArgs& a) {
  const int64_t segments = segments_of(a);
  in_parallel(a.rows * segments, segments == 1 ? a.vocab : kSegment,
              [&](int64_t begin, int64_t end) { kernels().grad(a, segments, begin, end); });
}

void run_loss_grad(Loss& loss) {
  loss.args.scale = loss.args.logit_scale * loss.inverse_divisor();
  if (segments_of(loss.args) == 1) {
    in_parallel(loss.args.rows, loss.args.vocab,
                [&](int64_t begin, int64_t end) { kernels().loss_grad(loss.args, begin, end); });
  } else {
    std::vector<double> table(loss.args.rows * kCoefficients);
    loss.args.wide_table = table.data();
    run_losses(loss.args);
    loss.args.scale = 1;  // the table has it
    run_grad(loss.args);
  }
}

// ---- the operators ----

std::tuple<Tensor, Tensor, Tensor> loss_grad(Tensor student, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  Tensor grad = loss.new_grad();
  run_loss_grad(loss);
  return {loss.reduced_loss(), grad, loss.metrics_tensor()};
}

std::tuple<Tensor, Tensor> loss_grad_(Tensor student, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  loss.grad_in_place();
  run_loss_grad(loss);
  loss.copy_back(student);
  return {loss.reduced_loss(), loss.metrics_tensor()};
}

std::tuple<Tensor, Tensor, Tensor> stats(Tensor student, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  Tensor table = loss.new_table();
  loss.use_table(table);
  run_losses(loss.args);
  return {loss.reduced_loss(), table, loss.metrics_tensor()};
}

Tensor sums(Tensor student, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  const int64_t segments = segments_of(loss.args);
  std::vector<double> sums(loss.args.rows * segments * kSums);
  loss.args.sums = sums.data();
  run_sums(loss.args, segments);
  return loss.sums_table(sums, segments);
}

Tensor pointwise_sums(Tensor student, Tensor sums, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  std::vector<double> numbers = loss.to_doubles(sums);
  loss.args.sums = numbers.data();
  in_parallel(loss.args.rows, loss.args.vocab,
              [&](int64_t begin, int64_t end) { kernels().pointwise_sums(loss.args, begin, end); });
  return loss.sums_table(numbers, 1);
}

std::tuple<Tensor, Tensor> losses_and_coefficients(Tensor student, Tensor sums, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  std::vector<double> numbers = loss.to_doubles(sums);
  loss.args.sums = numbers.data();
  Tensor table = loss.new_table();
  loss.use_table(table);
  kernels().losses_and_coefficients(loss.args, 1);
  return {loss.row_losses(), table};
}

Tensor grad(Tensor student, Tensor stats, Tensor grad_loss, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  Tensor grad = loss.new_grad();
  loss.scale_by(grad_loss);
  loss.use_table(stats);
  run_grad(loss.args);
  return grad;
}

void grad_(Tensor student, Tensor stats, Tensor grad_loss, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  loss.grad_in_place();
  loss.scale_by(grad_loss);
  loss.use_table(stats);
  run_grad(loss.args);
  loss.copy_back(student);
}

// A factor of 1 reads and writes nothing.
void scale_(Tensor grad, Tensor factor) {
  if (scalar(factor) == 1) return;
  std::array<StableIValue, 2> stack{torch::stable::detail::from(grad), torch::stable::detail::from(factor)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owns the returned reference
}

Tensor run_softmax(SoftmaxArgs a, const Tensor& like, std::optional<Tensor> temperatures, ScalarType dtype,
                   void (*RowKernels::*kernel)(const SoftmaxArgs&, int64_t, int64_t)) {
  a.vocab = like.sizes()[like.dim() - 1];
  a.rows = like.numel() / a.vocab;
  std::optional<Tensor> per_row;
  if (temperatures) {
    per_row = as_doubles(*temperatures);
    a.temperatures = (const double*)per_row->const_data_ptr();
    for (int64_t row = 0; row < a.rows; ++row)
      if (!is_row_value(a.temperatures[row], false))
        fail_row_value("temperature", a.temperatures[row], row, false);
  }
  Tensor out = empty_tensor(like.sizes(), dtype);
  advise_huge_pages(out);
  a.out = out.mutable_data_ptr();
  a.out_dtype = dtype_of(out);
  in_parallel(a.rows, a.vocab, [&](int64_t begin, int64_t end) { (kernels().*kernel)(a, begin, end); });
  return out;
}

Tensor tempered_softmax(Tensor logits, std::optional<Tensor> temperatures, double temperature, bool log,
                        ScalarType dtype) {
  const Tensor z = readable(logits);
  SoftmaxArgs a{};
  a.logits = matrix(z);
  a.temperature = temperature;
  a.log = log;
  return run_softmax(a, z, temperatures, dtype, &RowKernels::softmax);
}

Tensor tempered_softmax_backward(Tensor grad, Tensor output, std::optional<Tensor> temperatures,
                                 double temperature, bool log, ScalarType dtype) {
  const Tensor g = readable(grad), y = readable(output);
  SoftmaxArgs a{};
  a.logits = matrix(y);
  a.grad = matrix(g);
  a.temperature = temperature;
  a.log = log;
  return run_softmax(a, y, temperatures, dtype, &RowKernels::softmax_backward);
}

}  // namespace
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  KDFAST_REGISTER_LOSS(m);
  m.impl("loss_grad", TORCH_BOX(&kdfast::loss_grad));
  m.impl("grad", TORCH_BOX(&kdfast::grad));
  m.impl("sums", TORCH_BOX(&kdfast::sums));
  m.impl("pointwise_sums", TORCH_BOX(&kdfast::pointwise_sums));
  m.impl("losses_and_coefficients", TORCH_BOX(&kdfast::losses_and_coefficients));
  m.impl("token_stats", TORCH_BOX(&kdfast::token_stats));
  m.impl("token_grad", TORCH_BOX(&kdfast::token_grad));
  m.impl("tempered_softmax", TORCH_BOX(&kdfast::tempered_softmax));
  m.impl("tempered_softmax_backward", TORCH_BOX(&kdfast::tempered_softmax_backward));
  m.impl("matmul_", TORCH_BOX(&kdfast::matmul_));
}
