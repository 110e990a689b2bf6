// Teachers that are not plain logits of the student's dtype, as one row that the passes take: logits or
// probabilities.
#pragma once

#include "classifiers.h"
#include "softcap.h"

namespace kdfast {
namespace {

// The teachers of one row, classes [begin, begin + n), as one row of C: logits, or probabilities where
// teacher_is_probs(). The row is `out` or, where nothing is to be done, the teacher's own. Several teachers
// are standardized here, a single one by its exp2 scale.
template <class C>
KD_NOINLINE const C* mix_teachers(const LossArgs& a, int64_t row, int64_t begin, int64_t n,
                                  const RowScale& scale, C* out, C* other) {
  using V = typename Types<C>::V;
  const DType own = std::is_same_v<C, double> ? DType::kDouble : DType::kFloat;
  if (a.n_teachers == 1 && a.teachers[0].dtype == own && !a.teacher_softcap) {
    return (const C*)row_data(a.teachers[0], row) + begin;
  }
  for (int k = 0; k < a.n_teachers; ++k) {
    const Matrix& m = a.teachers[k];
    C* z = k == 0 ? out : other;
    const char* from = row_data(m, row) + begin * bytes_of(m.dtype);
    if (a.teacher_softcap != 0) {
      const char* next = row + 1 < a.rows ? row_data(a.student, row + 1) : nullptr;
      softcap_row(from, m.dtype, n, a.teacher_logit_scale, a.teacher_softcap, z, next);
    } else {
      widen(from, m.dtype, n, z);
    }
    if (a.n_teachers == 1) return out;
    const double unit = a.standardize ? moments(z, n).unit(scale.teacher_logit_scale) : 1;
    if (!a.geometric && a.target == Target::kLogits) softmax_row(z, n, scale.teacher * unit);
    const bool takes_log = a.geometric && a.target == Target::kProbs;
    const C w = a.teacher_weights[k] * (a.geometric ? unit : 1) * (takes_log ? kLn2 : 1);
    for_vectors(z, n, [&](V v, int64_t i) {
      if (takes_log) v = log2(v);
      if (!a.geometric && a.target == Target::kLogProbs) v = exp2(v * (C)kLog2E);
      return k == 0 ? v * w : v * w + load(out + i);
    });
    if (k > 0) std::memcpy(out, z, n * sizeof(C));
  }
  return out;
}

KD_INLINE bool teacher_is_probs(const LossArgs& a) {
  return a.n_teachers > 1 ? !a.geometric : a.target == Target::kProbs;
}
// Whether the row mix_teachers makes is normalized by its own softmax, and not as it is given.
KD_INLINE bool teacher_is_softmaxed(const LossArgs& a) {
  return a.n_teachers > 1 ? a.geometric : a.target == Target::kLogits;
}

}  // namespace
}  // namespace kdfast
