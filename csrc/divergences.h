// phi and psi of each divergence, once, for host and device, scalar and vector.
//
//   D = sum_i phi(p_i, q_i)       psi = q * dphi/dq       dD/ds_i = (psi_i - q_i * sum_j psi_j) / T
//
// V is a number or a vector of them; masked(p, x) is p * x, and 0 where p is 0, whatever x is there.
// The running sum of a *linear* divergence is taken over unnormalised exps, before their sums are known:
// there phi is linear in (log p, log q) and its terms carry one of p and q, which kOver names, so with p = P
// / P_sum, q = Q / Q_sum
//
//   D = sum phi(P, Q, log P, log Q) / kOver's sum  +  phi(sum p, 1, -log P_sum, -log Q_sum)
#pragma once

#ifdef __CUDACC__
#define KDFAST_HD __host__ __device__
#else
#define KDFAST_HD
#endif

namespace kdfast {
namespace {  // compiled once per instruction set: nothing here may be shared between them

enum class Over { kTeacher, kStudent };

KDFAST_HD inline double masked(double p, double x) { return p == 0 ? 0 : p * x; }
KDFAST_HD inline float masked(float p, float x) { return p == 0 ? 0 : p * x; }

struct CrossEntropy {  // -sum p log q
  static constexpr Over kOver = Over::kTeacher;
  template <class V>
  KDFAST_HD static V phi(V p, V q, V log_p, V log_q) {
    return -masked(p, log_q);
  }
  template <class V>
  KDFAST_HD static V psi(V p, V q, V log_p, V log_q) {
    return -p;
  }
  template <class V>  // sum psi, from D and sum p
  KDFAST_HD static V psi_sum(V divergence, V teacher_mass) {
    return -teacher_mass;
  }
};

struct ForwardKL : CrossEntropy {  // sum p log(p / q); the gradient is cross_entropy's
  template <class V>
  KDFAST_HD static V phi(V p, V q, V log_p, V log_q) {
    return masked(p, log_p - log_q);
  }
};

struct ReverseKL {  // sum q log(q / p)
  static constexpr Over kOver = Over::kStudent;
  template <class V>
  KDFAST_HD static V phi(V p, V q, V log_p, V log_q) {
    return masked(q, log_q - log_p);
  }
  template <class V>
  KDFAST_HD static V psi(V p, V q, V log_p, V log_q) {
    return masked(q, log_q - log_p + 1);
  }
  template <class V>
  KDFAST_HD static V psi_sum(V divergence, V teacher_mass) {
    return divergence + 1;
  }
};

// No softmax at all: 1 / (2 V) * sum (s_i - t_i)^2 on centred rows; the kernels know its two sums apart.
struct LogitMSE {};

// No soft term: alpha is 0 and no teacher is read.
struct NoDivergence {};

}  // namespace
}  // namespace kdfast
