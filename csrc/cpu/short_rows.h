// Rows of few classes: a vector holds one class of kLanes rows instead of kLanes classes of one row, so
// that no row pays for sums across a vector, for a partly filled one, or for its own logarithms. The
// formulas, phi and psi are those of row_sums.h and row_gradient.h; all classes are at hand, so the offset
// is the maximum.
#pragma once

#include "row_gradient.h"
#include "short_group.h"

namespace kdfast {
namespace {

enum class ShortKernel { kLossGrad, kLosses, kGrad };  // as in RowKernels

template <class P>
struct ShortRows {
  using S = typename P::S;
  using T = typename P::T;
  using C = typename P::C;
  using V = typename P::V;
  using Group = ShortGroup<C>;
  using RowExponents = Exponents<P, false>;  // an offset of each row, as its table has it
  static constexpr int kLanes = P::kLanes;
  static constexpr bool kLinear = !P::kPointwise && !P::kMSE;

  static V maximum(const C* z, int64_t n) {
    V high = splat(-std::numeric_limits<C>::infinity());
    for (int64_t i = 0; i < n; ++i) high = max(load(z + i * kLanes), high);
    return high;
  }

  // The exps of all classes, into the group. add(lanes, i) is called with each class's.
  template <class F>
  KD_INLINE static void store_exps(const LossArgs& a, const RowExponents& exponents, Group& g, F add) {
    for (int64_t i = 0; i < a.vocab; ++i) {
      const Lanes<P> x = exponents(load(g.s + i * kLanes), load(g.t + i * kLanes));
      store(g.es + i * kLanes, x.es);
      store(g.et + i * kLanes, x.et);
      if constexpr (P::kOwn) store(g.e1 + i * kLanes, x.e1);
      add(x, i);
    }
  }

  KD_INLINE static Scratch<C> exps(Group& g, int64_t i = 0) {
    return Scratch<C>{g.es, g.et, g.e1, g.psi} + i * kLanes;
  }

  // Passes A and B over a group; the exps and psi are left in it.
  KD_NOINLINE static Sums<V> sums(const LossArgs& a, RowExponents& exponents, Group& g) {
    const int64_t n = a.vocab;
    V teacher_offset{};
    if constexpr (P::kMSE) {
      for (int64_t i = 0; i < n; ++i)
        teacher_offset += (load(g.s + i * kLanes) * exponents.student_unit -
                           load(g.t + i * kLanes) * exponents.teacher_unit) /
                          (C)n;
    } else if constexpr (P::kSoft && !P::kProbs) {
      if (teacher_is_softmaxed(a)) teacher_offset = maximum(g.t, n);
    }
    const V student_offset = maximum(g.s, n);
    exponents.set_offsets(student_offset, teacher_offset);
    struct Totals {
      V student, teacher, hard, exponents, over_teacher, over_student;
    } part{}, total{};  // two levels, as in block_sums
    store_exps(a, exponents, g, [&](const Lanes<P>& each, int64_t i) __attribute__((always_inline)) {
      part.student += each.es;
      part.teacher += each.et;
      part.hard += each.e1;
      part.exponents += exponents.hard(each.ys);
      if constexpr (P::kMSE) part.over_teacher += each.et * each.et;
      if constexpr (P::D::kTeacher)
        part.over_teacher += P::D::over_teacher(each.et, each.ys, each.ys - each.yt);
      if constexpr (P::D::kStudent) part.over_student += P::D::over_student(each.es, each.ys - each.yt);
      if (i % 8 != 7 && i != n - 1) return;
      total.student += part.student;
      total.teacher += part.teacher;
      total.hard += part.hard;
      total.exponents += part.exponents;
      total.over_teacher += part.over_teacher;
      total.over_student += part.over_student;
      part = Totals{};
    });
    PointwiseSums<V> found{};
    if constexpr (P::kPointwise) {
      dispatch_pointwise(a, [&](auto d) {
        add_phi_and_psi<C, decltype(d)>(exps(g), n, 1 / total.student,
                                        teacher_is_softmaxed(a) ? 1 / total.teacher : V{} + 1, a.beta, found);
      });
      total.over_student = found.psi_apart;
    }
    return {student_offset,
            total.student,
            teacher_offset,
            total.teacher,
            total.hard,
            total.over_teacher,
            exponents.hard(exponents.student(load(g.label_logit))),
            total.exponents,
            V{} + (C)n,
            total.over_student,
            found.phi,
            found.psi};
  }

  // Losses of a group, and its gradient's coefficients.
  KD_NOINLINE static Coefficients<V> losses(const LossArgs& a, int64_t begin, int rows, const Sums<V>& x,
                                            const Group& g, Scales<V>& scales) {
    const V excess = multiply_subtract(1 / x.student_total, x.student_total, V{} + 1);
    const auto terms = row_terms<V, C>(a, load(g.temperature), load(g.factor), V{} + 1, excess);
    Coefficients<V> c;
    RowLoss<V> out{};
    if constexpr (P::kPointwise) {
      dispatch_pointwise(a, [&](auto d) { out = loss_and_coefficients<decltype(d)>(x, terms, c); });
    } else {
      out = loss_and_coefficients<typename P::D>(x, terms, c);
    }
    scales = scales_with(c, out.log_student, out.log_teacher);
    typedef double Doubles __attribute__((vector_size(2 * kVectorBytes)));
    Doubles weight, weighted = __builtin_convertvector(out.loss, Doubles);
    std::memcpy(&weight, g.weight, sizeof(weight));
    weighted = weight == 0 ? Doubles{} : weighted * weight;
    std::memcpy(a.losses + begin, &weighted, rows * sizeof(double));
    return c;
  }

  // The exps as sums() leaves them, from the table's offsets.
  KD_NOINLINE static void refill_exps(const LossArgs& a, const Coefficients<V>& c, RowExponents& exponents,
                                      Group& g) {
    exponents.set_offsets(c.student_offset, c.teacher_offset);
    store_exps(a, exponents, g, [](const Lanes<P>&, int64_t) __attribute__((always_inline)) {});
    if constexpr (P::kPointwise) {
      dispatch_pointwise(a, [&](auto d) {
        PointwiseSums<V> known{};
        add_phi_and_psi<C, decltype(d)>(exps(g), a.vocab, 1 / c.student_total, 1 / c.teacher_total, a.beta,
                                        known);
      });
    }
  }

  // Pass C: each class's gradient, written over the student's exps; store_group_gradient() subtracts the
  // label's term.
  KD_NOINLINE static void gradients(const LossArgs& a, const Coefficients<V>& c, const Scales<V>& scales,
                                    const RowExponents& exponents, Group& g) {
    Gradient<P, true, false> gradient{};
    gradient.exponents = exponents;
    gradient.factors = per_exp<C>(c, scales);
    if constexpr (P::kPointwise) {
      dispatch_apart(a, [&](auto d) {
        if (any(c.slope != 0))
          store_psi_apart<C, decltype(d)>(exps(g), a.vocab, scales.to_q, scales.to_p, a.beta, c.slope);
      });
    }
    for (int64_t i = 0; i < a.vocab; ++i) {
      const Scratch<C> at = exps(g, i);
      store(at.student, gradient.gradient(load(g.s + i * kLanes), load(g.t + i * kLanes), at, 0));
    }
  }

  template <ShortKernel kKernel>
  KD_NOINLINE static void run(const LossArgs& a, const RowScales& row_scales, int64_t begin, int rows,
                              Group& g) {
    load_group<S, T, P::kReadsTeacher>(a, row_scales, begin, rows, kKernel == ShortKernel::kGrad, g);
    RowExponents exponents;
    exponents.power = hard_power(a, a.temperature);
    exponents.hard_multiple = load(g.temperature);
    exponents.student_unit = splat<C>(a.logit_scale);
    exponents.teacher_unit = splat<C>(a.teacher_logit_scale);
    exponents.student.scale = load(g.student_scale);
    exponents.teacher.scale = load(g.teacher_scale);
    Coefficients<V> c;
    Scales<V> scales;
    if constexpr (kKernel == ShortKernel::kGrad) {
      c = load_table<kLinear>(a, begin, rows, load(g.factor));
      scales = scales_of(c);
      refill_exps(a, c, exponents, g);
    } else {
      c = losses(a, begin, rows, sums(a, exponents, g), g, scales);
    }
    if constexpr (kKernel == ShortKernel::kLosses) {
      store_table<kLinear>(a, begin, rows, c);
    } else {
      gradients(a, c, scales, exponents, g);
      store_group_gradient<S>(a, begin, rows, g, c.label);
    }
  }
};

// The teacher is read in place: one tensor, of the student's dtype.
template <class S>
bool is_for_short_rows(const LossArgs& a) {
  if (std::is_same_v<S, double>) return false;
  if (a.vocab > kShort || bytes_of(a.student.dtype) != sizeof(S)) return false;
  if (a.softcap != 0 || a.teacher_softcap != 0 || a.standardize || a.metrics) return false;
  if (a.divergence == Divergence::kDKD || a.entries.count) return false;
  return a.n_teachers == 0 || (a.n_teachers == 1 && a.teachers[0].dtype == a.student.dtype);
}

template <class P, ShortKernel kKernel>
KD_NOINLINE void short_rows(const LossArgs& a, int64_t begin, int64_t end) {
  if constexpr (!std::is_same_v<typename P::S, double>) {
    using Group = typename ShortRows<P>::Group;
    Group& group = *(Group*)thread_buffer(sizeof(Group));
    const RowScales scales(a);
    for (int r = 0; r < P::kLanes; ++r) set_scale(group, r, scales.common);
    for (int64_t row = begin; row < end; row += P::kLanes) {
      const int rows = end - row < P::kLanes ? end - row : P::kLanes;
      ShortRows<P>::template run<kKernel>(a, scales, row, rows, group);
    }
  }
}

}  // namespace
}  // namespace kdfast
