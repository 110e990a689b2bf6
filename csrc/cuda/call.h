// One call's arguments as the kernels take them, its launch, and its results as torch does: of every row.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "../operators.h"
#include "../tensors.h"
#include "launch.h"

namespace kdfast {
namespace {

inline float* float_data(const Tensor& t) { return (float*)t.mutable_data_ptr(); }

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
inline Stream current_stream(const Tensor& t) {
  const int device = std::max(0, (int)t.get_device_index());
  return {device, current_stream(device)};
}

// Whether all rows of two matrices of one dtype have their 16-byte vectors at the same classes.
inline bool have_same_alignment(const Matrix& a, const Matrix& b) {
  if (a.size[0] * a.size[1] * a.size[2] == 0) return true;
  const auto alignment = [](const Matrix& m, int64_t row) { return m.offset(row) * bytes_of(m.dtype) % 16; };
  bool same = ((uintptr_t)a.data - (uintptr_t)b.data) % 16 == 0;
  for (const Matrix& m : {a, b}) {  // a row's offset is a sum of its dimensions' strides
    int64_t row = 1;
    for (int d = 2; d >= 0; row *= m.size[d--])
      if (m.size[d] > 1) same = same && alignment(a, row) == alignment(b, row);
  }
  return same;
}

// One call: the kernels' arguments, and the tensors that they point to.
class Call {
 public:
  Call(const Tensor& student, const Inputs& inputs, const Settings& s)
      : student_(readable(student)), is_copy_(student_.get() != student.get()) {
    stream_ = current_stream(student);
    RowsArgs& a = args_;
#define KDFAST_COPY(type, name) a.name = (decltype(a.name))s.name;
    KDFAST_NUMBERS(KDFAST_COPY)
#undef KDFAST_COPY
    a.rest = (float)(1 - s.beta);
    if (rows_of(student_) > INT32_MAX || classes_of(student_) > INT32_MAX) {
      fail<std::invalid_argument>("student_logits: more than 2^31 - 1 rows or classes");
    }
    a.student = logits_matrix(student_);
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
      tensors_.push_back(torch::stable::contiguous(*inputs.labels));
      a.labels = (const int64_t*)tensors_.back().const_data_ptr();
    }
    if (inputs.row_weight) set_weights(*inputs.row_weight);
    a.temperatures = float_values(inputs.temperatures);
    a.teacher_temperatures = float_values(inputs.teacher_temperatures);
    a.normalizer = float_values(inputs.normalizer);
    if (s.metrics) {
      tensors_.push_back(new_floats({kMetrics, a.rows}));
      metrics_ = tensors_.back();
      a.row_metrics = float_data(*metrics_);
    }
  }

  // ---- where the gradient goes ----

  Tensor new_grad(ScalarType dtype) {  // of fp32 logits it may have 16 bits
    if (dtype != student_.scalar_type() && student_.scalar_type() != ScalarType::Float) {
      fail<std::invalid_argument>("kdfast: the gradient of 16-bit logits has their dtype");
    }
    Tensor grad = torch::stable::new_empty(student_, student_.sizes(), dtype);
    args_.grad = logits_matrix(grad);
    return grad;
  }
  void grad_in_place() { args_.grad = args_.student; }
  void copy_back(Tensor& to) {
    if (is_copy_) torch::stable::copy_(to, student_);
  }

  // ---- the launches ----

  // Shares of the loss, and the gradient, metrics and table that there is memory for.
  Tensor run(float* new_table = nullptr) {
    const Tensor losses = new_floats({args_.rows});
    if (args_.rows) {
      run_softmax_metrics();
      args_.losses = float_data(losses);
      args_.new_table = new_table;
      launch_rows(args_, stream_);
    }
    return reshape_to_rows(losses, {});
  }

  void backward(const Tensor& table, const Tensor& grad_loss) {
    tensors_.push_back(torch::stable::contiguous(grad_loss));
    args_.grad_loss = float_data(tensors_.back());
    args_.grad_loss_step = grad_loss.numel() > 1;
    tensors_.push_back(torch::stable::contiguous(table));
    args_.table = float_data(tensors_.back());
    if (args_.rows) launch_rows(args_, stream_);
  }

  Tensor metrics() const { return metrics_ ? reshape_to_rows(*metrics_, {kMetrics}) : new_floats({0}); }

  Tensor new_table() const { return new_floats({args_.rows, kCoefficients}); }

 private:
  Tensor student_;
  bool is_copy_;
  RowsArgs args_{};
  Stream stream_;
  std::vector<Tensor> tensors_;  // copies, conversions and results that the arguments point to
  std::optional<Tensor> metrics_;

  static Matrix logits_matrix(const Tensor& t) {
    if (dtype_of(t) == DType::kDouble) {
      fail<std::invalid_argument>(
          "kdfast: float64 logits, but the CUDA kernels take float32, bfloat16 and float16");
    }
    return matrix(t);
  }
  Tensor new_floats(const std::vector<int64_t>& shape) const {
    return torch::stable::new_empty(student_, shape, ScalarType::Float);
  }
  const float* float_values(const std::optional<Tensor>& values) {
    if (!values) return nullptr;
    tensors_.push_back(torch::stable::contiguous(torch::stable::to(*values, ScalarType::Float)));
    return float_data(tensors_.back());
  }

  // The vectors of both must be at the same classes, or both are copied, which costs 4 bytes a logit. The
  // table sends such calls to Triton, which needs no copies: these are for backend="cuda".
  void set_teacher(const Tensor& teacher) {
    RowsArgs& a = args_;
    tensors_.push_back(readable(teacher));
    a.teacher = logits_matrix(tensors_.back());
    if (a.teacher.dtype != a.student.dtype) {
      fail<std::invalid_argument>("kdfast: a teacher of another dtype than the student's");
    }
    if (have_same_alignment(a.student, a.teacher)) return;
    const auto copy_of = [&](Tensor t) {  // as wide as the student's
      Tensor copy = torch::stable::new_empty(student_, student_.sizes());
      const int64_t last = copy.dim() - 1, classes = std::min(classes_of(t), classes_of(copy));
      Tensor real = torch::stable::narrow(copy, last, 0, classes);
      torch::stable::copy_(real, torch::stable::narrow(t, last, 0, classes));
      return copy;
    };
    tensors_.push_back(copy_of(teacher));
    a.teacher = logits_matrix(tensors_.back());
    if (have_same_alignment(a.student, a.teacher)) return;
    student_ = copy_of(student_);
    is_copy_ = true;
    a.student = logits_matrix(student_);
  }

  void set_weights(const Tensor& weights) {
    const ScalarType type = weights.scalar_type();
    const bool is_known = type == ScalarType::Float || type == ScalarType::BFloat16 ||
                          type == ScalarType::Half || type == ScalarType::Bool;
    tensors_.push_back(
        torch::stable::contiguous(is_known ? weights : torch::stable::to(weights, ScalarType::Float)));
    args_.row_weight = tensors_.back().const_data_ptr();
    args_.row_weight_type = type == ScalarType::BFloat16 ? Number::kBFloat16
                            : type == ScalarType::Half   ? Number::kHalf
                            : type == ScalarType::Bool   ? Number::kBool
                                                         : Number::kFloat;
  }

  // A number per row in the shape of the student's rows, after other dimensions.
  Tensor reshape_to_rows(const Tensor& values, std::vector<int64_t> shape) const {
    const auto sizes = student_.sizes();
    shape.insert(shape.end(), sizes.begin(), sizes.end() - 1);
    return torch::stable::reshape(values, shape);
  }

  // logit_mse's metrics but for `soft` are of softmaxes, which its own kernel lacks.
  void run_softmax_metrics() const {
    if (!args_.metrics || args_.divergence != Divergence::kLogitMSE) return;
    RowsArgs a = args_;
    a.divergence = Divergence::kCrossEntropy;
    a.grad.data = nullptr;
    launch_rows(a, stream_);
  }
};

}  // namespace
}  // namespace kdfast
