// One call's arguments as the kernels take them, and its results as tensors.
#pragma once

#include <string>
#include <vector>

#include "../operators.h"
#include "sparse_arguments.h"
#include "tensors.h"

namespace kdfast {
namespace {

// One call: the kernels' arguments, and the tensors that hold what they point to.
struct Loss {
  LossArgs args{};
  Tensor student;
  std::vector<Tensor> owned;  // copies and conversions
  std::vector<Matrix> teachers;
  std::vector<double> teacher_weights, losses;
  std::vector<RowMetrics> metrics;
  std::string reduction;
  double divisor;  // of the sum of the row losses
  bool copied = false;
  bool labels_in_range = true;

  Loss(const Tensor& student_, const Inputs& inputs, Settings settings)
      : student(readable(student_)), reduction(settings.reduction) {
    LossArgs& a = args;
    if (inputs.dynamic_numbers) take_numbers(*inputs.dynamic_numbers, settings);
#define KDFAST_COPY(type, name) a.name = settings.name;
    KDFAST_NUMBERS(KDFAST_COPY)
#undef KDFAST_COPY
    copied = student.get() != student_.get();
    a.student = matrix(student);
    a.width = classes_of(student);
    a.vocab = settings.vocab_size < 0 ? a.width : settings.vocab_size;
    a.rows = rows_of(student);
    for (const Tensor& teacher : inputs.teachers) {
      owned.push_back(readable(teacher));
      teachers.push_back(matrix(owned.back()));
    }
    teacher_weights = settings.teacher_weights;
    a.n_teachers = (int)teachers.size();
    a.teachers = teachers.data();
    a.teacher_weights = teacher_weights.data();
    a.divergence = a.n_teachers ? divergence_of(settings.divergence, "CPU") : Divergence::kNone;
    if (!settings.missing.empty()) take_entries(*inputs.indices, settings.missing);
    a.target = target_of(settings.target);
    a.geometric = settings.ensemble == "geometric";
    a.temperatures = row_pointer(inputs.temperatures);
    a.teacher_temperatures = row_pointer(inputs.teacher_temperatures);
    a.row_weight = row_pointer(inputs.row_weight);
    a.dkd_target = settings.dkd_weights[0];
    a.dkd_others = settings.dkd_weights[1];
    a.ignore_index = settings.ignore_index;
    if (inputs.labels) {
      owned.push_back(as_contiguous(*inputs.labels));
      a.labels = (const int64_t*)owned.back().const_data_ptr();
    }
    check_rows();
    losses.resize(a.rows);
    a.losses = losses.data();
    if (a.metrics) metrics.resize(a.rows);
    a.row_metrics = metrics.data();
    a.scale = 1;
    set_divisor(inputs.normalizer);
  }

  // A sparse teacher is none that the passes over a row read.
  void take_entries(const Tensor& indices, const std::string& missing) {
    const Tensor log_probs = owned.back();
    owned.push_back(as_contiguous(indices));
    args.entries = entry_args(log_probs, owned.back(), args.divergence, missing);
    args.divergence = Divergence::kNone;
    args.n_teachers = 0;
  }

  // The settings that are NaN, see kdfast/arguments.py.
  static void take_numbers(const Tensor& numbers, Settings& settings) {
    const Tensor doubles = as_doubles(numbers);
    const double* next = (const double*)doubles.const_data_ptr();
#define KDFAST_TAKE(type, name) \
  if (std::isnan((double)settings.name)) settings.name = *next++;
    KDFAST_NUMBERS(KDFAST_TAKE)
#undef KDFAST_TAKE
  }

  // Its data as doubles, which this struct then owns.
  const double* row_pointer(const std::optional<Tensor>& values) {
    if (!values) return nullptr;
    owned.push_back(as_doubles(*values));
    return (const double*)owned.back().const_data_ptr();
  }

  // Dropped rows may hold anything.
  void check_rows() {
    if (args.labels) check_labels();
    check_values("row_weight", args.row_weight, true);
    check_values("temperature", args.temperatures, false);
    check_values("teacher_temperature", args.teacher_temperatures, false);
    if (args.entries.count) check_entries(args);
  }
  void check_labels() {
    uint64_t signs = 0;  // the highest bit is set if any label is below 0 or above the last class
    for (int64_t row = 0; row < args.rows; ++row) {
      const uint64_t label = args.labels[row];
      signs |= label | ((uint64_t)args.vocab - 1 - label);
    }
    labels_in_range = signs >> 63 == 0;
    if (labels_in_range) return;  // as most calls' labels are
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t label = args.labels[row];
      if ((uint64_t)label < (uint64_t)args.vocab || label == kOtherShard || !args.is_kept(row)) continue;
      fail<std::out_of_range>("labels: label ", label, " in row ", row,
                              " is out of range: with V = ", args.vocab, " it must be in [0, ",
                              args.vocab - 1, "] or ignore_index (", args.ignore_index, ")");
    }
  }
  void check_values(const char* name, const double* values, bool zero_allowed) const {
    for (int64_t row = 0; values && row < args.rows; ++row) {
      if (!is_row_value(values[row], zero_allowed) && args.is_kept(row))
        fail_row_value(name, values[row], row, zero_allowed);
    }
  }

  void set_divisor(const std::optional<Tensor>& normalizer) {
    divisor = 1;
    if (reduction == "batchmean") divisor = student.dim() > 1 ? student.sizes()[0] : 1;
    if (reduction != "mean") return;
    if (normalizer) {
      divisor = scalar(*normalizer);
    } else if (args.divisor != 0) {
      divisor = args.divisor;
    } else if (!args.row_weight) {
      int64_t kept = args.rows;
      // only a label that is ignore_index drops a row
      if (!labels_in_range || (uint64_t)args.ignore_index < (uint64_t)args.vocab) {
        kept = 0;  // an integer: additions of doubles would wait for one another
        for (int64_t row = 0; row < args.rows; ++row) kept += args.is_kept(row);
      }
      divisor = kept;
    } else {
      double total = 0;  // a local one, which stays in a register
      for (int64_t row = 0; row < args.rows; ++row) {
        if (args.is_kept(row)) total += args.weight(row);
      }
      divisor = total;
    }
  }
  double inverse_divisor() const { return divisor == 0 ? 0 : 1 / divisor; }  // 0: no row is kept

  // ---- where the gradient goes ----

  Tensor new_grad() {
    Tensor grad = torch::stable::new_empty(student, student.sizes());  // an operator, which profilers report
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

  // Backward: what each row's gradient is multiplied by, from the gradient of the losses or of the reduced
  // one.
  void scale_by(const Tensor& grad_loss) {
    args.scale = args.logit_scale;
    if (reduction == "none") {
      owned.push_back(as_doubles(grad_loss));
      args.row_scale = (const double*)owned.back().const_data_ptr();
    } else {
      args.scale *= scalar(grad_loss) * inverse_divisor();
    }
  }

  // ---- results ----

  ScalarType loss_dtype() const {
    return args.student.dtype == DType::kDouble ? ScalarType::Double : ScalarType::Float;
  }
  // A tensor of the losses' dtype; fill(data) gets its data as that type.
  template <class F>
  Tensor new_tensor(const std::vector<int64_t>& shape, F fill) const {
    Tensor out = empty_tensor(shape, loss_dtype());
    void* data = out.mutable_data_ptr();
    loss_dtype() == ScalarType::Double ? fill((double*)data) : fill((float*)data);
    return out;
  }
  // This shape with the rows' dimensions appended.
  std::vector<int64_t> rows_shape(std::vector<int64_t> shape) const {
    const auto sizes = student.sizes();
    shape.insert(shape.end(), sizes.begin(), sizes.end() - 1);
    return shape;
  }

  Tensor reduced_loss() const {
    if (reduction == "none") {
      return new_tensor(rows_shape({}), [&](auto* to) { std::copy(losses.begin(), losses.end(), to); });
    }
    double part[4] = {};  // whose additions do not wait for one another
    size_t row = 0;
    for (; row + 4 <= losses.size(); row += 4)
      for (int k = 0; k < 4; ++k) part[k] += losses[row + k];
    for (; row < losses.size(); ++row) part[0] += losses[row];
    const double total = (part[0] + part[1]) + (part[2] + part[3]);
    return new_tensor({}, [&](auto* to) { *to = total * inverse_divisor(); });
  }
  Tensor row_losses() const {  // whatever the reduction
    return new_tensor({args.rows}, [&](auto* to) { std::copy(losses.begin(), losses.end(), to); });
  }

  Tensor new_table() const {
    return new_tensor({args.rows, args.columns()}, [](auto*) {});
  }
  void use_table(const Tensor& table) {
    void* data = table.mutable_data_ptr();
    loss_dtype() == ScalarType::Double ? void(args.wide_table = (double*)data)
                                       : void(args.table = (float*)data);
  }

  // Rows' sums, of each row's first segment, as a tensor; and a tensor's numbers as doubles.
  Tensor sums_table(const std::vector<double>& sums, int64_t segments) const {
    return new_tensor({args.rows, kSums}, [&](auto* to) {
      for (int64_t row = 0; row < args.rows; ++row)
        std::copy_n(sums.begin() + row * segments * kSums, kSums, to + row * kSums);
    });
  }
  std::vector<double> to_doubles(const Tensor& table) const {
    const Tensor wide = as_doubles(table);
    const double* numbers = (const double*)wide.const_data_ptr();
    return {numbers, numbers + wide.numel()};
  }

  // What return_metrics reports: of every row, or the weighted means over the kept rows.
  Tensor metrics_tensor() const {
    if (!args.metrics) return new_tensor({0}, [](auto*) {});
    const auto metric = [&](int64_t row, int k) { return ((const double*)&metrics[row])[k]; };
    if (reduction == "none") {
      return new_tensor(rows_shape({kMetrics}), [&](auto* to) {
        for (int k = 0; k < kMetrics; ++k)
          for (int64_t row = 0; row < args.rows; ++row) to[k * args.rows + row] = metric(row, k);
      });
    }
    return new_tensor({kMetrics}, [&](auto* to) {
      for (int k = 0; k < kMetrics; ++k) {
        double total = 0, weights = 0;
        for (int64_t row = 0; row < args.rows; ++row) {
          if (!args.is_kept(row)) continue;
          total += args.weight(row) * metric(row, k);
          weights += args.weight(row);
        }
        to[k] = total / weights;  // 0 / 0 where no row is kept
      }
    });
  }
};

}  // namespace
}  // namespace kdfast
