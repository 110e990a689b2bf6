// The losses of image classifiers: what standardized logits, logit_mse and decoupled KD have of their own.
//
// Their parts in the loops over classes that all losses share stay there: logit_mse's difference (kMSE) in
// exponents.h, block_sums.h and row_gradient.h, and the tilt in row_gradient.h. logit_mse's loss and merge
// rule are in ../row_math.h, for CUDA takes them too.
#pragma once

#include "block_sums.h"
#include "convert.h"

namespace kdfast {
namespace {

// ---- standardized logits: (s - mean) / (1e-7 + deviation), of which softmax needs no mean ----

struct Moments {  // of a row's logits
  double mean, deviation;
  double unit(double logit_scale) const { return 1 / (1e-7 + logit_scale * deviation); }
};

// The sample deviation, about the mean of the first classes, which is near enough to lose no digits.
template <class X>
KD_NOINLINE Moments moments(const X* x, int64_t n) {
  using C = Compute<X>;
  using V = typename Types<C>::V;
  constexpr int kLanes = Types<C>::kLanes;
  const int first = n < 128 ? n : 128;
  double pivot = 0;
  for (int i = 0; i < first; ++i) pivot += load_one(x + i);
  const C middle = pivot / first;
  const V about = splat(middle);
  double total = 0, squares = 0;
  constexpr int64_t kUnrolled = 4 * kLanes, kPart = 32 * kUnrolled;  // two levels of sums
  for (int64_t at = 0; at < n; at += kPart) {
    V part[4] = {}, part_squares[4] = {};
    const int64_t end = n - at < kPart ? n : at + kPart;
    int64_t i = at;
    for (; i + kUnrolled <= end; i += kUnrolled) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; k += 2) {
        const auto at_k = load2(x + i + k * kLanes);
        const V a = at_k.a - about, b = at_k.b - about;
        part[k] += a;
        part[k + 1] += b;
        part_squares[k] += a * a;
        part_squares[k + 1] += b * b;
      }
    }
    for (; i < end; i += kLanes) {
      const V v = (end - i < kLanes ? load_part(x + i, end - i, middle) : load(x + i)) - about;
      part[0] += v;
      part_squares[0] += v * v;
    }
    total += sum((part[0] + part[1]) + (part[2] + part[3]));
    squares += sum((part_squares[0] + part_squares[1]) + (part_squares[2] + part_squares[3]));
  }
  const double variance = n > 1 ? (squares - total * total / n) / (n - 1) : 0 * squares;
  return {middle + total / n, variance < 0 ? 0 : std::sqrt(variance)};  // NaN stays
}

template <class C>
KD_INLINE void set_units(RowScale& scale, double student, double teacher, bool mse) {
  scale.student_unit = student;
  scale.teacher_unit = teacher;
  if (mse) return;  // its difference takes the units themselves
  const double hard = scale.hard;
  // volatile: GCC 12, where it makes one vector of both, leaves out the student's rounding
  const volatile C rounded_student = scale.student * student, rounded_teacher = scale.teacher * teacher;
  scale.student = rounded_student;
  scale.teacher = rounded_teacher;
  scale.hard_multiple = (C)(hard / scale.student);
  scale.hard = scale.student * scale.hard_multiple;
  scale.invert();
}

// Several teachers were standardized when they were mixed.
template <class P>
KD_INLINE Moments standardize(const LossArgs& a, const typename P::S* s,
                              [[maybe_unused]] const typename P::T* t, RowScale& scale) {
  const Moments student = moments(s, a.vocab);
  double teacher_unit = 1;
  if constexpr (P::kReadsTeacher) {
    if (a.n_teachers == 1) teacher_unit = moments(t, a.vocab).unit(scale.teacher_logit_scale);
  }
  set_units<typename P::C>(scale, student.unit(scale.logit_scale), teacher_unit, P::kMSE);
  return student;
}

// The standard deviation's part of the gradient is tilt * (s_i - mean). With g the soft term's gradient at a
// fixed deviation d, dot = sum g_j (s_j - mean) and tilt = -dot / ((1e-7 + d) (n - 1) d). Moments and dot are
// of logits that lack logit_scale.
KD_INLINE double tilt(const Moments& m, int64_t n, double dot, double logit_scale) {
  return m.deviation == 0 ? 0 : -dot * logit_scale * m.unit(logit_scale) / ((n - 1) * m.deviation);
}

// ---- logit_mse ----

// The mean of s - t over a block, which its sums are about.
template <class P>
KD_NOINLINE double mean_difference(const typename P::S* s, const typename P::T* t, int n,
                                   const RowScale& scale) {
  using C = typename P::C;
  const C a = scale.student_unit * scale.logit_scale, b = scale.teacher_unit * scale.teacher_logit_scale;
  double total = 0;
  for (int i = 0; i < n; i += P::kStep) {
    const int m = n - i < P::kStep ? n - i : P::kStep;
    const auto si = load_student<P>(s + i, m);
    const auto ti = load_teacher<P>(t + i, m);
    total += sum(si.a * a - ti.a * b) + sum(si.b * a - ti.b * b);
  }
  return (C)(total / n);
}

// ---- decoupled KD: forward KL's sums over the classes that are not the label, and the label apart ----

// log2(1 + 2^x)
double log_1_plus_exp2(double x) { return x > 64 ? x : std::log1p(std::exp2(x)) / kLn2; }

struct Split {  // the probability of the label, and of all others, with their logarithms to base 2
  double label, others, log_label, log_others;
};
Split split_by_softmax(double log_label, double log_others) {
  const double more = log_others - log_label;
  const double a = -log_1_plus_exp2(more), b = -log_1_plus_exp2(-more);
  return {std::exp2(a), std::exp2(b), a, b};
}

// D, and its gradient's coefficients, from the label's exponents ys and yt and the sums of the others. With
// p^ and q^ over the other classes alone, and what both of its gradient's parts have in common in brackets,
//
//   dD/ds_i = (q^_i [w_0 (p_y (1 - q_y) - (1 - p_y) q_y) + w_1] - w_1 p^_i) / T
//   dD/ds_y = -w_0 (p_y (1 - q_y) - (1 - p_y) q_y) / T
double decoupled_divergence(const LossArgs& a, const Sums<double>& x, const RowTerms<double, double>& r,
                            double ys, double yt, Coefficients<double>& c) {
  const double t = r.temperature, weight = r.factor * r.unit * r.alpha * (r.t_squared ? t : 1 / t);
  const Split q = split_by_softmax(ys, std::log2(x.student_total));
  Split p = split_by_softmax(yt, std::log2(x.teacher_total));
  if (!r.softmaxed) {
    p = {std::exp2(yt), x.teacher_total, yt, std::log2(x.teacher_total)};
  }
  const double target =
      masked(p.label, p.log_label - q.log_label) + masked(p.others, p.log_others - q.log_others);
  const double w = a.dkd_target, pull = p.label * q.others - p.others * q.label;
  c.at_label = -weight * w * pull;
  if (x.student_total == 0) {  // no class is left for the student
    c.student_total = 1;
  } else {
    c.level = weight * w * pull;
  }
  if (x.teacher_total == 0) {  // nor for the teacher
    c.teacher_total = 1;
    return kLn2 * masked(w, target);
  }
  c.teacher = weight * a.dkd_others;
  if (x.student_total != 0) c.level += c.teacher;
  const double among = x.student_total == 0 ? kInfinity
                                            : x.over_teacher / x.teacher_total + std::log2(x.student_total) -
                                                  std::log2(x.teacher_total);
  return kLn2 * (masked(w, target) + masked(a.dkd_others, among));  // a weight of 0 meets no infinity
}

// Of a row. soft_at_label: the soft term's part of c.at_label.
KD_NOINLINE RowLoss<double> dkd_loss_and_coefficients(const LossArgs& a, const Sums<double>& x,
                                                      const RowTerms<double, double>& r, double ys, double yt,
                                                      Coefficients<double>& c, double& soft_at_label) {
  Sums<double> with_label = x;
  double up = 0;  // how far the offset is raised for the label
  if (a.needs_hard_sum()) {
    up = x.hard_total == 0 ? x.label : std::fmax(x.label, 0.);
    with_label.student_offset = finite(x.student_offset) + up * kLn2 / r.logit_scale;
    with_label.hard_total = scaled(x.hard_total, -up) + std::exp2(x.label - up);
    with_label.label = x.label - up;
    with_label.exponents = x.exponents - x.classes * up;
  }
  RowLoss<double> out = loss_and_coefficients<NoDivergence>(with_label, r, c);
  const double hard_at_label = masked(c.hard, std::exp2(with_label.label) / with_label.hard_total) - c.label;
  c.student_offset = x.student_offset;
  c.hard_total = with_label.hard_total;
  if (x.hard_total != 0) c.hard_total *= std::exp2(up);  // else no class is multiplied by it
  const double divergence = decoupled_divergence(a, x, r, ys, yt, c);
  out.soft = r.distributions ? not_below_0(divergence) : divergence;
  if (r.t_squared) out.soft *= r.temperature * r.temperature;
  out.loss += r.alpha * out.soft;
  soft_at_label = c.at_label;
  c.at_label += hard_at_label;
  return out;
}

}  // namespace
}  // namespace kdfast
