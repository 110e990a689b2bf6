// The torch glue of the CPU kernels, on torch's stable ABI: it checks values, lays tensors out as rows,
// splits the work over torch's threads and registers the operators that kdfast/ops.py defines. No Python
// here.
#include <pthread.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../divergences.h"
#include "arguments.h"
#include "isa.h"
#include "row_kernels.h"

namespace kdfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const RowKernels& kernels() {
  static const RowKernels& chosen_kernels = []() -> const RowKernels& {
    switch (chosen()) {
#define X(isa)   \
  case Isa::isa: \
    return row_kernels_##isa();
      KDFAST_ISAS
#undef X
      default:
        throw std::runtime_error("kdfast: no kernels for this processor");
    }
  }();
  return chosen_kernels;
}

// OpenMP's threads are not there in a forked child, and waiting for them hangs: such a process works on its
// own.
bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// f over [0, units) by torch's threads, each taking at least some ten microseconds of work.
template <class F>
void in_parallel(int64_t units, int64_t classes, const F& f) {
  kernels();  // an error of the choice must not come out of a thread, where its message would be lost
  if (forked) return f(0, units);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, classes));
  torch::stable::parallel_for(0, units, grain, f);
}

bool is_pointwise(Divergence divergence) {
  switch (divergence) {
#define X(name, Type)       \
  case Divergence::k##Type: \
    return Type::kPointwise;
    KDFAST_DIVERGENCES
#undef X
    case Divergence::kNone:
      break;
  }
  return false;
}

// Few and long rows are split, so that every thread has work. It depends on the shape alone, not on the
// number of threads, so that this number never shows in the bits. An ensemble's members are softmaxed whole,
// and pass B and some options want whole rows.
int64_t segments_of(const LossArgs& a) {
  if (is_pointwise(a.divergence) || a.whole() || a.rows >= 32 || a.vocab <= 2 * kSegment || a.n_teachers > 1)
    return 1;
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
  loss.args.scale = loss.inverse_divisor();
  if (segments_of(loss.args) == 1) {
    in_parallel(loss.args.rows, loss.args.vocab,
                [&](int64_t begin, int64_t end) { kernels().loss_grad(loss.args, begin, end); });
  } else {
    std::vector<double> table(loss.args.rows * kCoefficients);
    loss.args.wide_table = table.data();
    run_losses(loss.args);
    loss.args.scale = 1;  // it is in the table
    run_grad(loss.args);
  }
}

// ---- the operators ----

std::tuple<Tensor, Tensor, Tensor> loss_grad(Tensor student, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  Tensor grad = loss.new_grad();
  run_loss_grad(loss);
  return {loss.reduced(), grad, loss.measured()};
}

std::tuple<Tensor, Tensor> loss_grad_(Tensor student, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  loss.grad_in_place();
  run_loss_grad(loss);
  loss.copy_back(student);
  return {loss.reduced(), loss.measured()};
}

std::tuple<Tensor, Tensor, Tensor> stats(Tensor student, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  Tensor table = loss.new_table();
  loss.use_table(table);
  run_losses(loss.args);
  return {loss.reduced(), table, loss.measured()};
}

Tensor sums(Tensor student, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  const int64_t segments = segments_of(loss.args);
  std::vector<double> sums(loss.args.rows * segments * kSums);
  loss.args.sums = sums.data();
  run_sums(loss.args, segments);
  return loss.table_of(sums, segments);
}

Tensor pointwise_sums(Tensor student, Tensor sums, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  std::vector<double> numbers = loss.numbers_in(sums);
  loss.args.sums = numbers.data();
  in_parallel(loss.args.rows, loss.args.vocab,
              [&](int64_t begin, int64_t end) { kernels().pointwise_sums(loss.args, begin, end); });
  return loss.table_of(numbers, 1);
}

std::tuple<Tensor, Tensor> losses_and_coefficients(Tensor student, Tensor sums, KDFAST_ARGUMENTS) {
  Loss loss(student, KDFAST_CALL);
  std::vector<double> numbers = loss.numbers_in(sums);
  loss.args.sums = numbers.data();
  Tensor table = loss.new_table();
  loss.use_table(table);
  kernels().losses_and_coefficients(loss.args, 1);
  return {loss.by_row(), table};
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

// Where the factor is 1, as it is for loss.backward(), nothing is read or written.
void scale_(Tensor grad, Tensor factor) {
  if (scalar(factor) == 1) return;
  std::array<StableIValue, 2> stack{torch::stable::detail::from(grad), torch::stable::detail::from(factor)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the reference that was returned
}

Tensor run_softmax(SoftmaxArgs a, const Tensor& like, std::optional<Tensor> temperatures, ScalarType dtype,
                   void (*RowKernels::*kernel)(const SoftmaxArgs&, int64_t, int64_t)) {
  const std::optional<Tensor> per_row = row_values("temperature", temperatures, false);
  a.temperatures = per_row ? (const double*)per_row->const_data_ptr() : nullptr;
  a.vocab = like.sizes()[like.dim() - 1];
  a.rows = like.numel() / a.vocab;
  Tensor out = torch::stable::new_empty(like, like.sizes(), dtype);
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

// Names of instruction sets with spaces between, best last.
template <class Predicate>
std::string names_of_isas(Predicate wanted) {
  std::string names;
  for (Isa isa : kAllIsas) {
    if (wanted(isa)) names += std::string(names.empty() ? "" : " ") + name(isa);
  }
  return names;
}

}  // namespace
}  // namespace kdfast

// For kdfast/choice.py: facts of the build, and the instruction set that the kernels above use.
#define KDFAST_EXPORT extern "C" __attribute__((visibility("default")))
KDFAST_EXPORT const char* kdfast_compiler() { return KDFAST_COMPILER; }
KDFAST_EXPORT const char* kdfast_compiled_isas() {
  static const std::string names = kdfast::names_of_isas(kdfast::compiled);
  return names.c_str();
}
KDFAST_EXPORT const char* kdfast_usable_isas() {
  static const std::string names = kdfast::names_of_isas(kdfast::usable);
  return names.c_str();
}
// Where KDFAST_CPU_ISA names no usable set, the error's message.
KDFAST_EXPORT const char* kdfast_isa() {
  static const std::string name = [] {
    try {
      return std::string(kdfast::name(kdfast::chosen()));
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
  }();
  return name.c_str();
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  KDFAST_REGISTER_LOSS(m);
  m.impl("sums", TORCH_BOX(&kdfast::sums));
  m.impl("pointwise_sums", TORCH_BOX(&kdfast::pointwise_sums));
  m.impl("losses_and_coefficients", TORCH_BOX(&kdfast::losses_and_coefficients));
  m.impl("tempered_softmax", TORCH_BOX(&kdfast::tempered_softmax));
  m.impl("tempered_softmax_backward", TORCH_BOX(&kdfast::tempered_softmax_backward));
}
