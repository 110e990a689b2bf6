// The torch glue of the CUDA kernels, on torch's stable ABI and without CUDA's headers: it
// registers the operators that kdfast/ops.py defines. No value is looked at, for that would wait
// for the device: a bad one spoils its row. No Python here.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "call.h"

#ifndef KDFAST_CUDA_KEY
#define KDFAST_CUDA_KEY CUDA
#endif

// For kdfast/choice.py.
extern "C" {
__attribute__((visibility("default"))) int kdfast_cuda_version() { return kdfast::cuda_version(); }
__attribute__((visibility("default"))) int kdfast_driver_version() { return kdfast::driver_version(); }
__attribute__((visibility("default"))) const char* kdfast_device_failure(int device) {
  static thread_local std::string text;
  return (text = kdfast::device_failure(device)).c_str();
}
}

namespace kdfast {
namespace {

// ---- the operators ----

std::tuple<Tensor, Tensor, Tensor> loss_grad_as(Tensor student, ScalarType dtype, KDFAST_ARGUMENTS) {
  Call call(student, KDFAST_CALL);
  Tensor grad = call.new_grad(dtype);
  Tensor loss = call.run();
  return {loss, grad, call.metrics()};
}

std::tuple<Tensor, Tensor> loss_grad_(Tensor student, KDFAST_ARGUMENTS) {
  Call call(student, KDFAST_CALL);
  call.grad_in_place();
  Tensor loss = call.run();
  call.copy_back(student);
  return {loss, call.metrics()};
}

std::tuple<Tensor, Tensor, Tensor> stats(Tensor student, KDFAST_ARGUMENTS) {
  Call call(student, KDFAST_CALL);
  Tensor table = call.new_table();
  Tensor loss = call.run(float_data(table));
  return {loss, table, call.metrics()};
}

Tensor grad_as(Tensor student, ScalarType dtype, Tensor stats, Tensor grad_loss, KDFAST_ARGUMENTS) {
  Call call(student, KDFAST_CALL);
  Tensor grad = call.new_grad(dtype);
  call.backward(stats, grad_loss);
  return grad;
}

void grad_(Tensor student, Tensor stats, Tensor grad_loss, KDFAST_ARGUMENTS) {
  Call call(student, KDFAST_CALL);
  call.grad_in_place();
  call.backward(stats, grad_loss);
  call.copy_back(student);
}

void scale_(Tensor grad, Tensor factor) {
  const Tensor view = readable(grad);
  if (view.numel() == 0) return;
  const Stream stream = current_stream(grad);
  const Tensor by = torch::stable::to(factor, ScalarType::Float);
  launch_scale({matrix(view), (int)rows_of(view), (int)classes_of(view), float_data(by)}, stream);
  if (view.get() != grad.get()) torch::stable::copy_(grad, view);
}

}  // namespace
}  // namespace kdfast

STABLE_TORCH_LIBRARY_IMPL(kdfast_cuda_rows, KDFAST_CUDA_KEY, m) {
  KDFAST_REGISTER_LOSS(m);
  m.impl("loss_grad_as", TORCH_BOX(&kdfast::loss_grad_as));  // of the logits' dtype too
  m.impl("grad_as", TORCH_BOX(&kdfast::grad_as));
}
