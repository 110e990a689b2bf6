// The three passes over one row, or over a segment of it: statistics (A, with the running sum that stands for B) and
// gradient (C), written once over storage types and divergences.
//
// The row goes by in blocks of kBlock classes. While a block is in L1 its exps are taken relative to an offset, kept in
// a scratch that stays in L2, and summed; the gradient is then made from the scratch, and memory is read once. The
// offset is the maximum of the first block and stays as long as no block's sums leave the range in which fp32 is exact
// enough; such a block takes its own maximum and is done again. So no pass for the maxima is needed, and any sums that
// carry their offset can be merged: blocks, segments, shards.
#pragma once

#include "../divergences.h"
#include "exp_math.h"
#include "row_kernels.h"

namespace kdfast {
namespace {

constexpr int kBlock = 2048;
constexpr int kMaxPower = 4;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What a kernel is instantiated for: storage types, divergence, the teacher as probabilities instead of logits, and the
// student's exps at temperature 1 taken by themselves (kOwn) instead of as powers of those at T.
template <class S_, class T_, class D_, bool kProbs_, bool kOwn_>
struct Spec {
  using S = S_;
  using T = T_;
  using D = D_;
  using C = Compute<S>;
  using V = typename Types<C>::V;
  static constexpr bool kProbs = kProbs_, kOwn = kOwn_;
  static constexpr bool kMSE = std::is_same_v<D, LogitMSE>;
  static constexpr bool kSoft = !kMSE && !std::is_same_v<D, NoDivergence>;
  static constexpr int kLanes = Types<C>::kLanes;
};

struct RowScale {  // of one row
  double temperature;
  double student, teacher;  // slopes
  int power;                // with kOwn false: the temperature, a small whole number
};

template <class C>
struct Scratch {  // (vocab) each, rounded up to whole vectors
  C *student, *teacher, *hard;
};

template <class P>
struct Block {  // where a block's exps stand, and what their exponents are relative to
  double student_offset, teacher_offset;
};

// y1 = T * y, whichever way it is taken
template <class P>
KD_INLINE double hard_offset(const RowScale& scale, double student_offset) {
  using C = typename P::C;
  return P::kOwn ? (double)(C)(student_offset * scale.temperature) : scale.power * student_offset;
}

template <class P>
struct Lanes {  // one vector of a row: exps and exponents, of which the compiler keeps those that are used
  typename P::V es, et, e1, ys, yt;
};

template <class P>
struct Exponents {
  using C = typename P::C;
  using V = typename P::V;
  V student, teacher, student_offset, teacher_offset, hard_offset_;
  int power;

  KD_INLINE Exponents(const RowScale& scale, double so, double to)
      : student(splat<C>(scale.student)),
        teacher(splat<C>(scale.teacher)),
        student_offset(splat<C>(so == -kInfinity ? 0 : so)),
        teacher_offset(splat<C>(to == -kInfinity ? 0 : to)),
        hard_offset_(splat<C>(so == -kInfinity ? 0 : hard_offset<P>(scale, so))),
        power(scale.power) {}

  KD_INLINE V power_of(V es) const {
    V e1 = es;
    for (int k = 1; k < power; ++k) e1 *= es;
    return e1;
  }

  KD_INLINE Lanes<P> operator()(V s, V t) const {
    Lanes<P> x{};
    x.ys = s * student - student_offset;
    x.es = exp2(x.ys);
    x.e1 = P::kOwn ? exp2(s * (C)kLog2E - hard_offset_) : power_of(x.es);
    if constexpr (P::kMSE) {
      x.et = (s - t) - teacher_offset;
    } else if constexpr (P::kProbs) {
      x.et = t;
      x.yt = log2(t);
    } else if constexpr (P::kSoft) {
      x.yt = t * teacher - teacher_offset;
      x.et = exp2(x.yt);
    }
    return x;
  }
};

// What fills up the last vector of a row: classes of probability 0.
template <class P>
KD_INLINE auto load_student(const typename P::S* s, int n) {
  return n == P::kLanes ? load(s) : load_part(s, n, P::kMSE ? 0 : -std::numeric_limits<typename P::C>::infinity());
}
template <class P>
KD_INLINE typename P::V load_teacher(const typename P::T* t, int n) {
  if constexpr (!P::kSoft && !P::kMSE) return typename P::V{};
  if (n == P::kLanes) return load(t);
  return load_part(t, n, P::kProbs || P::kMSE ? 0 : -std::numeric_limits<typename P::C>::infinity());
}

// Pass A over one block. The exps go to the scratch where kKeep.
template <class P, bool kKeep>
KD_NOINLINE RowStats block_sums(const typename P::S* s, const typename P::T* t, int n, const RowScale& scale,
                                double student_offset, double teacher_offset, Scratch<typename P::C> keep,
                                int ahead) {
  using V = typename P::V;
  const Exponents<P> exponents(scale, student_offset, teacher_offset);
  V student_sum{}, teacher_sum{}, hard_sum{}, running{};
  for (int i = 0; i < n; i += P::kLanes) {
    __builtin_prefetch(s + i + ahead, 0, 2);
    if constexpr (P::kSoft || P::kMSE) __builtin_prefetch(t + i + ahead, 0, 2);
    const int lanes = n - i < P::kLanes ? n - i : P::kLanes;
    Lanes<P> x = exponents(load_student<P>(s + i, lanes), load_teacher<P>(t + i, lanes));
    if constexpr (P::kMSE) {
      for (int j = lanes; j < P::kLanes; ++j) x.et[j] = x.es[j] = x.e1[j] = 0;
      running += x.et * x.et;
    } else if constexpr (P::kSoft) {
      running += P::D::phi(x.et, x.es, x.yt, x.ys);
    }
    student_sum += x.es;
    teacher_sum += x.et;
    hard_sum += x.e1;
    if constexpr (kKeep) {
      store(keep.student + i, x.es);
      if constexpr (P::kSoft || P::kMSE) store(keep.teacher + i, x.et);
      if constexpr (P::kOwn) store(keep.hard + i, x.e1);
    }
  }
  return {student_offset, teacher_offset, sum(student_sum), sum(teacher_sum), sum(hard_sum), sum(running)};
}

template <class S>
KD_NOINLINE double block_max(const S* s, int n) {
  using C = Compute<S>;
  constexpr int kLanes = Types<C>::kLanes;
  auto high = splat(-std::numeric_limits<C>::infinity());
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) high = max(load(s + i), high);
  if (i < n) high = max(load_part(s + i, n - i, -std::numeric_limits<C>::infinity()), high);
  return max_lane(high);
}

// The offset at which the largest exp of a block is 1; as a C, since the exponents are.
template <class P, class X>
double offset_at_max(const X* x, int n, double slope) {
  return (typename P::C)((typename P::C)slope * block_max(x, n));
}

template <class P>
KD_NOINLINE double mean_difference(const typename P::S* s, const typename P::T* t, int n) {
  double total = 0;
  for (int i = 0; i < n; i += P::kLanes) {
    const int lanes = n - i < P::kLanes ? n - i : P::kLanes;
    total += sum(load_student<P>(s + i, lanes) - load_teacher<P>(t + i, lanes));
  }
  return (typename P::C)(total / n);
}

// fp32 sums are exact enough, and leave room for later blocks' terms, below this. False for NaN.
KD_INLINE bool in_range(const RowStats& x, bool teacher) {
  return x.student_sum < 0x1p40 && x.hard_sum < 0x1p40 && (!teacher || x.teacher_sum < 0x1p40);
}

// a * 2^y, and 0 where that is 2^-inf, whatever a is
KD_INLINE double scaled(double a, double y) { return y == -kInfinity ? 0 : a * std::exp2(y); }

// The same sums relative to other offsets (logit_mse: the same moments about another shift).
template <class P>
KD_NOINLINE void shift(RowStats& x, const RowScale& scale, double student_offset, double teacher_offset, double n) {
  const double ds = x.student_offset == student_offset ? 0 : x.student_offset - student_offset;
  const double dt = x.teacher_offset == teacher_offset ? 0 : x.teacher_offset - teacher_offset;
  if constexpr (P::kMSE) {
    x.running += 2 * dt * x.teacher_sum + n * dt * dt;
    x.teacher_sum += n * dt;
  } else if constexpr (P::kSoft) {
    const double moved = x.running + P::D::phi(x.teacher_sum, x.student_sum, dt, ds);
    x.running = scaled(moved, P::D::kOver == Over::kTeacher ? dt : ds);
    x.teacher_sum = scaled(x.teacher_sum, dt);
  }
  x.student_sum = scaled(x.student_sum, ds);
  const double dh = ds == 0           ? 0
                    : ds == -kInfinity ? ds
                                       : hard_offset<P>(scale, x.student_offset) - hard_offset<P>(scale, student_offset);
  x.hard_sum = scaled(x.hard_sum, dh);
  x.student_offset = student_offset;
  x.teacher_offset = teacher_offset;
}

// The one merge rule: blocks of a segment, segments of a row.
template <class P>
void add(RowStats& total, double n_total, RowStats more, double n_more, const RowScale& scale) {
  if (n_total == 0) {
    total = more;
    return;
  }
  // std::max would do, but for NaN, which must stay
  const double so = more.student_offset < total.student_offset ? total.student_offset : more.student_offset;
  const double to = P::kMSE || more.teacher_offset < total.teacher_offset ? total.teacher_offset : more.teacher_offset;
  if (so != total.student_offset || to != total.teacher_offset) shift<P>(total, scale, so, to, n_total);
  if (so != more.student_offset || to != more.teacher_offset) shift<P>(more, scale, so, to, n_more);
  total.student_sum += more.student_sum;
  total.teacher_sum += more.teacher_sum;
  total.hard_sum += more.hard_sum;
  total.running += more.running;
}

// Pass A over n classes of a row; blocks[i] gets the i-th block's offsets.
template <class P, bool kKeep>
KD_NOINLINE RowStats row_sums(const typename P::S* s, const typename P::T* t, int64_t n, const RowScale& scale,
                  Scratch<typename P::C> keep, Block<P>* blocks, int ahead) {
  RowStats total{};
  double so = -kInfinity, to = P::kProbs ? 0 : -kInfinity;
  for (int64_t at = 0; at < n; at += kBlock) {
    const int m = n - at < kBlock ? n - at : kBlock;
    const Scratch<typename P::C> here{keep.student + at, keep.teacher + at, keep.hard + at};
    if (so == -kInfinity) so = offset_at_max<P>(s + at, m, scale.student);
    if constexpr (P::kMSE) {
      if (at == 0) to = mean_difference<P>(s, t, m);
    } else if constexpr (P::kSoft && !P::kProbs) {
      if (to == -kInfinity) to = offset_at_max<P>(t + at, m, scale.teacher);
    }
    RowStats more = block_sums<P, kKeep>(s + at, t + at, m, scale, so, to, here, ahead);
    if (!in_range(more, P::kSoft && !P::kProbs)) {
      so = offset_at_max<P>(s + at, m, scale.student);
      if constexpr (P::kSoft && !P::kProbs) to = offset_at_max<P>(t + at, m, scale.teacher);
      more = block_sums<P, kKeep>(s + at, t + at, m, scale, so, to, here, ahead);
    }
    add<P>(total, at, more, m, scale);
    if (blocks) blocks[at / kBlock] = {so, to};
  }
  return total;
}

// What pass C multiplies by, for exps relative to the row's offsets.
struct Coefficients {
  double student, teacher;          // to q and p, with the soft term's weight
  double log_student, log_teacher;  // log q = ln2 * (y + log_student)
  double psi_sum;
  double hard;   // to the hard term's weight * q1
  double label;  // that weight itself
};

template <class P>
KD_NOINLINE Coefficients at_offsets(Coefficients c, const RowStats& row, const RowScale& scale, double so, double to) {
  if (so != row.student_offset) {
    const double ds = so - row.student_offset;
    c.student = scaled(c.student, ds);
    c.log_student += ds;
    c.hard = so == -kInfinity
                 ? 0
                 : scaled(c.hard, hard_offset<P>(scale, so) - hard_offset<P>(scale, row.student_offset));
  }
  if (to != row.teacher_offset) {
    const double dt = to - row.teacher_offset;
    if constexpr (P::kMSE) {
      c.log_teacher += dt;
    } else {
      c.teacher = scaled(c.teacher, dt);
      c.log_teacher += dt;
    }
  }
  return c;
}

// Pass C over one block, from the scratch (kKeep) or from the logits.
template <class P, bool kKeep>
struct Gradient {
  using S = typename P::S;
  using T = typename P::T;
  using C = typename P::C;
  using V = typename P::V;
  Exponents<P> exponents;
  V student, teacher, log_student, log_teacher, psi_sum, hard;

  KD_INLINE Gradient(const RowScale& scale, const Coefficients& c, double so, double to)
      : exponents(scale, so, to),
        student(splat<C>(c.student)),
        teacher(splat<C>(c.teacher)),
        log_student(splat<C>(c.log_student)),
        log_teacher(splat<C>(c.log_teacher)),
        psi_sum(splat<C>(c.student * c.psi_sum)),
        hard(splat<C>(c.hard)) {}

  KD_INLINE V operator()(const S* s, const T* t, Scratch<C> kept, int i, int lanes) const {
    Lanes<P> x = exponents(load_student<P>(s + i, lanes), load_teacher<P>(t + i, lanes));
    if constexpr (kKeep) {  // the logits are then read only where psi needs a logarithm
      x.es = load(kept.student + i);
      x.e1 = P::kOwn ? load(kept.hard + i) : exponents.power_of(x.es);
      if constexpr (P::kSoft || P::kMSE) x.et = load(kept.teacher + i);
    }
    V g = x.e1 * hard;
    if constexpr (P::kMSE) {
      g += (x.et + log_teacher) * teacher;
    } else if constexpr (P::kSoft) {
      const V log_q = (x.ys + log_student) * (C)kLn2, log_p = (x.yt + log_teacher) * (C)kLn2;
      g += P::D::psi(x.et * teacher, x.es * student, log_p, log_q) - x.es * psi_sum;
    }
    return g;
  }

  KD_NOINLINE void write(const S* s, const T* t, Scratch<C> kept, int n, S* out, bool past_cache) const {
    constexpr uintptr_t kBytes = sizeof(S) * P::kLanes;
    // a first short step makes the streamed ones aligned
    int lanes = past_cache ? P::kLanes - (int)((uintptr_t)out % kBytes / sizeof(S)) : P::kLanes;
    for (int i = 0; i < n; i += lanes, lanes = P::kLanes) {
      if (n - i < lanes) lanes = n - i;
      const V g = (*this)(s, t, kept, i, lanes);
      if (lanes < P::kLanes) {
        store_part(out + i, g, lanes);
      } else if (past_cache) {
        stream(out + i, g);
      } else {
        store(out + i, g);
      }
    }
  }
};

}  // namespace
}  // namespace kdfast
