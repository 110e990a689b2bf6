// Rows of one storage type into another, and teachers that are not plain logits of the student's dtype into
// one row that the passes take: logits or probabilities.
#pragma once

#include <cstdlib>

#include "exp_math.h"
#include "row_kernels.h"

namespace kdfast {
namespace {

// A thread's own memory; it grows, and stays for the next call.
struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

KD_NOINLINE void* thread_buffer(size_t bytes) {
  static thread_local Buffer buffer;
  if (bytes > buffer.size) {
    std::free(buffer.data);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, buffer.size);
  }
  return buffer.data;
}

// A row of one storage type as another, through the vectors where both are computed in the same type.
template <class From, class To>
KD_INLINE void convert_row(const From* from, int64_t n, To* to) {
  if constexpr (std::is_same_v<Compute<From>, Compute<To>>) {
    constexpr int kLanes = Types<Compute<To>>::kLanes;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store_part(to + i, load_part(from + i, n - i, 0), n - i);
  } else if constexpr (sizeof(To) >= 4) {
    for (int64_t i = 0; i < n; ++i) to[i] = load_one(from + i);
  } else {
    for (int64_t i = 0; i < n; ++i) store_part(to + i, splat((float)from[i]), 1);
  }
}

template <class F>
void with_storage(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float{});
    case DType::kBFloat16:
      return f(bf16{});
    case DType::kHalf:
      return f(f16{});
    case DType::kDouble:
      return f(double{});
  }
}

template <class C>
KD_NOINLINE void widen(const void* from, DType dtype, int64_t n, C* to) {
  with_storage(dtype, [&](auto s) { convert_row((const decltype(s)*)from, n, to); });
}
template <class C>
KD_NOINLINE void narrow(const C* from, int64_t n, void* to, DType dtype) {
  with_storage(dtype, [&](auto s) { convert_row(from, n, (decltype(s)*)to); });
}

KD_INLINE const char* row_of(const Matrix& m, int64_t row) {
  return (const char*)m.data + m.offset(row) * bytes_of(m.dtype);
}

// f(vector, i) over a row of C, in place; what it does beyond n falls into the row's padding.
template <class C, class F>
KD_INLINE void for_vectors(C* row, int64_t n, F f) {
  for (int64_t i = 0; i < n; i += Types<C>::kLanes) store(row + i, f(load(row + i), i));
}

// cap * tanh(z / cap) of a row, as C; a masked class stays masked.
template <class C>
KD_NOINLINE void softcap_row(const void* from, DType dtype, int64_t n, double cap, C* to) {
  constexpr int kLanes = Types<C>::kLanes;
  const auto c = splat((C)cap), inverse = splat((C)(1 / cap));
  const auto masked = splat(-std::numeric_limits<C>::infinity());
  for (int64_t at = 0; at < n; at += kBlock) {
    const int64_t m = n - at < kBlock ? n - at : kBlock;
    const void* block = (const char*)from + at * bytes_of(dtype);
    if (bytes_of(dtype) != (int64_t)sizeof(C)) {
      widen(block, dtype, m, to + at);
      block = to + at;
    }
    const C* z = (const C*)block;
    auto capped = [&](auto v) { return v == masked ? masked : c * tanh(v * inverse); };
    int64_t i = 0;
    for (; i + kLanes <= m; i += kLanes) store(to + at + i, capped(load(z + i)));
    if (i < m) store(to + at + i, capped(load_part(z + i, m - i, 0)));
  }
}

// A gradient in the capped logits as one in the logits, in its place.
template <class C>
KD_NOINLINE void softcap_gradient(C* g, const C* capped, int64_t n, double cap) {
  using V = typename Types<C>::V;
  const V inverse = splat((C)(1 / cap)), masked = splat(-std::numeric_limits<C>::infinity());
  for_vectors(g, n, [&](V v, int64_t i) {
    const V z = load(capped + i), x = z * inverse;
    return z == masked ? V{} : v * ((1 - x) * (1 + x));
  });
}

struct Moments {  // of a row's logits
  double mean, deviation;
  double per_unit() const { return 1 / (1e-7 + deviation); }
};

// The sample deviation, about the mean of the first classes, which is near enough to lose no digits.
template <class X>
KD_NOINLINE Moments moments(const X* x, int64_t n) {
  using C = Compute<X>;
  using V = typename Types<C>::V;
  constexpr int kLanes = Types<C>::kLanes;
  const int first = n < 128 ? n : 128;
  double pivot = 0;
  for (int i = 0; i < first; ++i) pivot += load_one(x + i);
  const C middle = pivot / first;
  const V about = splat(middle);
  double total = 0, squares = 0;
  constexpr int64_t kUnrolled = 4 * kLanes, kPart = 32 * kUnrolled;  // two levels of sums
  for (int64_t at = 0; at < n; at += kPart) {
    V part[4] = {}, part_squares[4] = {};
    const int64_t end = n - at < kPart ? n : at + kPart;
    int64_t i = at;
    for (; i + kUnrolled <= end; i += kUnrolled) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const V v = load(x + i + k * kLanes) - about;
        part[k] += v;
        part_squares[k] += v * v;
      }
    }
    for (; i < end; i += kLanes) {
      const V v = (end - i < kLanes ? load_part(x + i, end - i, middle) : load(x + i)) - about;
      part[0] += v;
      part_squares[0] += v * v;
    }
    total += sum((part[0] + part[1]) + (part[2] + part[3]));
    squares += sum((part_squares[0] + part_squares[1]) + (part_squares[2] + part_squares[3]));
  }
  const double variance = n > 1 ? (squares - total * total / n) / (n - 1) : 0 * squares;
  return {middle + total / n, variance < 0 ? 0 : std::sqrt(variance)};  // NaN stays
}

// p = softmax(z * slope) of a row in place
template <class C>
KD_NOINLINE void softmax_row(C* z, int64_t n, double slope) {
  using V = typename Types<C>::V;
  V high = splat(-std::numeric_limits<C>::infinity()), total{};
  for (int64_t i = n; i % Types<C>::kLanes; ++i) z[i] = -std::numeric_limits<C>::infinity();
  for (int64_t i = 0; i < n; i += Types<C>::kLanes) high = max(load(z + i), high);
  const C offset = (C)slope * max_lane(high);
  double sum_of_blocks = 0;
  for_vectors(z, n, [&](V v, int64_t i) {
    if (i % 256 == 0) sum_of_blocks += sum(total), total = V{};
    const V e = exp2(multiply_subtract(v, splat((C)slope), splat(offset)));
    total += e;
    return e;
  });
  const V scale = splat<C>(1 / (sum_of_blocks + sum(total)));
  for_vectors(z, n, [&](V v, int64_t) { return v * scale; });
}

// The teachers of one row, classes [begin, begin + n), as one row of C: logits, or probabilities where that
// is said by teacher_is_probs(). `slope` is log2(e) / T'. The row is `out` or, where nothing is to be done,
// the teacher's own. Several teachers are standardised here, one by its slope.
template <class C>
KD_NOINLINE const C* mix_teachers(const LossArgs& a, int64_t row, int64_t begin, int64_t n, double slope,
                                  C* out, C* other) {
  using V = typename Types<C>::V;
  const DType own = std::is_same_v<C, double> ? DType::kDouble : DType::kFloat;
  if (a.n_teachers == 1 && a.teachers[0].dtype == own && !a.teacher_softcap) {
    return (const C*)row_of(a.teachers[0], row) + begin;
  }
  for (int k = 0; k < a.n_teachers; ++k) {
    const Matrix& m = a.teachers[k];
    C* z = k == 0 ? out : other;
    const char* from = row_of(m, row) + begin * bytes_of(m.dtype);
    if (a.teacher_softcap != 0) {
      softcap_row(from, m.dtype, n, a.teacher_softcap, z);
    } else {
      widen(from, m.dtype, n, z);
    }
    if (a.n_teachers == 1) return out;
    const double unit = a.standardize ? moments(z, n).per_unit() : 1;
    if (!a.geometric && a.target == Target::kLogits) softmax_row(z, n, slope * unit);
    const C w = a.teacher_weights[k] * (a.geometric ? unit : 1);
    for_vectors(z, n, [&](V v, int64_t i) {
      if (a.geometric && a.target == Target::kProbs) v = log2(v) * (C)0.6931471805599453;
      if (!a.geometric && a.target == Target::kLogProbs) v = exp2(v * (C)1.4426950408889634);
      return k == 0 ? v * w : v * w + load(out + i);
    });
    if (k > 0) std::memcpy(out, z, n * sizeof(C));
  }
  return out;
}

KD_INLINE bool teacher_is_probs(const LossArgs& a) {
  return a.n_teachers > 1 ? !a.geometric : a.target == Target::kProbs;
}
// Whether the row mix_teachers makes is normalised by its own softmax, and not as it is given.
KD_INLINE bool teacher_is_softmaxed(const LossArgs& a) {
  return a.n_teachers > 1 ? a.geometric : a.target == Target::kLogits;
}

}  // namespace
}  // namespace kdfast
