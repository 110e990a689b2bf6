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

constexpr int kMaxPower = 4;

// Whether exps at temperature 1 are whole powers of those at T, or not needed.
bool has_hard_powers(const LossArgs& a) {
  const double t = a.temperature;
  if (a.divergence == Divergence::kLogitMSE) return true;
  if (a.standardize) return false;
  if (!a.needs_hard_sum()) return true;
  return !a.temperatures && t <= kMaxPower && t == (int)t;
}

// A number as the kernels have it, which compute in doubles for fp64 alone.
KD_INLINE double round_to_compute(const LossArgs& a, double x) {
  return a.student.dtype == DType::kDouble ? x : (float)x;
}

struct RowScale : Exp2Scales {  // of one row: logit_scale * log2(e) / T
  double temperature;
  int power;  // exponents at temperature 1 are this multiple of those at T, where has_hard_powers()
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
  const double student = round_to_compute(a, kLog2E * scale / t);
  const double teacher = round_to_compute(a, kLog2E * teacher_scale / teacher_t);
  const double hard = has_hard_powers(a) ? (int)t * student : round_to_compute(a, kLog2E * scale);
  return {{student, teacher, hard}, t, (int)t, scale, teacher_scale};
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

// The same scales for a block's exps, which may have other offsets than the row's sums.
KD_NOINLINE Scales<double> block_scales(Scales<double> x, const RowScale& scale, const Block& block) {
  if (block.student_offset != x.student_offset) {
    const double change = block.student_offset - x.student_offset, d = change * scale.student;
    x.to_q = scaled(x.to_q, d);
    x.log_to_q += d;
    x.to_q1 = scaled(x.to_q1, change * scale.hard);
  }
  if (block.teacher_offset != x.teacher_offset) {
    const double d = (block.teacher_offset - x.teacher_offset) * scale.teacher;
    x.to_p = scaled(x.to_p, d);
    x.log_to_p += d;
  }
  x.student_offset = block.student_offset;
  x.teacher_offset = block.teacher_offset;
  return x;
}

template <class P>
struct Lanes {  // one vector of a row: exps and exponents, of which the compiler keeps those that are used
  typename P::V es, et, e1, ys, yt;
};

template <class P>
struct Exponents {
  using C = typename P::C;
  using V = typename P::V;
  V student_scale, teacher_scale, hard_scale;  // as Exp2Scales
  V student_offset, teacher_offset;
  V student_unit, teacher_unit;  // what logit_mse multiplies logits by
  int power;

  Exponents() = default;
  KD_INLINE Exponents(const RowScale& scale, double so, double to)
      : student_scale(splat<C>(scale.student)),
        teacher_scale(splat<C>(scale.teacher)),
        hard_scale(splat<C>(scale.hard)),
        student_offset(splat<C>(finite(so))),
        teacher_offset(splat<C>(finite(to))),
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
    return P::kOwn ? (s - student_offset) * hard_scale : (s - student_offset) * student_scale * (C)power;
  }
  KD_INLINE V hard_exp(V s, V es) const { return P::kOwn ? exp2(hard(s)) : power_of(es); }

  // log2 of the label's exp at temperature 1 as the sum of these has it, which a confident row's loss is the
  // difference to; of its exponent where that exp is next to nothing.
  KD_INLINE double label_exponent(C s, const RowScale& scale) const {
    const V logit = splat(s);
    const double e = hard_exp(logit, exp2((logit - student_offset) * student_scale))[0];
    return e > 0x1p-100 && e < kInfinity ? std::log2(e) : ((double)s - student_offset[0]) * scale.hard;
  }

  KD_INLINE Lanes<P> operator()(V s, V t) const {
    Lanes<P> x{};
    x.ys = (s - student_offset) * student_scale;
    x.es = exp2(x.ys);
    x.e1 = hard_exp(s, x.es);
    if constexpr (P::kMSE) {
      x.et = (s * student_unit - t * teacher_unit) - teacher_offset;
    } else if constexpr (P::kProbs) {
      x.et = t;
      x.yt = log2(t);
    } else if constexpr (P::kSoft) {
      x.yt = (t - teacher_offset) * teacher_scale;
      x.et = exp2(x.yt);
    }
    return x;
  }
};

}  // namespace
}  // namespace kdfast
