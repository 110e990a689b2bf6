// tempered_softmax over rows, and its backward.
#pragma once

#include "block_sums.h"
#include "convert.h"

namespace kdfast {
namespace {

constexpr int kChain = 256;  // classes that are summed in C before their sum is added in doubles

template <class C>
void softmax_rows(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using V = typename Types<C>::V;
  C* z = (C*)thread_buffer((a.vocab + 64) * sizeof(C));
  for (int64_t row = begin; row < end; ++row) {
    const C exp2_scale = kLog2E / row_value(a.temperatures, a.temperature, row);
    widen(row_data(a.logits, row), a.logits.dtype, a.vocab, z);
    if (a.log) {
      const V offset = splat((C)block_max(z, a.vocab)), scale = splat(exp2_scale);
      double total = 0;
      for (int64_t at = 0; at < a.vocab; at += kChain) {
        V block{};
        const int m = a.vocab - at < kChain ? a.vocab - at : kChain;
        for (int i = 0; i < m; i += Types<C>::kLanes) {
          const int lanes = m - i < Types<C>::kLanes ? m - i : Types<C>::kLanes;
          const V v = load_part(z + at + i, lanes, -std::numeric_limits<C>::infinity());
          block += exp2((v - offset) * scale);
        }
        total += sum(block);
      }
      const C log_total = std::log2(total);
      for_vectors(z, a.vocab, [&](V v, int64_t) {
        return ((v - offset) * scale - log_total) * (C)kLn2;
      });
    } else {
      softmax_row(z, a.vocab, exp2_scale);
    }
    narrow(z, a.vocab, (char*)a.out + row * a.vocab * bytes_of(a.out_dtype), a.out_dtype);
  }
}

template <class C>
void softmax_backward_rows(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  using V = typename Types<C>::V;
  const int64_t padded = a.vocab + 64;
  C* y = (C*)thread_buffer(2 * padded * sizeof(C));
  C* g = y + padded;
  for (int64_t row = begin; row < end; ++row) {
    widen(row_data(a.logits, row), a.logits.dtype, a.vocab, y);
    widen(row_data(a.grad, row), a.grad.dtype, a.vocab, g);
    for (int64_t i = a.vocab; i % Types<C>::kLanes; ++i) y[i] = g[i] = 0;
    double total = 0;
    for (int64_t at = 0; at < a.vocab; at += kChain) {
      V block{};
      for (int64_t i = at; i < a.vocab && i < at + kChain; i += Types<C>::kLanes) {
        block += a.log ? load(g + i) : load(g + i) * load(y + i);
      }
      total += sum(block);
    }
    const V totals = splat<C>(total), scale = splat<C>(1 / row_value(a.temperatures, a.temperature, row));
    for_vectors(y, a.vocab, [&](V v, int64_t i) {
      const V gi = load(g + i);
      return (a.log ? gi - exp2(v * (C)kLog2E) * totals : v * (gi - totals)) * scale;
    });
    narrow(y, a.vocab, (char*)a.out + row * a.vocab * bytes_of(a.out_dtype), a.out_dtype);
  }
}

bool is_double(const SoftmaxArgs& a) {
  return a.logits.dtype == DType::kDouble || a.out_dtype == DType::kDouble;
}

void softmax(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  is_double(a) ? softmax_rows<double>(a, begin, end) : softmax_rows<float>(a, begin, end);
}
void softmax_backward(const SoftmaxArgs& a, int64_t begin, int64_t end) {
  is_double(a) ? softmax_backward_rows<double>(a, begin, end) : softmax_backward_rows<float>(a, begin, end);
}

}  // namespace
}  // namespace kdfast
