// phi and psi of each divergence, once, for host and device, scalar and vector.
//
//   D = sum_i phi(p_i, q_i)       psi = q * dphi/dq       dD/ds_i = (psi_i - q_i * sum_j psi_j) / T
//
// V is a number or a vector of them; masked(p, x) is p * x, and 0 where p is 0, whatever x is there; psi may
// lack a multiple of q, which cancels in the gradient. There are two kinds.
//
// Linear ones: phi is linear in log q and above = log(q / p), and each of its terms carries p or q. It is
// given as these two parts, over_teacher and over_student, and their shares of D. The sums run along with
// those of the unnormalised exps P and Q:
//
//   sum over_teacher(p, log q, above) = sum over_teacher(P, log Q, log(Q / P)) / P_sum
//                                       + over_teacher(sum p, -log Q_sum, log(P_sum / Q_sum))
//
// and but for a multiple of q psi is -p from the first and q * above from the second, with their shares.
//
// The others get a pass over p and q, once the sums are known. phi leaves out a term of first order in q -
// p, which would drown the rest where p is near q; its sum, a multiple of 1 - sum p, is added by `constant`.
// rest is 1 - beta, rounded once. A mixture is a sum of numbers >= 0, right to its last digits at every beta;
// p + rest (q - p) would cancel. ratio(a, b) is 0 where both are 0. log_ratio(a, b, a - b) is log(a / b),
// exact to first order where a is near b, and finite where a is 0, since it is multiplied by a.
// kl_term(a, b, a - b) is a log(a / b) - (a - b), and log_excess is log(a / b) - beta (a - b) / b, both exact
// to second order. Comparisons see p and q rounded: where the compiler makes one operation of a product and a
// difference, q - p may not be 0 though p == q.
#pragma once

#ifdef __CUDACC__
#define KDFAST_HD __host__ __device__
#else
#define KDFAST_HD
#endif

#if defined(__GNUC__)  // all have one signature, of which each uses its part
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#endif

namespace kdfast {
namespace {  // compiled once per instruction set, which must share no function

KDFAST_HD inline double masked(double p, double x) { return p == 0 ? 0 : p * x; }
KDFAST_HD inline float masked(float p, float x) { return p == 0 ? 0 : p * x; }

// ---- linear ones ----

struct NoSums {
  static constexpr bool kPointwise = false, kTeacher = false, kStudent = false, kDifference = false;
  static constexpr bool kOthers = false;       // whether it is of the classes that are no entries
  static constexpr bool kHasPsiApart = false;  // another psi, for rows with little in common
};

struct Linear : NoSums {
  static constexpr bool kTeacher = true, kStudent = true;  // which parts there are
  template <class V>
  KDFAST_HD static V over_teacher(V p, V log_q, V above) {
    return V{};
  }
  template <class V>
  KDFAST_HD static V over_student(V q, V above) {
    return V{};
  }
  template <class V>
  KDFAST_HD static V teacher_share(V beta) {
    return beta * 0 + 1;
  }
  template <class V>
  KDFAST_HD static V student_share(V beta) {
    return beta * 0 + 1;
  }
};

struct CrossEntropy : Linear {  // -sum p log q
  static constexpr bool kStudent = false;
  template <class V>
  KDFAST_HD static V over_teacher(V p, V log_q, V above) {
    return -masked(p, log_q);
  }
};

struct ForwardKL : CrossEntropy {  // sum p log(p / q); the gradient is cross_entropy's
  template <class V>
  KDFAST_HD static V over_teacher(V p, V log_q, V above) {
    return -masked(p, above);
  }
};

// Decoupled KD: over the classes that are not the label it is this one with other factors, and the label's
// own part is a number per row; see dkd_sums.
struct DKD : ForwardKL {};

struct ReverseKL : Linear {  // sum q log(q / p)
  static constexpr bool kTeacher = false;
  template <class V>
  KDFAST_HD static V over_student(V q, V above) {
    return masked(q, above);
  }
};

struct SymmetricKL : Linear {  // beta * forward_kl + (1 - beta) * reverse_kl
  template <class V>
  KDFAST_HD static V over_teacher(V p, V log_q, V above) {
    return -masked(p, above);
  }
  template <class V>
  KDFAST_HD static V over_student(V q, V above) {
    return masked(q, above);
  }
  template <class V>
  KDFAST_HD static V teacher_share(V beta) {
    return beta;
  }
  template <class V>
  KDFAST_HD static V student_share(V beta) {
    return 1 - beta;
  }
};

// ---- those with a pass of their own ----

struct Pointwise : NoSums {
  static constexpr bool kPointwise = true;
  template <class V>
  KDFAST_HD static V constant(V mass, V rest) {
    return V{};
  }
};

struct JSD : Pointwise {  // beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q
  template <class V>
  KDFAST_HD static V phi(V p, V q, V beta, V rest) {
    const V m = beta * p + rest * q, d = q - p;
    return beta * p * log_ratio(p, m, -rest * d) + rest * q * log_ratio(q, m, beta * d);
  }
  template <class V>
  KDFAST_HD static V psi(V p, V q, V beta, V rest) {
    return rest * q * log_ratio(q, beta * p + rest * q, beta * (q - p));
  }
};

// KL(p, m), m = beta p + (1 - beta) q. With A = sum q p / m the sum of psi is rest (1 - A), and of psi_apart
// -rest A: near equality the digits of the gradient, rest q (A - p / m), are psi's, and where A is small
// psi_apart's.
struct SkewForwardKL : Pointwise {
  static constexpr bool kHasPsiApart = true;
  template <class V>
  KDFAST_HD static V phi(V p, V q, V beta, V rest) {
    return kl_term(p, beta * p + rest * q, rest * (p - q));
  }
  template <class V>
  KDFAST_HD static V psi(V p, V q, V beta, V rest) {
    return ratio(rest * q, beta * p + rest * q) * -(rest * (p - q));
  }
  template <class V>
  KDFAST_HD static V psi_apart(V p, V q, V beta, V rest) {
    return ratio(rest * q, beta * p + rest * q) * -p;
  }
  template <class V>
  KDFAST_HD static V constant(V mass, V rest) {
    return rest * (mass - 1);
  }
};

struct SkewReverseKL : Pointwise {  // KL(q, m), m = beta q + (1 - beta) p
  template <class V>
  KDFAST_HD static V phi(V p, V q, V beta, V rest) {
    return kl_term(q, beta * q + rest * p, rest * (q - p));
  }
  template <class V>
  KDFAST_HD static V psi(V p, V q, V beta, V rest) {
    const V m = beta * q + rest * p, d = rest * (q - p);
    return q * log_excess(q, m, d, beta, rest);
  }
  template <class V>
  KDFAST_HD static V constant(V mass, V rest) {
    return rest * (1 - mass);
  }
};

struct TVD : Pointwise {  // half the distance
  template <class V>
  KDFAST_HD static V phi(V p, V q, V beta, V rest) {
    return p == q ? V{} : (p < q ? q - p : p - q) / 2;
  }
  template <class V>
  KDFAST_HD static V psi(V p, V q, V beta, V rest) {
    return p > q ? -q / 2 : p < q ? q / 2 : p == q ? V{} : p - q;  // the last is NaN
  }
};

struct Hellinger : Pointwise {  // 1 - sum sqrt(p q)
  template <class V>
  KDFAST_HD static V phi(V p, V q, V beta, V rest) {
    const V d = p == q ? V{} : sqrt(q) - sqrt(p);
    return d * d / 2;
  }
  template <class V>
  KDFAST_HD static V psi(V p, V q, V beta, V rest) {
    return (p == q ? q : sqrt(q) * sqrt(p)) / -2;
  }
  template <class V>
  KDFAST_HD static V constant(V mass, V rest) {
    return (1 - mass) / 2;
  }
};

// No softmax at all: 1 / (2 V) * sum (s_i - t_i)^2 on centered rows; the kernels have its two sums.
struct LogitMSE : NoSums {
  static constexpr bool kDifference = true;
};

// No soft term: alpha is 0 and no teacher is read.
struct NoDivergence : NoSums {};

// A row whose entries, K of its classes, are kept apart: the others have a sum of exps, and the gradient
// q * level. And with -H of q as another sum, and the gradient q * (level + slope * log q).
struct Others : NoSums {
  static constexpr bool kOthers = true;
};
struct OthersWithEntropy : Others {
  static constexpr bool kStudent = true;
  template <class V>
  KDFAST_HD static V over_student(V q, V log_q) {
    return masked(q, log_q);
  }
};

}  // namespace
}  // namespace kdfast

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
