// What the torch glue hands to the row kernels, and the table of kernels that each instruction set exports.
// No torch here: the kernels can be compiled and tested alone.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace kdfast {

constexpr int kMaxTeachers = 64;

// Row statistics, in base 2: y = slope * logit - offset with slope = log2(e) / T, and an offset near the
// row's largest y, -inf where every logit is. For logit_mse the teacher's three are k, sum (s-t-k) and sum
// (s-t-k)^2.
struct RowStats {
  double student_offset, teacher_offset;
  double student_sum;  // sum 2^y
  double teacher_sum;
  double hard_sum;         // sum 2^(T * y): the student at temperature 1
  double teacher_running;  // sum of phi's part over_teacher, over the unnormalised exps
  double student_running;  // the other part's
};

// What pass C makes a row's gradient of, beside its logits: a function of these and of nothing else. A row of
// the table that `stats` writes and `grad` reads.
struct Coefficients {
  double student_offset, teacher_offset;  // of the exps that the others are multiplied with
  double student, teacher;          // to q and p; where the divergence is linear, with the soft term's weight
  double log_student, log_teacher;  // log q = ln2 * (y + log_student)
  double shift;                     // logit_mse: less the mean difference
  double psi_sum;
  double soft;                        // that weight, where it is not in the first two
  double hard;                        // to q1 of the hard term and of z_loss
  double label;                       // the hard term's weight on its label
  double uniform;                     // and on every class, from smoothing
  double label_soft, label_hard;      // decoupled KD, whose sums are without the label: its own gradient
  double mean, tilt;                  // standardised logits: what is added is tilt * (s - mean)
  double student_unit, teacher_unit;  // and what they are multiplied by; of logit_mse too
};
static_assert(sizeof(Coefficients) == kColumns * sizeof(double));

struct LossArgs {
  int64_t rows, vocab;
  int64_t width;  // of the student with its padding: the gradient beyond vocab is 0
  Matrix student;
  Matrix teachers[kMaxTeachers];
  double teacher_weights[kMaxTeachers];
  int n_teachers;
  Target target;
  bool geometric;
  Divergence divergence;
  double beta;
  const int64_t* labels;  // (rows) or null
  int64_t ignore_index;
  const double* row_weight;                           // (rows) or null
  double temperature, teacher_temperature;            // where there is none per row
  const double *temperatures, *teacher_temperatures;  // (rows) or null
  double alpha, hard_weight;
  bool t_squared;
  double label_smoothing, z_loss;
  double softcap, teacher_softcap;  // 0: none
  bool standardize;
  double dkd_target, dkd_others;  // weights

  double* losses;       // (rows)
  RowMetrics* metrics;  // (rows) or null
  RowStats* stats;      // (rows * segments): out of `stats`, into `merge`, where rows are split; or null
  float* table;         // (rows, kColumns), Coefficients: out of `stats` or `merge`, into `grad`;
  double* wide_table;   // the other is null, or both
  // the gradient of row r is scale * (row_scale ? row_scale[r] : 1) * dl_r/ds
  double scale;
  const double* row_scale;
  void* grad;          // the student's dtype
  Matrix grad_layout;  // its data and dtype are the student's where the gradient goes in place

  __attribute__((always_inline)) Coefficients coefficients(int64_t row) const {
    Coefficients c;
    for (int k = 0; k < kColumns; ++k) {
      ((double*)&c)[k] = table ? table[row * kColumns + k] : wide_table[row * kColumns + k];
    }
    return c;
  }
  __attribute__((always_inline)) void keep(int64_t row, const Coefficients& c) const {
    for (int k = 0; k < kColumns; ++k) {
      const double value = ((const double*)&c)[k];
      if (table) table[row * kColumns + k] = value;
      if (wide_table) wide_table[row * kColumns + k] = value;
    }
  }
  __attribute__((always_inline)) bool kept(int64_t row) const {
    return !(labels && labels[row] == ignore_index) && !(row_weight && row_weight[row] == 0);
  }
  // Whether the student's exps at temperature 1 are summed, and whether the label's is looked at.
  __attribute__((always_inline)) bool labelled() const { return labels && (hard_weight != 0 || metrics); }
  __attribute__((always_inline)) bool hard() const { return labelled() || z_loss != 0; }
  // Whether something is asked for whose sums are not merged: such a row is not split.
  __attribute__((always_inline)) bool whole() const {
    return softcap != 0 || teacher_softcap != 0 || standardize || metrics || label_smoothing != 0 ||
           divergence == Divergence::kDKD;
  }
};

struct SoftmaxArgs {
  int64_t rows, vocab;
  Matrix logits;  // backward: the output
  Matrix grad;    // backward only
  double temperature;
  const double* temperatures;
  bool log;
  void* out;  // (rows, vocab), contiguous
  DType out_dtype;
};

constexpr int kBlock = 2048;  // classes that the passes take at a time

// Rows [begin, end) each. Where rows are few a row is split into segments of kSegment classes: `stats` and
// `grad` take units of (row, segment) then, and `merge` joins a row's segments in their order.
constexpr int64_t kSegment = 8192;

struct RowKernels {
  void (*loss_grad)(const LossArgs&, int64_t begin, int64_t end);
  // of split rows the statistics of segments, else losses and table
  void (*stats)(const LossArgs&, int64_t segments, int64_t begin, int64_t end);
  void (*merge)(const LossArgs&, int64_t segments);  // of split rows: losses and table
  void (*grad)(const LossArgs&, int64_t segments, int64_t begin, int64_t end);
  void (*softmax)(const SoftmaxArgs&, int64_t begin, int64_t end);
  void (*softmax_backward)(const SoftmaxArgs&, int64_t begin, int64_t end);
};

const RowKernels& row_kernels_baseline();
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();
const RowKernels& row_kernels_avx512_bf16();

}  // namespace kdfast
