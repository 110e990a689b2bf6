// The row kernels of one instruction set. This file is compiled once for each, with the compiler's flags for
// it and KDFAST_ISA, its name; it exports one table.
#include "row_kernels.h"

#include "row_gradient.h"
#include "short_rows.h"
#include "softmax_rows.h"
#include "sparse_rows.h"
#include "spec.h"
#include "token_rows.h"
#if defined(__AVX512BF16__)
#include "matmul_kernel.h"
#endif

#define KDFAST_JOIN(a, b) a##b
#define KDFAST_EXPORT(isa) KDFAST_JOIN(row_kernels_, isa)

namespace kdfast {
namespace {

// The kernels of this instruction set, and a call's arguments for rows of huge logits.
const RowKernels& this_set() { return KDFAST_EXPORT(KDFAST_ISA)(); }
LossArgs in_doubles(LossArgs a) {
  a.in_doubles = true;
  return a;
}
TokenArgs in_doubles(TokenArgs a) {
  a.in_doubles = true;
  return a;
}

template <class P>
struct Kernels {
  struct State {  // of a row
    RowScale scale;
    Coefficients<double> coefficients{};
    Scales<double> scales{};
  };

  // Passes A and B over a row: its loss, metrics and coefficients. kKeep: whether pass C takes the exps.
  // False: it is to be computed in doubles.
  template <bool kKeep>
  static bool passes_a_and_b(const LossArgs& a, int64_t row, const RowOf<P>& r, State& x) {
    const int64_t n = a.vocab;
    bool is_huge = false;
    Moments student{};
    if (a.standardize) student = standardize<P>(a, r.s, r.t, x.scale);
    Label label = find_label(a, row, r, 0, n);
    MetricSums metric_sums;
    SumsOptions options;
    options.label = label.index;
    options.without_label = a.divergence == Divergence::kDKD;
    options.given = !teacher_is_softmaxed(a);
    options.is_huge = &is_huge;
    if (a.label_smoothing != 0) options.logits = &label.logits;
    if (a.metrics) options.metrics = &metric_sums;
    [[maybe_unused]] Sums<double> softmax_sums;
    if constexpr (P::kMSE) {
      if (a.metrics) {  // their p and q have a pass of their own
        using Q = Spec<typename P::S, typename P::T, ForwardKL, false, false>;
        RowScale scale = x.scale;
        set_units<typename P::C>(scale, scale.student_unit, scale.teacher_unit, false);
        SumsOptions of_metrics;
        of_metrics.metrics = &metric_sums;
        of_metrics.is_huge = &is_huge;
        softmax_sums = row_sums<Q, true>(r.s, r.t, n, scale, r.scratch, r.blocks, of_metrics);
      }
    }
    Sums<double> sums = a.metrics || a.standardize
                            ? row_sums<P, true>(r.s, r.t, n, x.scale, r.scratch, r.blocks, options)
                            : row_sums<P, kKeep>(r.s, r.t, n, x.scale, r.scratch, r.blocks, options);
    if (is_huge) return false;
    add_logits(a, x.scale, label, sums);
    add_pointwise_sums<P, true>(a, r, n, x.scale, sums);
    double soft_at_label = 0;
    const RowLoss<double> loss =
        row_loss_and_coefficients(a, row, sums, x.scale, label, x.coefficients, soft_at_label);
    x.scales = scales_with(x.coefficients, loss.log_student, loss.log_teacher);
    a.losses[row] = loss.loss;
    if (a.metrics) {
      a.row_metrics[row] = row_metrics<typename P::S, typename P::T, P::kReadsTeacher>(
          a, r.s, r.t, x.scale, P::kMSE ? softmax_sums : sums, metric_sums, label, loss);
    }
    if constexpr (P::kOwn ? P::kSoft : P::kMSE) {
      if (a.standardize) {
        x.coefficients.mean = student.mean;
        double dot = soft_gradient_dot<P>(a, r, n, x.scale, x.coefficients);
        if (a.divergence == Divergence::kDKD) dot += soft_at_label * (label.student - student.mean);
        x.coefficients.tilt = tilt(student, n, dot, x.scale.logit_scale);
      }
    }
    return true;
  }

  static void loss_grad(const LossArgs& a, int64_t begin, int64_t end) {
    if (is_for_short_rows<typename P::S>(a)) return short_rows<P, ShortKernel::kLossGrad>(a, begin, end);
    const RowScales scales(a);
    for (int64_t row = begin; row < end; ++row) {
      const bool kept = a.is_kept(row);
      if (a.vocab < a.width || !kept) zero_gradient(a, row, kept ? a.vocab : 0, a.width);
      if (!kept) {
        write_dropped_row(a, row);
        continue;
      }
      State x{scales(row)};
      const RowOf<P> r = open_row<P>(a, row, 0, a.vocab, x.scale);
      if (!passes_a_and_b<true>(a, row, r, x)) {
        this_set().loss_grad(in_doubles(a), row, row + 1);
        continue;
      }
      write_gradient<P, true>(a, row, r, 0, a.vocab, x.scale, x.coefficients, x.scales);
    }
  }

  static void losses(const LossArgs& a, int64_t begin, int64_t end) {
    if (is_for_short_rows<typename P::S>(a)) return short_rows<P, ShortKernel::kLosses>(a, begin, end);
    const RowScales scales(a);
    for (int64_t row = begin; row < end; ++row) {
      if (!a.is_kept(row)) {
        write_dropped_row(a, row);
        continue;
      }
      State x{scales(row)};
      const RowOf<P> r = open_row<P>(a, row, 0, a.vocab, x.scale);
      if (!passes_a_and_b<P::kPointwise>(a, row, r, x)) {
        this_set().losses(in_doubles(a), row, row + 1);
        continue;
      }
      round_offsets(a, x.scale, x.coefficients);
      store_coefficients(a, row, x.coefficients);
    }
  }

  static void sums(const LossArgs& a, int64_t segments, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const Segment part(a, segments, unit);
      Sums<double>& sums = ((Sums<double>*)a.sums)[unit];
      sums = {};
      if (!a.is_kept(part.row)) continue;
      const RowScale scale = row_scale(a, part.row);
      const RowOf<P> r = open_row<P>(a, part.row, part.first, part.classes, scale);
      Label label = find_label(a, part.row, r, part.first, part.classes);
      SumsOptions options;
      options.label = label.index;
      options.given = !teacher_is_softmaxed(a);
      bool is_huge = false;
      options.is_huge = &is_huge;
      if (a.label_smoothing != 0) options.logits = &label.logits;
      // kKeep as `losses` has it, so that nothing is instantiated for this alone
      sums = row_sums<P, P::kPointwise>(r.s, r.t, part.classes, scale, r.scratch, r.blocks, options);
      if (is_huge) {
        this_set().sums(in_doubles(a), segments, unit, unit + 1);
        continue;
      }
      add_logits(a, scale, label, sums);
      if (a.student.dtype != DType::kDouble) {  // the table rounds them; logit_mse's is no logit's
        const double teacher_offset = P::kMSE ? sums.teacher_offset : (float)sums.teacher_offset;
        rescale<typename P::D>(sums, (float)sums.student_offset, teacher_offset, scale);
      }
    }
  }

  static void pointwise_sums(const LossArgs& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!a.is_kept(row)) continue;
      const RowScale scale = row_scale(a, row);
      Sums<double>& sums = ((Sums<double>*)a.sums)[row];
      if (kFuses<typename P::C> && scale.is_huge(sums.student_offset, sums.teacher_offset)) {
        this_set().pointwise_sums(in_doubles(a), row, row + 1);
        continue;
      }
      const RowOf<P> r = open_row<P>(a, row, 0, a.vocab, scale);
      add_pointwise_sums<P, false>(a, r, a.vocab, scale, sums);
    }
  }

  static void grad(const LossArgs& a, int64_t segments, int64_t begin, int64_t end) {
    if (is_for_short_rows<typename P::S>(a)) return short_rows<P, ShortKernel::kGrad>(a, begin, end);
    for (int64_t unit = begin; unit < end; ++unit) {
      const Segment part(a, segments, unit);
      const int64_t row = part.row, last = part.first + part.classes;
      if (!a.is_kept(row)) {
        zero_gradient(a, row, part.first, last);
      } else {
        RowScale scale = row_scale(a, row);
        const RowOf<P> r = open_row<P>(a, row, part.first, part.classes, scale);
        Coefficients<double> c = load_coefficients(a, row);
        set_units<typename P::C>(scale, c.student_unit, c.teacher_unit, P::kMSE);
        if (kFuses<typename P::C> && scale.is_huge(c.student_offset, P::kMSE ? 0 : c.teacher_offset)) {
          this_set().grad(in_doubles(a), segments, unit, unit + 1);
          continue;
        }
        scale_gradient(c, a.scale * row_value(a.row_scale, 1, row));
        write_gradient<P, false>(a, row, r, part.first, part.classes, scale, c, scales_of(c));
      }
      if (last == a.vocab) zero_gradient(a, row, a.vocab, a.width);
    }
  }
};

template <class S, class T, bool kOwn>
struct Kernels<Spec<S, T, Others, false, kOwn>> : SparseRows<Spec<S, T, Others, false, kOwn>> {};

#if defined(__AVX512BF16__)
template <>
struct Kernels<AVX512Kernels> {
#define KDFAST_FORWARD(kernel)              \
  template <class... Args>                  \
  static void kernel(const Args&... args) { \
    row_kernels_avx512().kernel(args...);   \
  }
  KDFAST_FORWARD(loss_grad)
  KDFAST_FORWARD(losses)
  KDFAST_FORWARD(sums)
  KDFAST_FORWARD(pointwise_sums)
  KDFAST_FORWARD(grad)
};
template <>
struct TokenRows<AVX512Kernels> {
  KDFAST_FORWARD(token_stats)
  KDFAST_FORWARD(token_grad)
};
#undef KDFAST_FORWARD
#endif

}  // namespace

#define KDFAST_KERNEL(kernel)                                                    \
  [](const LossArgs& a, auto... args) {                                          \
    dispatch_spec(a, [&](auto p) { Kernels<decltype(p)>::kernel(a, args...); }); \
  }
#define KDFAST_TOKEN_KERNEL(kernel, with_entropy)                                                         \
  [](const TokenArgs& a, int64_t begin, int64_t end) {                                                    \
    dispatch_token_spec(a, with_entropy, [&](auto p) { TokenRows<decltype(p)>::kernel(a, begin, end); }); \
  }
const RowKernels& KDFAST_EXPORT(KDFAST_ISA)() {
  static const RowKernels kernels = {KDFAST_KERNEL(loss_grad),
                                     KDFAST_KERNEL(losses),
                                     KDFAST_KERNEL(sums),
                                     KDFAST_KERNEL(pointwise_sums),
                                     merge,
                                     losses_and_coefficients,
                                     KDFAST_KERNEL(grad),
                                     KDFAST_TOKEN_KERNEL(token_stats, a.has_entropy),
                                     KDFAST_TOKEN_KERNEL(token_grad, a.grad_entropy != nullptr),
                                     softmax,
                                     softmax_backward,
#if defined(__AVX512BF16__)
                                     matmul
#else
                                     nullptr
#endif
  };
  return kernels;
}

}  // namespace kdfast
