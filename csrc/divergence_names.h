// The divergences by the names that users know them by; their formulas are in divergences.h.
#pragma once

#define KDFAST_DIVERGENCES          \
  X(cross_entropy, CrossEntropy)    \
  X(forward_kl, ForwardKL)          \
  X(reverse_kl, ReverseKL)          \
  X(symmetric_kl, SymmetricKL)      \
  X(jsd, JSD)                       \
  X(skew_forward_kl, SkewForwardKL) \
  X(skew_reverse_kl, SkewReverseKL) \
  X(tvd, TVD)                       \
  X(hellinger, Hellinger)           \
  X(dkd, DKD)                       \
  X(logit_mse, LogitMSE)
