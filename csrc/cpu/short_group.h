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
  C psi[kShort * kLanes];
  C temperature[kLanes], student_scale[kLanes], teacher_scale[kLanes], weight[kLanes], factor[kLanes];
  int64_t label[kLanes];
};

// Four numbers of each of four arrays become the four arrays' first numbers, second ones, and so on.
KD_INLINE void transpose(const float* const (&from)[4], float* const (&to)[4]) {
#if defined(__x86_64__)
  __m128 a = _mm_loadu_ps(from[0]), b = _mm_loadu_ps(from[1]);
  __m128 c = _mm_loadu_ps(from[2]), d = _mm_loadu_ps(from[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to[0], a);
  _mm_storeu_ps(to[1], b);
  _mm_storeu_ps(to[2], c);
  _mm_storeu_ps(to[3], d);
#else
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 4; ++k) to[i][k] = from[k][i];
#endif
}

// Calls f with the first of four classes, until all of n >= 4 had their turn; the last ones may have two.
template <class F>
KD_INLINE void for_four_classes(int64_t n, F f) {
  for (int64_t i = 0; i < n; i += 4) f(i = i < n - 4 ? i : n - 4);
}

// n classes of four rows, to or from their lanes in a group.
KD_INLINE void to_lanes(const float* const (&rows)[4], int64_t n, float* lanes) {
  constexpr int kLanes = Types<float>::kLanes;
  if (n < 4) {
    for (int64_t i = 0; i < n; ++i)
      for (int k = 0; k < 4; ++k) lanes[i * kLanes + k] = rows[k][i];
    return;
  }
  for_four_classes(n, [&](int64_t i) __attribute__((always_inline)) {
    float* at = lanes + i * kLanes;
    transpose({rows[0] + i, rows[1] + i, rows[2] + i, rows[3] + i},
              {at, at + kLanes, at + 2 * kLanes, at + 3 * kLanes});
  });
}
KD_INLINE void from_lanes(const float* lanes, int64_t n, float* const (&rows)[4]) {
  constexpr int kLanes = Types<float>::kLanes;
  if (n < 4) {
    for (int64_t i = 0; i < n; ++i)
      for (int k = 0; k < 4; ++k) rows[k][i] = lanes[i * kLanes + k];
    return;
  }
  for_four_classes(n, [&](int64_t i) __attribute__((always_inline)) {
    const float* at = lanes + i * kLanes;
    transpose({at, at + kLanes, at + 2 * kLanes, at + 3 * kLanes},
              {rows[0] + i, rows[1] + i, rows[2] + i, rows[3] + i});
  });
}

// A row of floats itself, or a 16-bit one, widened.
template <class X>
KD_INLINE const float* as_floats(const X* row, int64_t n, float* wide) {
  if constexpr (sizeof(X) == 4) {
    return row;
  } else {
    convert_row(row, n, wide);
    return wide;
  }
}

// is_grad: whether the gradient is to be made from a table, and not from the row's loss.
template <class S, class T, bool kTeacher>
KD_NOINLINE void load_group(const LossArgs& a, const RowScales& scales, int64_t begin, int rows, bool is_grad,
                            ShortGroup<float>& g) {
  constexpr int kLanes = Types<float>::kLanes;
  static const float zeros[kShort] = {};
  float wide[2][4][kShort];
  const float *s[4], *t[4];
  for (int r = 0; r < kLanes; ++r) {
    const int64_t row = begin + r;
    const bool kept = r < rows && a.is_kept(row);
    if (r == 0 || !scales.alike) {
      const RowScale scale = kept || scales.alike ? scales(row) : RowScale{{1, 1, 1}, 1, 0, 1};
      for (int k = r; k < (scales.alike ? kLanes : r + 1); ++k) {
        g.temperature[k] = scale.temperature;
        g.student_scale[k] = scale.student;
        g.teacher_scale[k] = scale.teacher;
      }
    }
    g.weight[r] = kept ? a.weight(row) : 0;
    const double factor = is_grad ? row_value(a.row_scale, 1, row) : g.weight[r];
    g.factor[r] = kept ? factor * a.scale : 0;
    const int64_t label = kept && a.needs_label() ? a.labels[row] : -1;
    g.label[r] = label < a.vocab ? label : -1;
    const int k = r % 4;
    s[k] = kept ? as_floats((const S*)row_data(a.student, row), a.vocab, wide[0][k]) : zeros;
    if constexpr (kTeacher)
      t[k] = kept ? as_floats((const T*)row_data(a.teachers[0], row), a.vocab, wide[1][k]) : zeros;
    if (k != 3) continue;
    to_lanes(s, a.vocab, g.s + r - 3);
    if constexpr (kTeacher) to_lanes(t, a.vocab, g.t + r - 3);
  }
}

template <class S>
KD_NOINLINE void store_group_gradient(const LossArgs& a, int64_t begin, int rows,
                                      const ShortGroup<float>& g) {
  const int64_t n = a.vocab;
  for (int r = 0; r < rows; r += 4) {
    float wide[4][kShort];  // for 16 bits, and for rows that get no gradient
    float* to[4];
    bool kept[4];
    const auto row_of = [&](int k) { return (S*)a.grad + a.grad_layout.offset(begin + r + k); };
    for (int k = 0; k < 4; ++k) {
      kept[k] = r + k < rows && a.is_kept(begin + r + k);
      to[k] = kept[k] && sizeof(S) == 4 ? (float*)row_of(k) : wide[k];
    }
    from_lanes(g.es + r, n, to);
    for (int k = 0; k < 4 && r + k < rows; ++k) {
      S* out = row_of(k);
      if (!kept[k]) {
        std::memset((void*)out, 0, a.width * sizeof(S));
        continue;
      }
      if constexpr (sizeof(S) == 2) convert_row(wide[k], n, out);
      if (a.width > n) std::memset((void*)(out + n), 0, (a.width - n) * sizeof(S));
    }
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
