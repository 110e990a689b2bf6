// Rows of few classes: a vector holds one class of kLanes rows instead of kLanes classes of one row, so that
// no row pays for sums across a vector, for a partly filled one, or for its own logarithms. The same
// formulas, over the same phi and psi, as in row_sums.h and row_gradient.h; the classes are all at hand, so
// the offset is the maximum.
#pragma once

#include "convert.h"
#include "row_gradient.h"

namespace kdfast {
namespace {

constexpr int kShort = 64;  // classes; above it the transposition costs more than it saves

template <class P>
struct ShortRows {
  using S = typename P::S;
  using T = typename P::T;
  using C = typename P::C;
  using V = typename P::V;
  static constexpr int kLanes = P::kLanes;

  // One class of kLanes rows after the other. Rows that drop out hold zeros, and factor 0.
  struct alignas(64) Group {
    C s[kShort * kLanes], t[kShort * kLanes], es[kShort * kLanes], et[kShort * kLanes], e1[kShort * kLanes];
    C temperature[kLanes], student[kLanes], teacher[kLanes], weight[kLanes], factor[kLanes];
    int64_t label[kLanes];
  };

  KD_INLINE static V at(const C* lanes) { return load(lanes); }

  template <class X>
  KD_INLINE static void transpose(const X* row, int64_t n, C* column) {
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (sizeof(X) == 2) {
        column[i * kLanes] = load_one(row + i);
      } else {
        column[i * kLanes] = row[i];
      }
    }
  }

  KD_NOINLINE static void gather(const LossArgs& a, int64_t begin, int rows, Group& g) {
    for (int r = 0; r < kLanes; ++r) {
      const int64_t row = begin + r;
      const bool kept = r < rows && a.kept(row);
      const RowScale scale = kept ? row_scale(a, row) : RowScale{1, 1, 1, 1, 0};
      g.temperature[r] = scale.temperature;
      g.student[r] = scale.student;
      g.teacher[r] = scale.teacher;
      g.weight[r] = kept ? at_row(a.row_weight, 1, row) : 0;
      g.factor[r] = kept ? g.weight[r] * a.scale * at_row(a.row_scale, 1, row) : 0;
      g.label[r] = kept && a.labelled() ? a.labels[row] : -1;
      if (kept) {
        transpose((const S*)row_of(a.student, row), a.vocab, g.s + r);
        if constexpr (P::kSoft || P::kMSE) transpose((const T*)row_of(a.teachers[0], row), a.vocab, g.t + r);
      } else {
        for (int64_t i = 0; i < a.vocab; ++i) g.s[i * kLanes + r] = g.t[i * kLanes + r] = 0;
      }
    }
  }

  static V maximum(const C* z, int64_t n) {
    V high = splat(-std::numeric_limits<C>::infinity());
    for (int64_t i = 0; i < n; ++i) high = max(load(z + i * kLanes), high);
    return high;
  }

  // Losses of a group and, where `write`, its gradient.
  KD_NOINLINE static void run(const LossArgs& a, int64_t begin, int rows, bool write, Group& g) {
    const int64_t n = a.vocab;
    gather(a, begin, rows, g);
    Exponents<P> exponents;
    const V temperature = at(g.temperature);
    exponents.power = (int)a.temperature;
    exponents.student_unit = exponents.teacher_unit = V{} + 1;
    exponents.student = at(g.student);
    exponents.teacher = at(g.teacher);
    const V high = maximum(g.s, n);
    exponents.student_offset = exponents.student * high;
    exponents.hard_offset = exponents.student_offset * (P::kOwn ? temperature : splat((C)exponents.power));
    V teacher_offset{};
    if constexpr (P::kMSE) {
      for (int64_t i = 0; i < n; ++i) teacher_offset += (at(g.s + i * kLanes) - at(g.t + i * kLanes)) / (C)n;
    } else if constexpr (P::kSoft && !P::kProbs) {
      teacher_offset = exponents.teacher * maximum(g.t, n);
      // all classes masked, as log-probabilities may be: finite, so that probabilities are 0
      teacher_offset = teacher_offset == -std::numeric_limits<C>::infinity() ? V{} : teacher_offset;
    }
    exponents.teacher_offset = teacher_offset;

    V student_sum{}, teacher_sum{}, hard_sum{}, teacher_running{}, student_running{}, label_logit{},
        exponent_sum{};
    const V beta = splat((C)a.beta);
    for (int64_t i = 0; i < n; ++i) {
      const Lanes<P> x = exponents(at(g.s + i * kLanes), at(g.t + i * kLanes));
      store(g.es + i * kLanes, x.es);
      store(g.et + i * kLanes, x.et);
      store(g.e1 + i * kLanes, x.e1);
      student_sum += x.es;
      teacher_sum += x.et;
      hard_sum += x.e1;
      exponent_sum += exponents.hard(at(g.s + i * kLanes));
      if constexpr (P::kMSE) teacher_running += x.et * x.et;
      if constexpr (P::D::kTeacher) teacher_running += P::D::over_teacher(x.et, x.ys, x.ys - x.yt);
      if constexpr (P::D::kStudent) student_running += P::D::over_student(x.es, x.ys - x.yt);
    }
    for (int r = 0; r < kLanes; ++r) label_logit[r] = g.label[r] < 0 ? 0 : g.s[g.label[r] * kLanes + r];

    Gradient<P, true> gradient{};
    gradient.exponents = exponents;
    V loss{};
    const V factor = at(g.factor);
    if constexpr (P::kMSE) {
      const V mean = teacher_sum / (C)n;
      loss = (teacher_running - teacher_sum * mean) * (C)(a.alpha / (2 * n));
      gradient.teacher = factor * (C)(a.alpha / n);
      gradient.shift = loss == loss ? -mean : loss;
    } else if constexpr (P::kSoft) {
      const bool softmaxed = teacher_is_softmaxed(a);
      const V given = exp2(-teacher_offset);
      const V divided = softmaxed ? teacher_sum : P::kProbs ? V{} + 1 : given;
      const V log_teacher = softmaxed ? log2(teacher_sum) : P::kProbs ? V{} : -teacher_offset;
      const V log_student = log2(student_sum), mass = teacher_sum / divided;
      V divergence{}, psi_sum{};
      if constexpr (P::kPointwise) {
        with_pointwise(a, [&](auto d) {
          using D = decltype(d);
          const V to_q = 1 / student_sum;
          add_pointwise<C, D>(g.es, g.et, n, to_q, 1 / divided, beta, divergence, psi_sum);
          psi_sum -=
              psi_sum * multiply_subtract(to_q, student_sum, V{} + 1) - 0 * divergence;  // see finish()
          divergence += D::constant(mass, beta);
        });
      } else {
        const V above = log_teacher - log_student;
        if constexpr (P::D::kTeacher) {
          const C share = P::D::teacher_share(a.beta);
          divergence =
              (teacher_running / divided + P::D::over_teacher(mass, -log_student, above)) * (share * (C)kLn2);
          psi_sum -= mass * share;
        }
        if constexpr (P::D::kStudent) {
          const V part = (student_running / student_sum + P::D::over_student(V{} + 1, above)) *
                         (C)(kLn2 * P::D::student_share(a.beta));
          divergence += part;
          psi_sum += part;
        }
      }
      loss = divergence * (C)a.alpha * (a.t_squared ? temperature * temperature : V{} + 1);
      const V weight = factor * (C)a.alpha * (a.t_squared ? temperature : 1 / temperature);
      gradient.soft = weight;
      gradient.student = (P::kPointwise ? V{} + 1 : weight) / student_sum;
      gradient.teacher = weight / divided;
      gradient.psi_sum = psi_sum;
      if constexpr (!P::kPointwise) {  // as Gradient::linear has it
        gradient.psi_sum *= -gradient.student;
        if constexpr (P::D::kStudent) {
          gradient.student *= (C)(kLn2 * P::D::student_share(a.beta));
          gradient.psi_sum += gradient.student * (log_teacher - log_student);
        }
        if constexpr (P::D::kTeacher) gradient.teacher *= (C)P::D::teacher_share(a.beta);
      }
    }
    V label_weight{};
    gradient.hard = gradient.uniform = V{};
    if (a.labelled()) {
      const C e = a.label_smoothing;
      V hard = (log2(hard_sum) - exponents.hard(label_logit)) * (C)kLn2;
      if (e != 0) hard = hard * (1 - e) + (log2(hard_sum) - exponent_sum / (C)n) * (e * (C)kLn2);
      loss += hard * (C)a.hard_weight;
      gradient.hard = V{} + (C)a.hard_weight;
      gradient.uniform = factor * (C)(a.hard_weight * a.label_smoothing / n);
      label_weight = factor * (C)(a.hard_weight * (1 - a.label_smoothing));
    }
    if (a.z_loss != 0) {
      V z = (log2(hard_sum) - exponents.hard(V{})) * (C)kLn2;
      z = z == -std::numeric_limits<C>::infinity() ? z - z : z;
      loss += z * z * (C)a.z_loss;
      gradient.hard += z * (C)(2 * a.z_loss);
    }
    if (a.hard()) gradient.hard *= factor / hard_sum;
    loss = at(g.weight) == 0 ? V{} : loss * at(g.weight);
    for (int r = 0; r < rows; ++r) a.losses[begin + r] = loss[r];
    if (!write) return;

    for (int64_t i = 0; i < n; ++i) {
      const Scratch<C> here{g.es + i * kLanes, g.et + i * kLanes, g.e1 + i * kLanes};
      store(g.es + i * kLanes, gradient.combine(at(g.s + i * kLanes), at(g.t + i * kLanes), here, 0));
    }
    for (int r = 0; r < rows; ++r) {
      if (g.label[r] >= 0) g.es[g.label[r] * kLanes + r] -= label_weight[r];
      S* out = (S*)a.grad + a.grad_layout.offset(begin + r);
      if (g.factor[r] == 0 && !a.kept(begin + r)) {
        std::memset((void*)out, 0, a.width * sizeof(S));
        continue;
      }
      for (int64_t i = 0; i < n; ++i) {
        if constexpr (sizeof(S) == 2) {
          store_part(out + i, splat(g.es[i * kLanes + r]), 1);
        } else {
          out[i] = g.es[i * kLanes + r];
        }
      }
      if (a.width > n) std::memset((void*)(out + n), 0, (a.width - n) * sizeof(S));
    }
  }
};

// They keep no statistics: `grad` makes them again, which costs less than to keep them.
// The teacher is read as it lies: one tensor, of the student's dtype.
template <class P>
bool takes_short_rows(const LossArgs& a) {
  if (std::is_same_v<typename P::S, double>) return false;
  if (a.vocab > kShort || bytes_of(a.student.dtype) != sizeof(typename P::S)) return false;
  if (a.softcap != 0 || a.teacher_softcap != 0 || a.standardize || a.metrics) return false;
  if (a.divergence == Divergence::kDKD) return false;
  return a.n_teachers == 0 || (a.n_teachers == 1 && a.teachers[0].dtype == a.student.dtype);
}

template <class P>
KD_NOINLINE void short_rows(const LossArgs& a, int64_t begin, int64_t end, bool write) {
  if constexpr (!std::is_same_v<typename P::S, double>) {
    using Group = typename ShortRows<P>::Group;
    Group& group = *(Group*)thread_buffer(sizeof(Group));
    for (int64_t row = begin; row < end; row += P::kLanes) {
      ShortRows<P>::run(a, row, end - row < P::kLanes ? end - row : P::kLanes, write, group);
    }
  }
}

}  // namespace
}  // namespace kdfast
