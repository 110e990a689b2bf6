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

// Exponents are (x - offset) * scale. In fp32 that is one fused multiply-add, x * scale - base, where the
// rounded base stands for an offset of base / scale, which is near any number that is given. The base of huge
// logits is rounded by more than exps have room for: such rows are computed in doubles.
constexpr double kHuge = 0x1p28;  // of a base, which is then rounded by at most 16
template <class C>
KD_INLINE double representable(double offset, double scale, double inverse_scale) {
  const double base = offset * scale;
  return std::is_same_v<C, double> || std::fabs(base) > kHuge ? offset : (double)(C)base * inverse_scale;
}

template <class C>
constexpr bool kFuses = !std::is_same_v<C, double>;
template <class C, bool kFused = kFuses<C>>
struct Exponent {  // not fused, the base is the offset
  using V = typename Types<C>::V;
  V scale, base;
  Exponent() = default;
  KD_INLINE Exponent(double scale_, double offset)
      : scale(splat((C)scale_)), base(splat((C)(finite(offset) * (kFused ? scale_ : 1)))) {}
  KD_INLINE V operator()(V x) const {
    return kFused ? multiply_subtract(x, scale, base) : (x - base) * scale;
  }
};

// Whether exps at temperature 1 are whole powers of those at T, or not needed.
bool has_hard_powers(const LossArgs& a) {
  const double t = a.temperature;
  if (a.divergence == Divergence::kLogitMSE) return true;
  if (a.standardize) return false;
  if (!a.needs_hard_sum()) return true;
  return !a.temperatures && t <= kMaxPower && t == (int)t;
}

// Which power; 1 where they are not needed, as another would cost time and could make NaN of a masked class.
KD_INLINE int hard_power(const LossArgs& a, double temperature) {
  return a.needs_hard_sum() ? (int)temperature : 1;
}

// A number as the kernels have it, which compute in doubles for fp64 alone.
KD_INLINE double round_to_compute(const LossArgs& a, double x) {
  return a.student.dtype == DType::kDouble || a.in_doubles ? x : (float)x;
}

struct RowScale : Exp2Scales {  // of one row: logit_scale * log2(e) / T
  double temperature;
  int power;                                        // where has_hard_powers(), a small whole number:
  double hard_multiple;                             // of exponents at T those at temperature 1
  double logit_scale = 1, teacher_logit_scale = 1;  // 1 where softcapping takes it in
  double student_unit = 1, teacher_unit = 1;        // what standardization multiplies scaled logits by
  double inverse_student = 1, inverse_teacher = 1;  // of the scales, by which rows of few classes then divide

  KD_INLINE void invert() {
    inverse_student = 1 / student;
    inverse_teacher = 1 / teacher;
  }

  KD_INLINE bool is_huge(double student_offset, double teacher_offset) const {
    const double largest = higher(hard, student) * finite(student_offset);  // hard may be NaN, inf * 0
    return std::fabs(largest) > kHuge || std::fabs(teacher * finite(teacher_offset)) > kHuge;
  }
};

KD_INLINE double row_value(const double* per_row, double number, int64_t row) {
  return per_row ? per_row[row] : number;
}

KD_NOINLINE RowScale row_scale(const LossArgs& a, int64_t row) {
  const double t = row_value(a.temperatures, a.temperature, row);
  const bool logits = a.target == Target::kLogits;
  const double teacher_t = logits ? row_value(a.teacher_temperatures, a.teacher_temperature, row) : 1;
  const double scale = a.softcap == 0 ? a.logit_scale : 1;
  const double teacher_scale = a.teacher_softcap == 0 ? a.teacher_logit_scale : 1;
  const double student = round_to_compute(a, kLog2E * scale / t);
  const double teacher = round_to_compute(a, kLog2E * teacher_scale / teacher_t);
  const int power = hard_power(a, t);
  // a multiple of the other one, as the kernels have it
  const double multiple = has_hard_powers(a) ? power : round_to_compute(a, kLog2E * scale / student);
  RowScale out{{student, teacher, student * multiple}, t, power, multiple, scale, teacher_scale};
  out.invert();
  return out;
}

// Whether no row has a temperature of its own.
KD_INLINE bool have_one_scale(const LossArgs& a) { return !a.temperatures && !a.teacher_temperatures; }

struct RowScales {  // of a call's rows, which are alike unless they have temperatures of their own
  const LossArgs& a;
  const bool alike;
  const RowScale common;
  KD_INLINE explicit RowScales(const LossArgs& args)
      : a(args), alike(have_one_scale(a)), common(alike ? row_scale(a, 0) : RowScale{}) {}
  KD_INLINE RowScale operator()(int64_t row) const { return alike ? common : row_scale(a, row); }
};

template <class C>
struct Scratch {  // a place for each step of a row
  C *student, *teacher, *hard, *psi;
  KD_INLINE Scratch operator+(int64_t n) const { return {student + n, teacher + n, hard + n, psi + n}; }
};

struct Block {  // what a block's exponents are relative to, as it is representable
  double student_offset, teacher_offset;
  bool operator==(const Block& other) const {
    return student_offset == other.student_offset && teacher_offset == other.teacher_offset;
  }
};

template <class P>
KD_INLINE Block representable_block(double student_offset, double teacher_offset, const RowScale& scale) {
  using C = typename P::C;
  return {representable<C>(student_offset, scale.student, scale.inverse_student),
          P::kMSE ? teacher_offset : representable<C>(teacher_offset, scale.teacher, scale.inverse_teacher)};
}

KD_NOINLINE void move_scales(Scales<double>& x, const RowScale& scale, const Block& block) {
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
}

// The same scales for a block's exps; `moved` holds them where these have other offsets than the row's sums.
// No copy otherwise: it would wait for numbers that have just been stored.
KD_INLINE const Scales<double>& block_scales(const Scales<double>& x, const RowScale& scale,
                                             const Block& block, Scales<double>& moved) {
  if (block == Block{x.student_offset, x.teacher_offset}) return x;
  moved = x;
  move_scales(moved, scale, block);
  return moved;
}

template <class P>
struct Lanes {  // one vector of a row: exps and exponents, of which the compiler keeps those that are used
  typename P::V es, et, e1, ys, yt;
};

template <class P, bool kFused = kFuses<typename P::C>>
struct Exponents {
  using C = typename P::C;
  using V = typename P::V;
  Exponent<C, kFused> student, teacher;
  V difference_offset;           // logit_mse's
  V hard_multiple;               // of exponents at T: those at temperature 1
  V student_unit, teacher_unit;  // what logit_mse multiplies logits by
  int power;

  Exponents() = default;
  KD_INLINE Exponents(const RowScale& scale, double so, double to)
      : student(scale.student, so),
        teacher(scale.teacher, to),
        difference_offset(splat<C>(finite(to))),
        hard_multiple(splat<C>(scale.hard_multiple)),
        student_unit(splat<C>(scale.student_unit * scale.logit_scale)),
        teacher_unit(splat<C>(scale.teacher_unit * scale.teacher_logit_scale)),
        power(scale.power) {}

  KD_INLINE void set_offsets(V so, V to) {
    student.base = so;
    teacher.base = difference_offset = to;
  }

  // x times es^(power - 1), which makes e1 of es.
  template <int kPower = 0>
  KD_INLINE V times_power(V x, V es) const {
    for (int k = 1; k < (kPower ? kPower : power); ++k) x *= es;
    return x;
  }

  // Of exponents and exps at T those at temperature 1.
  KD_INLINE V hard(V ys) const { return ys * hard_multiple; }
  KD_INLINE V hard_exp(V ys, V es) const { return P::kOwn ? exp2(hard(ys)) : times_power(es, es); }

  // log2 of a class's exp at temperature 1 as the sum of these has it, not of its exponent.
  KD_NOINLINE double log_hard_exp(C s) const {
    const V ys = student(splat(s));
    return std::log2((double)hard_exp(ys, exp2(ys))[0]);
  }

  template <int kPower = 0, bool kGuarded = true>
  KD_INLINE Lanes<P> lanes(V s, V t, [[maybe_unused]] SeenExponents& seen) const {
    const auto exp = [&](V y) __attribute__((always_inline)) {
      if constexpr (kGuarded) {
        return exp2(y);
      } else {
        return exp2(y, seen);
      }
    };
    Lanes<P> x{};
    x.ys = student(s);
    x.es = exp(x.ys);
    x.e1 = P::kOwn ? exp(hard(x.ys)) : times_power<kPower>(x.es, x.es);
    if constexpr (P::kMSE) {
      x.et = (s * student_unit - t * teacher_unit) - difference_offset;
    } else if constexpr (P::kProbs) {
      x.et = t;
      x.yt = log2(t);
    } else if constexpr (P::kSoft) {
      x.yt = teacher(t);
      x.et = exp(x.yt);
    }
    return x;
  }
  KD_INLINE Lanes<P> operator()(V s, V t) const {
    SeenExponents seen;
    return lanes(s, t, seen);
  }
};

// f of the power as a constant, where it is the commonest one: loops then hold no loop over it. Else of 0.
template <class P, class F>
KD_INLINE void dispatch_power(int power, F f) {
  if constexpr (!P::kOwn) {
    if (power == 2) return f(std::integral_constant<int, 2>{});
  }
  f(std::integral_constant<int, 0>{});
}

}  // namespace
}  // namespace kdfast
