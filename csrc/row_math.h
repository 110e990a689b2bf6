// A row's numbers between the passes over its classes: sums are merged, and become a loss and the gradient's
// coefficients. V is a number, or a vector with one of each row; kdfast/row_math.py says the same in PyTorch,
// and what each number is. Include it after log2 and exp2 of V, and the functions that divergences.h needs.
#pragma once

#include <cmath>
#include <initializer_list>

#include "rows.h"
//
#include "divergences.h"

namespace kdfast {
namespace {

template <class N>
constexpr N kNatsPerBit = (N)0.69314718055994530942;
template <class D>
constexpr bool kHasSoftmax = D::kPointwise || D::kTeacher || D::kStudent;

template <class V>
struct Sums {
  V student_offset, student_total, teacher_offset, teacher_total, hard_total;
  V over_teacher, label, exponents, classes, over_student, phi, psi;
};

template <class V>
struct Coefficients {
  V student_offset, student_total, teacher_offset, teacher_total, hard_total;
  V level, slope, teacher, soft, center, hard, label, uniform;
  V mean, tilt, student_unit, teacher_unit, teacher_mean, at_label;
};

static_assert(sizeof(Sums<char>) == kSums && sizeof(Coefficients<char>) == kCoefficients);

// An offset as logits have it subtracted: 0 where every class is masked.
KDFAST_ALWAYS_INLINE double finite(double offset) { return offset == -INFINITY ? 0 : offset; }

// a * 2^d; infinite where a is, unless 2^d is 0 in every precision. NaN stays.
KDFAST_ALWAYS_INLINE double scaled(double a, double d) {
  if (a != a) return a;
  return d < -1100 ? 0 : a == INFINITY || a == -INFINITY ? a : a * exp2(d);
}

// ---- merge ----

KDFAST_ALWAYS_INLINE double offset_change(double old, double now) { return old == now ? 0 : old - now; }
// fmax would do, but for NaN, which must stay
KDFAST_ALWAYS_INLINE double higher(double a, double b) { return b < a ? a : b; }

// What logits less their offsets are multiplied by to be exponents, as the sums' exps had it rounded.
struct Exp2Scales {
  double student, teacher, hard;
};

// Brings sums to other offsets, none of which is below its own.
template <class D>
void rescale(Sums<double>& x, double student_offset, double teacher_offset, const Exp2Scales& scale) {
  const double ds = offset_change(x.student_offset, student_offset) * scale.student;
  const double dt = offset_change(x.teacher_offset, teacher_offset) * (D::kDifference ? 1 : scale.teacher);
  const double dh = offset_change(x.student_offset, student_offset) * scale.hard;
  const double exponent_change = (finite(x.student_offset) - finite(student_offset)) * scale.hard;
  if constexpr (D::kDifference) {  // whose offset is what the differences have subtracted
    x.over_teacher += 2 * dt * x.teacher_total + x.classes * dt * dt;
    x.teacher_total += x.classes * dt;
  }
  x.student_total = scaled(x.student_total, ds);
  if constexpr (!D::kDifference) x.teacher_total = scaled(x.teacher_total, dt);
  // of the new totals: what they have nothing of adds nothing, however far the offset moves
  if constexpr (D::kTeacher)
    x.over_teacher = scaled(x.over_teacher, dt) + D::over_teacher(x.teacher_total, ds, ds - dt);
  if constexpr (D::kStudent)
    x.over_student = scaled(x.over_student, ds) + D::over_student(x.student_total, ds - dt);
  x.hard_total = scaled(x.hard_total, dh);
  x.label += exponent_change;
  x.exponents += x.classes * exponent_change;
  x.student_offset = student_offset;
  x.teacher_offset = teacher_offset;
}

// Adds sums at common offsets: of a segment's blocks, of a row's segments, of a vocabulary's shards.
template <class D>
void merge(Sums<double>& total, Sums<double> more, const Exp2Scales& scale) {
  if (total.classes == 0) {
    total = more;
    return;
  }
  const double so = higher(total.student_offset, more.student_offset);
  const double to = higher(total.teacher_offset, more.teacher_offset);
  for (Sums<double>* x : {&total, &more}) {
    if (so != x->student_offset || to != x->teacher_offset) rescale<D>(*x, so, to, scale);
  }
  total.student_total += more.student_total;
  total.teacher_total += more.teacher_total;
  total.hard_total += more.hard_total;
  total.over_teacher += more.over_teacher;
  total.over_student += more.over_student;
  total.label = higher(total.label, more.label);
  total.exponents += more.exponents;
  total.classes += more.classes;
  total.phi += more.phi;
  total.psi += more.psi;
}

// ---- loss and coefficients ----

// What loss_and_coefficients() knows of a row beside its sums. N: the type of what is the same in all rows.
template <class V, class N>
struct RowTerms {
  V temperature, factor;  // the gradient's: weight, reduction
  V unit;                 // what logits were multiplied by before T divided them: 1 unless standardized
  V excess;  // of the sum of q over 1, as the kernel rounds 1 / student_total; the gradient's sum is to be 0
  N alpha, hard_weight, label_smoothing, z_loss, beta;
  N rest;         // 1 - beta
  N logit_scale;  // the student's, 1 where softcapping takes it in
  bool t_squared;
  bool softmaxed;      // whether P becomes p by its own sum, and not as it is given
  bool distributions;  // whether p sums to 1, which given probabilities need not
  bool labelled;       // whether there is a hard term to report
};

// A row's loss without its weight, its two terms without theirs, and the base-2 logarithms of its totals.
template <class V>
struct RowLoss {
  V loss, soft, hard, log_student, log_teacher;
};

template <class V>  // what rounding may leave below 0; NaN stays
KDFAST_HD inline V not_below_0(V x) {
  return x < 0 ? V{} : x;
}

template <class D, class V, class N>
KDFAST_HD inline RowLoss<V> loss_and_coefficients(const Sums<V>& x, const RowTerms<V, N>& r,
                                                  Coefficients<V>& c) {
  const V nan = V{} + (N)NAN;
  RowLoss<V> out{V{}, nan, nan, V{}, V{}};
  c = Coefficients<V>{x.student_offset, x.student_total, x.teacher_offset, x.teacher_total, x.hard_total};
  c.student_unit = r.unit;
  c.teacher_unit = V{} + 1;
  [[maybe_unused]] const V soft =
      x.classes == 1 ? V{} : r.factor * r.unit * r.alpha;  // a single class always has q = 1
  if constexpr (D::kDifference) {  // the teacher's sums are of d = s - t - teacher_offset and of d^2
    const V mean = x.teacher_total / x.classes;
    out.soft = (x.over_teacher - x.teacher_total * mean) / (2 * x.classes);
    out.loss = out.soft * r.alpha;
    c.soft = soft / x.classes;
    c.center = out.soft == out.soft ? mean : out.soft;  // one infinity makes all of a row NaN
  } else if constexpr (kHasSoftmax<D>) {
    const V log_student = log2(x.student_total);
    if (!r.softmaxed) c.teacher_total = V{} + 1;
    const V log_teacher = r.softmaxed ? log2(x.teacher_total) : V{};
    out.log_student = log_student;
    out.log_teacher = log_teacher;
    const V mass = x.teacher_total / c.teacher_total;
    const V weight = soft * (r.t_squared ? r.temperature : 1 / r.temperature);
    V divergence{}, psi{};
    if constexpr (D::kPointwise) {
      divergence = x.phi + D::constant(mass, V{} + r.rest);
      c.soft = weight;
      V center = x.psi;
      if constexpr (D::kHasPsiApart) {
        const auto is_apart = -4 * x.over_student < x.psi;
        center = is_apart ? x.over_student : x.psi;
        c.slope = is_apart ? V{} + 1 : V{};  // which psi pass C takes
      }
      c.center = center - center * r.excess + 0 * x.phi;  // NaN where phi is
    }
    const V above = log_teacher - log_student;
    if constexpr (D::kTeacher) {
      const N share = D::teacher_share(r.beta);
      if (share != 0) {  // or there may be an infinity that is none of the loss's
        const V rest = D::over_teacher(mass, -log_student, above);
        divergence += (x.over_teacher / c.teacher_total + rest) * (share * kNatsPerBit<N>);
      }
      psi -= mass * share;
      c.teacher = weight * share;
    }
    if constexpr (D::kStudent) {
      const N share = D::student_share(r.beta);
      if (share != 0) {
        const V part =
            (x.over_student / x.student_total + D::over_student(V{} + 1, above)) * (share * kNatsPerBit<N>);
        divergence += part;
        psi += part;
      }
      c.slope = weight * share;
    }
    if constexpr (!D::kPointwise) c.level = -weight * psi;
    if (r.distributions) divergence = not_below_0(divergence);
    out.soft = r.t_squared ? divergence * r.temperature * r.temperature : divergence;
    out.loss = out.soft * r.alpha;
  }
  const V log_hard = log2(x.hard_total);
  if (r.labelled) {
    const N e = r.label_smoothing;
    out.hard = not_below_0((log_hard - x.label) * kNatsPerBit<N>);
    if (e != 0) out.hard = out.hard * (1 - e) + (log_hard - x.exponents / x.classes) * (e * kNatsPerBit<N>);
  }
  if (r.hard_weight != 0) {
    out.loss += out.hard * r.hard_weight;
    c.hard = r.factor * r.hard_weight;
    c.label = c.hard * (1 - r.label_smoothing);
    c.uniform = c.hard * r.label_smoothing / x.classes;
  }
  if (r.z_loss != 0) {
    V lse = log_hard * kNatsPerBit<N> + x.student_offset * r.logit_scale;
    lse = lse == -(N)INFINITY ? nan : lse;  // every class is masked
    out.loss += lse * lse * r.z_loss;
    c.hard += lse * r.factor * (2 * r.z_loss);
  }
  return out;
}

// ---- gradient ----

// How exps become probabilities: the offsets that their logits are relative to, factors and their logarithms.
template <class V>
struct Scales {
  V student_offset, teacher_offset;
  V to_q, to_p, to_q1;
  V log_to_q, log_to_p;
};
template <class V>  // whose logarithms may be known
KDFAST_HD inline Scales<V> scales_with(const Coefficients<V>& c, V log_student, V log_teacher) {
  return {c.student_offset, c.teacher_offset, 1 / c.student_total, 1 / c.teacher_total,
          1 / c.hard_total, -log_student,     -log_teacher};
}
template <class V>
KDFAST_HD inline Scales<V> scales_of(const Coefficients<V>& c) {
  return scales_with(c, log2(c.student_total), log2(c.teacher_total));
}

// What the exps of a class are multiplied by:
//
//   linear        Q (level + slope (log2 Q - log2 P)) - P teacher + E hard - uniform
//   pointwise     soft (psi(P to_p, Q to_q) - Q to_q center) + E hard - uniform
template <class V>
struct PerExp {
  V level, slope, teacher, soft, center, to_q, to_p, hard, uniform;
};
template <class N, class V>  // N: the number that V is or is made of
KDFAST_HD inline PerExp<V> per_exp(const Coefficients<V>& c, const Scales<V>& x) {
  const V slope = c.slope * x.to_q * kNatsPerBit<N>;
  const V level =
      c.level * x.to_q + masked(slope, x.log_to_q - x.log_to_p);  // no slope: there may be no exps
  return {level,  slope,  c.teacher * x.to_p,      c.soft,   c.center,
          x.to_q, x.to_p, masked(c.hard, x.to_q1), c.uniform};
}

}  // namespace
}  // namespace kdfast
