// Pass A: sums over a row's classes, by threads, and how the lanes of a warp add theirs up.
//
// In base 2, with exp2_scale = logit_scale * log2(e) / T and a logit as the offset:
//
//   y_i = (s_i - offset) * exp2_scale       Q_i = 2^y_i       exps at temperature 1 are 2^(T * y_i)
//
// At T = 1 these are Q, at 2 its squares, whose sum costs one instruction; at another T they are exps of
// their own, if they are wanted.
//
// Each thread has an offset of its own, the largest logit so far; row_math.h has the rule by which sums are
// brought to another one. In the end it is the row's largest, whose exp is 1, with no rounding: so the sum
// has the digits of what is not the largest class's.
#pragma once

#include "device_math.cuh"  // before divergences.h, which uses it
//
#include "../row_math.h"
#include "packs.cuh"
#include "reduce.cuh"

namespace kdfast {
namespace {

template <class D>
constexpr bool kHasTeacher = kHasSoftmax<D> || D::kDifference;

// What a thread knows of its row before it reads it.
struct RowScale {
  float exp2_scale, teacher_exp2_scale, hard_exp2_scale;  // logit_scale * log2(e) / T; hard: T = 1
  float temperature, beta, rest;
  float logit_scale;
  float teacher_ratio;  // logit_mse: the teacher's logit_scale to the student's
  float shift;          // logit_mse: the first difference, near the mean one
  bool smoothed;        // whether the sum of the logits is wanted
  bool powers;          // whether exps at temperature 1 are computed from the exponents
  bool rare;            // either
  float first_logit;    // the student's, or 0: near the mean one
  float first_teacher_logit;
  float first_difference;  // logit_mse: of both, not scaled
  int label;               // -1: none
};

struct Exp {
  float exp, log;  // to base 2
  __device__ explicit Exp(float y) : exp(fast_exp2(y)), log(y) {}
};
__device__ inline Exp student_exp(float s, float offset, const RowScale& row) {
  return Exp((s - offset) * row.exp2_scale);
}
__device__ inline Exp teacher_exp(float t, float offset, const RowScale& row) {
  return Exp((t - offset) * row.teacher_exp2_scale);
}
__device__ inline float hard_exp(float s, float offset, const RowScale& row) {  // at temperature 1
  return fast_exp2((s - offset) * row.hard_exp2_scale);
}

// logit_mse's, of scaled logits, less the first one and an offset. Large logits leave no digit of small ones:
// each side's first logit is subtracted before both meet, unless it is the large one.
__device__ inline float difference(float s, float t, float offset, const RowScale& row) {
  const float ds = s - row.first_logit, dt = t - row.first_teacher_logit;
  const float near = __fmaf_rn(-row.teacher_ratio, dt, ds);
  const float far = __fmaf_rn(-row.teacher_ratio, t, s) - row.first_difference;
  const bool is_near = fabsf(ds) + fabsf(dt) <= fabsf(s) + fabsf(t);
  return __fmaf_rn(row.logit_scale, is_near ? near : far, -offset);
}

__device__ inline float finite(float offset) { return offset == -kInf ? 0 : offset; }
// sum * 2^d, infinite where the sum is; but where fp64 has no 2^d either it is 0.
__device__ inline float scaled(float sum, float d) {
  return fabsf(sum) == kInf ? (d < -1100 ? 0 : sum) : sum * fast_exp2(d);
}

// A number that masked() takes as it is: where p is 0 and x infinite, their product is NaN.
struct Unmasked {
  float x;
  __device__ Unmasked operator-() const { return {-x}; }
};
__device__ inline Unmasked masked(Unmasked p, Unmasked x) { return {p.x * x.x}; }
__device__ inline float number(float x) { return x; }
__device__ inline float number(Unmasked x) { return x.x; }

// A linear divergence's parts, of a pack.
template <class D>
struct Parts {
  float over_teacher, over_student;
  template <class V>
  __device__ void add(Exp p, Exp q) {
    if constexpr (D::kTeacher) over_teacher += number(D::over_teacher(V{p.exp}, V{q.log}, V{q.log - p.log}));
    if constexpr (D::kStudent) over_student += number(D::over_student(V{q.exp}, V{q.log - p.log}));
  }
  __device__ bool is_nan() const {
    return (D::kTeacher && over_teacher != over_teacher) || (D::kStudent && over_student != over_student);
  }
};

// Totals are sums of exps but for the largest logit's, which is 1: "others". Added to it, small ones would
// lose the digits that all of a confident row's loss is. Of no class they are -1.
// Over a warp; factor: 1 where the lane's largest logit is the warp's, or one of these.
__device__ inline float warp_others(float others, float factor) {
  const bool has_largest = factor == 1;
  others = warp_sum(__fmaf_rn(others, factor, has_largest ? 0 : factor));
  return others + (float)(__popc(__ballot_sync(~0u, has_largest)) - 1);
}

// A pack's sum of exps without the largest logit's, which is 1; where that took their digits they are added
// up again.
template <class P, class F>
__device__ inline float pack_others(const P& logits, float sum, F exp_of) {
  if (sum - 1 > 0x1p-8f) return sum - 1;
  float others = 0, largest = -1;
#pragma unroll
  for (int i = 0; i < P::kN; ++i) {
    const float x = exp_of(logits[i]);
    (x == 1 ? largest : others) += x;
  }
  return others + largest;
}

// Sums of one thread's classes, or of all. Offsets are numbers where every class is masked too. hard_others
// is of the exps at temperature 1, or of the squares of Q. Without a teacher's softmax the teacher's are 0;
// for LogitMSE teacher_others and over_teacher are sums of d = difference and of d^2. logits: sum of s -
// first_logit, for label smoothing.
template <class D>
struct RowSums {
  static constexpr bool kMSE = D::kDifference, kSoft = kHasSoftmax<D>;
  float student_offset, teacher_offset, student_others, teacher_others, hard_others;
  float over_teacher, over_student, logits;

  __device__ static RowSums identity() { return {-FLT_MAX, kSoft ? -FLT_MAX : 0, -1, kSoft ? -1.f : 0, -1}; }

  // What totals are multiplied by at other offsets, of which neither is below the present ones. All else is
  // brought to these; the parts where they are, since an exp may be 0 there that an infinite change
  // multiplies.
  struct Factors {
    float student, teacher, hard;
  };
  __device__ Factors move_to(float new_student_offset, float new_teacher_offset, const RowScale& row) {
    const Exp ds = student_exp(student_offset, new_student_offset, row);
    Factors factors{ds.exp, 1, hard_exp(student_offset, new_student_offset, row)};
    if constexpr (kSoft) {
      const Exp dt = teacher_exp(teacher_offset, new_teacher_offset, row);
      factors.teacher = dt.exp;
      const float above = ds.log - dt.log;
      if constexpr (D::kTeacher)
        over_teacher =
            scaled(over_teacher, dt.log) + D::over_teacher((1 + teacher_others) * dt.exp, ds.log, above);
      if constexpr (D::kStudent)
        over_student = scaled(over_student, ds.log) + D::over_student((1 + student_others) * ds.exp, above);
      teacher_offset = new_teacher_offset;
    }
    student_offset = new_student_offset;
    return factors;
  }

  // kShort: of a row of which a pack may be the most. The largest logit's exp is left out of its pack's sum
  // already.
  template <bool kShort, class P>
  __device__ void add(const P& s, const P& t, const RowScale& row) {
    constexpr int N = P::kN;
    bool is_students_new = false, is_teachers_new = false;
    if (__builtin_expect(s.exceeds(student_offset) | (kSoft && t.exceeds(teacher_offset)), 0)) {
      float s_max = student_offset, t_max = teacher_offset;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        s_max = fmaxf(s_max, s[i]);
        if constexpr (kSoft) t_max = fmaxf(t_max, t[i]);
      }
      is_students_new = kShort && s_max > student_offset;
      is_teachers_new = kShort && kSoft && t_max > teacher_offset;
      const Factors factors = move_to(s_max, t_max, row);
      const auto rescaled = [](float others, float factor, bool is_new) {
        return __fmaf_rn(others, factor, is_new ? factor : factor - 1);  // with the exp that was the largest
      };
      student_others = rescaled(student_others, factors.student, is_students_new);
      if constexpr (kSoft) teacher_others = rescaled(teacher_others, factors.teacher, is_teachers_new);
      hard_others = rescaled(hard_others, factors.hard, is_students_new);
    }
    const float so = student_offset, to = teacher_offset;
    float q_sum = 0, p_sum = 0, squares = 0, d1 = 0, d2 = 0;
    Parts<D> parts{};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Exp q = student_exp(s[i], so, row);
      q_sum += q.exp;
      squares = __fmaf_rn(q.exp, q.exp, squares);
      if constexpr (kSoft) {
        const Exp p = teacher_exp(t[i], to, row);
        p_sum += p.exp;
        parts.template add<Unmasked>(p, q);
      } else if constexpr (kMSE) {
        const float d = difference(s[i], t[i], 0, row);
        d1 += d;
        d2 += d * d;
      }
    }
    // exponents are computed again, lest they take registers until it is known that they are not needed
    if (__builtin_expect(row.rare | parts.is_nan(), 0)) {
      const float so_again = opaque(so), to_again = opaque(to);
      if (parts.is_nan()) {  // a masked class, most likely
        parts = {};
#pragma unroll
        for (int i = 0; i < N; ++i)
          parts.template add<float>(teacher_exp(t[i], to_again, row), student_exp(s[i], so_again, row));
      }
      if (row.powers) {
        squares = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) squares += hard_exp(s[i], so_again, row);
      }
      if (row.smoothed) {
#pragma unroll
        for (int i = 0; i < N; ++i) logits += s[i] - row.first_logit;
      }
    }
    if (is_students_new) {
      q_sum = pack_others(s, q_sum, [&](float x) { return student_exp(x, so, row).exp; });
      squares = pack_others(s, squares, [&](float x) {
        const float q = student_exp(x, so, row).exp;
        return row.powers ? hard_exp(x, so, row) : q * q;
      });
    }
    if (is_teachers_new) p_sum = pack_others(t, p_sum, [&](float x) { return teacher_exp(x, to, row).exp; });
    student_others += q_sum;
    hard_others += squares;
    teacher_others += kMSE ? d1 : p_sum;
    over_teacher += kMSE ? d2 : parts.over_teacher;
    over_student += parts.over_student;
  }

  // NaN offsets are left out by max, and the sums are NaN.
  __device__ RowSums warp_reduce(const RowScale& row) const {
    RowSums x = *this;
    const Factors factors = x.move_to(warp_max(student_offset), kSoft ? warp_max(teacher_offset) : 0, row);
    x.student_others = warp_others(x.student_others, factors.student);
    if constexpr (kSoft) x.teacher_others = warp_others(x.teacher_others, factors.teacher);
    if constexpr (kMSE) x.teacher_others = warp_sum(x.teacher_others);
    x.hard_others = warp_others(x.hard_others, factors.hard);
    if constexpr (D::kTeacher || kMSE) x.over_teacher = warp_sum(x.over_teacher);
    if constexpr (D::kStudent) x.over_student = warp_sum(x.over_student);
    if (row.smoothed) x.logits = warp_sum(x.logits);
    return x;
  }
};

}  // namespace
}  // namespace kdfast
