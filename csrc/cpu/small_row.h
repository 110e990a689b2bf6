// A sparse teacher's row of K + 1 classes, for the dense kernels.
#pragma once

#include "others.h"

namespace kdfast {
namespace {

template <class C>
struct SmallRow {
  LossArgs args{};
  Matrix teacher;
  double one = 1, loss = 0;
  C *s, *t, *g;

  SmallRow(const LossArgs& a, const Entries& e, double temperature, double factor)
      : s((C*)e.small), t((C*)((char*)e.small + e.small_bytes)), g((C*)((char*)e.small + 2 * e.small_bytes)) {
    const DType dtype = std::is_same_v<C, double> ? DType::kDouble : DType::kFloat;
    const bool given = a.entries.missing == Missing::kTail || a.entries.missing == Missing::kTruncate;
    args.temperature = temperature;
    args.teacher_temperature = args.logit_scale = args.teacher_logit_scale = 1;
    args.alpha = a.alpha;
    args.t_squared = a.t_squared;
    args.beta = a.beta;
    args.rows = 1;
    args.vocab = args.width = e.count + 1;
    args.student = matrix(s, dtype);
    args.grad_layout = matrix(g, dtype);
    args.grad = g;
    teacher = matrix(t, dtype);
    args.teachers = &teacher;
    args.teacher_weights = &one;
    args.n_teachers = 1;
    args.target = given ? Target::kLogProbs : Target::kLogits;
    args.divergence = a.entries.divergence;
    args.losses = &loss;
    args.scale = factor;
  }
  Matrix matrix(const C* data, DType dtype) const { return {data, dtype, {1, 1, 1}, {0, 0, args.vocab}}; }

  void run() {
    current_buffer = kSmallRow;
    this_set().loss_grad(args, 0, 1);
    current_buffer = kRow;
  }
};

}  // namespace
}  // namespace kdfast
