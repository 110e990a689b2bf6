// From logits to exps: what the kernels are instantiated for, a row's temperatures, and its exponents.
#pragma once

#include <type_traits>

#include "exp_math.h"
#include "row_kernels.h"
//
#include "../row_math.h"  // last: it is over their functions of vectors

namespace kdfast {
namespace {

constexpr int64_t kFitsL2 = 65536;  // classes whose logits and exps a megabyte holds
constexpr int kSample = 128;
constexpr int kMaxPower = 4;
constexpr double kLog2E = 1.4426950408889634, kLn2 = kNatsPerBit<double>;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// What a kernel is instantiated for: storage types, divergence, the teacher as probabilities instead of
// logits, and the student's exps at temperature 1 taken by themselves (kOwn) instead of as powers of those at
// T.
template <class S_, class T_, class D_, bool kProbs_, bool kOwn_>
struct Spec {
  using S = S_;
  using T = T_;
  using D = D_;
  using C = Compute<S>;
  using V = typename Types<C>::V;
  static constexpr bool kProbs = kProbs_, kOwn = kOwn_;
  static constexpr bool kMSE = std::is_same_v<D, LogitMSE>;
  static constexpr bool kSoft = !kMSE && !std::is_same_v<D, NoDivergence>;
  static constexpr bool kPointwise = D::kPointwise;                    // sums in a pass of their own
  static constexpr int kLanes = Types<C>::kLanes, kStep = 2 * kLanes;  // classes in a vector, and at a time
};

struct RowScale {  // of one row
  double temperature;
  double student, teacher;  // slopes
  double hard;              // exponents at temperature 1 are this multiple of those at T
  int power;                // with kOwn false: that multiple, a small whole number
  double beta;
  double student_unit = 1, teacher_unit = 1;  // what logit_mse multiplies logits by
};

KD_INLINE double at_row(const double* per_row, double number, int64_t row) {
  return per_row ? per_row[row] : number;
}

KD_INLINE RowScale row_scale(const LossArgs& a, int64_t row) {
  const double t = at_row(a.temperatures, a.temperature, row);
  const bool logits = a.target == Target::kLogits;
  const double at = logits ? at_row(a.teacher_temperatures, a.teacher_temperature, row) : 1;
  return {t, kLog2E / t, kLog2E / at, t, (int)t, a.beta};
}

template <class C>
struct Scratch {  // a place for each step of a row
  C *student, *teacher, *hard;
  KD_INLINE Scratch after(int64_t n) const { return {student + n, teacher + n, hard + n}; }
};

template <class P>
struct Block {  // where a block's exps stand, and what their exponents are relative to
  double student_offset, teacher_offset;
  bool operator==(const Block& other) const {
    return student_offset == other.student_offset && teacher_offset == other.teacher_offset;
  }
};

// The offset of exps at temperature 1, whichever way they are taken.
template <class P>
KD_INLINE double hard_offset(const RowScale& scale, double student_offset) {
  if (student_offset == -kInfinity) return student_offset;
  return P::kOwn ? (double)(typename P::C)(student_offset * scale.hard) : scale.power * student_offset;
}

template <class P>
struct Lanes {  // one vector of a row: exps and exponents, of which the compiler keeps those that are used
  typename P::V es, et, e1, ys, yt;
};

template <class P>
struct Exponents {
  using C = typename P::C;
  using V = typename P::V;
  V student, teacher, student_offset, teacher_offset, hard_offset;
  V student_unit, teacher_unit;
  int power;

  Exponents() = default;
  KD_INLINE Exponents(const RowScale& scale, double so, double to, double ho)
      : student(splat<C>(scale.student)),
        teacher(splat<C>(scale.teacher)),
        student_offset(splat<C>(finite(so))),
        teacher_offset(splat<C>(finite(to))),
        hard_offset(splat<C>(finite(ho))),
        student_unit(splat<C>(scale.student_unit)),
        teacher_unit(splat<C>(scale.teacher_unit)),
        power(scale.power) {}

  KD_INLINE V power_of(V es) const {
    V e1 = es;
    for (int k = 1; k < power; ++k) e1 *= es;
    return e1;
  }

  // The exponent at temperature 1.
  KD_INLINE V hard(V s) const {
    return P::kOwn ? multiply_subtract(s, splat<C>(kLog2E), hard_offset)
                   : multiply_subtract(s, student, student_offset) * (C)power;
  }

  KD_INLINE Lanes<P> operator()(V s, V t) const {
    Lanes<P> x{};
    x.ys = multiply_subtract(s, student, student_offset);
    x.es = exp2(x.ys);
    x.e1 = P::kOwn ? exp2(hard(s)) : power_of(x.es);
    if constexpr (P::kMSE) {
      x.et = (s * student_unit - t * teacher_unit) - teacher_offset;
    } else if constexpr (P::kProbs) {
      x.et = t;
      x.yt = log2(t);
    } else if constexpr (P::kSoft) {
      x.yt = multiply_subtract(t, teacher, teacher_offset);
      x.et = exp2(x.yt);
    }
    return x;
  }
};

}  // namespace
}  // namespace kdfast
