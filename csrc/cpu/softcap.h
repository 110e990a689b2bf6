// Softcaps: of logits, while their row is widened, and in the gradient, while it is narrowed.
#pragma once

#include "convert.h"

namespace kdfast {
namespace {

// cap * tanh(scale * z / cap); a masked class stays masked.
template <class C>
struct Softcap {
  using V = typename Types<C>::V;
  static constexpr double kMasked = -std::numeric_limits<double>::infinity();
  const double scale, cap;
  Softcap(double scale_, double cap_) : scale(scale_), cap(cap_) {}
  KD_INLINE V operator()(V z) const {
    for (int i = 0; i < Types<C>::kLanes; ++i)
      z[i] = z[i] == kMasked ? kMasked : cap * std::tanh(scale * z[i] / cap);
    return z;
  }
};
template <>
struct Softcap<float> {
  static constexpr int kTerms = 7;
  static constexpr float kSmall = 0.81f;  // of x^2
  FloatV cap, inverse, ratio[kTerms];     // tanh(x) / x times scale, in powers of x^2
  Softcap(double scale, double cap_) : cap(splat((float)cap_)), inverse(splat((float)(scale / cap_))) {
    // minimax in the relative error, 1.6e-8
    const float ratios[kTerms] = {1,
                                  -0x1.555504p-2f,
                                  0x1.11017ap-3f,
                                  -0x1.b81622p-5f,
                                  0x1.567e5ap-6f,
                                  -0x1.c19542p-8f,
                                  0x1.55d486p-10f};
    for (int k = 0; k < kTerms; ++k) ratio[k] = splat((float)(scale * ratios[k]));
  }
  KD_INLINE FloatV operator()(FloatV z) const {
    const FloatV x = z * inverse, square = x * x;
    FloatV p = ratio[kTerms - 1];
#pragma GCC unroll 8
    for (int k = kTerms - 2; k >= 0; --k) p = p * square + ratio[k];
    const FloatV small = z * p;
    if (__builtin_expect(!any_above(square, splat(kSmall)), 1)) return small;  // most vectors
    using I = Types<float>::I;
    const FloatV masked = splat(-std::numeric_limits<float>::infinity());
    const I sign = bits<I>(x) & (int)0x80000000;
    const FloatV size = bits<FloatV>(bits<I>(x) ^ sign);
    const FloatV large = 1 - 2 / (1 + exp2(size * 0x1.715476p+1f));
    const FloatV y = square <= kSmall ? small : cap * bits<FloatV>(bits<I>(large) | sign);
    return z == masked ? masked : y;
  }
};

// A row's logits, capped, as C. next: the row that is read after it, which is fetched meanwhile, or null.
template <class C>
KD_NOINLINE void softcap_row(const void* from, DType dtype, int64_t n, double scale, double cap, C* to,
                             const void* next) {
  using V = typename Types<C>::V;
  dispatch_storage(dtype, [&](auto s) {
    using S = decltype(s);
    const Softcap<C> softcap(scale, cap);
    const S* fetched = (const S*)(next ? next : from);
    const auto capped = [&](V z, int64_t i) __attribute__((always_inline)) {
      __builtin_prefetch(fetched + i, 0, 2);
      return softcap(z);
    };
    if constexpr (std::is_same_v<Compute<S>, C>) {
      convert_row((const S*)from, n, to, capped);
    } else {
      convert_row((const S*)from, n, to);
      for_vectors(to, n, capped);
    }
  });
}

// A gradient in the capped logits as one in the logits, times 1 - tanh^2: as it is narrowed.
template <class C>
KD_NOINLINE void uncap_gradient(C* g, const C* capped, int64_t n, double cap, void* to, DType dtype) {
  using V = typename Types<C>::V;
  dispatch_storage(dtype, [&](auto s) {
    using S = decltype(s);
    const V inverse = splat((C)(1 / cap)), lowest = splat((C)-1);
    const auto uncapped = [&](V v, int64_t i) __attribute__((always_inline)) {
      const V x = max(lowest, load(capped + i) * inverse);  // -1 of a masked class
      return v * (1 - x * x);
    };
    if constexpr (std::is_same_v<Compute<S>, C>) {
      convert_row(g, n, (S*)to, uncapped);
    } else {
      for_vectors(g, n, uncapped);
      convert_row(g, n, (S*)to);
    }
  });
}

}  // namespace
}  // namespace kdfast
