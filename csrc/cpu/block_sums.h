// Pass A over one block of a row's classes, which are in L1; and a block's maximum, sum, and first class of a
// value.
#pragma once

#include "exponents.h"

namespace kdfast {
namespace {

// A step's logits; those that a short step lacks are classes of probability 0.
template <class S>
KD_INLINE S filler(bool zero) {
  if constexpr (std::is_same_v<S, bf16>)
    return S{(uint16_t)(zero ? 0 : 0xff80)};
  else
    return zero ? 0 : -std::numeric_limits<S>::infinity();
}
template <class P>
KD_INLINE auto load_student(const typename P::S* s, int n) {
  return __builtin_expect(n == P::kStep, 1) ? load2(s) : load2_part(s, n, filler<typename P::S>(P::kMSE));
}
template <class P>
KD_INLINE auto load_teacher(const typename P::T* t, int n) {
  if constexpr (!P::kReadsTeacher) {
    return Two<typename P::V>{};
  } else {
    return __builtin_expect(n == P::kStep, 1) ? load2(t)
                                              : load2_part(t, n, filler<typename P::T>(P::kProbs || P::kMSE));
  }
}

// Sets the lanes of a short step's vectors to 0 that are beyond its n classes.
template <class P>
KD_INLINE void zero_tail(typename P::V& a, typename P::V& b, int n) {
  constexpr bool kPairs = std::is_same_v<typename P::S, bf16>;  // even and odd places
  typename Types<typename P::C>::I at_a, at_b;
  for (int j = 0; j < P::kLanes; ++j) {
    at_a[j] = kPairs ? 2 * j : j;
    at_b[j] = kPairs ? 2 * j + 1 : j + P::kLanes;
  }
  a = at_a < n ? a : typename P::V{};
  b = at_b < n ? b : typename P::V{};
}

// Prefetches a later step. Measured on Zen 4: fp32 rows that fit into L2 with their scratch are
// best fetched into L2 a block ahead, 16-bit and longer ones into L1 half a block ahead (each against the
// other choice: fp32 at V = 32000 takes 0.85 of the time, bf16 0.92, both at V = 151936 0.9).
template <class S>
KD_INLINE void prefetch(const S* p, bool near) {
  for (int line = 0; line < 2 * Types<Compute<S>>::kLanes * (int)sizeof(S); line += 64) {
    if (near) {
      __builtin_prefetch((const char*)(p + kBlock / 2) + line, 0, 3);
    } else {
      __builtin_prefetch((const char*)(p + kBlock) + line, 0, 2);
    }
  }
}

// A copy of a block without some of its classes.
template <class X>
KD_NOINLINE const X* copy_without(const X* x, int n, const int32_t* places, int count, bool probs) {
  static thread_local X copies[2][kBlock];
  static thread_local int next = 0;  // student and teacher may be of one type
  X* copy = copies[next ^= 1];
  std::memcpy((void*)copy, x, n * sizeof(X));
  for (int k = 0; k < count; ++k) copy[places[k]] = filler<X>(probs);
  return copy;
}

// A block without some of its classes: steps that hold one are read from a copy. The next block's is another.
template <class P>
struct Patches {
  using S = typename P::S;
  S* copy;          // (kBlock)
  bool* is_copied;  // (kBlock / kStep), false between blocks

  KD_INLINE const S* of_step(const S* s, int i) const { return is_copied[i / P::kStep] ? copy : s; }
  void set(const S* s, int n, const int32_t* places, int count) const {
    for (int k = 0; k < count; ++k) {
      const int step = places[k] / P::kStep, at = step * P::kStep;
      if (!is_copied[step]) {
        if (n - at >= P::kStep) {  // of a size that is known
          std::memcpy((void*)(copy + at), s + at, P::kStep * sizeof(S));
        } else {
          std::memcpy((void*)(copy + at), s + at, (n - at) * sizeof(S));
        }
      }
      is_copied[step] = true;
      copy[places[k]] = filler<S>(false);
    }
  }
  void unset(const int32_t* places, int count) const {
    for (int k = 0; k < count; ++k) is_copied[places[k] / P::kStep] = false;
  }
};

// Numbers of which masked(p, x) is p * x.
template <class V>
struct Unguarded {
  V x;
  KD_INLINE Unguarded operator-() const { return {-x}; }
};
template <class V>
KD_INLINE Unguarded<V> masked(Unguarded<V> p, Unguarded<V> x) {
  return {p.x * x.x};
}

// Whether a block's sums are at first computed as though every exponent were finite and within exp2's range.
// One of them is NaN where that is wrong; the block is then computed again, guarded. Pointwise divergences
// have no such sums here: their exponents alone may be out of range.
template <class P>
constexpr bool kTriesUnguarded =
    std::is_same_v<typename P::C, float> && !P::D::kOthers &&
    (P::D::kTeacher || P::D::kStudent || (P::kPointwise && SeenExponents::kAreChecked));

// Pass A over one block. The exps go to the scratch where kKeep. patches: Others' alone. The sums are stored
// where they stay, for a copy of numbers that have just been stored waits for them.
template <class P, bool kKeep, bool kGuarded = true>
KD_NOINLINE void block_sums(const typename P::S* s, const typename P::T* t, int n, const RowScale& scale,
                            double student_offset, double teacher_offset, Scratch<typename P::C> scratch,
                            bool near, Sums<double>& sums, [[maybe_unused]] const Patches<P>& patches = {}) {
  using V = typename P::V;
  const Exponents<P> exponents(scale, student_offset, teacher_offset);
  // Two levels of sums: short chains of additions, so that rounding does not add up over equal terms.
  struct Totals {
    V student, teacher, hard, over_teacher, over_student;
  } part{}, total{};
  SeenExponents seen;
  auto flush = [&]() __attribute__((always_inline)) {
    total.student += part.student;
    total.teacher += part.teacher;
    total.hard += part.hard;
    total.over_teacher += part.over_teacher;
    total.over_student += part.over_student;
    part = Totals{};
  };
  auto add_up = [&](const Lanes<P>& x, int at) __attribute__((always_inline)) {
    if constexpr (P::kMSE) part.over_teacher += x.et * x.et;
    using Guarded = std::conditional_t<kGuarded, V, Unguarded<V>>;
    const auto guarded = [](V v) __attribute__((always_inline)) { return bits<Guarded>(v); };
    if constexpr (P::D::kTeacher)
      part.over_teacher += bits<V>(P::D::over_teacher(guarded(x.et), guarded(x.ys), guarded(x.ys - x.yt)));
    if constexpr (P::D::kStudent)
      part.over_student += bits<V>(P::D::over_student(guarded(x.es), guarded(x.ys - x.yt)));
    part.student += x.es;
    part.teacher += x.et;
    part.hard += x.e1;
    if constexpr (kKeep) {
      store(scratch.student + at, x.es);
      if constexpr (P::kReadsTeacher) store(scratch.teacher + at, x.et);
      if constexpr (P::kOwn) store(scratch.hard + at, x.e1);
    }
  };
  dispatch_power<P>(scale.power, [&](auto power) __attribute__((always_inline)) {
    // is_tail: what is left of an unguarded block, whose fillers are no factors
    const auto step = [&](int i, auto is_tail) __attribute__((always_inline)) {
      constexpr bool guards = kGuarded || is_tail();
      prefetch(s + i, near);
      if constexpr (P::kReadsTeacher) prefetch(t + i, near);
      const int m = guards && n - i < P::kStep ? n - i : P::kStep;
      const typename P::S* from = s;
      if constexpr (P::D::kOthers) from = patches.of_step(s, i);
      const auto si = load_student<P>(from + i, m);
      const auto ti = load_teacher<P>(t + i, m);
      Lanes<P> x = exponents.template lanes<power(), guards>(si.a, ti.a, seen),
               y = exponents.template lanes<power(), guards>(si.b, ti.b, seen);
      if (P::kMSE && m < P::kStep) {  // the fillers' differences
        zero_tail<P>(x.et, y.et, m);
        zero_tail<P>(x.es, y.es, m);
        zero_tail<P>(x.e1, y.e1, m);
      }
      if constexpr (is_tail()) {
        zero_tail<P>(x.ys, y.ys, m);
        zero_tail<P>(x.yt, y.yt, m);
      }
      add_up(x, i);
      add_up(y, i + P::kLanes);
      if (i / P::kStep % 8 == 7) flush();
    };
    int i = 0;
    for (; i < (kGuarded ? n : n - P::kStep + 1); i += P::kStep) step(i, std::false_type{});
    if constexpr (!kGuarded) {
      if (i < n) step(i, std::true_type{});
    }
  });
  flush();
  sums = {student_offset,  sum(total.student),      teacher_offset, sum(total.teacher),
          sum(total.hard), sum(total.over_teacher), -kInfinity,     0,
          (double)n,       sum(total.over_student)};
  if (!kGuarded && !seen.are_in_range()) sums.over_teacher = kNaN;
}

template <class S>
KD_NOINLINE double block_max(const S* s, int n) {
  using C = Compute<S>;
  constexpr int kLanes = Types<C>::kLanes;
  auto high = splat(-std::numeric_limits<C>::infinity());
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) high = max(load(s + i), high);
  if (i < n) high = max(load_part(s + i, n - i, -std::numeric_limits<C>::infinity()), high);
  return max_lane(high);
}

// A first offset: the largest of some classes is near enough, unless all of them are masked.
template <class X>
double first_offset(const X* x, int n) {
  const double offset = block_max(x, n < kSample ? n : kSample);
  return offset == -kInfinity ? block_max(x, n) : offset;
}

// The sum of x - about, which keeps its digits.
template <class S>
KD_NOINLINE double block_sum(const S* s, int n, Compute<S> about) {
  using V = typename Types<Compute<S>>::V;
  constexpr int kLanes = Types<Compute<S>>::kLanes;
  V part[4] = {};
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; k += 2) {
      const auto x = load2(s + i + k * kLanes);
      part[k] += x.a - about;
      part[k + 1] += x.b - about;
    }
  }
  for (; i < n; i += kLanes) {
    part[0] += (n - i < kLanes ? load_part(s + i, n - i, about) : load(s + i)) - about;
  }
  return sum((part[0] + part[1]) + (part[2] + part[3]));
}

// The first of n classes that is `value`, which is one of them.
template <class S>
KD_NOINLINE int first_index(const S* s, int n, Compute<S> value) {
  constexpr int kLanes = Types<Compute<S>>::kLanes;
  int i = 0;
  while (i + kLanes <= n && !any(load(s + i) == splat(value))) i += kLanes;
  while (i < n - 1 && load_one(s + i) != value) ++i;
  return i;
}

}  // namespace
}  // namespace kdfast
