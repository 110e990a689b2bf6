// Pass C: the gradient of a row.
#pragma once

#include "pointwise_sums.h"
#include "row_loss.h"

namespace kdfast {
namespace {

template <class C>
KD_INLINE PerExp<typename Types<C>::V> splat(const PerExp<double>& x) {
  const auto lanes = [](double number) { return splat<C>(number); };
  return {lanes(x.level), lanes(x.slope), lanes(x.teacher), lanes(x.soft),   lanes(x.center),
          lanes(x.to_q),  lanes(x.to_p),  lanes(x.hard),    lanes(x.uniform)};
}

// Pass C over one block, from the scratch (kKeep) or from the logits.
template <class P, bool kKeep, bool kFused = kFuses<typename P::C>>
struct Gradient {
  using S = typename P::S;
  using T = typename P::T;
  using C = typename P::C;
  using V = typename P::V;
  Exponents<P, kFused> exponents;
  PerExp<V> factors;
  V mean, tilt;
  bool is_tilted = false;

  Gradient() = default;
  KD_NOINLINE Gradient(const RowScale& scale, const Coefficients<double>& c, const Scales<double>& x)
      : exponents(scale, x.student_offset, x.teacher_offset),
        factors(splat<C>(per_exp<double>(c, x))),
        mean(splat<C>(c.mean)),
        tilt(splat<C>(c.tilt)),
        is_tilted(c.tilt != 0) {}

  // kOnlySoft: of the soft term.
  template <int kPower = 0, bool kOnlySoft = false>
  KD_INLINE V gradient_of_exps(const Lanes<P>& x, V s) const {
    V factor{}, rest = factors.uniform;  // the gradient is es * factor - rest
    if constexpr (kOnlySoft) {
      rest = V{};
    } else if constexpr (P::kOwn) {
      rest -= x.e1 * factors.hard;
    } else {
      factor = exponents.template times_power<kPower>(factors.hard, x.es);
    }
    if constexpr (P::kMSE) {
      rest -= (x.et - factors.center) * factors.soft;
    } else if constexpr (P::kPointwise) {
      rest -= (x.et - (x.es * factors.to_q) * factors.center) * factors.soft;  // which psi is
    } else if constexpr (P::kSoft || P::D::kOthers) {
      factor += factors.level;
      if constexpr (P::D::kStudent) factor += factors.slope * (x.es == 0 ? V{} : x.ys - x.yt);
      if constexpr (P::D::kTeacher) rest += x.et * factors.teacher;
    }
    V g = x.es * factor - rest;
    if constexpr (!kOnlySoft && (P::kOwn || P::kMSE)) {  // standardized; other logits need not be read
      if (hide_from_optimizer(is_tilted)) g += tilt * (s - mean);
    }
    return g;
  }

  // i: where the scratch has these classes.
  template <int kPower = 0, bool kOnlySoft = false>
  KD_INLINE V gradient(V s, V t, Scratch<C> scratch, int i) const {
    Lanes<P> x = exponents(s, t);
    if constexpr (kKeep) {  // the logits are then read only where psi needs a logarithm
      x.es = load(scratch.student + i);
      if constexpr (P::kOwn) x.e1 = load(scratch.hard + i);
      if constexpr (P::kReadsTeacher) x.et = load((P::kPointwise ? scratch.psi : scratch.teacher) + i);
    }
    return gradient_of_exps<kPower, kOnlySoft>(x, s);
  }

  // Of the i-th class of a block, the label. Its own term is subtracted before the rounding.
  KD_NOINLINE C label_gradient(const S* s, const T* t, Scratch<C> scratch, int i,
                               const Coefficients<double>& c, bool decoupled) const {
    const auto si = load_student<P>(s + i, 1);
    const auto ti = load_teacher<P>(t + i, 1);
    if (decoupled)  // the sums have none of the label's exps
      return gradient_of_exps(Lanes<P>{}, si.a)[0] + (C)c.at_label;
    constexpr bool kPairs = std::is_same_v<S, bf16>;  // even and odd classes are in vectors of their own
    const int at = kPairs ? i / P::kStep * P::kStep + i % 2 * P::kLanes + i % P::kStep / 2 : i;
    return gradient(si.a, ti.a, scratch, at)[0] - (C)c.label;
  }

  // sum g * (s - mean) over a block, g of the soft term
  KD_NOINLINE double dot(const S* s, const T* t, Scratch<C> scratch, int n) const {
    V part[2] = {}, total{};
    for (int i = 0; i < n; i += P::kStep) {
      const int m = n - i < P::kStep ? n - i : P::kStep;
      const auto si = load_student<P>(s + i, m);
      const auto ti = load_teacher<P>(t + i, m);
      V more[2] = {gradient<0, true>(si.a, ti.a, scratch, i) * (si.a - mean),
                   gradient<0, true>(si.b, ti.b, scratch, i + P::kLanes) * (si.b - mean)};
      if (m < P::kStep) zero_tail<P>(more[0], more[1], m);
      part[0] += more[0];
      part[1] += more[1];
      if (i / P::kStep % 8 == 7) {
        total += part[0] + part[1];
        part[0] = part[1] = V{};
      }
    }
    return sum(total + (part[0] + part[1]));
  }

  // next: where a later row's gradient will be written, of which as many lines are fetched; or null.
  KD_NOINLINE void write(const S* s, const T* t, Scratch<C> scratch, int n, S* out, const S* next) const {
    const Gradient self = *this;  // which `out` could not be for all that the compiler knows
    dispatch_power<P>(exponents.power, [&](auto power) __attribute__((always_inline)) {
      for (int i = 0; i < n; i += P::kStep) {
        if constexpr (!kKeep) {  // of the block before, which is the next
          prefetch(s + i - 2 * kBlock, false);
          if constexpr (P::kReadsTeacher) prefetch(t + i - 2 * kBlock, false);
        } else if (next) {
          for (int j = i; j < i + P::kStep; j += 64 / (int)sizeof(S)) __builtin_prefetch(next + j, 1, 2);
        }
        const int m = n - i < P::kStep ? n - i : P::kStep;
        const auto si = load_student<P>(s + i, m);
        const auto ti = load_teacher<P>(t + i, m);
        const Two<V> g{self.template gradient<power()>(si.a, ti.a, scratch, i),
                       self.template gradient<power()>(si.b, ti.b, scratch, i + P::kLanes)};
        if (m == P::kStep) {
          store2(out + i, g);
        } else {
          store2_part(out + i, g, m);
        }
      }
    });
  }
};

// The soft term's gradient at a fixed deviation, times s - mean, summed over a row: what the tilt is made of.
template <class P>
KD_NOINLINE double soft_gradient_dot(const LossArgs& a, const RowOf<P>& r, int64_t n, const RowScale& scale,
                                     Coefficients<double> c) {
  c.hard = c.uniform = c.tilt = 0;
  const Scales<double> x = scales_of(c);
  Scales<double> moved;
  const Scales<double>* scales = nullptr;
  Block current{NAN, NAN};
  Gradient<P, true> gradient;
  double total = 0;
  for (int64_t at = 0; at < n; at += kBlock) {
    const Block& block = r.blocks[at / kBlock];
    if (!(block == current)) {
      current = block;
      scales = &block_scales(x, scale, current, moved);
      gradient = Gradient<P, true>(scale, c, *scales);
    }
    const int m = n - at < kBlock ? n - at : kBlock;
    choose_block_psi<P>(a, r.scratch + at, m, *scales, c);
    total += gradient.dot(r.s + at, r.t + at, r.scratch + at, m);
  }
  return total;
}

// Pass C over n classes from `begin` of a row. The label's class is written last.
template <class P, bool kKeep>
void write_gradient(const LossArgs& a, int64_t row, const RowOf<P>& r, int64_t begin, int64_t n,
                    const RowScale& scale, const Coefficients<double>& c, const Scales<double>& row_scales) {
  using C = typename P::C;
  const bool direct = (const void*)r.out == r.final_out;
  const bool decoupled = a.divergence == Divergence::kDKD;
  const int64_t label = a.labels && (a.hard_weight != 0 || decoupled) ? a.labels[row] - begin : -1;
  Block current;
  if constexpr (kKeep) {
    current = r.blocks[(n - 1) / kBlock];
  } else {
    current = representable_block<P>(c.student_offset, c.teacher_offset, scale);
  }
  Scales<double> moved;
  const Scales<double>* scales = &block_scales(row_scales, scale, current, moved);
  Gradient<P, kKeep || P::kPointwise> gradient(scale, c, *scales);
  // Writing a row of one block takes less time than fetching its lines from memory: those of two rows later
  // are fetched meanwhile. The rows of a gradient that is not in place are `width` apart. (One row later, or
  // all lines before the row, was slower.)
  const bool fetches = kKeep && n <= kBlock && direct && (const void*)r.out != (const void*)r.s;
  // From the last block to the first: what was written last is still in the cache, where not all of it fits
  for (int64_t at = (n - 1) / kBlock * kBlock; at >= 0; at -= kBlock) {
    if constexpr (kKeep) {
      const Block& block = r.blocks[at / kBlock];
      if (!(block == current)) {
        current = block;
        scales = &block_scales(row_scales, scale, current, moved);
        gradient = Gradient<P, kKeep>(scale, c, *scales);
      }
    }
    const int m = n - at < kBlock ? n - at : kBlock;
    const Scratch<C> scratch = kKeep ? r.scratch + at : r.scratch;
    if constexpr (P::kPointwise && !kKeep) {
      PointwiseSums<typename P::V> known{};
      refill_block_psi<P>(a, r, at, m, scale, *scales, known);
    }
    choose_block_psi<P>(a, scratch, m, *scales, c);
    typename P::S* out = direct ? r.out + at : r.out;
    const bool labelled = at <= label && label < at + m;
    C at_label = 0;
    if (labelled)  // before the logits are overwritten
      at_label = gradient.label_gradient(r.s + at, r.t + at, scratch, label - at, c, decoupled);
    gradient.write(r.s + at, r.t + at, scratch, m, out, fetches ? out + 2 * a.width : nullptr);
    if (labelled) store_part(out + label - at, splat(at_label), 1);
    if constexpr (std::is_same_v<typename P::S, C>) {
      if (direct) continue;
      void* to = (char*)r.final_out + at * bytes_of(a.student.dtype);
      if (a.softcap != 0) {
        uncap_gradient(out, r.s + at, m, a.softcap, to, a.student.dtype);
      } else {
        narrow(out, m, to, a.student.dtype);
      }
    }
  }
}

}  // namespace
}  // namespace kdfast
