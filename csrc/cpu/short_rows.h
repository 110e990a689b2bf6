// Rows of few classes: a vector holds one class of kLanes rows instead of kLanes classes of one row, so that
// no row pays for sums across a vector, for a partly filled one, or for its own logarithms. The same
// formulas, over the same phi and psi, as in row_sums.h and row_gradient.h; the classes are all at hand, so
// the offset is the maximum.
#pragma once

#include <cstddef>

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

  // Which coefficients such rows have; the others are 0.
#define COLUMN(field) (offsetof(Coefficients<char>, field))
  static constexpr bool has(size_t column) {
    if (column == COLUMN(soft) || column == COLUMN(center)) return P::kPointwise || P::kMSE;
    if (column >= COLUMN(level) && column <= COLUMN(teacher)) return !P::kPointwise && !P::kMSE;
    return column <= COLUMN(uniform) || column == COLUMN(student_unit) || column == COLUMN(teacher_unit);
  }
#undef COLUMN
  KD_NOINLINE static void store_table(const LossArgs& a, int64_t begin, int rows, const Coefficients<V>& c) {
    const C* lanes = (const C*)&c;
    for (int r = 0; r < rows; ++r) {
      float* row = a.table + (begin + r) * kCoefficients;
      std::memset(row, 0, kCoefficients * sizeof(float));
      if (!a.kept(begin + r)) continue;
#pragma GCC unroll 32
      for (int k = 0; k < kCoefficients; ++k) {
        if (has(k)) row[k] = lanes[k * kLanes + r];
      }
    }
  }
  KD_NOINLINE static Coefficients<V> load_table(const LossArgs& a, int64_t begin, int rows, const Group& g) {
    Coefficients<V> c{};
    C* lanes = (C*)&c;
    for (int r = 0; r < rows; ++r) {
      const float* row = a.table + (begin + r) * kCoefficients;
#pragma GCC unroll 32
      for (int k = 0; k < kCoefficients; ++k) {
        if (has(k)) lanes[k * kLanes + r] = row[k];
      }
    }
    scale_gradient(c, at(g.factor));
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
      const int64_t label = kept && a.labelled() ? a.labels[row] : -1;
      g.label[r] = label < a.vocab ? label : -1;
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

  // Passes A and B over a group; the exps are left in it, psi in P's place.
  KD_NOINLINE static Sums<V> sums(const LossArgs& a, Exponents<P>& exponents, Group& g) {
    const int64_t n = a.vocab;
    V teacher_offset{};
    if constexpr (P::kMSE) {
      for (int64_t i = 0; i < n; ++i) teacher_offset += (at(g.s + i * kLanes) - at(g.t + i * kLanes)) / (C)n;
    } else if constexpr (P::kSoft && !P::kProbs) {
      teacher_offset = exponents.teacher * maximum(g.t, n);
      // all classes masked, as log-probabilities may be: finite, so that probabilities are 0
      teacher_offset = teacher_offset == -std::numeric_limits<C>::infinity() ? V{} : teacher_offset;
    }
    set_offsets(exponents, g, exponents.student * maximum(g.s, n), teacher_offset);
    Sums<V> x{exponents.student_offset, V{}, teacher_offset, V{}, exponents.hard_offset};
    x.classes += (C)n;
    for (int64_t i = 0; i < n; ++i) {
      const Lanes<P> each = exponents(at(g.s + i * kLanes), at(g.t + i * kLanes));
      store(g.es + i * kLanes, each.es);
      store(g.et + i * kLanes, each.et);
      store(g.e1 + i * kLanes, each.e1);
      x.student_total += each.es;
      x.teacher_total += each.et;
      x.hard_total += each.e1;
      x.exponents += exponents.hard(at(g.s + i * kLanes));
      if constexpr (P::kMSE) x.over_teacher += each.et * each.et;
      if constexpr (P::D::kTeacher) x.over_teacher += P::D::over_teacher(each.et, each.ys, each.ys - each.yt);
      if constexpr (P::D::kStudent) x.over_student += P::D::over_student(each.es, each.ys - each.yt);
    }
    V label_logit{};
    for (int r = 0; r < kLanes; ++r) label_logit[r] = g.label[r] < 0 ? 0 : g.s[g.label[r] * kLanes + r];
    x.label = exponents.hard(label_logit);
    if constexpr (P::kPointwise) {
      const V given = exp2(-teacher_offset);
      with_pointwise(a, [&](auto d) {
        add_pointwise<C, decltype(d)>(g.es, g.et, n, 1 / x.student_total,
                                      1 / (teacher_is_softmaxed(a) ? x.teacher_total : given),
                                      splat((C)a.beta), x.phi, x.psi);
      });
    }
    return x;
  }

  // Losses of a group, and its gradient's coefficients.
  KD_NOINLINE static Coefficients<V> loss(const LossArgs& a, int64_t begin, int rows, const Sums<V>& x,
                                          const Group& g, Scales<V>& scales) {
    const RowTerms<V, C> terms{at(g.temperature),
                               at(g.factor),
                               V{} + 1,
                               multiply_subtract(1 / x.student_total, x.student_total, V{} + 1),
                               (C)a.alpha,
                               (C)a.hard_weight,
                               (C)a.label_smoothing,
                               (C)a.z_loss,
                               (C)a.beta,
                               a.t_squared,
                               teacher_is_softmaxed(a),
                               a.labelled()};
    Coefficients<V> c;
    RowLoss<V> out{};
    if constexpr (P::kPointwise) {
      with_pointwise(a, [&](auto d) { out = loss_and_coefficients<decltype(d)>(x, terms, c); });
    } else {
      out = loss_and_coefficients<typename P::D>(x, terms, c);
    }
    scales = scales_with(c, out.log_student, out.log_teacher);
    const V weight = at(g.weight), weighted = weight == 0 ? V{} : out.loss * weight;
    for (int r = 0; r < rows; ++r) a.losses[begin + r] = weighted[r];
    return c;
  }

  // The exps as sums() leaves them, from the table's offsets.
  KD_NOINLINE static void keep_exps(const LossArgs& a, const Coefficients<V>& c, Exponents<P>& exponents,
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
        add_pointwise<C, decltype(d)>(g.es, g.et, a.vocab, 1 / c.student_total, 1 / c.teacher_total,
                                      splat((C)a.beta), phi, psi);
      });
    }
  }

  KD_NOINLINE static void write(const LossArgs& a, int64_t begin, int rows, const Coefficients<V>& c,
                                const Scales<V>& scales, const Exponents<P>& exponents, Group& g) {
    const int64_t n = a.vocab;
    Gradient<P, true> gradient{};
    gradient.exponents = exponents;
    gradient.per = per_exp<C>(c, scales);
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
    Coefficients<V> c;
    Scales<V> scales;
    if constexpr (kWhat == Short::kGradient) {
      c = load_table(a, begin, rows, g);
      scales = scales_of(c);
      keep_exps(a, c, exponents, g);
    } else {
      c = loss(a, begin, rows, sums(a, exponents, g), g, scales);
    }
    if constexpr (kWhat == Short::kLoss) {
      store_table(a, begin, rows, c);
    } else {
      write(a, begin, rows, c, scales, exponents, g);
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
