// The three passes over one row, or over a segment of it: statistics (A, with the running sum that stands for
// B) and gradient (C), written once over storage types and divergences.
//
// The row goes by in blocks of kBlock classes. While a block is in L1 its exps are taken relative to an
// offset, kept in a scratch that stays in L2, and summed; the gradient is then made from the scratch, and
// memory is read once. The offset is the maximum of the first classes and stays as long as no block's sums
// leave the range in which fp32 is exact enough; such a block takes its own maximum and is done again. So no
// pass for the maxima is needed, and any sums that carry their offset can be merged: blocks, segments,
// shards.
#pragma once

#include "../divergences.h"
#include "exp_math.h"
#include "row_kernels.h"

namespace kdfast {
namespace {

constexpr int kBlock = 2048;
constexpr int kSample = 128;
constexpr int kMaxPower = 4;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What a kernel is instantiated for: storage types, divergence, the teacher as probabilities instead of
// logits, and the student's exps at temperature 1 taken by themselves (kOwn) instead of as powers of those at
// T.
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
  static constexpr int kLanes = Types<C>::kLanes, kStep = 2 * kLanes;  // classes in a vector, and at a time
};

struct RowScale {  // of one row
  double temperature;
  double student, teacher;  // slopes
  int power;                // with kOwn false: the temperature, a small whole number
};

KD_INLINE double at_row(const double* per_row, double number, int64_t row) {
  return per_row ? per_row[row] : number;
}

KD_INLINE RowScale row_scale(const LossArgs& a, int64_t row) {
  const double t = at_row(a.temperatures, a.temperature, row);
  const bool logits = a.target == Target::kLogits;
  const double at = logits ? at_row(a.teacher_temperatures, a.teacher_temperature, row) : 1;
  return {t, kLog2E / t, kLog2E / at, (int)t};
}

template <class C>
struct Scratch {  // a place for each step of a row
  C *student, *teacher, *hard;
  KD_INLINE Scratch after(int64_t n) const { return {student + n, teacher + n, hard + n}; }
};

template <class P>
struct Block {  // where a block's exps stand, and what their exponents are relative to
  double student_offset, teacher_offset;
  bool operator==(const Block& other) const {
    return student_offset == other.student_offset && teacher_offset == other.teacher_offset;
  }
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
  V student, teacher, student_offset, teacher_offset, hard_offset;
  int power;

  Exponents() = default;
  KD_INLINE Exponents(const RowScale& scale, double so, double to)
      : student(splat<C>(scale.student)),
        teacher(splat<C>(scale.teacher)),
        student_offset(splat<C>(so == -kInfinity ? 0 : so)),
        teacher_offset(splat<C>(to == -kInfinity ? 0 : to)),
        hard_offset(splat<C>(so == -kInfinity ? 0 : kdfast::hard_offset<P>(scale, so))),
        power(scale.power) {}

  KD_INLINE V power_of(V es) const {
    V e1 = es;
    for (int k = 1; k < power; ++k) e1 *= es;
    return e1;
  }

  KD_INLINE Lanes<P> operator()(V s, V t) const {
    Lanes<P> x{};
    x.ys = multiply_subtract(s, student, student_offset);
    x.es = exp2(x.ys);
    x.e1 = P::kOwn ? exp2(multiply_subtract(s, splat<C>(kLog2E), hard_offset)) : power_of(x.es);
    if constexpr (P::kMSE) {
      x.et = (s - t) - teacher_offset;
    } else if constexpr (P::kProbs) {
      x.et = t;
      x.yt = log2(t);
    } else if constexpr (P::kSoft) {
      x.yt = multiply_subtract(t, teacher, teacher_offset);
      x.et = exp2(x.yt);
    }
    return x;
  }
};

// A step's logits; those that a short step lacks are classes of probability 0.
template <class S>
KD_INLINE S filler(bool zero) {
  if constexpr (std::is_same_v<S, bf16>)
    return S{(uint16_t)(zero ? 0 : 0xff80)};
  else
    return zero ? 0 : -std::numeric_limits<S>::infinity();
}
template <class P>
KD_INLINE auto load_student(const typename P::S* s, int n) {
  return n == P::kStep ? load2(s) : load2_part(s, n, filler<typename P::S>(P::kMSE));
}
template <class P>
KD_INLINE auto load_teacher(const typename P::T* t, int n) {
  if constexpr (!P::kSoft && !P::kMSE) {
    return Two<typename P::V>{};
  } else {
    return n == P::kStep ? load2(t) : load2_part(t, n, filler<typename P::T>(P::kProbs || P::kMSE));
  }
}

// Pass A over one block. The exps go to the scratch where kKeep. The first step is short where `head` is not
// 0.
template <class P, bool kKeep>
KD_NOINLINE RowStats block_sums(const typename P::S* s, const typename P::T* t, int n, int head,
                                const RowScale& scale, double student_offset, double teacher_offset,
                                Scratch<typename P::C> keep, int ahead) {
  using V = typename P::V;
  const Exponents<P> exponents(scale, student_offset, teacher_offset);
  // Two levels of sums: short chains of additions, so that rounding does not add up over equal terms.
  struct Sums {
    V student, teacher, hard, running;
  } part{}, total{};
  auto flush = [&]() __attribute__((always_inline)) {
    total.student += part.student;
    total.teacher += part.teacher;
    total.hard += part.hard;
    total.running += part.running;
    part = Sums{};
  };
  auto add_up = [&](const Lanes<P>& x, int at) __attribute__((always_inline)) {
    if constexpr (P::kMSE) part.running += x.et * x.et;
    if constexpr (P::kSoft) part.running += P::D::phi(x.et, x.es, x.yt, x.ys);
    part.student += x.es;
    part.teacher += x.et;
    part.hard += x.e1;
    if constexpr (kKeep) {
      store(keep.student + at, x.es);
      if constexpr (P::kSoft || P::kMSE) store(keep.teacher + at, x.et);
      if constexpr (P::kOwn) store(keep.hard + at, x.e1);
    }
  };
  int at = 0;  // in the scratch, where each step has a whole place
  for (int i = 0, m = head ? head : P::kStep; i < n; i += m, m = P::kStep, at += P::kStep) {
    for (int line = 0; line < P::kStep * (int)sizeof(typename P::S); line += 64) {
      __builtin_prefetch((const char*)(s + i + ahead) + line, 0, 2);
      if constexpr (P::kSoft || P::kMSE) __builtin_prefetch((const char*)(t + i + ahead) + line, 0, 2);
    }
    if (n - i < m) m = n - i;
    const auto si = load_student<P>(s + i, m);
    const auto ti = load_teacher<P>(t + i, m);
    Lanes<P> x = exponents(si.a, ti.a), y = exponents(si.b, ti.b);
    if (P::kMSE && m < P::kStep) {
      for (int j = 0; j < P::kLanes; ++j) {
        const bool halves = std::is_same_v<typename P::S, bf16>;  // even and odd places
        if ((halves ? 2 * j : j) >= m) x.et[j] = x.es[j] = x.e1[j] = 0;
        if ((halves ? 2 * j + 1 : j + P::kLanes) >= m) y.et[j] = y.es[j] = y.e1[j] = 0;
      }
    }
    add_up(x, at);
    add_up(y, at + P::kLanes);
    if (at / P::kStep % 8 == 7) flush();
  }
  flush();
  return {student_offset,     teacher_offset,  sum(total.student),
          sum(total.teacher), sum(total.hard), sum(total.running)};
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

// The offset at which the largest exp of n classes is 1; as a C, since the exponents are.
template <class P, class X>
double offset_at_max(const X* x, int n, double slope) {
  return (typename P::C)((typename P::C)slope * block_max(x, n));
}

// A first offset: the largest of some classes is near enough, unless all of them are masked.
template <class P, class X>
double first_offset(const X* x, int n, double slope) {
  const double offset = offset_at_max<P>(x, n < kSample ? n : kSample, slope);
  return offset == -kInfinity ? offset_at_max<P>(x, n, slope) : offset;
}

template <class P>
KD_NOINLINE double mean_difference(const typename P::S* s, const typename P::T* t, int n) {
  double total = 0;
  for (int i = 0; i < n; i += P::kStep) {
    const int m = n - i < P::kStep ? n - i : P::kStep;
    const auto si = load_student<P>(s + i, m);
    const auto ti = load_teacher<P>(t + i, m);
    total += sum(si.a - ti.a) + sum(si.b - ti.b);
  }
  return (typename P::C)(total / n);
}

// fp32 sums are exact enough, and leave room for later blocks' terms, below this. False for NaN.
KD_INLINE bool in_range(const RowStats& x, bool teacher) {
  return x.student_sum < 0x1p40 && x.hard_sum < 0x1p40 && (!teacher || x.teacher_sum < 0x1p40);
}

// a * 2^y; 0 where 2^y is 2^-inf, and infinite where a is and 2^y only underflows. NaN stays.
KD_INLINE double scaled(double a, double y) {
  if (a != a) return a;
  return y == -kInfinity ? 0 : std::isinf(a) ? a : a * std::exp2(y);
}

// The same sums relative to other offsets (logit_mse: the same moments about another shift).
template <class P>
KD_NOINLINE void shift(RowStats& x, const RowScale& scale, double student_offset, double teacher_offset,
                       double n) {
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
  const double dh = ds == 0 ? 0
                    : ds == -kInfinity
                        ? ds
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
  const double to =
      P::kMSE || more.teacher_offset < total.teacher_offset ? total.teacher_offset : more.teacher_offset;
  if (so != total.student_offset || to != total.teacher_offset) shift<P>(total, scale, so, to, n_total);
  if (so != more.student_offset || to != more.teacher_offset) shift<P>(more, scale, so, to, n_more);
  total.student_sum += more.student_sum;
  total.teacher_sum += more.teacher_sum;
  total.hard_sum += more.hard_sum;
  total.running += more.running;
}

// A row's blocks: the first is a short step and whole ones where `head` is not 0, so that the others start
// aligned.
template <class P>
KD_INLINE int block_length(int64_t at, int64_t n, int head) {
  const int whole = at == 0 && head ? head + kBlock - P::kStep : kBlock;
  return n - at < whole ? n - at : whole;
}

// Pass A over n classes of a row; blocks[i] gets the i-th block's offsets.
template <class P, bool kKeep>
KD_NOINLINE RowStats row_sums(const typename P::S* s, const typename P::T* t, int64_t n, int head,
                              const RowScale& scale, Scratch<typename P::C> keep, Block<P>* blocks,
                              int ahead) {
  RowStats total{};
  double so = -kInfinity, to = P::kProbs ? 0 : -kInfinity;
  for (int64_t at = 0, m; at < n; at += m, head = 0) {
    m = block_length<P>(at, n, head);
    if (so == -kInfinity) so = first_offset<P>(s + at, m, scale.student);
    if constexpr (P::kMSE) {
      if (at == 0) to = mean_difference<P>(s, t, m);
    } else if constexpr (P::kSoft && !P::kProbs) {
      if (to == -kInfinity) to = first_offset<P>(t + at, m, scale.teacher);
    }
    RowStats more = block_sums<P, kKeep>(s + at, t + at, m, head, scale, so, to, keep, ahead);
    if (!in_range(more, P::kSoft && !P::kProbs)) {
      so = offset_at_max<P>(s + at, m, scale.student);
      if constexpr (P::kSoft && !P::kProbs) to = offset_at_max<P>(t + at, m, scale.teacher);
      more = block_sums<P, kKeep>(s + at, t + at, m, head, scale, so, to, keep, ahead);
    }
    add<P>(total, at, more, m, scale);
    if constexpr (kKeep) {
      *blocks++ = {so, to};
      keep = keep.after(kBlock);
    }
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

// The same for the exps of a block that has other offsets.
template <class P>
KD_NOINLINE Coefficients at_offsets(Coefficients c, const RowStats& row, const RowScale& scale,
                                    const Block<P>& block) {
  const double ds = block.student_offset - row.student_offset, dt = block.teacher_offset - row.teacher_offset;
  c.log_student += ds;
  c.log_teacher += dt;
  if constexpr (!P::kMSE) c.teacher = scaled(c.teacher, dt);
  if (ds == 0) return c;
  c.student = scaled(c.student, ds);
  c.hard = scaled(c.hard, ds == -kInfinity ? ds
                                           : hard_offset<P>(scale, block.student_offset) -
                                                 hard_offset<P>(scale, row.student_offset));
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

  Gradient() = default;
  KD_INLINE Gradient(const RowScale& scale, const Coefficients& c, double so, double to)
      : exponents(scale, so, to),
        student(splat<C>(c.student)),
        teacher(splat<C>(c.teacher)),
        log_student(splat<C>(c.log_student)),
        log_teacher(splat<C>(c.log_teacher)),
        psi_sum(splat<C>(c.student * c.psi_sum)),
        hard(splat<C>(c.hard)) {}

  KD_INLINE V combine(V s, V t, Scratch<C> kept, int i) const {
    Lanes<P> x = exponents(s, t);
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

  KD_NOINLINE void write(const S* s, const T* t, Scratch<C> kept, int n, int head, S* out,
                         bool past_cache) const {
    int at = 0;
    for (int i = 0, m = head ? head : P::kStep; i < n; i += m, m = P::kStep, at += P::kStep) {
      if (n - i < m) m = n - i;
      const auto si = load_student<P>(s + i, m);
      const auto ti = load_teacher<P>(t + i, m);
      const Two<V> g{combine(si.a, ti.a, kept, at), combine(si.b, ti.b, kept, at + P::kLanes)};
      if (m < P::kStep) {
        store2_part(out + i, g, m);
      } else if (past_cache) {
        stream2(out + i, g);
      } else {
        store2(out + i, g);
      }
    }
  }
};

}  // namespace
}  // namespace kdfast
