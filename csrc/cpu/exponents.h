// From logits to exps: a row's temperatures, its exponents, and their offsets. P is a Spec, see spec.h.
#pragma once

#include "exp_math.h"
#include "row_kernels.h"
//
#include "../row_math.h"  // these last: they use the functions of vectors
#include "dispatch.h"

namespace kdfast {
namespace {

constexpr int64_t kFitsL2 = 65536;  // classes whose logits and exps a megabyte holds
constexpr int kSample = 128;
constexpr double kLog2E = 1.4426950408889634, kLn2 = kNatsPerBit<double>;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

struct RowScale {  // of one row
  double temperature;
  double exp2_scale,
      teacher_exp2_scale;  // what a logit is multiplied by to be an exponent: logit_scale * log2(e) / T
  double hard_multiple;    // exponents at temperature 1 are this multiple of those at T
  int power;               // with kOwn false: that multiple, a small whole number
  double logit_scale = 1, teacher_logit_scale = 1;  // 1 where softcapping takes it in
  double student_unit = 1, teacher_unit = 1;        // what standardization multiplies scaled logits by
};

KD_INLINE double row_value(const double* per_row, double number, int64_t row) {
  return per_row ? per_row[row] : number;
}

KD_INLINE RowScale row_scale(const LossArgs& a, int64_t row) {
  const double t = row_value(a.temperatures, a.temperature, row);
  const bool logits = a.target == Target::kLogits;
  const double teacher_t = logits ? row_value(a.teacher_temperatures, a.teacher_temperature, row) : 1;
  const double scale = a.softcap == 0 ? a.logit_scale : 1;
  const double teacher_scale = a.teacher_softcap == 0 ? a.teacher_logit_scale : 1;
  return {t, kLog2E * scale / t, kLog2E * teacher_scale / teacher_t, t, (int)t, scale, teacher_scale};
}

template <class C>
struct Scratch {  // a place for each step of a row
  C *student, *teacher, *hard;
  KD_INLINE Scratch operator+(int64_t n) const { return {student + n, teacher + n, hard + n}; }
};

struct Block {  // what a block's exponents are relative to
  double student_offset, teacher_offset;
  bool operator==(const Block& other) const {
    return student_offset == other.student_offset && teacher_offset == other.teacher_offset;
  }
};

// The offset of exps at temperature 1, whichever way they are computed.
template <class C, bool kOwn>
KD_INLINE double hard_offset(const RowScale& scale, double student_offset) {
  if (student_offset == -kInfinity) return student_offset;
  return kOwn ? (double)(C)(student_offset * scale.hard_multiple) : scale.power * student_offset;
}

// The same scales for a block's exps, which may have other offsets than the row's sums.
template <class C, bool kOwn>
KD_NOINLINE Scales<double> block_scales(Scales<double> x, const RowScale& scale, const Block& block) {
  const double hard = hard_offset<C, kOwn>(scale, block.student_offset);
  if (block == Block{x.student_offset, x.teacher_offset} && hard == x.hard_offset) return x;
  const double ds = block.student_offset - x.student_offset, dt = block.teacher_offset - x.teacher_offset;
  if (block.student_offset != x.student_offset) x.to_q = scaled(x.to_q, ds), x.log_to_q += ds;
  if (block.teacher_offset != x.teacher_offset) x.to_p = scaled(x.to_p, dt), x.log_to_p += dt;
  if ((C)hard != (C)x.hard_offset)  // which a table may have rounded
    x.to_q1 = scaled(x.to_q1, hard - x.hard_offset);
  return {block.student_offset, block.teacher_offset, hard, x.to_q, x.to_p, x.to_q1, x.log_to_q, x.log_to_p};
}

template <class P>
struct Lanes {  // one vector of a row: exps and exponents, of which the compiler keeps those that are used
  typename P::V es, et, e1, ys, yt;
};

template <class P>
struct Exponents {
  using C = typename P::C;
  using V = typename P::V;
  V exp2_scale, teacher_exp2_scale, student_offset, teacher_offset, hard_offset;
  V hard_exp2_scale;             // of exponents at temperature 1
  V student_unit, teacher_unit;  // what logit_mse multiplies logits by
  int power;

  Exponents() = default;
  KD_INLINE Exponents(const RowScale& scale, double so, double to, double ho)
      : exp2_scale(splat<C>(scale.exp2_scale)),
        teacher_exp2_scale(splat<C>(scale.teacher_exp2_scale)),
        student_offset(splat<C>(finite(so))),
        teacher_offset(splat<C>(finite(to))),
        hard_offset(splat<C>(finite(ho))),
        hard_exp2_scale(splat<C>(kLog2E * scale.logit_scale)),
        student_unit(splat<C>(scale.student_unit * scale.logit_scale)),
        teacher_unit(splat<C>(scale.teacher_unit * scale.teacher_logit_scale)),
        power(scale.power) {}

  KD_INLINE V power_of(V es) const {
    V e1 = es;
    for (int k = 1; k < power; ++k) e1 *= es;
    return e1;
  }

  // The exponent at temperature 1.
  KD_INLINE V hard(V s) const {
    return P::kOwn ? multiply_subtract(s, hard_exp2_scale, hard_offset)
                   : multiply_subtract(s, exp2_scale, student_offset) * (C)power;
  }

  KD_INLINE Lanes<P> operator()(V s, V t) const {
    Lanes<P> x{};
    x.ys = multiply_subtract(s, exp2_scale, student_offset);
    x.es = exp2(x.ys);
    x.e1 = P::kOwn ? exp2(hard(s)) : power_of(x.es);
    if constexpr (P::kMSE) {
      x.et = (s * student_unit - t * teacher_unit) - teacher_offset;
    } else if constexpr (P::kProbs) {
      x.et = t;
      x.yt = log2(t);
    } else if constexpr (P::kSoft) {
      x.yt = multiply_subtract(t, teacher_exp2_scale, teacher_offset);
      x.et = exp2(x.yt);
    }
    return x;
  }
};

}  // namespace
}  // namespace kdfast
