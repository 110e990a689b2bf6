// Rows of one storage type as another, or softmaxed in place; and the memory for them.
#pragma once

#include <cstdlib>

#include "exp_math.h"
#include "row_kernels.h"

namespace kdfast {
namespace {

// A thread's memory, which grows and is kept for the next call.
struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

enum BufferOf { kRow, kEntries, kSmallRow, kBuffers };

// Where thread_buffer's is to be another than the row's: of a call inside of a row.
thread_local BufferOf current_buffer = kRow;

KD_NOINLINE void* thread_buffer(size_t bytes, BufferOf which = current_buffer) {
  static thread_local Buffer buffers[kBuffers];
  Buffer& buffer = buffers[which];
  if (bytes > buffer.size) {
    std::free(buffer.data);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, buffer.size);
  }
  return buffer.data;
}

constexpr int kAhead = 2048;  // bytes; a machine's own prefetching ends with each page

// f(vector, i) over a row of one storage type, as another; both are computed in the same type.
template <class From, class To, class F>
KD_INLINE void convert_row(const From* from, int64_t n, To* to, F f) {
  constexpr int kLanes = Types<Compute<To>>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch((const char*)(from + i) + kAhead, 0, 3);
    store(to + i, f(load(from + i), i));
  }
  if (i < n) store_part(to + i, f(load_part(from + i, n - i, 0), i), n - i);
}
// A row of one storage type as another, through the vectors where both are computed in the same type.
template <class From, class To>
KD_INLINE void convert_row(const From* from, int64_t n, To* to) {
  if constexpr (std::is_same_v<Compute<From>, Compute<To>>) {
    convert_row(from, n, to, [](auto v, int64_t) { return v; });
  } else if constexpr (sizeof(To) >= 4) {
    for (int64_t i = 0; i < n; ++i) to[i] = load_one(from + i);
  } else {
    for (int64_t i = 0; i < n; ++i) store_part(to + i, splat((float)from[i]), 1);
  }
}

template <class F>
void dispatch_storage(DType dtype, F f) {
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
  dispatch_storage(dtype, [&](auto s) { convert_row((const decltype(s)*)from, n, to); });
}
template <class C>
KD_NOINLINE void narrow(const C* from, int64_t n, void* to, DType dtype) {
  dispatch_storage(dtype, [&](auto s) { convert_row(from, n, (decltype(s)*)to); });
}

KD_INLINE const char* row_data(const Matrix& m, int64_t row) {
  return (const char*)m.data + m.offset(row) * bytes_of(m.dtype);
}

// f(vector, i) over a row of C, in place; what it does beyond n falls into the row's padding.
template <class C, class F>
KD_INLINE void for_vectors(C* row, int64_t n, F f) {
  for (int64_t i = 0; i < n; i += Types<C>::kLanes) store(row + i, f(load(row + i), i));
}

// p = softmax(z * exp2_scale) of a row in place
template <class C>
KD_NOINLINE void softmax_row(C* z, int64_t n, double exp2_scale) {
  using V = typename Types<C>::V;
  V high = splat(-std::numeric_limits<C>::infinity()), total{};
  for (int64_t i = n; i % Types<C>::kLanes; ++i) z[i] = -std::numeric_limits<C>::infinity();
  for (int64_t i = 0; i < n; i += Types<C>::kLanes) high = max(load(z + i), high);
  const V offset = splat(max_lane(high)), exponent_scale = splat((C)exp2_scale);
  double sum_of_blocks = 0;
  for_vectors(z, n, [&](V v, int64_t i) {
    if (i % 256 == 0) sum_of_blocks += sum(total), total = V{};
    const V e = exp2((v - offset) * exponent_scale);
    total += e;
    return e;
  });
  const V scale = splat<C>(1 / (sum_of_blocks + sum(total)));
  for_vectors(z, n, [&](V v, int64_t) { return v * scale; });
}

}  // namespace
}  // namespace kdfast
