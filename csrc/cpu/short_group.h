// A group of rows of few classes, transposed: a vector holds one class of kLanes rows.
#pragma once

#include <cstddef>

#include "row.h"
#include "short_transpose.h"

namespace kdfast {
namespace {

constexpr int kShort = 64;  // classes; above it the transposition costs more than it saves

// One class of kLanes rows after the other. Dropped rows, and lanes beyond the last row, have weight 0: what
// is computed for them is not stored.
template <class C>
struct alignas(64) ShortGroup {
  static constexpr int kLanes = Types<C>::kLanes;
  C s[kShort * kLanes], t[kShort * kLanes], es[kShort * kLanes], et[kShort * kLanes], e1[kShort * kLanes];
  C psi[kShort * kLanes];
  C temperature[kLanes], student_scale[kLanes], teacher_scale[kLanes], factor[kLanes];
  C label_logit[kLanes];  // 0 where label is -1: no hard term, a dropped row, or a label of another shard
  int64_t label[kLanes];
  double weight[kLanes];  // whose range is larger than C's
};

// Pointers to a group's rows. Lanes beyond the last row point to that row: it is read again, and not written
// again, for their weight is 0.
template <class X>
KD_INLINE void find_rows(X* data, const Matrix& m, int64_t begin, int rows,
                         X* (&found)[Types<float>::kLanes]) {
  constexpr int kLanes = Types<float>::kLanes;
  if (rows == kLanes && m.has_one_stride()) {
    for (int r = 0; r < kLanes; ++r) found[r] = data + (begin + r) * m.stride[2];
  } else {
    for (int r = 0; r < kLanes; ++r) found[r] = data + m.offset(begin + (r < rows ? r : rows - 1));
  }
}

KD_INLINE void set_scale(ShortGroup<float>& g, int r, const RowScale& scale) {
  g.temperature[r] = scale.temperature;
  g.student_scale[r] = scale.student;
  g.teacher_scale[r] = scale.teacher;
}

// Each row's weight, factor and label, and its scales unless all rows share them, which short_rows() has set
// then. The loops are simple so that the compiler makes vectors of them.
KD_NOINLINE void load_row_values(const LossArgs& a, const RowScales& scales, int64_t begin, int rows,
                                 bool is_grad, ShortGroup<float>& g) {
  constexpr int kLanes = Types<float>::kLanes;
  int64_t label[kLanes] = {};
  if (a.labels) std::memcpy(label, a.labels + begin, rows * sizeof(int64_t));
  for (int r = 0; r < kLanes; ++r) g.weight[r] = r < rows;
  if (a.row_weight) std::memcpy(g.weight, a.row_weight + begin, rows * sizeof(double));
  if (a.labels) {
    for (int r = 0; r < kLanes; ++r) g.weight[r] = label[r] == a.ignore_index ? 0 : g.weight[r];
  }
  const double scale = a.scale;
  if (is_grad) {
    for (int r = 0; r < kLanes; ++r)
      g.factor[r] = g.weight[r] == 0 ? 0 : scale * row_value(a.row_scale, 1, begin + r);
  } else {
    for (int r = 0; r < kLanes; ++r) g.factor[r] = scale * g.weight[r];
  }
  const uint64_t end = a.needs_label() ? a.vocab : 0;
  for (int r = 0; r < kLanes; ++r) g.label[r] = g.weight[r] != 0 && (uint64_t)label[r] < end ? label[r] : -1;
  if (scales.alike) return;
  for (int r = 0; r < kLanes; ++r)
    set_scale(g, r, g.weight[r] == 0 ? RowScale{{1, 1, 1}, 1, 0, 1} : scales(begin + r));
}

// is_grad: whether the gradient is to be made from a table, and not from the row's loss.
template <class S, class T, bool kTeacher>
KD_NOINLINE void load_group(const LossArgs& a, const RowScales& scales, int64_t begin, int rows, bool is_grad,
                            ShortGroup<float>& g) {
  constexpr int kLanes = Types<float>::kLanes;
  load_row_values(a, scales, begin, rows, is_grad, g);
  [[maybe_unused]] float wide[kLanes][kShort];
  const float* floats[kLanes];
  const auto transpose = [&](const Matrix& matrix, auto x, float* to) __attribute__((always_inline)) {
    const decltype(x)* found[kLanes];
    find_rows((const decltype(x)*)matrix.data, matrix, begin, rows, found);
    for (int r = 0; r < kLanes; ++r) {
      if constexpr (sizeof(x) == 4) {
        floats[r] = found[r];
      } else {
        convert_row(found[r], a.vocab, wide[r]);
        floats[r] = wide[r];
      }
    }
    to_lanes(floats, a.vocab, to);
  };
  transpose(a.student, S{}, g.s);
  for (int r = 0; r < kLanes; ++r) g.label_logit[r] = g.label[r] < 0 ? 0 : floats[r][g.label[r]];
  if constexpr (kTeacher) transpose(a.teachers[0], T{}, g.t);
}

// at_label: what is subtracted from each row's gradient at its label.
template <class S>
KD_NOINLINE void store_group_gradient(const LossArgs& a, int64_t begin, int rows, const ShortGroup<float>& g,
                                      FloatV at_label) {
  constexpr int kLanes = Types<float>::kLanes;
  const int64_t n = a.vocab;
  // 16-bit rows before they are rounded; of floats, where rows without a gradient are written
  float wide[sizeof(S) == 4 ? 1 : kLanes][kShort];
  float subtracted[kLanes];
  store(subtracted, at_label);
  S* out[kLanes];
  float* to[kLanes];
  find_rows((S*)a.grad, a.grad_layout, begin, rows, out);
  bool is_complete = sizeof(S) == 4 && a.width == n;
  for (int r = 0; r < kLanes; ++r) {
    const bool kept = g.weight[r] != 0;
    is_complete &= kept;
    to[r] = sizeof(S) == 2 ? wide[r] : kept ? (float*)out[r] : wide[0];
  }
  from_lanes(g.es, n, to);
  for (int r = 0; r < kLanes; ++r) {
    if (g.label[r] >= 0) to[r][g.label[r]] -= subtracted[r];
  }
  if (is_complete) return;
  for (int r = 0; r < rows; ++r) {
    const bool kept = g.weight[r] != 0;
    if (!kept) std::memset((void*)out[r], 0, n * sizeof(S));
    if (kept && sizeof(S) == 2) convert_row(wide[r], n, out[r]);
    if (a.width > n) std::memset((void*)(out[r] + n), 0, (a.width - n) * sizeof(S));
  }
}

// ---- the table of coefficients; a column that such rows never have is 0 ----

template <bool kLinear>
constexpr bool has_column(size_t column) {
#define COLUMN(field) offsetof(Coefficients<char>, field)
  if (column == COLUMN(soft) || column == COLUMN(center)) return !kLinear;
  if (column == COLUMN(level) || column == COLUMN(teacher)) return kLinear;
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
