// What a kernel is instantiated for, and its choice by a call's arguments, one axis after the other.
#pragma once

#include <type_traits>

#include "teachers.h"

namespace kdfast {
namespace {

// Storage types, divergence, the teacher as probabilities instead of logits, and the student's exps at
// temperature 1 computed from the logits (kOwn) instead of as powers of those at T.
template <class S_, class T_, class D_, bool kProbs_, bool kOwn_>
struct Spec {
  using S = S_;
  using T = T_;
  using D = D_;
  using C = Compute<S>;
  using V = typename Types<C>::V;
  static constexpr bool kProbs = kProbs_, kOwn = kOwn_;
  static constexpr bool kMSE = std::is_same_v<D, LogitMSE>;
  static constexpr bool kSoft = !kMSE && !D::kOthers && !std::is_same_v<D, NoDivergence>;
  static constexpr bool kReadsTeacher = kSoft || kMSE;
  static constexpr bool kPointwise = D::kPointwise;                    // sums in a pass of their own
  static constexpr int kLanes = Types<C>::kLanes, kStep = 2 * kLanes;  // classes in a vector, and at a time
};

// Of a row whose entries are kept apart, which reads no teacher.
template <class S, class F>
void dispatch_others_spec(const LossArgs& a, F f) {
  if constexpr (!std::is_same_v<S, double>) {
    if (has_hard_powers(a)) return f(Spec<S, S, Others, false, false>{});
  }
  f(Spec<S, S, Others, false, true>{});
}

template <class S, class T, bool kProbs, class F>
void dispatch_divergence_spec(const LossArgs& a, F f) {
  if constexpr (!kProbs) {
    if (a.entries.count) return dispatch_others_spec<S>(a, f);
  }
  dispatch_divergence(a.divergence, [&](auto divergence) {
    using Named = decltype(divergence);
    // Pass B asks which pointwise divergence it is. Decoupled KD has forward KL's sums.
    using D = std::conditional_t<Named::kPointwise, Pointwise,
                                 std::conditional_t<std::is_same_v<Named, DKD>, ForwardKL, Named>>;
    constexpr bool kMSE = std::is_same_v<D, LogitMSE>, kNone = std::is_same_v<D, NoDivergence>;
    if constexpr (kProbs && (kMSE || kNone)) return;
    if constexpr (!std::is_same_v<S, double> || kMSE || kNone) {  // fp64 does without the shortcut
      if (has_hard_powers(a)) return f(Spec<S, T, D, kProbs, false>{});
    }
    if constexpr (!kMSE) f(Spec<S, T, D, kProbs, true>{});
  });
}

struct AVX512Kernels {};  // in a Spec's place: call the AVX-512 library's kernel

template <class F>
void dispatch_spec(const LossArgs& a, F f) {
  const DType dtype = a.in_doubles ? DType::kDouble : a.student.dtype;
  const bool plain = a.softcap == 0 && a.teacher_softcap == 0 &&
                     (a.n_teachers == 0 ||
                      (a.n_teachers == 1 && a.teachers[0].dtype == dtype && a.target != Target::kProbs));
  if (plain && dtype == DType::kBFloat16) return dispatch_divergence_spec<bf16, bf16, false>(a, f);
#if defined(__AVX512BF16__)  // rounds to bf16 in one instruction, and adds nothing to other storage types
  f(AVX512Kernels{});
#else
  if (teacher_is_probs(a) && a.n_teachers) {
    if (dtype == DType::kDouble) return dispatch_divergence_spec<double, double, true>(a, f);
    return dispatch_divergence_spec<float, float, true>(a, f);
  }
  if (dtype == DType::kDouble) return dispatch_divergence_spec<double, double, false>(a, f);
  dispatch_divergence_spec<float, float, false>(a, f);
#endif
}

// For token_stats and token_grad.
template <class F>
void dispatch_token_spec(const LossArgs& a, bool entropy, F f) {
  const DType dtype = a.in_doubles ? DType::kDouble : a.student.dtype;
  const auto with = [&](auto s) {
    using S = decltype(s);
    if constexpr (!std::is_same_v<S, double>) {  // fp64 does without the shortcut
      if (!entropy) return f(Spec<S, S, Others, false, false>{});
    }
    f(Spec<S, S, OthersWithEntropy, false, false>{});
  };
  if (a.softcap == 0 && dtype == DType::kBFloat16) return with(bf16{});
#if defined(__AVX512BF16__)
  f(AVX512Kernels{});
#else
  dtype == DType::kDouble ? with(double{}) : with(float{});
#endif
}

}  // namespace
}  // namespace kdfast
