// Rows of few classes: a vector holds one class of kLanes rows instead of kLanes classes of one row, so that
// no row pays for sums across a vector, for a partly filled one, or for its own logarithms. The same
// formulas, over the same phi and psi, as in row_sums.h and row_gradient.h; the classes are all at hand, so
// the offset is the maximum.
#pragma once

#include <cstddef>
#include <iterator>

#include "convert.h"
#include "row_gradient.h"

namespace kdfast {
namespace {

constexpr int kShort = 64;  // classes; above it the transposition costs more than it saves

enum class Short { kLossAndGradient, kLoss, kGradient };  // what is asked for; the last from the rows' table

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

  // Those of struct Coefficients that such rows have, of kLanes rows.
  struct LaneCoefficients {
    V student_offset, teacher_offset, student, teacher, log_student, log_teacher, shift, psi_sum, soft, hard,
        label, uniform;
  };
  static constexpr size_t kColumnsOf[] = {
#define X(field) offsetof(Coefficients, field) / sizeof(double)
      X(student_offset), X(teacher_offset), X(student), X(teacher), X(log_student), X(log_teacher), X(shift),
      X(psi_sum),        X(soft),           X(hard),    X(label),   X(uniform)
#undef X
  };
  static constexpr size_t kUnits[] = {offsetof(Coefficients, student_unit) / sizeof(double),
                                      offsetof(Coefficients, teacher_unit) / sizeof(double)};
  static_assert(sizeof(LaneCoefficients) == sizeof(V) * std::size(kColumnsOf));

  KD_NOINLINE static void store_table(const LossArgs& a, int64_t begin, int rows, const LaneCoefficients& c) {
    const C* lanes = (const C*)&c;
    for (int r = 0; r < rows; ++r) {
      float* row = a.table + (begin + r) * kColumns;
      std::memset(row, 0, kColumns * sizeof(float));
      if (!a.kept(begin + r)) continue;
      for (size_t k = 0; k < std::size(kColumnsOf); ++k) row[kColumnsOf[k]] = lanes[k * kLanes + r];
      for (size_t k : kUnits) row[k] = 1;
    }
  }
  KD_NOINLINE static LaneCoefficients load_table(const LossArgs& a, int64_t begin, int rows, const Group& g) {
    LaneCoefficients c{};
    C* lanes = (C*)&c;
    for (int r = 0; r < rows; ++r) {
      const float* row = a.table + (begin + r) * kColumns;
      for (size_t k = 0; k < std::size(kColumnsOf); ++k) lanes[k * kLanes + r] = row[kColumnsOf[k]];
    }
    const V factor = at(g.factor);
    c.soft *= factor;
    c.hard *= factor;
    c.label *= factor;
    c.uniform *= factor;
    if constexpr (!P::kPointwise) {
      c.student *= factor;
      c.teacher *= factor;
    }
    return c;
  }

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

  template <Short kWhat>
  KD_NOINLINE static void gather(const LossArgs& a, int64_t begin, int rows, Group& g) {
    for (int r = 0; r < kLanes; ++r) {
      const int64_t row = begin + r;
      const bool kept = r < rows && a.kept(row);
      const RowScale scale = kept ? row_scale(a, row) : RowScale{1, 1, 1, 1, 0};
      g.temperature[r] = scale.temperature;
      g.student[r] = scale.student;
      g.teacher[r] = scale.teacher;
      g.weight[r] = kept ? at_row(a.row_weight, 1, row) : 0;
      // of the gradient: of what is in the table, or of the row's loss
      const double factor = kWhat == Short::kGradient ? at_row(a.row_scale, 1, row) : g.weight[r];
      g.factor[r] = kept ? factor * a.scale : 0;
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

  KD_INLINE static void set_offsets(Exponents<P>& exponents, const Group& g, V student, V teacher) {
    exponents.student_offset = student;
    exponents.hard_offset = student * (P::kOwn ? at(g.temperature) : splat((C)exponents.power));
    exponents.teacher_offset = teacher;
  }

  // Losses of a group, and its gradient's coefficients; the exps are left in the group, psi in P's place.
  KD_NOINLINE static LaneCoefficients loss(const LossArgs& a, int64_t begin, int rows,
                                           Exponents<P>& exponents, Group& g) {
    const int64_t n = a.vocab;
    const V temperature = at(g.temperature);
    V teacher_offset{};
    if constexpr (P::kMSE) {
      for (int64_t i = 0; i < n; ++i) teacher_offset += (at(g.s + i * kLanes) - at(g.t + i * kLanes)) / (C)n;
    } else if constexpr (P::kSoft && !P::kProbs) {
      teacher_offset = exponents.teacher * maximum(g.t, n);
      // all classes masked, as log-probabilities may be: finite, so that probabilities are 0
      teacher_offset = teacher_offset == -std::numeric_limits<C>::infinity() ? V{} : teacher_offset;
    }
    LaneCoefficients c{};
    c.student_offset = exponents.student * maximum(g.s, n);
    c.teacher_offset = teacher_offset;
    set_offsets(exponents, g, c.student_offset, c.teacher_offset);

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

    V loss{};
    const V factor = at(g.factor);
    if constexpr (P::kMSE) {
      const V mean = teacher_sum / (C)n;
      loss = (teacher_running - teacher_sum * mean) * (C)(a.alpha / (2 * n));
      c.teacher = c.soft = factor * (C)(a.alpha / n);
      c.shift = loss == loss ? -mean : loss;
    } else if constexpr (P::kSoft) {
      const bool softmaxed = teacher_is_softmaxed(a);
      const V given = exp2(-teacher_offset);
      const V divided = softmaxed ? teacher_sum : P::kProbs ? V{} + 1 : given;
      const V log_teacher = softmaxed ? log2(teacher_sum) : P::kProbs ? V{} : -teacher_offset;
      const V log_student = log2(student_sum), mass = teacher_sum / divided;
      V divergence{};
      if constexpr (P::kPointwise) {
        with_pointwise(a, [&](auto d) {
          using D = decltype(d);
          const V to_q = 1 / student_sum;
          add_pointwise<C, D>(g.es, g.et, n, to_q, 1 / divided, beta, divergence, c.psi_sum);
          c.psi_sum -=
              c.psi_sum * multiply_subtract(to_q, student_sum, V{} + 1) - 0 * divergence;  // see finish()
          divergence += D::constant(mass, beta);
        });
      } else {
        const V above = log_teacher - log_student;
        if constexpr (P::D::kTeacher) {
          const C share = P::D::teacher_share(a.beta);
          divergence =
              (teacher_running / divided + P::D::over_teacher(mass, -log_student, above)) * (share * (C)kLn2);
          c.psi_sum -= mass * share;
        }
        if constexpr (P::D::kStudent) {
          const V part = (student_running / student_sum + P::D::over_student(V{} + 1, above)) *
                         (C)(kLn2 * P::D::student_share(a.beta));
          divergence += part;
          c.psi_sum += part;
        }
      }
      loss = divergence * (C)a.alpha * (a.t_squared ? temperature * temperature : V{} + 1);
      c.soft = factor * (C)a.alpha * (a.t_squared ? temperature : 1 / temperature);
      const V weight = P::kPointwise ? V{} + 1 : c.soft;
      c.student = weight / student_sum;
      c.teacher = weight / divided;
      c.log_student = -log_student;
      c.log_teacher = -log_teacher;
    }
    if (a.labelled()) {
      const C e = a.label_smoothing;
      V hard = (log2(hard_sum) - exponents.hard(label_logit)) * (C)kLn2;
      if (e != 0) hard = hard * (1 - e) + (log2(hard_sum) - exponent_sum / (C)n) * (e * (C)kLn2);
      loss += hard * (C)a.hard_weight;
      c.hard = V{} + (C)a.hard_weight;
      c.uniform = factor * (C)(a.hard_weight * a.label_smoothing / n);
      c.label = factor * (C)(a.hard_weight * (1 - a.label_smoothing));
    }
    if (a.z_loss != 0) {
      V z = (log2(hard_sum) - exponents.hard(V{})) * (C)kLn2;
      z = z == -std::numeric_limits<C>::infinity() ? z - z : z;
      loss += z * z * (C)a.z_loss;
      c.hard += z * (C)(2 * a.z_loss);
    }
    if (a.hard()) c.hard *= factor / hard_sum;
    loss = at(g.weight) == 0 ? V{} : loss * at(g.weight);
    for (int r = 0; r < rows; ++r) a.losses[begin + r] = loss[r];
    return c;
  }

  // The exps as loss() leaves them, from the table's offsets.
  KD_NOINLINE static void keep_exps(const LossArgs& a, const LaneCoefficients& c, Exponents<P>& exponents,
                                    Group& g) {
    set_offsets(exponents, g, c.student_offset, c.teacher_offset);
    for (int64_t i = 0; i < a.vocab; ++i) {
      const Lanes<P> x = exponents(at(g.s + i * kLanes), at(g.t + i * kLanes));
      store(g.es + i * kLanes, x.es);
      store(g.et + i * kLanes, x.et);
      store(g.e1 + i * kLanes, x.e1);
    }
    if constexpr (P::kPointwise) {
      with_pointwise(a, [&](auto d) {
        V phi{}, psi{};
        add_pointwise<C, decltype(d)>(g.es, g.et, a.vocab, c.student, c.teacher, splat((C)a.beta), phi, psi);
      });
    }
  }

  KD_NOINLINE static void write(const LossArgs& a, int64_t begin, int rows, const LaneCoefficients& c,
                                const Exponents<P>& exponents, Group& g) {
    const int64_t n = a.vocab;
    Gradient<P, true> gradient{};
    gradient.exponents = exponents;
    gradient.student = c.student;
    gradient.teacher = c.teacher;
    gradient.psi_sum = c.psi_sum;
    gradient.soft = c.soft;
    gradient.hard = c.hard;
    gradient.uniform = c.uniform;
    gradient.shift = c.shift;
    if constexpr (P::kSoft && !P::kPointwise) {  // as Gradient::linear has it
      gradient.psi_sum *= -gradient.student;
      if constexpr (P::D::kStudent) {
        gradient.student *= (C)(kLn2 * P::D::student_share(a.beta));
        gradient.psi_sum += gradient.student * (c.log_student - c.log_teacher);
      }
      if constexpr (P::D::kTeacher) gradient.teacher *= (C)P::D::teacher_share(a.beta);
    }
    for (int64_t i = 0; i < n; ++i) {
      const Scratch<C> here{g.es + i * kLanes, g.et + i * kLanes, g.e1 + i * kLanes};
      store(g.es + i * kLanes, gradient.combine(at(g.s + i * kLanes), at(g.t + i * kLanes), here, 0));
    }
    for (int r = 0; r < rows; ++r) {
      S* out = (S*)a.grad + a.grad_layout.offset(begin + r);
      if (!a.kept(begin + r)) {
        std::memset((void*)out, 0, a.width * sizeof(S));
        continue;
      }
      if (g.label[r] >= 0) g.es[g.label[r] * kLanes + r] -= c.label[r];
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

  template <Short kWhat>
  KD_NOINLINE static void run(const LossArgs& a, int64_t begin, int rows, Group& g) {
    gather<kWhat>(a, begin, rows, g);
    Exponents<P> exponents;
    exponents.power = (int)a.temperature;
    exponents.student_unit = exponents.teacher_unit = V{} + 1;
    exponents.student = at(g.student);
    exponents.teacher = at(g.teacher);
    LaneCoefficients c;
    if constexpr (kWhat == Short::kGradient) {
      c = load_table(a, begin, rows, g);
      keep_exps(a, c, exponents, g);
    } else {
      c = loss(a, begin, rows, exponents, g);
    }
    if constexpr (kWhat == Short::kLoss) {
      store_table(a, begin, rows, c);
    } else {
      write(a, begin, rows, c, exponents, g);
    }
  }
};

// The teacher is read as it lies: one tensor, of the student's dtype.
template <class P>
bool takes_short_rows(const LossArgs& a) {
  if (std::is_same_v<typename P::S, double>) return false;
  if (a.vocab > kShort || bytes_of(a.student.dtype) != sizeof(typename P::S)) return false;
  if (a.softcap != 0 || a.teacher_softcap != 0 || a.standardize || a.metrics) return false;
  if (a.divergence == Divergence::kDKD) return false;
  return a.n_teachers == 0 || (a.n_teachers == 1 && a.teachers[0].dtype == a.student.dtype);
}

template <class P, Short kWhat>
KD_NOINLINE void short_rows(const LossArgs& a, int64_t begin, int64_t end) {
  if constexpr (!std::is_same_v<typename P::S, double>) {
    using Group = typename ShortRows<P>::Group;
    Group& group = *(Group*)thread_buffer(sizeof(Group));
    for (int64_t row = begin; row < end; row += P::kLanes) {
      ShortRows<P>::template run<kWhat>(a, row, end - row < P::kLanes ? end - row : P::kLanes, group);
    }
  }
}

}  // namespace
}  // namespace kdfast
