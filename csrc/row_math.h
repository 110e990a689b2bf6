// A row's numbers between the passes over its classes: sums go up, coefficients come down. No logits, no
// threads: for host and device, over any type of number. kdfast/row_math.py says what each of them is.
#pragma once

#include <cmath>
#include <type_traits>

#include "divergences.h"

namespace kdfast {
namespace {

template <class D>
constexpr bool kIsMSE = std::is_same_v<D, LogitMSE>;
template <class D>
constexpr bool kHasSoftmax = !kIsMSE<D> && !std::is_same_v<D, NoDivergence>;

template <class N>
struct Sums {
  N student_offset, student_total, teacher_offset, teacher_total, hard_offset, hard_total;
  N over_teacher, over_student;  // logit_mse: over_teacher is sum d^2, and teacher_total is sum d
  N label, exponents, classes, phi, psi;
};

// A row of the table that `stats` writes and `grad` reads, in this order.
template <class N>
struct Coefficients {
  N student_offset, student_total, teacher_offset, teacher_total, hard_offset, hard_total;
  N level, slope, teacher, soft, hard, label, uniform;
  N shift;
  N mean, tilt, student_unit, teacher_unit, teacher_mean;
  N at_label;
};
constexpr int kCoefficients = sizeof(Coefficients<float>) / sizeof(float);

template <class N>
struct RowSettings {
  N temperature, beta, alpha, hard_weight, label_smoothing, z_loss;
  N factor;  // what the gradient is multiplied by
  N shift;   // logit_mse: d = s - t - shift
  bool t_squared, labelled;
};

template <class N>
struct Finished {
  N loss, soft, hard;  // without the row's weight; the terms without theirs
  Coefficients<N> c;
};

// The soft term's part. Where the divergence is linear
//
//   D = sum over_teacher / P_sum + over_teacher(mass, -log Q_sum, above) + the same over the student
//
// with above = log(P_sum / Q_sum), mass = sum p, and psi's sum is -mass and the student's part of D.
template <class D, class N>
KDFAST_HD inline N finish_soft(const Sums<N>& x, const RowSettings<N>& row, Coefficients<N>& c) {
  const N ln2 = N(0.69314718055994530942), t = row.temperature;
  N divergence = 0, psi_sum = 0;
  const N mass = x.teacher_total / x.teacher_total;  // 1, or NaN
  const N per_student = 1 / x.student_total, per_teacher = 1 / x.teacher_total;
  const N soft = row.factor * row.alpha * (row.t_squared ? t : 1 / t);
  c.teacher_offset = x.teacher_offset;
  c.teacher_total = x.teacher_total;
  if constexpr (D::kPointwise) {
    divergence = x.phi + D::constant(mass, row.beta);
    // for q as it is rounded: its sum is not quite 1, and the gradient's is to be 0
    psi_sum = x.psi - x.psi * std::fma(per_student, x.student_total, N(-1));
    c.soft = soft;
  } else {
    const N log_student = std::log2(x.student_total), above = std::log2(x.teacher_total) - log_student;
    // where a share is 0 there may be an infinity that is none of the loss's
    if constexpr (D::kTeacher) {
      const N share = D::teacher_share(row.beta);
      if (share != 0)
        divergence = share * (x.over_teacher * per_teacher + D::over_teacher(mass, -log_student, above));
      psi_sum = -share * mass;
      c.teacher = soft * share;
    }
    if constexpr (D::kStudent) {
      const N share = D::student_share(row.beta);
      if (share != 0) {
        const N part = share * (x.over_student * per_student + D::over_student(N(1), above));
        divergence += part;
        psi_sum += part * ln2;
        c.slope = soft * share;
      }
    }
    divergence *= ln2;
  }
  c.level = -soft * psi_sum;
  return divergence * (row.t_squared ? t * t : 1);
}

template <class N>
KDFAST_HD inline N finish_mse(const Sums<N>& x, const RowSettings<N>& row, Coefficients<N>& c) {
  const N mean = x.teacher_total / x.classes;
  const N half = (x.over_teacher - x.teacher_total * mean) / (2 * x.classes);
  c.soft = row.factor * row.alpha / x.classes;
  c.shift = row.shift + (half == half ? mean : half);  // an infinity: NaN throughout
  return half;
}

// From the sums of all classes the row's loss, and the coefficients of `factor` times its gradient.
template <class D, class N>
KDFAST_HD inline Finished<N> finish(const Sums<N>& x, const RowSettings<N>& row) {
  const N ln2 = N(0.69314718055994530942), e = row.label_smoothing;
  Finished<N> done{};
  Coefficients<N>& c = done.c;
  c.student_offset = x.student_offset;
  c.student_total = x.student_total;
  c.teacher_total = 1;
  c.hard_offset = x.hard_offset;
  c.hard_total = x.hard_total;
  c.student_unit = c.teacher_unit = 1;
  if constexpr (kIsMSE<D>) {
    done.soft = finish_mse(x, row, c);
  } else if constexpr (kHasSoftmax<D>) {
    done.soft = finish_soft<D>(x, row, c);
  }
  if (row.alpha != 0) done.loss = row.alpha * done.soft;

  const N log_total = std::log2(x.hard_total);
  if (row.labelled) {
    done.hard = (log_total - x.label) * ln2;
    if (e != 0)
      done.hard = ((1 - e) * (log_total - x.label) + e * (log_total - x.exponents / x.classes)) * ln2;
  }
  if (row.hard_weight != 0) {
    done.loss += row.hard_weight * done.hard;
    c.hard = row.factor * row.hard_weight;
    c.label = c.hard * (1 - e);
    c.uniform = c.hard * e / x.classes;
  }
  if (row.z_loss != 0) {
    N lse = (log_total + x.hard_offset) * ln2;
    lse = lse == -N(INFINITY) ? N(NAN) : lse;  // every class is masked
    done.loss += row.z_loss * lse * lse;
    c.hard += row.factor * 2 * row.z_loss * lse;
  }
  return done;
}

}  // namespace
}  // namespace kdfast
