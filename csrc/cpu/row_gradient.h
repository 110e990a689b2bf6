// Passes B and C, and what stands between them and pass A: a row's loss, and the coefficients of its
// gradient.
#pragma once

#include "row_sums.h"

namespace kdfast {
namespace {

template <class P>
struct Row {
  using S = typename P::S;
  using T = typename P::T;
  using C = typename P::C;
  const S* s;
  const T* t;
  S* out;           // where pass C writes
  void* final_out;  // where it ends: the same, unless the student was widened
  Scratch<C> scratch;
  Block<P>* blocks;
};

// What pass C multiplies by, for exps relative to the row's offsets.
struct Coefficients {
  double student, teacher;          // to q and p; where the divergence is linear, with the soft term's weight
  double log_student, log_teacher;  // log q = ln2 * (y + log_student)
  double psi_sum;
  double soft;   // that weight, where it is not in the first two
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

// How a row's teacher becomes p.
struct Teacher {
  double sum;      // what P is divided by
  double log_sum;  // its logarithm; a given log p is exp2(y + offset) as it stands
  double mass;     // sum p
};

template <class P>
Teacher teacher_of(const LossArgs& a, const RowStats& x) {
  if (teacher_is_softmaxed(a))
    return {x.teacher_sum, std::log2(x.teacher_sum), x.teacher_sum / x.teacher_sum};
  if (P::kProbs) return {1, 0, x.teacher_sum};
  const double sum = std::exp2(-x.teacher_offset);
  return {sum, -x.teacher_offset, x.teacher_sum / sum};
}

struct DivergenceSums {
  double divergence, psi;
};

template <class P>
DivergenceSums linear_sums(const RowStats& x, const Teacher& teacher, double beta) {
  const double log_student = std::log2(x.student_sum);
  double over_teacher = 0, over_student = 0;
  if constexpr (P::D::kTeacher) {
    const double rest = P::D::over_teacher(teacher.mass, -teacher.log_sum, -log_student, beta);
    over_teacher = kLn2 * (x.teacher_running / teacher.sum + rest);
  }
  if constexpr (P::D::kStudent) {
    const double rest = P::D::over_student(1., -teacher.log_sum, -log_student, beta);
    over_student = kLn2 * (x.student_running / x.student_sum + rest);
  }
  return {over_teacher + over_student, P::D::psi_sum(over_teacher, over_student, teacher.mass, beta)};
}

// The row's loss without its weight, and what pass C needs, from merged statistics over n classes.
// `pointwise`: pass B's sums, where the divergence has them.
template <class P>
KD_NOINLINE double finish(const LossArgs& a, int64_t row, const RowStats& x, const RowScale& scale,
                          const DivergenceSums& pointwise, double label_logit, double n, Coefficients& c) {
  const double t = scale.temperature;
  double loss = 0;
  c = {};
  if constexpr (P::kMSE) {
    const double mean = x.teacher_sum / n;
    loss = a.alpha * (x.teacher_running - x.teacher_sum * mean) / (2 * n);
    c.teacher = a.alpha / n;
    c.log_teacher = loss == loss ? -mean : loss;  // a row with an infinity is NaN throughout
  } else if constexpr (P::kSoft) {
    const Teacher teacher = teacher_of<P>(a, x);
    DivergenceSums sums = pointwise;
    if constexpr (!P::kPointwise) sums = linear_sums<P>(x, teacher, a.beta);
    loss = a.alpha * (a.t_squared ? t * t : 1) * sums.divergence;
    c.soft = a.alpha * (a.t_squared ? t : 1 / t);
    const double weight = P::kPointwise ? 1 : c.soft;
    c.student = weight / x.student_sum;
    c.teacher = weight / teacher.sum;
    c.log_student = -std::log2(x.student_sum);
    c.log_teacher = -teacher.log_sum;
    c.psi_sum = sums.psi;
    // for q as it is rounded: its sum is not quite 1, and the gradient's is to be 0
    if constexpr (P::kPointwise) c.psi_sum /= (typename P::C)c.student * x.student_sum;
  }
  if (a.labels && a.hard_weight) {
    loss += a.hard_weight * hard_loss<P>(x, scale, label_logit);
    c.hard = a.hard_weight / x.hard_sum;
    c.label = a.hard_weight;
  }
  const double w = at_row(a.weight, 1, row);
  const double factor = w * a.scale * at_row(a.row_scale, 1, row);
  c.soft *= factor;
  if constexpr (!P::kPointwise) {
    c.student *= factor;
    c.teacher *= factor;
  }
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
  V student, teacher, log_student, log_teacher, psi_sum, soft, hard, beta;

  Gradient() = default;
  KD_INLINE Gradient(const RowScale& scale, const Coefficients& c, double so, double to)
      : exponents(scale, so, to),
        student(splat<C>(c.student)),
        teacher(splat<C>(c.teacher)),
        log_student(splat<C>(c.log_student)),
        log_teacher(splat<C>(c.log_teacher)),
        psi_sum(splat<C>(P::kPointwise ? c.psi_sum : c.student * c.psi_sum)),
        soft(splat<C>(c.soft)),
        hard(splat<C>(c.hard)),
        beta(splat<C>(scale.beta)) {}

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
    } else if constexpr (P::kPointwise) {
      g += (x.et - (x.es * student) * psi_sum) * soft;  // psi is in P's place
    } else if constexpr (P::kSoft) {
      const V log_q = (x.ys + log_student) * (C)kLn2, log_p = (x.yt + log_teacher) * (C)kLn2;
      g += P::D::psi(x.et * teacher, x.es * student, log_p, log_q, beta) - x.es * psi_sum;
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

// Pass B over vectors of exps: adds each lane's phi and psi, and leaves psi in P's place.
template <class C, class D>
KD_NOINLINE void add_pointwise(const C* es, C* et, int vectors, typename Types<C>::V to_q,
                               typename Types<C>::V to_p, typename Types<C>::V beta,
                               typename Types<C>::V& phi, typename Types<C>::V& psi) {
  using V = typename Types<C>::V;
  V phi_part{}, psi_part{};  // two levels, as in block_sums
  for (int i = 0; i < vectors; ++i) {
    C* at = et + i * Types<C>::kLanes;
    const V p = load(at) * to_p, q = load(es + i * Types<C>::kLanes) * to_q, each = D::psi(p, q, beta);
    phi_part += D::phi(p, q, beta);
    psi_part += each;
    store(at, each);
    if (i % 16 == 15) {
      phi += phi_part;
      psi += psi_part;
      phi_part = psi_part = V{};
    }
  }
  phi += phi_part;
  psi += psi_part;
}

// f of the divergence's struct.
template <class F>
void with_pointwise(const LossArgs& a, F f) {
  switch (a.divergence) {
#define X(name, Type)                          \
  case Divergence::k##Type:                    \
    if constexpr (Type::kPointwise) f(Type{}); \
    return;
    KDFAST_DIVERGENCES
#undef X
    case Divergence::kNone:
      return;
  }
}

// Pass B over a row of n classes, from the scratch.
template <class P>
DivergenceSums pointwise_sums(const LossArgs& a, const Row<P>& r, int64_t n, const RowScale& scale,
                              const RowStats& stats) {
  DivergenceSums sums{};
  if constexpr (P::kPointwise) {
    using C = typename P::C;
    const Teacher teacher = teacher_of<P>(a, stats);
    Coefficients c{};
    c.student = 1 / stats.student_sum;
    c.teacher = 1 / teacher.sum;
    with_pointwise(a, [&](auto d) {
      using D = decltype(d);
      typename P::V phi{}, psi{};
      for (int64_t at = 0; at < n; at += kBlock) {
        const Coefficients here = at_offsets<P>(c, stats, scale, r.blocks[at / kBlock]);
        const Scratch<C> block = r.scratch.after(at);
        const int64_t vectors = ((n - at < kBlock ? n - at : kBlock) + P::kStep - 1) / P::kStep * 2;
        add_pointwise<C, D>(block.student, block.teacher, vectors, splat<C>(here.student),
                            splat<C>(here.teacher), splat<C>(a.beta), phi, psi);
      }
      sums = {sum(phi) + D::constant(teacher.mass, a.beta), sum(psi)};
    });
  }
  return sums;
}

}  // namespace
}  // namespace kdfast
