// Pass B: phi and psi of the divergences that are not linear, over p and q, from the exps in the scratch. It
// leaves psi there, which is in P's place unless the divergence has two of them.
#pragma once

#include "row.h"
#include "row_sums.h"

namespace kdfast {
namespace {

template <class V>
struct PointwiseSums {  // each lane's
  V phi, psi, psi_apart;
};

// Adds phi and psi of vectors of exps.
template <class C, class D, class V>
KD_NOINLINE void add_phi_and_psi(Scratch<C> scratch, int vectors, V to_q, V to_p, double beta_,
                                 PointwiseSums<V>& total) {
  const V beta = splat<C>(beta_), rest = splat<C>(1 - beta_);
  PointwiseSums<V> part{};  // two levels, as in block_sums
  const auto flush = [&]() __attribute__((always_inline)) {
    total.phi += part.phi;
    total.psi += part.psi;
    if constexpr (D::kHasPsiApart) total.psi_apart += part.psi_apart;
    part = PointwiseSums<V>{};
  };
  for (int i = 0; i < vectors; ++i) {
    const Scratch<C> at = scratch + i * Types<C>::kLanes;
    const V p = load(at.teacher) * to_p, q = load(at.student) * to_q, psi = D::psi(p, q, beta, rest);
    part.phi += D::phi(p, q, beta, rest);
    part.psi += psi;
    if constexpr (D::kHasPsiApart) part.psi_apart += D::psi_apart(p, q, beta, rest);
    store(at.psi, psi);
    if (i % 16 == 15) flush();
  }
  flush();
}

// The other psi, where the lanes of `apart` are not 0.
template <class C, class D, class V>
KD_NOINLINE void store_psi_apart(Scratch<C> scratch, int vectors, V to_q, V to_p, double beta_, V apart) {
  const V beta = splat<C>(beta_), rest = splat<C>(1 - beta_);
  for (int i = 0; i < vectors; ++i) {
    const Scratch<C> at = scratch + i * Types<C>::kLanes;
    const V p = load(at.teacher) * to_p, q = load(at.student) * to_q;
    store(at.psi, apart != 0 ? D::psi_apart(p, q, beta, rest) : load(at.psi));
  }
}

// f of the divergence's struct, where it has a pass of its own.
template <class F>
void dispatch_pointwise(const LossArgs& a, F f) {
  dispatch_divergence(a.divergence, [&](auto d) {
    if constexpr (decltype(d)::kPointwise) f(d);
  });
}

// f of the divergence's struct, where the coefficients ask for its other psi.
template <class F>
void dispatch_apart(const LossArgs& a, F f) {
  dispatch_pointwise(a, [&](auto d) {
    if constexpr (decltype(d)::kHasPsiApart) f(d);
  });
}

template <class P>
KD_INLINE int vectors_of(int64_t n) {
  return (n + P::kStep - 1) / P::kStep * 2;
}

template <class P>
KD_INLINE void add_block_phi_and_psi(const LossArgs& a, Scratch<typename P::C> scratch, int64_t n,
                                     const Scales<double>& x, PointwiseSums<typename P::V>& sums) {
  using C = typename P::C;
  dispatch_pointwise(a, [&](auto d) {
    add_phi_and_psi<C, decltype(d)>(scratch, vectors_of<P>(n), splat<C>(x.to_q), splat<C>(x.to_p), a.beta,
                                    sums);
  });
}

// The same where pass A has left no scratch: fills it for a block.
template <class P>
KD_NOINLINE void refill_block_psi(const LossArgs& a, const RowOf<P>& r, int64_t begin, int n,
                                  const RowScale& scale, const Scales<double>& x,
                                  PointwiseSums<typename P::V>& sums) {
  Sums<double> known;
  block_sums<P, true>(r.s + begin, r.t + begin, n, scale, x.student_offset, x.teacher_offset, r.scratch, true,
                      known);
  add_block_phi_and_psi<P>(a, r.scratch, n, x, sums);
}

// Pass C's choice of psi for a block, once the row's sums are known.
template <class P>
KD_INLINE void choose_block_psi(const LossArgs& a, Scratch<typename P::C> scratch, int64_t n,
                                const Scales<double>& x, const Coefficients<double>& c) {
  using C = typename P::C;
  if constexpr (P::kPointwise) {
    if (c.slope == 0) return;
    dispatch_apart(a, [&](auto d) {
      store_psi_apart<C, decltype(d)>(scratch, vectors_of<P>(n), splat<C>(x.to_q), splat<C>(x.to_p), a.beta,
                                      splat<C>(1));
    });
  }
}

// How exps become probabilities before the coefficients are known.
KD_INLINE Scales<double> scales_of(const LossArgs& a, const Sums<double>& x) {
  Coefficients<double> c{x.student_offset, x.student_total, x.teacher_offset, x.teacher_total, 1};
  if (!teacher_is_softmaxed(a)) c.teacher_total = 1;
  return scales_with(c, 0., 0.);
}

// Over a row of n classes. kScratch: which is in the scratch.
template <class P, bool kScratch>
void add_pointwise_sums(const LossArgs& a, const RowOf<P>& r, int64_t n, const RowScale& scale,
                        Sums<double>& sums) {
  if constexpr (P::kPointwise) {
    const Scales<double> of_row = scales_of(a, sums);
    Scales<double> moved;
    const Block first = representable_block<P>(of_row.student_offset, of_row.teacher_offset, scale);
    const Scales<double>& x = kScratch ? of_row : block_scales(of_row, scale, first, moved);
    PointwiseSums<typename P::V> found{};
    for (int64_t at = 0; at < n; at += kBlock) {
      const int m = n - at < kBlock ? n - at : kBlock;
      if constexpr (kScratch) {
        const Scales<double>& block = block_scales(x, scale, r.blocks[at / kBlock], moved);
        add_block_phi_and_psi<P>(a, r.scratch + at, m, block, found);
      } else {
        refill_block_psi<P>(a, r, at, m, scale, x, found);
      }
    }
    sums.phi = sum(found.phi);
    sums.psi = sum(found.psi);
    sums.over_student = sum(found.psi_apart);
  }
}

}  // namespace
}  // namespace kdfast
