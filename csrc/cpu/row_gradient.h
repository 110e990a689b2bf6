// Passes B and C.
#pragma once

#include "row_loss.h"

namespace kdfast {
namespace {

template <class P>
struct Row {
  using S = typename P::S;
  using T = typename P::T;
  using C = typename P::C;
  const S* s;
  const T* t;
  S* out;           // where pass C writes a block
  void* final_out;  // where the row ends: from `out` on, unless the student was widened or capped
  Scratch<C> scratch;
  Block<P>* blocks;
};

// How a block's exps, which have other offsets, become probabilities.
template <class P>
KD_NOINLINE Scales<double> at_offsets(Scales<double> x, const RowScale& scale, const Block<P>& block) {
  const double of_hard = hard_offset<P>(scale, block.student_offset);
  if (block == Block<P>{x.student_offset, x.teacher_offset} && of_hard == x.hard_offset) return x;
  const double ds = block.student_offset - x.student_offset, dt = block.teacher_offset - x.teacher_offset;
  if (block.student_offset != x.student_offset) x.to_q = scaled(x.to_q, ds), x.log_to_q += ds;
  if (block.teacher_offset != x.teacher_offset) x.to_p = scaled(x.to_p, dt), x.log_to_p += dt;
  if ((typename P::C)of_hard != (typename P::C)x.hard_offset)  // which a table may have rounded
    x.to_q1 = scaled(x.to_q1, of_hard - x.hard_offset);
  return {
      block.student_offset, block.teacher_offset, of_hard, x.to_q, x.to_p, x.to_q1, x.log_to_q, x.log_to_p};
}

template <class C>
KD_INLINE PerExp<typename Types<C>::V> splat(const PerExp<double>& x) {
  const auto all = [](double number) { return splat<C>(number); };
  return {all(x.level), all(x.slope), all(x.teacher), all(x.soft),   all(x.center),
          all(x.to_q),  all(x.to_p),  all(x.hard),    all(x.uniform)};
}

// Pass C over one block, from the scratch (kKeep) or from the logits.
template <class P, bool kKeep>
struct Gradient {
  using S = typename P::S;
  using T = typename P::T;
  using C = typename P::C;
  using V = typename P::V;
  Exponents<P> exponents;
  PerExp<V> per;
  V mean, tilt;
  bool tilted = false;

  Gradient() = default;
  KD_INLINE Gradient(const RowScale& scale, const Coefficients<double>& c, const Scales<double>& x)
      : exponents(scale, x.student_offset, x.teacher_offset, x.hard_offset),
        per(splat<C>(per_exp<double>(c, x))),
        mean(splat<C>(c.mean)),
        tilt(splat<C>(c.tilt)),
        tilted(c.tilt != 0) {}

  KD_INLINE V combine(V s, V t, Scratch<C> kept, int i) const {
    Lanes<P> x = exponents(s, t);
    if constexpr (kKeep) {  // the logits are then read only where psi needs a logarithm
      x.es = load(kept.student + i);
      x.e1 = P::kOwn ? load(kept.hard + i) : exponents.power_of(x.es);
      if constexpr (P::kSoft || P::kMSE) x.et = load(kept.teacher + i);
    }
    return of_exps(x, s);
  }

  KD_INLINE V of_exps(const Lanes<P>& x, V s) const {
    V g = x.e1 * per.hard - per.uniform;
    if constexpr (P::kMSE) {
      g += (x.et - per.center) * per.soft;
    } else if constexpr (P::kPointwise) {
      g += (x.et - (x.es * per.to_q) * per.center) * per.soft;  // psi is in P's place
    } else if constexpr (P::kSoft) {
      V of_exp = per.level;
      if constexpr (P::D::kStudent) of_exp += per.slope * (x.es == 0 ? V{} : x.ys - x.yt);
      g += x.es * of_exp;
      if constexpr (P::D::kTeacher) g -= x.et * per.teacher;
    }
    if (opaque(tilted)) g += tilt * (s - mean);
    return g;
  }

  // sum g * (s - mean) over a block
  KD_NOINLINE double dot(const S* s, const T* t, Scratch<C> kept, int n) const {
    V part[2] = {}, total{};
    for (int i = 0; i < n; i += P::kStep) {
      const int m = n - i < P::kStep ? n - i : P::kStep;
      const auto si = load_student<P>(s + i, m);
      const auto ti = load_teacher<P>(t + i, m);
      V more[2] = {combine(si.a, ti.a, kept, i) * (si.a - mean),
                   combine(si.b, ti.b, kept, i + P::kLanes) * (si.b - mean)};
      if (m < P::kStep) {
        for (int j = 0; j < P::kLanes; ++j) {
          const bool halves = std::is_same_v<S, bf16>;  // even and odd places
          if ((halves ? 2 * j : j) >= m) more[0][j] = 0;
          if ((halves ? 2 * j + 1 : j + P::kLanes) >= m) more[1][j] = 0;
        }
      }
      part[0] += more[0];
      part[1] += more[1];
      if (i / P::kStep % 8 == 7) {
        total += part[0] + part[1];
        part[0] = part[1] = V{};
      }
    }
    return sum(total + (part[0] + part[1]));
  }

  KD_NOINLINE void write(const S* s, const T* t, Scratch<C> kept, int n, S* out) const {
    for (int i = 0; i < n; i += P::kStep) {
      const int m = n - i < P::kStep ? n - i : P::kStep;
      const auto si = load_student<P>(s + i, m);
      const auto ti = load_teacher<P>(t + i, m);
      const Two<V> g{combine(si.a, ti.a, kept, i), combine(si.b, ti.b, kept, i + P::kLanes)};
      if (m == P::kStep) {
        store2(out + i, g);
      } else {
        store2_part(out + i, g, m);
      }
    }
  }
};

// Pass B over vectors of exps: adds each lane's phi and psi, and leaves psi in P's place.
template <class C, class D>
KD_NOINLINE void add_pointwise(const C* es, C* et, int vectors, typename Types<C>::V to_q,
                               typename Types<C>::V to_p, typename Types<C>::V beta,
                               typename Types<C>::V& phi, typename Types<C>::V& psi) {
  using V = typename Types<C>::V;
  V phi_part{}, psi_part{};  // two levels, as in block_sums
  for (int i = 0; i < vectors; ++i) {
    C* at = et + i * Types<C>::kLanes;
    const V p = load(at) * to_p, q = load(es + i * Types<C>::kLanes) * to_q, each = D::psi(p, q, beta);
    phi_part += D::phi(p, q, beta);
    psi_part += each;
    store(at, each);
    if (i % 16 == 15) {
      phi += phi_part;
      psi += psi_part;
      phi_part = psi_part = V{};
    }
  }
  phi += phi_part;
  psi += psi_part;
}

// f of the divergence's struct, where it has a pass of its own.
template <class F>
void with_pointwise(const LossArgs& a, F f) {
  with_divergence_named(a, [&](auto d) {
    if constexpr (decltype(d)::kPointwise) f(d);
  });
}

// Pass B over a block whose exps are in the scratch.
template <class P>
KD_INLINE void add_block(const LossArgs& a, Scratch<typename P::C> kept, int64_t n, const Scales<double>& x,
                         typename P::V& phi, typename P::V& psi) {
  using C = typename P::C;
  const int vectors = (n + P::kStep - 1) / P::kStep * 2;
  with_pointwise(a, [&](auto d) {
    add_pointwise<C, decltype(d)>(kept.student, kept.teacher, vectors, splat<C>(x.to_q), splat<C>(x.to_p),
                                  splat<C>(a.beta), phi, psi);
  });
}

// Where no sums of the row are taken there is no scratch: fills it for a block, with psi in P's place.
template <class P>
KD_NOINLINE void keep_psi(const LossArgs& a, const Row<P>& r, int64_t begin, int n, const RowScale& scale,
                          const Scales<double>& x, typename P::V& phi, typename P::V& psi) {
  block_sums<P, true>(r.s + begin, r.t + begin, n, scale, x.student_offset, x.teacher_offset, r.scratch,
                      true);
  add_block<P>(a, r.scratch, n, x, phi, psi);
}

// How exps become probabilities before the coefficients are known.
KD_INLINE Scales<double> scales_of(const LossArgs& a, const Sums<double>& x) {
  Coefficients<double> c{x.student_offset, x.student_total, x.teacher_offset,
                         x.teacher_total,  x.hard_offset,   1};
  if (!teacher_is_softmaxed(a)) c.teacher_total = std::exp2(-x.teacher_offset);
  return scales_with(c, 0., 0.);
}

// Pass B over a row of n classes, from the scratch.
template <class P>
void add_pointwise_sums(const LossArgs& a, const Row<P>& r, int64_t n, const RowScale& scale,
                        Sums<double>& sums) {
  if constexpr (P::kPointwise) {
    const Scales<double> x = scales_of(a, sums);
    typename P::V phi{}, psi{};
    for (int64_t at = 0; at < n; at += kBlock) {
      const Scales<double> here = at_offsets<P>(x, scale, r.blocks[at / kBlock]);
      add_block<P>(a, r.scratch.after(at), n - at < kBlock ? n - at : kBlock, here, phi, psi);
    }
    sums.phi = sum(phi);
    sums.psi = sum(psi);
  }
}

}  // namespace
}  // namespace kdfast
