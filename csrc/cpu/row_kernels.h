// The arguments of the row kernels, and the table of kernels that each instruction set exports. No torch
// here: the kernels can be compiled and tested alone.
#pragma once

#include <cstdint>

#include "../rows.h"
#include "../settings.h"
#include "matmul.h"

namespace kdfast {

// Classes of each row that are kept apart from the sums over all others: a sparse teacher's, or ids.
enum class Missing { kTail, kConditional, kRenormalize, kTruncate };
struct EntryArgs {
  int64_t count;        // K; 0: there are none
  const void* indices;  // (rows, K)
  bool wide;            // whether they are int64 and not int32
  // a sparse teacher's: its log-probabilities, and what LossArgs has of a dense one; null with ids, of which
  // one below 0 is absent
  Matrix log_probs;
  Divergence divergence;
  Missing missing;
};

struct LossArgs {
#define KDFAST_FIELD(type, name) type name;
  KDFAST_NUMBERS(KDFAST_FIELD)  // temperatures: where there is none per row; softcaps: 0: none
#undef KDFAST_FIELD
  int64_t rows, vocab;
  int64_t width;  // of the student with its padding: the gradient beyond vocab is 0
  Matrix student;
  const Matrix* teachers;
  const double* teacher_weights;  // of each
  int n_teachers;
  bool in_doubles;  // whether a row of a narrower dtype is computed so
  Target target;
  bool geometric;
  Divergence divergence;  // kNone where there are entries
  EntryArgs entries;
  const int64_t* labels;  // (rows) or null
  int64_t ignore_index;
  const double* row_weight;                           // (rows) or null
  const double *temperatures, *teacher_temperatures;  // (rows) or null
  double dkd_target, dkd_others;                      // weights

  double* losses;           // (rows)
  RowMetrics* row_metrics;  // (rows) or null
  double* sums;  // (rows * segments, kSums): Sums<double> of rows, or of segments of split ones; or null
  // (rows, columns()), Coefficients and the entries' gradients: out of `losses` or `losses_and_coefficients`,
  // into `grad`; at least one of the two is null
  float* table;
  double* wide_table;
  // the gradient of row r is scale * (row_scale ? row_scale[r] : 1) * dl_r/ds
  double scale;
  const double* row_scale;
  void* grad;          // the student's dtype
  Matrix grad_layout;  // its data and dtype are the student's where the gradient goes in place

  __attribute__((always_inline)) bool is_kept(int64_t row) const {
    return !(labels && labels[row] == ignore_index) && !(row_weight && row_weight[row] == 0);
  }
  __attribute__((always_inline)) double weight(int64_t row) const { return row_weight ? row_weight[row] : 1; }
  // Whether the label's logit is read, and whether the student's exps at temperature 1 are summed.
  __attribute__((always_inline)) bool needs_label() const { return labels && (hard_weight != 0 || metrics); }
  __attribute__((always_inline)) bool needs_hard_sum() const { return needs_label() || z_loss != 0; }
  // Whether an option has sums that are not merged: such a row is not split.
  __attribute__((always_inline)) bool needs_whole_row() const {
    return softcap != 0 || teacher_softcap != 0 || standardize || metrics || label_smoothing != 0 ||
           divergence == Divergence::kDKD || entries.count;
  }
  __attribute__((always_inline)) int64_t columns() const { return kCoefficients + entries.count; }
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

// token_stats and token_grad: the ids are `entries`, and of a loss there is nothing.
struct TokenArgs : LossArgs {
  bool has_entropy;
  bool wide;                             // whether the results are doubles and not floats
  void *log_probs, *entropy, *log_rest;  // (rows, K), (rows), (rows): token_stats' results, and its table
  void* stats;                           // (rows, kTokenStats); token_grad's argument
  const double *grad_log_probs, *grad_entropy, *grad_log_rest;  // each may be null
  const double*
      grad_elsewhere;  // (rows), the sum of the gradients of ids that other processes have; may be null

  // Of such a row all results are 0, whatever it holds.
  __attribute__((always_inline)) bool is_ignored(int64_t row) const {
    return entries.count && ((const int64_t*)entries.indices)[row * entries.count] == kIgnoredId;
  }
};
constexpr int kTokenStats = 5;

constexpr int kBlock = 2048;  // classes that the passes take at a time

// Rows [begin, end) each. Where rows are few a row is split into segments of kSegment classes: `sums` and
// `grad` take units of (row, segment) then, and `merge` merges a row's segments in their order.
constexpr int64_t kSegment = 8192;

struct RowKernels {
  void (*loss_grad)(const LossArgs&, int64_t begin, int64_t end);
  void (*losses)(const LossArgs&, int64_t begin, int64_t end);  // and the table; of whole rows
  void (*sums)(const LossArgs&, int64_t segments, int64_t begin, int64_t end);
  void (*pointwise_sums)(const LossArgs&, int64_t begin, int64_t end);  // phi and psi, given the other sums
  void (*merge)(const LossArgs&, int64_t segments);  // the sums of a row's segments, into its first one's
  // losses and the table, from the sums of each row's first segment
  void (*losses_and_coefficients)(const LossArgs&, int64_t segments);
  void (*grad)(const LossArgs&, int64_t segments, int64_t begin, int64_t end);
  void (*token_stats)(const TokenArgs&, int64_t begin, int64_t end);
  void (*token_grad)(const TokenArgs&, int64_t begin, int64_t end);
  void (*softmax)(const SoftmaxArgs&, int64_t begin, int64_t end);
  void (*softmax_backward)(const SoftmaxArgs&, int64_t begin, int64_t end);
  // Units [begin, end); how they are split does not change a bit. Null where the set has none.
  void (*matmul)(const MatmulArgs&, int64_t begin, int64_t end);
};

const RowKernels& row_kernels_baseline();
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();
const RowKernels& row_kernels_avx512_bf16();

}  // namespace kdfast
