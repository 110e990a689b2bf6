// Pass C, and what stands between it and pass A: a row's loss, and the coefficients of its gradient.
#pragma once

#include "row_sums.h"

namespace kdfast {
namespace {

// What pass C multiplies by, for exps relative to the row's offsets.
struct Coefficients {
  double student, teacher;          // to q and p, with the soft term's weight
  double log_student, log_teacher;  // log q = ln2 * (y + log_student)
  double psi_sum;
  double hard;   // to the hard term's weight * q1
  double label;  // that weight itself
};

template <class P>
double hard_loss(const RowStats& x, const RowScale& scale, double label_logit) {
  using C = typename P::C;
  const C so = x.student_offset;
  const double y = P::kOwn ? label_logit * (C)kLog2E - hard_offset<P>(scale, so)
                           : scale.power * (label_logit * (C)scale.student - so);
  return kLn2 * (std::log2(x.hard_sum) - y);
}

// The row's loss without its weight, and what pass C needs, from merged statistics over n classes.
template <class P>
KD_NOINLINE double finish(const LossArgs& a, int64_t row, const RowStats& x, const RowScale& scale,
                          double label_logit, double n, Coefficients& c) {
  const double t = scale.temperature;
  double loss = 0;
  c = {};
  if constexpr (P::kMSE) {
    const double mean = x.teacher_sum / n;
    loss = a.alpha * (x.running - x.teacher_sum * mean) / (2 * n);
    c.teacher = a.alpha / n;
    c.log_teacher = loss == loss ? -mean : loss;  // a row with an infinity is NaN throughout
  } else if constexpr (P::kSoft) {
    const bool softmaxed = teacher_is_softmaxed(a);
    // logarithm of the sum that P is divided by to give p; a given log p is exp2(y + offset) as it stands
    const double log_teacher = softmaxed ? std::log2(x.teacher_sum) : P::kProbs ? 0 : -x.teacher_offset;
    const double teacher_sum = softmaxed ? x.teacher_sum : P::kProbs ? 1 : std::exp2(-x.teacher_offset);
    const double mass = softmaxed ? x.teacher_sum / x.teacher_sum : x.teacher_sum / teacher_sum;
    const double log_student = std::log2(x.student_sum);
    const double over = P::D::kOver == Over::kTeacher ? teacher_sum : x.student_sum;
    const double divergence = kLn2 * (x.running / over + P::D::phi(mass, 1., -log_teacher, -log_student));
    loss = a.alpha * (a.t_squared ? t * t : 1) * divergence;
    const double weight = a.alpha * (a.t_squared ? t : 1 / t);
    c.student = weight / x.student_sum;
    c.teacher = weight / teacher_sum;
    c.log_student = -log_student;
    c.log_teacher = -log_teacher;
    c.psi_sum = P::D::psi_sum(divergence, mass);
  }
  if (a.labels && a.hard_weight) {
    loss += a.hard_weight * hard_loss<P>(x, scale, label_logit);
    c.hard = a.hard_weight / x.hard_sum;
    c.label = a.hard_weight;
  }
  const double w = at_row(a.weight, 1, row);
  const double factor = w * a.scale * at_row(a.row_scale, 1, row);
  c.student *= factor;
  c.teacher *= factor;
  c.hard *= factor;
  c.label *= factor;
  return w * loss;
}

// The same for the exps of a block that has other offsets.
template <class P>
KD_NOINLINE Coefficients at_offsets(Coefficients c, const RowStats& row, const RowScale& scale,
                                    const Block<P>& block) {
  const double ds = block.student_offset - row.student_offset, dt = block.teacher_offset - row.teacher_offset;
  c.log_student += ds;
  c.log_teacher += dt;
  if constexpr (!P::kMSE) c.teacher = scaled(c.teacher, dt);
  if (ds == 0) return c;
  c.student = scaled(c.student, ds);
  c.hard = scaled(c.hard, ds == -kInfinity ? ds
                                           : hard_offset<P>(scale, block.student_offset) -
                                                 hard_offset<P>(scale, row.student_offset));
  return c;
}

// Pass C over one block, from the scratch (kKeep) or from the logits.
template <class P, bool kKeep>
struct Gradient {
  using S = typename P::S;
  using T = typename P::T;
  using C = typename P::C;
  using V = typename P::V;
  Exponents<P> exponents;
  V student, teacher, log_student, log_teacher, psi_sum, hard;

  Gradient() = default;
  KD_INLINE Gradient(const RowScale& scale, const Coefficients& c, double so, double to)
      : exponents(scale, so, to),
        student(splat<C>(c.student)),
        teacher(splat<C>(c.teacher)),
        log_student(splat<C>(c.log_student)),
        log_teacher(splat<C>(c.log_teacher)),
        psi_sum(splat<C>(c.student * c.psi_sum)),
        hard(splat<C>(c.hard)) {}

  KD_INLINE V combine(V s, V t, Scratch<C> kept, int i) const {
    Lanes<P> x = exponents(s, t);
    if constexpr (kKeep) {  // the logits are then read only where psi needs a logarithm
      x.es = load(kept.student + i);
      x.e1 = P::kOwn ? load(kept.hard + i) : exponents.power_of(x.es);
      if constexpr (P::kSoft || P::kMSE) x.et = load(kept.teacher + i);
    }
    V g = x.e1 * hard;
    if constexpr (P::kMSE) {
      g += (x.et + log_teacher) * teacher;
    } else if constexpr (P::kSoft) {
      const V log_q = (x.ys + log_student) * (C)kLn2, log_p = (x.yt + log_teacher) * (C)kLn2;
      g += P::D::psi(x.et * teacher, x.es * student, log_p, log_q) - x.es * psi_sum;
    }
    return g;
  }

  KD_NOINLINE void write(const S* s, const T* t, Scratch<C> kept, int n, S* out) const {
    for (int i = 0; i < n; i += P::kStep) {
      const int m = n - i < P::kStep ? n - i : P::kStep;
      const auto si = load_student<P>(s + i, m);
      const auto ti = load_teacher<P>(t + i, m);
      const Two<V> g{combine(si.a, ti.a, kept, i), combine(si.b, ti.b, kept, i + P::kLanes)};
      if (m == P::kStep) {
        store2(out + i, g);
      } else {
        store2_part(out + i, g, m);
      }
    }
  }
};

}  // namespace
}  // namespace kdfast
