// Pass B: phi and psi of the divergences that are not linear, over p and q, from the exps in the scratch. It
// leaves psi in P's place.
#pragma once

#include "row.h"
#include "row_sums.h"

namespace kdfast {
namespace {

// Adds each lane's phi and psi of vectors of exps.
template <class C, class D>
KD_NOINLINE void add_phi_and_psi(const C* es, C* et, int vectors, typename Types<C>::V to_q,
                                 typename Types<C>::V to_p, double beta_, typename Types<C>::V& phi,
                                 typename Types<C>::V& psi) {
  using V = typename Types<C>::V;
  const V beta = splat<C>(beta_), rest = splat<C>(1 - beta_);
  V phi_part{}, psi_part{};  // two levels, as in block_sums
  for (int i = 0; i < vectors; ++i) {
    C* at = et + i * Types<C>::kLanes;
    const V p = load(at) * to_p, q = load(es + i * Types<C>::kLanes) * to_q, each = D::psi(p, q, beta, rest);
    phi_part += D::phi(p, q, beta, rest);
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
void dispatch_pointwise(const LossArgs& a, F f) {
  dispatch_divergence(a.divergence, [&](auto d) {
    if constexpr (decltype(d)::kPointwise) f(d);
  });
}

template <class P>
KD_INLINE void add_block_phi_and_psi(const LossArgs& a, Scratch<typename P::C> scratch, int64_t n,
                                     const Scales<double>& x, typename P::V& phi, typename P::V& psi) {
  using C = typename P::C;
  const int vectors = (n + P::kStep - 1) / P::kStep * 2;
  dispatch_pointwise(a, [&](auto d) {
    add_phi_and_psi<C, decltype(d)>(scratch.student, scratch.teacher, vectors, splat<C>(x.to_q),
                                    splat<C>(x.to_p), a.beta, phi, psi);
  });
}

// The same where pass A has left no scratch: fills it for a block.
template <class P>
KD_NOINLINE void refill_block_psi(const LossArgs& a, const RowOf<P>& r, int64_t begin, int n,
                                  const RowScale& scale, const Scales<double>& x, typename P::V& phi,
                                  typename P::V& psi) {
  Sums<double> known;
  block_sums<P, true>(r.s + begin, r.t + begin, n, scale, x.student_offset, x.teacher_offset, r.scratch, true,
                      known);
  add_block_phi_and_psi<P>(a, r.scratch, n, x, phi, psi);
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
    typename P::V phi{}, psi{};
    for (int64_t at = 0; at < n; at += kBlock) {
      const int m = n - at < kBlock ? n - at : kBlock;
      if constexpr (kScratch) {
        const Scales<double>& block = block_scales(x, scale, r.blocks[at / kBlock], moved);
        add_block_phi_and_psi<P>(a, r.scratch + at, m, block, phi, psi);
      } else {
        refill_block_psi<P>(a, r, at, m, scale, x, phi, psi);
      }
    }
    sums.phi = sum(phi);
    sums.psi = sum(psi);
  }
}

}  // namespace
}  // namespace kdfast
