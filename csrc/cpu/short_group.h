// A group of rows of few classes, transposed: a vector holds one class of kLanes rows.
#pragma once

#include <cstddef>

#include "row.h"

namespace kdfast {
namespace {

constexpr int kShort = 64;  // classes; above it the transposition costs more than it saves

// One class of kLanes rows after the other. Dropped rows hold zeros, and factor 0.
template <class C>
struct alignas(64) ShortGroup {
  static constexpr int kLanes = Types<C>::kLanes;
  C s[kShort * kLanes], t[kShort * kLanes], es[kShort * kLanes], et[kShort * kLanes], e1[kShort * kLanes];
  C temperature[kLanes], student_scale[kLanes], teacher_scale[kLanes], weight[kLanes], factor[kLanes];
  int64_t label[kLanes];
};

template <class X, class C>
KD_INLINE void transpose(const X* row, int64_t n, C* column) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (sizeof(X) == 2) {
      column[i * Types<C>::kLanes] = load_one(row + i);
    } else {
      column[i * Types<C>::kLanes] = row[i];
    }
  }
}

// is_grad: whether the gradient is to be made from a table, and not from the row's loss.
template <class S, class T, bool kTeacher>
KD_NOINLINE void load_group(const LossArgs& a, int64_t begin, int rows, bool is_grad,
                            ShortGroup<Compute<S>>& g) {
  constexpr int kLanes = Types<Compute<S>>::kLanes;
  const bool alike = have_one_scale(a);
  RowScale scale = alike ? row_scale(a, 0) : RowScale{};
  for (int r = 0; r < kLanes; ++r) {
    const int64_t row = begin + r;
    const bool kept = r < rows && a.is_kept(row);
    if (!alike) scale = kept ? row_scale(a, row) : RowScale{{1, 1, 1}, 1, 0, 1};
    g.temperature[r] = scale.temperature;
    g.student_scale[r] = scale.student;
    g.teacher_scale[r] = scale.teacher;
    g.weight[r] = kept ? a.weight(row) : 0;
    const double factor = is_grad ? row_value(a.row_scale, 1, row) : g.weight[r];
    g.factor[r] = kept ? factor * a.scale : 0;
    const int64_t label = kept && a.needs_label() ? a.labels[row] : -1;
    g.label[r] = label < a.vocab ? label : -1;
    if (kept) {
      transpose((const S*)row_data(a.student, row), a.vocab, g.s + r);
      if constexpr (kTeacher) transpose((const T*)row_data(a.teachers[0], row), a.vocab, g.t + r);
    } else {
      for (int64_t i = 0; i < a.vocab; ++i) g.s[i * kLanes + r] = g.t[i * kLanes + r] = 0;
    }
  }
}

template <class S>
KD_NOINLINE void store_group_gradient(const LossArgs& a, int64_t begin, int rows,
                                      const ShortGroup<Compute<S>>& g) {
  constexpr int kLanes = Types<Compute<S>>::kLanes;
  const int64_t n = a.vocab;
  for (int r = 0; r < rows; ++r) {
    S* out = (S*)a.grad + a.grad_layout.offset(begin + r);
    if (!a.is_kept(begin + r)) {
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

// ---- the table of coefficients; a column that such rows never have is 0 ----

template <bool kLinear>
constexpr bool has_column(size_t column) {
#define COLUMN(field) offsetof(Coefficients<char>, field)
  if (column == COLUMN(soft) || column == COLUMN(center)) return !kLinear;
  if (column >= COLUMN(level) && column <= COLUMN(teacher)) return kLinear;
  return column <= COLUMN(uniform) || column == COLUMN(student_unit) || column == COLUMN(teacher_unit);
#undef COLUMN
}
template <bool kLinear, class V>
KD_NOINLINE void store_table(const LossArgs& a, int64_t begin, int rows, const Coefficients<V>& c) {
  constexpr int kLanes = Types<float>::kLanes;
  const float* lanes = (const float*)&c;
  for (int r = 0; r < rows; ++r) {
    float* row = a.table + (begin + r) * kCoefficients;
    std::memset(row, 0, kCoefficients * sizeof(float));
    if (!a.is_kept(begin + r)) continue;
#pragma GCC unroll 32
    for (int k = 0; k < kCoefficients; ++k) {
      if (has_column<kLinear>(k)) row[k] = lanes[k * kLanes + r];
    }
  }
}
template <bool kLinear, class V>
KD_NOINLINE Coefficients<V> load_table(const LossArgs& a, int64_t begin, int rows, V factor) {
  constexpr int kLanes = Types<float>::kLanes;
  Coefficients<V> c{};
  float* lanes = (float*)&c;
  for (int r = 0; r < rows; ++r) {
    const float* row = a.table + (begin + r) * kCoefficients;
#pragma GCC unroll 32
    for (int k = 0; k < kCoefficients; ++k) {
      if (has_column<kLinear>(k)) lanes[k * kLanes + r] = row[k];
    }
  }
  scale_gradient(c, factor);
  return c;
}

}  // namespace
}  // namespace kdfast
