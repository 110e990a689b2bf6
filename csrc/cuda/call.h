// One call's arguments as the kernels take them, its launch, and its results as torch does: of every row.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "../operators.h"
#include "../row_math.h"
#include "../tensors.h"
#include "launch.h"

namespace kdfast {
namespace {

inline float* floats(const Tensor& t) { return (float*)t.mutable_data_ptr(); }

// The current stream, which torch's CUDA library knows; it is loaded wherever there are CUDA tensors.
inline void* current_stream(int device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? (Get)dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  }();
  if (!get)
    fail<std::runtime_error>("kdfast: libtorch_cuda.so, which knows the current stream, is not loaded");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}
inline Place place_of(const Tensor& t) {
  const int device = std::max(0, (int)t.get_device_index());
  return {device, current_stream(device)};
}

// Whether all rows of two matrices have their vectors at the same classes.
inline bool lie_alike(const Matrix& a, const Matrix& b) {
  if (a.size[0] * a.size[1] * a.size[2] == 0) return true;
  const int64_t bytes = bytes_of(a.dtype);  // of both
  bool alike = ((uintptr_t)a.data - (uintptr_t)b.data) % 16 == 0;
  const auto spread = [&](const Matrix& m, int64_t row) { return m.offset(row) * bytes % 16; };
  // the rows' places modulo 16 are sums of their dimensions' strides
  int64_t step = 1;
  for (int d = 2; d >= 0; step *= a.size[d--]) {
    if (a.size[d] > 1) alike = alike && spread(a, step) == spread(b, step);
  }
  step = 1;
  for (int d = 2; d >= 0; step *= b.size[d--]) {
    if (b.size[d] > 1) alike = alike && spread(a, step) == spread(b, step);
  }
  return alike;
}

// One call: the kernels' arguments, and the tensors that hold what they point to.
class Call {
 public:
  Call(const Tensor& student, const Inputs& inputs, const Settings& s)
      : student_(readable(student)), copied_(student_.get() != student.get()) {
    place_ = place_of(student);
    RowsArgs& a = args_;
    if (rows_of(student_) > INT32_MAX || classes_of(student_) > INT32_MAX) {
      fail<std::invalid_argument>("student_logits: more than 2^31 - 1 rows or classes");
    }
    a.student = tensor(student_);
    a.width = (int)classes_of(student_);
    a.vocab = s.vocab_size < 0 ? a.width : (int)s.vocab_size;
    a.rows = (int)rows_of(student_);
    a.divergence = Divergence::kNone;
    if (!inputs.teachers.empty()) {
      a.divergence = divergence_of(s.divergence, "CUDA");
      set_teacher(inputs.teachers[0]);
    }
    if (inputs.teachers.size() > 1 || (!inputs.teachers.empty() && s.target != "logits") || s.softcap != 0 ||
        s.teacher_softcap != 0 || s.standardize || a.divergence == Divergence::kDKD) {
      fail<std::invalid_argument>(
          "kdfast: the CUDA kernels are those of plain calls; see kdfast/gpu_choice.py");
    }
    if (inputs.labels) {
      held_.push_back(torch::stable::contiguous(*inputs.labels));
      a.labels = (const int64_t*)held_.back().const_data_ptr();
    }
    if (inputs.row_weight) set_weights(*inputs.row_weight);
    a.temperatures = by_row(inputs.temperatures);
    a.teacher_temperatures = by_row(inputs.teacher_temperatures);
    a.temperature = (float)s.temperature;
    a.teacher_temperature = (float)s.teacher_temperature;
    a.alpha = (float)s.alpha;
    a.hard_weight = (float)s.hard_weight;
    a.z_loss = (float)s.z_loss;
    a.beta = (float)s.beta;
    a.label_smoothing = (float)s.label_smoothing;
    a.t_squared = s.t_squared;
    a.scale = (float)(1 / s.divisor);
    a.divisor = by_row(inputs.normalizer);
    if (s.metrics) {
      held_.push_back(new_floats({kMetrics, a.rows}));
      measured_ = held_.back();
      a.metrics = floats(*measured_);
    }
  }

  // ---- where the gradient goes ----

  Tensor new_grad() {
    Tensor grad = torch::stable::new_empty(student_, student_.sizes());
    args_.grad = tensor(grad);
    return grad;
  }
  void grad_in_place() { args_.grad = args_.student; }
  void copy_back(Tensor& to) {
    if (copied_) torch::stable::copy_(to, student_);
  }

  // ---- the launches ----

  // Shares of the loss and, where it has a place, the gradient; metrics; the table of coefficients.
  Tensor run(float* new_table = nullptr) {
    const Tensor losses = new_floats({args_.rows});
    if (args_.rows) {
      measure_softmaxes();
      args_.losses = floats(losses);
      args_.new_table = new_table;
      launch_rows(args_, place_);
    }
    return by_rows(losses, {});
  }

  void backward(const Tensor& table, const Tensor& grad_loss) {
    held_.push_back(torch::stable::contiguous(grad_loss));
    args_.grad_loss = floats(held_.back());
    args_.grad_loss_step = grad_loss.numel() > 1;
    held_.push_back(torch::stable::contiguous(table));
    args_.table = floats(held_.back());
    if (args_.rows) launch_rows(args_, place_);
  }

  // What return_metrics reports, of every row.
  Tensor metrics() const { return measured_ ? by_rows(*measured_, {kMetrics}) : new_floats({0}); }

  Tensor new_table() const { return new_floats({args_.rows, kCoefficients}); }

 private:
  Tensor student_;
  bool copied_;
  RowsArgs args_{};
  Place place_;
  std::vector<Tensor> held_;        // copies, conversions and what is made on the way
  std::optional<Tensor> measured_;  // the metrics of every row

  static Matrix tensor(const Tensor& t) {
    if (dtype_of(t) == DType::kDouble) {
      fail<std::invalid_argument>(
          "kdfast: float64 logits, but the CUDA kernels take float32, bfloat16 and float16");
    }
    return matrix(t);
  }
  Tensor new_floats(const std::vector<int64_t>& shape) const {
    return torch::stable::new_empty(student_, shape, ScalarType::Float);
  }
  const float* by_row(const std::optional<Tensor>& values) {
    if (!values) return nullptr;
    held_.push_back(torch::stable::contiguous(torch::stable::to(*values, ScalarType::Float)));
    return floats(held_.back());
  }

  // The vectors of both must be at the same classes. Where they are not, both are copied, 4 bytes a logit
  // more than Triton moves, to which the table sends such calls: this is for who asks for CUDA by name.
  void set_teacher(const Tensor& teacher) {
    RowsArgs& a = args_;
    held_.push_back(readable(teacher));
    a.teacher = tensor(held_.back());
    if (a.teacher.dtype != a.student.dtype) {
      fail<std::invalid_argument>("kdfast: a teacher of another dtype than the student's");
    }
    if (lie_alike(a.student, a.teacher)) return;
    const auto copied = [&](Tensor t) {  // as wide as the student's
      Tensor copy = torch::stable::new_empty(student_, student_.sizes());
      const int64_t last = copy.dim() - 1, classes = std::min(classes_of(t), classes_of(copy));
      Tensor real = torch::stable::narrow(copy, last, 0, classes);
      torch::stable::copy_(real, torch::stable::narrow(t, last, 0, classes));
      return copy;
    };
    held_.push_back(copied(teacher));
    a.teacher = tensor(held_.back());
    if (lie_alike(a.student, a.teacher)) return;
    student_ = copied(student_);
    copied_ = true;
    a.student = tensor(student_);
  }

  void set_weights(const Tensor& weights) {
    const ScalarType type = weights.scalar_type();
    const bool as_is = type == ScalarType::Float || type == ScalarType::BFloat16 ||
                       type == ScalarType::Half || type == ScalarType::Bool;
    held_.push_back(
        torch::stable::contiguous(as_is ? weights : torch::stable::to(weights, ScalarType::Float)));
    args_.row_weight = held_.back().const_data_ptr();
    args_.row_weight_type = type == ScalarType::BFloat16 ? Number::kBFloat16
                            : type == ScalarType::Half   ? Number::kHalf
                            : type == ScalarType::Bool   ? Number::kBool
                                                         : Number::kFloat;
  }

  // A tensor of a number per row in the shape of the rows, after other dimensions.
  Tensor by_rows(const Tensor& values, std::vector<int64_t> shape) const {
    const auto sizes = student_.sizes();
    shape.insert(shape.end(), sizes.begin(), sizes.end() - 1);
    return torch::stable::reshape(values, shape);
  }

  // logit_mse's metrics but for `soft` are of softmaxes, which it does not take.
  void measure_softmaxes() const {
    if (!args_.metrics || args_.divergence != Divergence::kLogitMSE) return;
    RowsArgs a = args_;
    a.divergence = Divergence::kCrossEntropy;
    a.grad.data = nullptr;
    launch_rows(a, place_);
  }
};

}  // namespace
}  // namespace kdfast
