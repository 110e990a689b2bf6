// Pass A: a row's sums of exps, by threads, and the rule by which they are joined;
// kdfast/triton/statistics.py and csrc/cpu/row_sums.h say the same.
//
// In base 2, with slope = log2(e) / T and an offset o near the largest exponent (-inf where every class is
// masked, and counted as 0 then):
//
//   y_i = slope * s_i - o       Q_i = 2^y_i       exps at temperature 1 are 2^(T * y_i)
//
// Each thread has an offset of its own, which grows as larger logits come by. To bring sums from an old to a
// new one, d = old - new:  sum' = sum * 2^d,  part' = (part + D's part(sum P, ...)) * 2^d.
#pragma once

#include "device_math.cuh"  // before divergences.h, which uses it
//
#include "../row_math.h"
#include "packs.cuh"
#include "reduce.cuh"

namespace kdfast {
namespace {

// What a thread knows of its row before it reads it.
struct RowScale {
  float slope, teacher_slope;  // log2(e) / T
  float temperature, beta;
  float shift;    // logit_mse: k, a difference near the mean one
  bool smoothed;  // whether the sum of the logits is wanted
  float first;    // the student's first logit, or 0: near the mean one
  int label;      // -1: none
};

// Of exps at temperature 1: exponents are those at T times T, offsets too.
__device__ inline float hard_exp(float y, const RowScale& row) { return fast_exp2(y * row.temperature); }

struct Exp {
  float exp, log;  // to base 2
};
__device__ inline Exp teacher_exp(float t, float offset, const RowScale& row) {
  const float y = __fmaf_rn(t, row.teacher_slope, -offset);
  return {fast_exp2(y), y};
}

__device__ inline float finite(float offset) { return offset == -kInf ? 0 : offset; }
__device__ inline float scaled(float sum, float d) {  // also where 2^d underflows and the sum is infinite
  return fabsf(sum) == kInf ? sum : sum * fast_exp2(d);
}

enum Value {
  kStudentOffset,
  kTeacherOffset,
  kStudentSum,
  kTeacherSum,
  kHardSum,
  kOverTeacher,
  kOverStudent,
  kLogits
};

// The statistics of D by one thread, or of all. Without a teacher's softmax the teacher's are 0. For LogitMSE
// the teacher's are 0, sum d and sum d^2 of d = s - t - k, in the places of sum and running sum. kLogits:
// sum of s less row.first, for label smoothing.
template <class D>
struct Statistics {
  static constexpr int kCount = 8;
  static constexpr bool kMSE = D::kDifference, kSoft = kHasSoftmax<D>;
  float value[kCount];

  __device__ static Statistics nothing() {
    Statistics x{};
    x.value[kStudentOffset] = -kInf;
    x.value[kTeacherOffset] = kSoft ? -kInf : 0;
    return x;
  }
  __device__ float operator[](Value v) const { return value[v]; }
  __device__ float& operator[](Value v) { return value[v]; }

  __device__ static constexpr bool used(int v) {
    return v == kOverStudent   ? D::kStudent
           : v == kOverTeacher ? D::kTeacher || kMSE
                               : v != kTeacherSum || kSoft || kMSE;
  }

  // To other offsets, of which neither is below the ones that there are.
  __device__ void move(float student, float teacher, const RowScale& row) {
    const float ds = value[kStudentOffset] == -kInf ? 0 : value[kStudentOffset] - finite(student);
    if constexpr (kSoft) {
      const float dt = value[kTeacherOffset] == -kInf ? 0 : value[kTeacherOffset] - finite(teacher);
      if constexpr (D::kTeacher)
        value[kOverTeacher] =
            scaled(value[kOverTeacher] + D::over_teacher(value[kTeacherSum], ds, ds - dt), dt);
      if constexpr (D::kStudent)
        value[kOverStudent] = scaled(value[kOverStudent] + D::over_student(value[kStudentSum], ds - dt), ds);
      value[kTeacherSum] *= fast_exp2(dt);
      value[kTeacherOffset] = teacher;
    }
    value[kStudentSum] *= fast_exp2(ds);
    value[kHardSum] *= hard_exp(ds, row);
    value[kStudentOffset] = student;
  }

  // there: whether these are classes at all; else they are -inf.
  template <int N>
  __device__ void add(const float (&s)[N], const float (&t)[N], bool there, const RowScale& row) {
    float high = s[0], teacher_high = t[0];
#pragma unroll
    for (int i = 1; i < N; ++i) {
      high = fmaxf(high, s[i]);
      teacher_high = fmaxf(teacher_high, t[i]);
    }
    high = fmaxf(value[kStudentOffset], high * row.slope);
    teacher_high = kSoft ? fmaxf(value[kTeacherOffset], teacher_high * row.teacher_slope) : 0;
    if (high > value[kStudentOffset] || teacher_high > value[kTeacherOffset]) move(high, teacher_high, row);
    const float so = finite(high), to = finite(teacher_high);
    float q_sum = 0, p_sum = 0, hard = 0, over_teacher = 0, over_student = 0, d1 = 0, d2 = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float ys = __fmaf_rn(s[i], row.slope, -so), q = fast_exp2(ys);
      q_sum += q;
      hard += hard_exp(ys, row);
      if constexpr (kSoft) {
        const Exp p = teacher_exp(t[i], to, row);
        p_sum += p.exp;
        if constexpr (D::kTeacher) over_teacher += D::over_teacher(p.exp, ys, ys - p.log);
        if constexpr (D::kStudent) over_student += D::over_student(q, ys - p.log);
      } else if constexpr (kMSE) {
        const float d = there ? s[i] - t[i] - row.shift : 0;
        d1 += d;
        d2 += d * d;
      }
    }
    value[kStudentSum] += q_sum;
    value[kHardSum] += hard;
    value[kTeacherSum] += kMSE ? d1 : p_sum;
    value[kOverTeacher] += kMSE ? d2 : over_teacher;
    value[kOverStudent] += over_student;
    if (row.smoothed && there) {
#pragma unroll
      for (int i = 0; i < N; ++i) value[kLogits] += s[i] - row.first;
    }
  }

  // Of a warp's lanes. NaN offsets are nobody's: max leaves them out, and the sums are NaN.
  __device__ Statistics joined(const RowScale& row) const {
    Statistics x = *this;
    const float student = warp_max(value[kStudentOffset]);
    const float teacher = kSoft ? warp_max(value[kTeacherOffset]) : 0;
    x.move(student, teacher, row);
#pragma unroll
    for (int i = kStudentSum; i < kCount; ++i) {
      if (used(i) && (i != kLogits || row.smoothed)) x.value[i] = warp_sum(x.value[i]);
    }
    return x;
  }
};

}  // namespace
}  // namespace kdfast
