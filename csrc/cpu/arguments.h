// One call's arguments as the kernels take them, and its results as torch does.
#pragma once

#include <numeric>
#include <string>
#include <vector>

#include "tensors.h"

namespace kdfast {
namespace {

// One call: the kernels' arguments, and the tensors that hold what they point to.
struct Loss {
  LossArgs args{};
  Tensor student;
  std::vector<Tensor> kept;  // copies and conversions
  std::vector<double> losses;
  std::vector<RowMetrics> metrics;
  std::string reduction;
  double divisor;  // of the sum of the row losses
  bool copied = false, measures = false;

  Loss(const Tensor& student_, const std::vector<Tensor>& teachers, const std::optional<Tensor>& labels,
       const std::optional<Tensor>& row_weight, const std::optional<Tensor>& normalizer,
       const std::optional<Tensor>& temperatures, const std::optional<Tensor>& teacher_temperatures,
       double temperature, double teacher_temperature, double alpha, double hard_weight, bool t_squared,
       const std::string& divergence, double beta, const std::string& target, const std::string& ensemble,
       const std::vector<double>& teacher_weights, int64_t vocab_size, int64_t ignore_index,
       const std::string& reduction_, double given_divisor, double label_smoothing, double z_loss,
       double softcap, double teacher_softcap, bool standardize, const std::vector<double>& dkd_weights,
       bool with_metrics)
      : student(readable(student_)), reduction(reduction_) {
    LossArgs& a = args;
    copied = student.get() != student_.get();
    a.student = matrix(student);
    a.width = classes_of(student);
    a.vocab = vocab_size < 0 ? a.width : vocab_size;
    a.rows = rows_of(student);
    if (teachers.size() > kMaxTeachers) {
      fail<std::invalid_argument>("teacher: ", teachers.size(),
                                  " teachers, but the CPU kernels take at most ", kMaxTeachers);
    }
    a.n_teachers = (int)teachers.size();
    for (int k = 0; k < a.n_teachers; ++k) {
      kept.push_back(readable(teachers[k]));
      a.teachers[k] = matrix(kept.back());
      a.teacher_weights[k] = teacher_weights[k];
    }
    a.divergence = a.n_teachers ? divergence_of(divergence, "CPU") : Divergence::kNone;
    a.beta = beta;
    a.target = target == "logits" ? Target::kLogits : target == "probs" ? Target::kProbs : Target::kLogProbs;
    a.geometric = ensemble == "geometric";
    a.temperature = temperature;
    a.teacher_temperature = teacher_temperature;
    a.temperatures = hold(row_values("temperature", temperatures, false));
    a.teacher_temperatures = hold(row_values("teacher_temperature", teacher_temperatures, false));
    a.row_weight = hold(row_values("row_weight", row_weight, true));
    a.alpha = alpha;
    a.hard_weight = hard_weight;
    a.t_squared = t_squared;
    a.label_smoothing = label_smoothing;
    a.z_loss = z_loss;
    a.softcap = softcap;
    a.teacher_softcap = teacher_softcap;
    a.standardize = standardize;
    a.dkd_target = dkd_weights[0];
    a.dkd_others = dkd_weights[1];
    a.ignore_index = ignore_index;
    if (labels) check_labels(*labels);
    losses.resize(a.rows);
    a.losses = losses.data();
    measures = with_metrics;
    if (measures) metrics.resize(a.rows);
    a.metrics = measures ? metrics.data() : nullptr;
    a.scale = 1;
    set_divisor(normalizer, given_divisor);
  }

  const double* hold(const std::optional<Tensor>& values) {
    if (!values) return nullptr;
    kept.push_back(*values);
    return (const double*)values->const_data_ptr();
  }

  void check_labels(const Tensor& labels) {
    kept.push_back(torch::stable::contiguous(labels));
    args.labels = (const int64_t*)kept.back().const_data_ptr();
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t label = args.labels[row];
      if ((label < 0 || label >= args.vocab) && label != args.ignore_index && label != kElsewhere) {
        fail<std::out_of_range>("labels: label ", label, " in row ", row,
                                " is out of range: with V = ", args.vocab, " it must be in [0, ",
                                args.vocab - 1, "] or ignore_index (", args.ignore_index, ")");
      }
    }
  }

  void set_divisor(const std::optional<Tensor>& normalizer, double given) {
    divisor = 1;
    if (reduction == "batchmean") divisor = student.dim() > 1 ? student.sizes()[0] : 1;
    if (reduction != "mean") return;
    if (normalizer) {
      divisor = scalar(*normalizer);
    } else if (given != 0) {
      divisor = given;
    } else {
      divisor = 0;
      for (int64_t row = 0; row < args.rows; ++row) {
        if (args.kept(row)) divisor += args.row_weight ? args.row_weight[row] : 1;
      }
      if (divisor == 0) divisor = 1;  // no row is kept: the mean is 0
    }
  }
  double inverse_divisor() const { return reduction == "batchmean" && divisor == 0 ? 0 : 1 / divisor; }

  // ---- where the gradient goes ----

  Tensor new_grad() {
    Tensor grad = torch::stable::new_empty(student, student.sizes());
    advise_huge_pages(grad);
    args.grad = grad.mutable_data_ptr();
    args.grad_layout = matrix(grad);
    return grad;
  }
  void grad_in_place() {
    args.grad = student.mutable_data_ptr();
    args.grad_layout = args.student;
  }
  void copy_back(Tensor& to) {
    if (copied) torch::stable::copy_(to, student);
  }

  // Backward: each row's coefficient, from the gradient of a loss per row or of the reduced one.
  void scale_by(const Tensor& grad_loss) {
    if (reduction == "none") {
      kept.push_back(torch::stable::contiguous(torch::stable::to(grad_loss, ScalarType::Double)));
      args.row_scale = (const double*)kept.back().const_data_ptr();
    } else {
      args.scale = scalar(grad_loss) * inverse_divisor();
    }
  }

  // ---- results ----

  ScalarType loss_dtype() const {
    return args.student.dtype == DType::kDouble ? ScalarType::Double : ScalarType::Float;
  }
  Tensor reduced() const {
    std::vector<int64_t> shape;
    if (reduction == "none") {
      const auto sizes = student.sizes();
      shape.assign(sizes.begin(), sizes.end() - 1);
    }
    Tensor out = torch::stable::new_empty(student, shape, loss_dtype());
    with_numbers(out, [&](auto* to) {
      if (reduction == "none") {
        std::copy(losses.begin(), losses.end(), to);
      } else {
        *to = std::accumulate(losses.begin(), losses.end(), 0.) * inverse_divisor();
      }
    });
    return out;
  }

  Tensor new_table() const {
    return torch::stable::new_empty(student, std::vector<int64_t>{args.rows, kCoefficients}, loss_dtype());
  }
  void use_table(const Tensor& table) {
    void* data = table.mutable_data_ptr();
    loss_dtype() == ScalarType::Double ? void(args.wide_table = (double*)data)
                                       : void(args.table = (float*)data);
  }

  // The losses of all rows, whatever the reduction.
  Tensor by_row() const {
    Tensor out = torch::stable::new_empty(student, std::vector<int64_t>{args.rows}, loss_dtype());
    with_numbers(out, [&](auto* to) { std::copy(losses.begin(), losses.end(), to); });
    return out;
  }

  // Rows' sums, of each row's first segment, as a table, and the other way about.
  Tensor table_of(const std::vector<double>& sums, int64_t segments) const {
    Tensor out = torch::stable::new_empty(student, std::vector<int64_t>{args.rows, kSums}, loss_dtype());
    with_numbers(out, [&](auto* to) {
      for (int64_t row = 0; row < args.rows; ++row)
        std::copy_n(sums.begin() + row * segments * kSums, kSums, to + row * kSums);
    });
    return out;
  }
  std::vector<double> numbers_in(const Tensor& table) const {
    const Tensor wide = torch::stable::contiguous(torch::stable::to(table, ScalarType::Double));
    const double* numbers = (const double*)wide.const_data_ptr();
    return {numbers, numbers + wide.numel()};
  }

  // What return_metrics reports: of every row, or the means over those kept, with their weights.
  Tensor measured() const {
    std::vector<int64_t> shape{measures ? kMetrics : 0};
    const bool by_row = measures && reduction == "none";
    const auto sizes = student.sizes();
    if (by_row) shape.insert(shape.end(), sizes.begin(), sizes.end() - 1);
    Tensor out = torch::stable::new_empty(student, shape, loss_dtype());
    if (measures) {
      with_numbers(out, [&](auto* to) {
        for (int k = 0; k < kMetrics; ++k) {
          double total = 0, weights = 0;
          for (int64_t row = 0; row < args.rows; ++row) {
            const double value = ((const double*)&metrics[row])[k];
            if (by_row) to[k * args.rows + row] = value;
            if (!args.kept(row)) continue;
            const double w = args.row_weight ? args.row_weight[row] : 1;
            total += w * value;
            weights += w;
          }
          if (!by_row) to[k] = total / weights;  // 0 / 0 where no row is kept
        }
      });
    }
    return out;
  }

  template <class F>
  void with_numbers(const Tensor& tensor, F f) const {
    loss_dtype() == ScalarType::Double ? f((double*)tensor.mutable_data_ptr())
                                       : f((float*)tensor.mutable_data_ptr());
  }
};

}  // namespace
}  // namespace kdfast
