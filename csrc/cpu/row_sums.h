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

#include "exponents.h"

namespace kdfast {
namespace {

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

// A step's worth of what is to come. Measured on Zen 4: fp32 rows that fit into L2 with their scratch are
// best fetched into L2 a block ahead, 16-bit and longer ones into L1 half a block ahead (each against the
// other way about: fp32 at V = 32000 takes 0.85 of the time, bf16 0.92, both at V = 151936 0.9).
template <class S>
KD_INLINE void prefetch(const S* p, bool near) {
  for (int line = 0; line < 2 * Types<Compute<S>>::kLanes * (int)sizeof(S); line += 64) {
    if (near) {
      __builtin_prefetch((const char*)(p + kBlock / 2) + line, 0, 3);
    } else {
      __builtin_prefetch((const char*)(p + kBlock) + line, 0, 2);
    }
  }
}

// Pass A over one block. The exps go to the scratch where kKeep.
template <class P, bool kKeep>
KD_NOINLINE RowStats block_sums(const typename P::S* s, const typename P::T* t, int n, const RowScale& scale,
                                double student_offset, double teacher_offset, Scratch<typename P::C> keep,
                                bool near) {
  using V = typename P::V;
  const Exponents<P> exponents(scale, student_offset, teacher_offset);
  // Two levels of sums: short chains of additions, so that rounding does not add up over equal terms.
  struct Sums {
    V student, teacher, hard, teacher_running, student_running;
  } part{}, total{};
  auto flush = [&]() __attribute__((always_inline)) {
    total.student += part.student;
    total.teacher += part.teacher;
    total.hard += part.hard;
    total.teacher_running += part.teacher_running;
    total.student_running += part.student_running;
    part = Sums{};
  };
  auto add_up = [&](const Lanes<P>& x, int at) __attribute__((always_inline)) {
    if constexpr (P::kMSE) part.teacher_running += x.et * x.et;
    if constexpr (P::D::kTeacher) part.teacher_running += P::D::over_teacher(x.et, x.ys, x.ys - x.yt);
    if constexpr (P::D::kStudent) part.student_running += P::D::over_student(x.es, x.ys - x.yt);
    part.student += x.es;
    part.teacher += x.et;
    part.hard += x.e1;
    if constexpr (kKeep) {
      store(keep.student + at, x.es);
      if constexpr (P::kSoft || P::kMSE) store(keep.teacher + at, x.et);
      if constexpr (P::kOwn) store(keep.hard + at, x.e1);
    }
  };
  for (int i = 0; i < n; i += P::kStep) {
    prefetch(s + i, near);
    if constexpr (P::kSoft || P::kMSE) prefetch(t + i, near);
    const int m = n - i < P::kStep ? n - i : P::kStep;
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
    add_up(x, i);
    add_up(y, i + P::kLanes);
    if (i / P::kStep % 8 == 7) flush();
  }
  flush();
  return {student_offset,
          teacher_offset,
          sum(total.student),
          sum(total.teacher),
          sum(total.hard),
          sum(total.teacher_running),
          sum(total.student_running)};
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

// Their sum less n times `about`, in which its digits are kept.
template <class S>
KD_NOINLINE double block_sum(const S* s, int n, Compute<S> about) {
  using V = typename Types<Compute<S>>::V;
  constexpr int kLanes = Types<Compute<S>>::kLanes;
  V part[4] = {};
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) part[k] += load(s + i + k * kLanes) - about;
  }
  for (; i < n; i += kLanes) {
    part[0] += (n - i < kLanes ? load_part(s + i, n - i, about) : load(s + i)) - about;
  }
  return sum((part[0] + part[1]) + (part[2] + part[3]));
}

// The first of n classes that is `value`, which is one of them.
template <class S>
KD_NOINLINE int first_at(const S* s, int n, Compute<S> value) {
  constexpr int kLanes = Types<Compute<S>>::kLanes;
  int i = 0;
  while (i + kLanes <= n && !any(load(s + i) == splat(value))) i += kLanes;
  while (i < n - 1 && load_one(s + i) != value) ++i;
  return i;
}

template <class P>
KD_NOINLINE double mean_difference(const typename P::S* s, const typename P::T* t, int n,
                                   const RowScale& scale) {
  using C = typename P::C;
  const C a = scale.student_unit, b = scale.teacher_unit;
  double total = 0;
  for (int i = 0; i < n; i += P::kStep) {
    const int m = n - i < P::kStep ? n - i : P::kStep;
    const auto si = load_student<P>(s + i, m);
    const auto ti = load_teacher<P>(t + i, m);
    total += sum(si.a * a - ti.a * b) + sum(si.b * a - ti.b * b);
  }
  return (C)(total / n);
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

// An offset as it is subtracted: 0 where every class is masked.
KD_INLINE double finite(double offset) { return offset == -kInfinity ? 0 : offset; }

// The same sums relative to other offsets (logit_mse: the same moments about another shift).
template <class P>
KD_NOINLINE void shift(RowStats& x, const RowScale& scale, double student_offset, double teacher_offset,
                       double n) {
  const double ds = x.student_offset == student_offset ? 0 : x.student_offset - student_offset;
  const double dt = x.teacher_offset == teacher_offset ? 0 : x.teacher_offset - teacher_offset;
  if constexpr (P::kMSE) {
    x.teacher_running += 2 * dt * x.teacher_sum + n * dt * dt;
    x.teacher_sum += n * dt;
  } else if constexpr (P::kSoft) {
    if constexpr (P::D::kTeacher) {
      const double moved = P::D::over_teacher(x.teacher_sum, ds, ds - dt);
      x.teacher_running = scaled(x.teacher_running + moved, dt);
    }
    if constexpr (P::D::kStudent) {
      const double moved = P::D::over_student(x.student_sum, ds - dt);
      x.student_running = scaled(x.student_running + moved, ds);
    }
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
  total.teacher_running += more.teacher_running;
  total.student_running += more.student_running;
}

// What the metrics sum, over exps at T relative to these offsets.
struct Measures {
  double student_offset, teacher_offset, student_sum, teacher_sum;
  double divergence, teacher_log, student_log;  // sums of P (yt - ys), P yt and Q ys
  double student_max, teacher_max;              // of the logits, and the blocks that hold the first of them
  int64_t student_block, teacher_block;
};

// Of a block whose exps are in the scratch; its sums are pass A's.
template <class S, class T, bool kTeacher, bool kProbs>
KD_NOINLINE Measures block_measures(const S* s, const T* t, int n, const RowScale& scale, const RowStats& x,
                                    Scratch<Compute<S>> kept) {
  using C = Compute<S>;
  using V = typename Types<C>::V;
  constexpr int kLanes = Types<C>::kLanes, kStep = 2 * kLanes;
  constexpr C kMasked = -std::numeric_limits<C>::infinity();
  // a probability of 0 adds 0, and NaN stays
  const V slope = splat((C)scale.student), teacher_slope = splat((C)scale.teacher), least = splat((C)-1e30);
  const V so = splat((C)finite(x.student_offset)), to = splat((C)finite(x.teacher_offset));
  V divergence{}, teacher_log{}, student_log{}, student_max = splat(kMasked), teacher_max = splat(kMasked);
  V divergence_part{}, teacher_part{}, student_part{};
  auto add = [&](V si, V ti, int at) __attribute__((always_inline)) {
    const V ys = multiply_subtract(si, slope, so), q = load(kept.student + at);
    student_part += q * max(least, ys);
    student_max = max(si, student_max);
    if constexpr (kTeacher) {
      const V yt = kProbs ? log2(ti) : multiply_subtract(ti, teacher_slope, to), p = load(kept.teacher + at);
      const V above = max(least, yt);
      teacher_part += p * above;
      divergence_part += p == 0 ? V{} : p * (above - ys);
      teacher_max = max(ti, teacher_max);
    }
  };
  for (int i = 0; i < n; i += kStep) {
    const int m = n - i < kStep ? n - i : kStep;
    const auto si = m == kStep ? load2(s + i) : load2_part(s + i, m, filler<S>(false));
    Two<V> ti{};
    if constexpr (kTeacher) ti = m == kStep ? load2(t + i) : load2_part(t + i, m, filler<T>(kProbs));
    add(si.a, ti.a, i);
    add(si.b, ti.b, i + kLanes);
    if (i / kStep % 8 == 7 || m < kStep) {
      divergence += divergence_part;
      teacher_log += teacher_part;
      student_log += student_part;
      divergence_part = teacher_part = student_part = V{};
    }
  }
  return {x.student_offset,
          x.teacher_offset,
          x.student_sum,
          x.teacher_sum,
          sum(divergence + divergence_part),
          sum(teacher_log + teacher_part),
          sum(student_log + student_part),
          max_lane(student_max),
          max_lane(teacher_max)};
}

void shift(Measures& x, double student_offset, double teacher_offset) {
  const double ds = x.student_offset == student_offset ? 0 : x.student_offset - student_offset;
  const double dt = x.teacher_offset == teacher_offset ? 0 : x.teacher_offset - teacher_offset;
  x.divergence = x.teacher_sum == 0 ? 0 : scaled(x.divergence + x.teacher_sum * (dt - ds), dt);
  x.teacher_log = x.teacher_sum == 0 ? 0 : scaled(x.teacher_log + x.teacher_sum * dt, dt);
  x.student_log = x.student_sum == 0 ? 0 : scaled(x.student_log + x.student_sum * ds, ds);
  x.teacher_sum = scaled(x.teacher_sum, dt);
  x.student_sum = scaled(x.student_sum, ds);
  x.student_offset = student_offset;
  x.teacher_offset = teacher_offset;
}

void add(Measures& total, Measures more) {
  const double so = more.student_offset < total.student_offset ? total.student_offset : more.student_offset;
  const double to = more.teacher_offset < total.teacher_offset ? total.teacher_offset : more.teacher_offset;
  shift(total, so, to);
  shift(more, so, to);
  total.student_sum += more.student_sum;
  total.teacher_sum += more.teacher_sum;
  total.divergence += more.divergence;
  total.teacher_log += more.teacher_log;
  total.student_log += more.student_log;
  if (more.student_max > total.student_max) {
    total.student_max = more.student_max;
    total.student_block = more.student_block;
  }
  if (more.teacher_max > total.teacher_max) {
    total.teacher_max = more.teacher_max;
    total.teacher_block = more.teacher_block;
  }
}

struct Wanted {                  // of pass A, beside the sums
  int64_t without = -1;          // a class that is left out
  double* logits = nullptr;      // the sum of the logits
  Measures* measures = nullptr;  // the exps are kept
};

// A copy of a block without one of its classes.
template <class X>
KD_NOINLINE const X* leave_out(const X* x, int n, int without, bool probs) {
  static thread_local X copies[2][kBlock];
  static thread_local int next = 0;  // student and teacher may be of one type
  X* copy = copies[next ^= 1];
  std::memcpy((void*)copy, x, n * sizeof(X));
  copy[without] = filler<X>(probs);
  return copy;
}

// Pass A over n classes of a row; blocks[i] gets the i-th block's offsets.
template <class P, bool kKeep>
KD_NOINLINE RowStats row_sums(const typename P::S* row_s, const typename P::T* row_t, int64_t n,
                              const RowScale& scale, Scratch<typename P::C> keep, Block<P>* blocks,
                              const Wanted& wanted = {}) {
  const bool near = sizeof(typename P::S) == 2 || n > kFitsL2;
  typename P::C about = wanted.logits ? load_one(row_s) : 0;
  if (!std::isfinite(about)) about = 0;
  RowStats total{};
  double so = -kInfinity, to = P::kProbs ? 0 : -kInfinity;
  for (int64_t at = 0; at < n; at += kBlock) {
    const int m = n - at < kBlock ? n - at : kBlock;
    const typename P::S* s = row_s + at;
    const typename P::T* t = row_t + at;
    if constexpr (std::is_same_v<typename P::D, ForwardKL>) {  // which decoupled KD is
      if (at <= wanted.without && wanted.without < at + m) {
        s = leave_out(s, m, wanted.without - at, false);
        t = leave_out(t, m, wanted.without - at, P::kProbs);
      }
    }
    if (so == -kInfinity) so = first_offset<P>(s, m, scale.student);
    if constexpr (P::kMSE) {
      if (at == 0) to = mean_difference<P>(s, t, m, scale);
    } else if constexpr (P::kSoft && !P::kProbs) {
      if (to == -kInfinity) to = first_offset<P>(t, m, scale.teacher);
    }
    RowStats more = block_sums<P, kKeep>(s, t, m, scale, so, to, keep, near);
    if (!in_range(more, P::kSoft && !P::kProbs)) {
      so = offset_at_max<P>(s, m, scale.student);
      if constexpr (P::kSoft && !P::kProbs) to = offset_at_max<P>(t, m, scale.teacher);
      more = block_sums<P, kKeep>(s, t, m, scale, so, to, keep, near);
    }
    if (wanted.logits) *wanted.logits += block_sum(row_s + at, m, about) + m * (double)about;
    if constexpr (kKeep && !P::kMSE) {
      if (wanted.measures) {
        Measures part =
            block_measures<typename P::S, typename P::T, P::kSoft, P::kProbs>(s, t, m, scale, more, keep);
        part.student_block = part.teacher_block = at;
        if (at == 0)
          *wanted.measures = part;
        else
          add(*wanted.measures, part);
      }
    }
    add<P>(total, at, more, m, scale);
    if constexpr (kKeep) {
      *blocks++ = {so, to};
      keep = keep.after(kBlock);
    }
  }
  return total;
}

}  // namespace
}  // namespace kdfast
