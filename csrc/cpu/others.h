// The passes over the classes of a row that are no entries. What a row has beside them is computed in
// doubles, by functions that no Spec changes.
#pragma once

#include "entries.h"
#include "row_gradient.h"

namespace kdfast {
namespace {

const RowKernels& this_set();  // the kernels of this instruction set
LossArgs in_doubles(LossArgs a);
TokenArgs in_doubles(TokenArgs a);

using AnyRow = Row<float, float>;  // in the place of a Row of any types

struct OthersPasses {
  // Opens a row and adds up its exps. keep: for the gradient. False: it is to be computed in doubles.
  bool (*sums)(const LossArgs&, int64_t row, const RowScale&, const Entries&, bool keep, AnyRow&, Label&,
               Sums<double>&);
  // Writes the gradient, at the entries any number. row_or_null: as `sums` has kept it, or null.
  void (*gradient)(const LossArgs&, int64_t row, const RowScale&, const AnyRow* row_or_null,
                   const Coefficients<double>&);
  bool fuses;
};

template <class P>
struct OthersPassesOf {
  // Not every combination is worth its code.
  static constexpr bool kKeeps = !P::D::kStudent, kForgets = !P::kOwn;

  static bool sums(const LossArgs& a, int64_t row, const RowScale& scale, const Entries& e, bool keep,
                   AnyRow& any, Label& label, Sums<double>& out) {
    const RowOf<P> r = open_row<P>(a, row, 0, a.vocab, scale);
    sort_by_blocks(e, a.vocab);
    label = find_label(a, row, r, 0, a.vocab);
    bool is_huge = false;
    SumsOptions options;
    options.label = label.index;
    options.without = &e;
    options.is_huge = &is_huge;
    if (a.label_smoothing != 0) options.logits = &label.logits;
    if constexpr (kKeeps) {
      if (keep || !kForgets) out = row_sums<P, true>(r.s, r.t, a.vocab, scale, r.scratch, r.blocks, options);
    }
    if constexpr (kForgets) {
      if (!keep) out = row_sums<P, false>(r.s, r.t, a.vocab, scale, r.scratch, r.blocks, options);
    }
    add_logits(a, scale, label, out);
    static_assert(sizeof(r) == sizeof(any));
    std::memcpy((void*)&any, &r, sizeof(r));
    return !is_huge;
  }

  static void gradient(const LossArgs& a, int64_t row, const RowScale& scale, const AnyRow* any,
                       const Coefficients<double>& c) {
    if constexpr (kKeeps) {
      if (any) {
        RowOf<P> r;
        std::memcpy((void*)&r, any, sizeof(r));
        return write_gradient<P, true>(a, row, r, 0, a.vocab, scale, c, scales_of(c));
      }
    }
    const RowOf<P> r = open_row<P>(a, row, 0, a.vocab, scale);
    write_gradient<P, false>(a, row, r, 0, a.vocab, scale, c, scales_of(c));
  }

  static const OthersPasses& get() {
    static constexpr OthersPasses passes{sums, gradient, kFuses<typename P::C>};
    return passes;
  }
};

}  // namespace
}  // namespace kdfast
