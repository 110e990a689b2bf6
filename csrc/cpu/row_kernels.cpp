// The row kernels of one instruction set. This file is compiled once for each, with the compiler's flags for
// it and KDFAST_ISA, its name; it exports one table.
#include "row_kernels.h"

#include <type_traits>

#include "convert.h"
#include "row_gradient.h"
#include "short_rows.h"
#include "softmax_rows.h"
#include "standardize.h"

namespace kdfast {
namespace {

// Whether exps at temperature 1 are whole powers of those at T, or not wanted at all.
bool takes_powers(const LossArgs& a) {
  const double t = a.temperature;
  if (a.standardize && a.divergence != Divergence::kLogitMSE) return false;
  if (!a.hard()) return true;
  return !a.temperatures && t <= kMaxPower && t == (int)t;
}

// ---- a row as the passes take it ----

// Classes [begin, begin + n) of a row, in the thread's buffer where they cannot be read as they are.
template <class P>
KD_NOINLINE Row<P> open_row(const LossArgs& a, int64_t row, int64_t begin, int64_t n, const RowScale& scale) {
  using C = typename P::C;
  using S = typename P::S;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  const int64_t padded = blocks * kBlock + 16;  // not a power of two apart, which would share cache sets
  const bool direct = sizeof(S) == bytes_of(a.student.dtype) && a.softcap == 0;
  C* at = (C*)thread_buffer(padded * sizeof(C) * 7 + blocks * sizeof(Block<P>));
  Row<P> r{};
  r.blocks = (Block<P>*)(at + 7 * padded);
  r.scratch = {at, at + padded, at + 2 * padded};
  r.final_out =
      a.grad ? (char*)a.grad + (a.grad_layout.offset(row) + begin) * bytes_of(a.student.dtype) : nullptr;
  if (direct) {
    r.s = (const S*)row_of(a.student, row) + begin;
    r.out = (S*)r.final_out;
  } else if constexpr (std::is_same_v<S, C>) {
    const char* from = row_of(a.student, row) + begin * bytes_of(a.student.dtype);
    if (a.softcap != 0) {
      softcap_row(from, a.student.dtype, n, a.softcap, at + 3 * padded);
    } else {
      widen(from, a.student.dtype, n, at + 3 * padded);
    }
    r.s = at + 3 * padded;
    r.out = at + 4 * padded;
  }
  if constexpr (P::kSoft || P::kMSE) {
    if constexpr (!std::is_same_v<typename P::T, C>) {
      r.t = (const typename P::T*)row_of(a.teachers[0], row) + begin;
    } else {
      r.t = mix_teachers(a, row, begin, n, scale.teacher, at + 5 * padded, at + 6 * padded);
    }
  }
  return r;
}

// A short row's gradient is written soon after the row was read: its lines come in meanwhile.
template <class P>
KD_INLINE void fetch_for_writing(const Row<P>& r, int64_t n) {
  if (n > kBlock || (const void*)r.out == (const void*)r.s) return;
  for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(typename P::S)) __builtin_prefetch(r.out + i, 1, 2);
}

// Of a row's classes [begin, begin + n).
template <class P>
Label label_of(const LossArgs& a, int64_t row, const Row<P>& r, int64_t begin, int64_t n) {
  if (!a.labelled() && a.divergence != Divergence::kDKD) return {};
  Label label{a.labels[row] - begin};
  if (label.index < 0 || label.index >= n) return {};
  label.student = load_one(r.s + label.index);
  if constexpr (P::kSoft) label.teacher = load_one(r.t + label.index);
  return label;
}

// Where in the scratch of a block its i-th class is: even and odd ones of 16 bits stand in vectors of their
// own.
template <class P>
int place(int i) {
  if constexpr (!std::is_same_v<typename P::S, bf16>) return i;
  return i / P::kStep * P::kStep + i % 2 * P::kLanes + i % P::kStep / 2;
}

// Pass C over n classes from `begin` of a row. The label's own term goes in last, into the value before its
// rounding.
template <class P, bool kKeep>
void write_gradient(const LossArgs& a, int64_t row, const Row<P>& r, int64_t begin, int64_t n,
                    const RowScale& scale, const Coefficients<double>& c, const Scales<double>& of_row) {
  using C = typename P::C;
  const bool direct = (const void*)r.out == r.final_out;
  const bool decoupled = a.divergence == Divergence::kDKD;
  const int64_t label = a.labels && (a.hard_weight != 0 || decoupled) ? a.labels[row] - begin : -1;
  Block<P> current{c.student_offset, c.teacher_offset};
  if constexpr (kKeep) current = r.blocks[(n - 1) / kBlock];
  Scales<double> scales = at_offsets<P>(of_row, scale, current);
  Gradient<P, kKeep || P::kPointwise> gradient(scale, c, scales);
  // From the last block to the first: what was kept last is still in the cache, where not all of it fits
  for (int64_t at = (n - 1) / kBlock * kBlock; at >= 0; at -= kBlock) {
    if constexpr (kKeep) {
      const Block<P>& block = r.blocks[at / kBlock];
      if (!(block == current)) {
        current = block;
        scales = at_offsets<P>(of_row, scale, current);
        gradient = Gradient<P, kKeep>(scale, c, scales);
      }
    }
    const int m = n - at < kBlock ? n - at : kBlock;
    const Scratch<C> kept = kKeep ? r.scratch.after(at) : r.scratch;
    if constexpr (P::kPointwise && !kKeep) {
      typename P::V phi{}, psi{};
      keep_psi<P>(a, r, at, m, scale, scales, phi, psi);
    }
    typename P::S* out = direct ? r.out + at : r.out;
    const bool labelled = at <= label && label < at + m;
    C at_label = 0;
    if (labelled) {  // before the logits are overwritten
      const auto s = load_student<P>(r.s + label, 1);
      const auto t = load_teacher<P>(r.t + label, 1);
      if (decoupled) {  // its exps are not in the sums
        at_label = gradient.of_exps(Lanes<P>{}, s.a)[0] + (C)c.at_label;
      } else {
        at_label = gradient.combine(s.a, t.a, kept, place<P>(label - at))[0] - (C)c.label;
      }
    }
    gradient.write(r.s + at, r.t + at, kept, m, out);
    if (labelled) store_part(out + label - at, splat(at_label), 1);
    if constexpr (std::is_same_v<typename P::S, C>) {
      if (direct) continue;
      if (a.softcap != 0) softcap_gradient(out, r.s + at, m, a.softcap);
      narrow(out, m, (char*)r.final_out + at * bytes_of(a.student.dtype), a.student.dtype);
    }
  }
}

KD_NOINLINE void zero(const LossArgs& a, int64_t row, int64_t begin, int64_t end) {
  const int64_t size = bytes_of(a.student.dtype);
  std::memset((char*)a.grad + (a.grad_layout.offset(row) + begin) * size, 0, (end - begin) * size);
}

// ---- the kernels ----

template <class P>
struct Kernels {
  struct State {  // of a row
    RowScale scale;
    Sums<double> sums;
    Coefficients<double> coefficients;
    Scales<double> scales;
    Moments moments;
    double soft_at_label = 0;
    explicit State(const RowScale& s) : scale(s) {}
  };

  // Passes A and B over a row, and its loss. kKeep: as the gradient wants it.
  template <bool kKeep>
  static void pass_a_and_b(const LossArgs& a, int64_t row, const Row<P>& r, State& x) {
    const int64_t n = a.vocab;
    if (a.standardize) standardize<P>(a, r, n, x.scale, x.moments);
    Label label = label_of<P>(a, row, r, 0, n);
    Measures measures;
    Wanted wanted;
    if (a.divergence == Divergence::kDKD) wanted.without = label.index;
    if (a.label_smoothing != 0) wanted.logits = &label.logits;
    if (a.metrics) wanted.measures = &measures;
    RowScale of_metrics = x.scale;
    if constexpr (P::kMSE) {
      if (a.metrics) {  // their p and q have a pass of their own
        using Q = Spec<typename P::S, typename P::T, ForwardKL, false, false>;
        of_metrics.student *= x.scale.student_unit;
        of_metrics.teacher *= x.scale.teacher_unit;
        row_sums<Q, true>(r.s, r.t, n, of_metrics, r.scratch, (Block<Q>*)r.blocks, {-1, nullptr, &measures});
      }
    }
    if (a.metrics) {
      x.sums = row_sums<P, true>(r.s, r.t, n, x.scale, r.scratch, r.blocks, wanted);
    } else {
      x.sums = row_sums<P, kKeep>(r.s, r.t, n, x.scale, r.scratch, r.blocks, wanted);
    }
    add_label<P>(a, x.scale, label, x.sums);
    add_pointwise_sums<P>(a, r, n, x.scale, x.sums);
    const RowLoss<double> loss =
        row_loss_and_coefficients<P>(a, row, x.sums, x.scale, label, x.coefficients, x.soft_at_label);
    x.scales = scales_with(x.coefficients, loss.log_student, loss.log_teacher);
    a.losses[row] = loss.loss;
    if (a.metrics) {
      measure<typename P::S, typename P::T, P::kSoft || P::kMSE, P::kProbs>(a, row, r.s, r.t, of_metrics,
                                                                            measures, label, loss);
    }
  }

  // The same with the gradient's part that standardised logits add.
  template <bool kKeep>
  static void all_passes_but_c(const LossArgs& a, int64_t row, const Row<P>& r, State& x) {
    if constexpr (P::kOwn ? P::kSoft : P::kMSE) {
      if (a.standardize) {
        pass_a_and_b<true>(a, row, r, x);
        return add_tilt<P>(a, r, a.vocab, x.scale, x.moments, label_of<P>(a, row, r, 0, a.vocab),
                           x.soft_at_label, x.coefficients);
      }
    }
    pass_a_and_b<kKeep>(a, row, r, x);
  }

  static void drop(const LossArgs& a, int64_t row) {
    a.losses[row] = 0;
    if (a.metrics) a.row_metrics[row] = {kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN};
    if (a.table || a.wide_table) keep(a, row, {});
  }

  static void loss_grad(const LossArgs& a, int64_t begin, int64_t end) {
    if (takes_short_rows<P>(a)) return short_rows<P, Short::kLossAndGradient>(a, begin, end);
    for (int64_t row = begin; row < end; ++row) {
      if (a.vocab < a.width || !a.kept(row)) zero(a, row, a.kept(row) ? a.vocab : 0, a.width);
      if (!a.kept(row)) {
        drop(a, row);
        continue;
      }
      State x(row_scale(a, row));
      const Row<P> r = open_row<P>(a, row, 0, a.vocab, x.scale);
      fetch_for_writing(r, a.vocab);
      all_passes_but_c<true>(a, row, r, x);
      write_gradient<P, true>(a, row, r, 0, a.vocab, x.scale, x.coefficients, x.scales);
    }
  }

  static void losses(const LossArgs& a, int64_t begin, int64_t end) {
    if (takes_short_rows<P>(a)) return short_rows<P, Short::kLoss>(a, begin, end);
    for (int64_t row = begin; row < end; ++row) {
      if (!a.kept(row)) {
        drop(a, row);
        continue;
      }
      State x(row_scale(a, row));
      const Row<P> r = open_row<P>(a, row, 0, a.vocab, x.scale);
      all_passes_but_c<P::kPointwise>(a, row, r, x);
      keep(a, row, x.coefficients);
    }
  }

  // Classes of the unit-th segment: all of a row's but for few and long ones.
  static int64_t first_class(int64_t segments, int64_t unit) {
    return segments == 1 ? 0 : unit % segments * kSegment;
  }
  static int64_t classes(const LossArgs& a, int64_t segments, int64_t unit) {
    const int64_t left = a.vocab - first_class(segments, unit);
    return segments == 1 || left < kSegment ? left : kSegment;
  }

  static void sums(const LossArgs& a, int64_t segments, int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / segments, first = first_class(segments, unit),
                    n = classes(a, segments, unit);
      Sums<double>& sums = ((Sums<double>*)a.sums)[unit];
      sums = {};
      if (!a.kept(row)) continue;
      const RowScale scale = row_scale(a, row);
      const Row<P> r = open_row<P>(a, row, first, n, scale);
      Label label = label_of<P>(a, row, r, first, n);
      Wanted wanted;
      if (a.label_smoothing != 0) wanted.logits = &label.logits;
      sums = row_sums<P, false>(r.s, r.t, n, scale, r.scratch, r.blocks, wanted);
      add_label<P>(a, scale, label, sums);
    }
  }

  static void pointwise_sums(const LossArgs& a, int64_t begin, int64_t end) {
    if constexpr (P::kPointwise) {
      for (int64_t row = begin; row < end; ++row) {
        Sums<double>& sums = ((Sums<double>*)a.sums)[row];
        if (!a.kept(row)) continue;
        const RowScale scale = row_scale(a, row);
        const Row<P> r = open_row<P>(a, row, 0, a.vocab, scale);
        const Scales<double> x = scales_of(a, sums);
        typename P::V phi{}, psi{};
        for (int64_t at = 0; at < a.vocab; at += kBlock)
          keep_psi<P>(a, r, at, a.vocab - at < kBlock ? a.vocab - at : kBlock, scale, x, phi, psi);
        sums.phi = sum(phi);
        sums.psi = sum(psi);
      }
    }
  }

  static void merge(const LossArgs& a, int64_t segments) {
    for (int64_t row = 0; row < a.rows; ++row) {
      Sums<double>* sums = (Sums<double>*)a.sums + row * segments;
      for (int64_t k = 1; k < segments; ++k) kdfast::merge<typename P::D>(sums[0], sums[k]);
    }
  }

  static void losses_and_coefficients(const LossArgs& a, int64_t segments) {
    for (int64_t row = 0; row < a.rows; ++row) {
      if (!a.kept(row)) {
        drop(a, row);
        continue;
      }
      const Sums<double>& sums = ((const Sums<double>*)a.sums)[row * segments];
      Coefficients<double> c;
      double soft_at_label = 0;
      a.losses[row] =
          row_loss_and_coefficients<P>(a, row, sums, row_scale(a, row), {}, c, soft_at_label).loss;
      keep(a, row, c);
    }
  }

  static void grad(const LossArgs& a, int64_t segments, int64_t begin, int64_t end) {
    if (takes_short_rows<P>(a)) return short_rows<P, Short::kGradient>(a, begin, end);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / segments, first = first_class(segments, unit),
                    n = classes(a, segments, unit);
      if (!a.kept(row)) {
        zero(a, row, first, first + n);
      } else {
        RowScale scale = row_scale(a, row);
        const Row<P> r = open_row<P>(a, row, first, n, scale);
        Coefficients<double> c = coefficients_of(a, row);
        set_units<P>(scale, c.student_unit, c.teacher_unit);
        scale_gradient(c, a.scale * at_row(a.row_scale, 1, row));
        write_gradient<P, false>(a, row, r, first, n, scale, c, scales_of(c));
      }
      if (first + n == a.vocab) zero(a, row, a.vocab, a.width);
    }
  }
};

// ---- from run-time settings to a Spec, one axis after the other ----

template <class S, class T, bool kProbs, class F>
void with_divergence(const LossArgs& a, F f) {
  auto call = [&](auto divergence) {
    using Named = decltype(divergence);
    // which pointwise one it is pass B asks; whether forward_kl's sums are decoupled KD's,
    // loss_and_coefficients()
    using D = std::conditional_t<Named::kPointwise, Pointwise,
                                 std::conditional_t<std::is_same_v<Named, DKD>, ForwardKL, Named>>;
    constexpr bool kMSE = std::is_same_v<D, LogitMSE>, kNone = std::is_same_v<D, NoDivergence>;
    if constexpr (kProbs && (kMSE || kNone)) return;
    if constexpr (!std::is_same_v<S, double> || kMSE || kNone) {  // fp64 does without the shortcut
      if (kMSE || takes_powers(a)) return f(Spec<S, T, D, kProbs, false>{});
    }
    if constexpr (!kMSE) f(Spec<S, T, D, kProbs, true>{});
  };
  with_divergence_named(a, call);
}

#if defined(__AVX512BF16__)  // which rounds to bf16 in one instruction, and adds nothing to other storage
                             // types
struct Elsewhere {};
template <>
struct Kernels<Elsewhere> {
#define KDFAST_ELSEWHERE(kernel)            \
  template <class... Args>                  \
  static void kernel(const Args&... args) { \
    row_kernels_avx512().kernel(args...);   \
  }
  KDFAST_ELSEWHERE(loss_grad)
  KDFAST_ELSEWHERE(losses)
  KDFAST_ELSEWHERE(sums)
  KDFAST_ELSEWHERE(pointwise_sums)
  KDFAST_ELSEWHERE(merge)
  KDFAST_ELSEWHERE(losses_and_coefficients)
  KDFAST_ELSEWHERE(grad)
#undef KDFAST_ELSEWHERE
};
#endif

template <class F>
void with_spec(const LossArgs& a, F f) {
  const DType dtype = a.student.dtype;
  const bool plain = a.softcap == 0 && a.teacher_softcap == 0 &&
                     (a.n_teachers == 0 ||
                      (a.n_teachers == 1 && a.teachers[0].dtype == dtype && a.target != Target::kProbs));
  if (plain && dtype == DType::kBFloat16) return with_divergence<bf16, bf16, false>(a, f);
#if defined(__AVX512BF16__)
  f(Elsewhere{});
#else
  if (teacher_is_probs(a) && a.n_teachers) {
    if (dtype == DType::kDouble) return with_divergence<double, double, true>(a, f);
    return with_divergence<float, float, true>(a, f);
  }
  if (dtype == DType::kDouble) return with_divergence<double, double, false>(a, f);
  with_divergence<float, float, false>(a, f);
#endif
}

}  // namespace

#define KDFAST_JOIN(a, b) a##b
#define KDFAST_EXPORT(isa) KDFAST_JOIN(row_kernels_, isa)
#define KDFAST_KERNEL(kernel)                                                \
  [](const LossArgs& a, auto... args) {                                      \
    with_spec(a, [&](auto p) { Kernels<decltype(p)>::kernel(a, args...); }); \
  }
const RowKernels& KDFAST_EXPORT(KDFAST_ISA)() {
  static const RowKernels kernels = {KDFAST_KERNEL(loss_grad), KDFAST_KERNEL(losses),
                                     KDFAST_KERNEL(sums),      KDFAST_KERNEL(pointwise_sums),
                                     KDFAST_KERNEL(merge),     KDFAST_KERNEL(losses_and_coefficients),
                                     KDFAST_KERNEL(grad),      softmax,
                                     softmax_backward};
  return kernels;
}

}  // namespace kdfast
