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

// A row's coefficients for the exps of a block that has other offsets.
template <class P>
KD_NOINLINE Coefficients at_offsets(Coefficients c, const RowScale& scale, const Block<P>& block) {
  const double ds = block.student_offset - c.student_offset, dt = block.teacher_offset - c.teacher_offset;
  c.teacher_offset = block.teacher_offset;
  c.log_student += ds;
  c.log_teacher += dt;
  if constexpr (!P::kMSE) c.teacher = scaled(c.teacher, dt);
  if (ds == 0) return c;
  c.student = scaled(c.student, ds);
  c.hard = scaled(c.hard, ds == -kInfinity ? ds
                                           : hard_offset<P>(scale, block.student_offset) -
                                                 hard_offset<P>(scale, c.student_offset));
  c.student_offset = block.student_offset;
  return c;
}

// Pass C over one block, from the scratch (kKeep) or from the logits.
template <class P, bool kKeep>
struct Gradient {
  using S = typename P::S;
  using T = typename P::T;
  using C = typename P::C;
  using V = typename P::V;
  Exponents<P> exponents;
  V student, teacher, psi_sum, soft, hard, uniform, shift;
  V mean, tilt;
  bool tilted = false;

  Gradient() = default;
  KD_INLINE Gradient(const RowScale& scale, const Coefficients& c)
      : exponents(scale, c.student_offset, c.teacher_offset),
        student(splat<C>(c.student)),
        teacher(splat<C>(c.teacher)),
        psi_sum(splat<C>(c.psi_sum)),
        soft(splat<C>(c.soft)),
        hard(splat<C>(c.hard)),
        uniform(splat<C>(c.uniform)),
        shift(splat<C>(c.shift)),
        mean(splat<C>(c.mean)),
        tilt(splat<C>(c.tilt)),
        tilted(c.tilt != 0) {
    if constexpr (P::kSoft && !P::kPointwise) linear(scale.beta, c);
  }

  // psi less q * psi_sum is es * (student * log2(es / et) + psi_sum) - et * teacher
  KD_INLINE void linear(double beta, const Coefficients& c) {
    double level = -c.student * c.psi_sum;
    if constexpr (P::D::kStudent) {
      const double share = c.student * P::D::student_share(beta);
      if (share != 0) level += share * kLn2 * (c.log_student - c.log_teacher);  // else there are no exps
      student = splat<C>(share * kLn2);
    }
    if constexpr (P::D::kTeacher) teacher = splat<C>(c.teacher * P::D::teacher_share(beta));
    psi_sum = splat<C>(level);
  }

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
    V g = x.e1 * hard - uniform;
    if constexpr (P::kMSE) {
      g += (x.et + shift) * teacher;
    } else if constexpr (P::kPointwise) {
      g += (x.et - (x.es * student) * psi_sum) * soft;  // psi is in P's place
    } else if constexpr (P::kSoft) {
      V per_exp = psi_sum;
      if constexpr (P::D::kStudent) per_exp += student * (x.es == 0 ? V{} : x.ys - x.yt);
      g += x.es * per_exp;
      if constexpr (P::D::kTeacher) g -= x.et * teacher;
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

// f of the divergence's struct.
template <class F>
void with_pointwise(const LossArgs& a, F f) {
  switch (a.divergence) {
#define X(name, Type)                          \
  case Divergence::k##Type:                    \
    if constexpr (Type::kPointwise) f(Type{}); \
    return;
    KDFAST_DIVERGENCES
#undef X
    case Divergence::kNone:
      return;
  }
}

// Pass C alone has no scratch: fills it for a block, with psi in P's place.
template <class P>
KD_NOINLINE void keep_psi(const LossArgs& a, const Row<P>& r, int64_t begin, int n, const RowScale& scale,
                          const Coefficients& c) {
  using C = typename P::C;
  block_sums<P, true>(r.s + begin, r.t + begin, n, scale, c.student_offset, c.teacher_offset, r.scratch,
                      true);
  with_pointwise(a, [&](auto d) {
    typename P::V phi{}, psi{};
    add_pointwise<C, decltype(d)>(r.scratch.student, r.scratch.teacher, (n + P::kStep - 1) / P::kStep * 2,
                                  splat<C>(c.student), splat<C>(c.teacher), splat<C>(a.beta), phi, psi);
  });
}

// Pass B over a row of n classes, from the scratch.
template <class P>
DivergenceSums pointwise_sums(const LossArgs& a, const Row<P>& r, int64_t n, const RowScale& scale,
                              const RowStats& stats) {
  DivergenceSums sums{};
  if constexpr (P::kPointwise) {
    using C = typename P::C;
    const Teacher teacher = teacher_of<P::kProbs>(a, stats);
    Coefficients c{stats.student_offset, stats.teacher_offset};
    c.student = 1 / stats.student_sum;
    c.teacher = 1 / teacher.sum;
    with_pointwise(a, [&](auto d) {
      using D = decltype(d);
      typename P::V phi{}, psi{};
      for (int64_t at = 0; at < n; at += kBlock) {
        const Coefficients here = at_offsets<P>(c, scale, r.blocks[at / kBlock]);
        const Scratch<C> block = r.scratch.after(at);
        const int64_t vectors = ((n - at < kBlock ? n - at : kBlock) + P::kStep - 1) / P::kStep * 2;
        add_pointwise<C, D>(block.student, block.teacher, vectors, splat<C>(here.student),
                            splat<C>(here.teacher), splat<C>(a.beta), phi, psi);
      }
      sums = {sum(phi) + D::constant(teacher.mass, a.beta), sum(psi) + 0 * sum(phi)};  // NaN where D is
    });
  }
  return sums;
}

}  // namespace
}  // namespace kdfast
