// Written by tools/write_operators.py from kdfast/arguments.py, which says what each of these is.
#pragma once
// clang-format off

// The settings that are numbers, as f(type, name).
#define KDFAST_NUMBERS(f) \
  f(double, temperature) f(double, teacher_temperature) f(double, alpha) f(double, hard_weight) \
  f(bool, t_squared) f(double, beta) f(double, divisor) f(double, label_smoothing) \
  f(double, z_loss) f(double, logit_scale) f(double, teacher_logit_scale) f(double, softcap) \
  f(double, teacher_softcap) f(bool, standardize) f(bool, metrics)
