// Panels of both factors are packed into the caches and multiplied tile by tile: a tile of the result stays
// in registers while kDepth words are added to it.
//
//   bf16 x bf16    a word is a pair of terms, and vdpbf16ps adds both exact products to a float
//   anything else  a word is a float, converted while packing
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "matmul.h"

namespace kdfast {
namespace {
namespace products {

// Of a tile, which takes 24 registers; of the words of a packed panel of b, 32 KB, which stay in the L1 cache
// beside one of a; and of the rows of a packed block of a, 528 KB, in the L2 cache.
constexpr int64_t kRows = 12, kColumns = 32, kDepth = 256, kBlockRows = 528;
constexpr int64_t kVectors = kColumns / 16;
static_assert(kColumns == MatmulArgs::kUnitColumns && MatmulArgs::kUnitRows % kRows == 0);

using Word = uint32_t;  // a float, or a pair of bf16

// Vectors of an array are registers only where every index is a constant.
#define KDFAST_UNROLL _Pragma("GCC unroll 16")

// Words of a factor of one dtype. kPairs: of bf16, and pairs of terms.
template <DType kDType, bool kPairs>
struct Words {
  static constexpr int64_t kSize = kDType == DType::kFloat ? 4 : 2, kTerms = kPairs ? 2 : 1;

  // Of 16 words, or as many as there are elements for.
  static uint32_t mask(int64_t elements) {
    return elements >= 16 * kTerms ? ~0u : elements <= 0 ? 0 : (1u << elements) - 1;
  }
  static __m512i load(const char* from, uint32_t mask) {
    if constexpr (kDType == DType::kFloat) return _mm512_maskz_loadu_epi32((__mmask16)mask, from);
    if constexpr (kPairs) return _mm512_maskz_loadu_epi16(mask, from);
    const __m256i narrow = _mm256_maskz_loadu_epi16((__mmask16)mask, from);
    if constexpr (kDType == DType::kHalf) return _mm512_castps_si512(_mm512_cvtph_ps(narrow));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
  }
};

inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  KDFAST_UNROLL for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  KDFAST_UNROLL for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  KDFAST_UNROLL for (int i = 0; i < 4; ++i) {  // of 4 x 4 words each
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  KDFAST_UNROLL for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
  }
}

// A block of a factor: `count` of the result's rows or columns, and `terms` of the sum.
struct Block {
  const char* data;
  int64_t stride, k_stride, count, terms;  // strides in bytes

  Block(const Factor& f, int64_t first, int64_t count, int64_t k, int64_t terms)
      : stride(f.stride * bytes_of(f.dtype)),
        k_stride(f.k_stride * bytes_of(f.dtype)),
        count(count),
        terms(terms) {
    data = (const char*)f.data + first * stride + k * k_stride;
  }
};

// A block as panels of kWidth rows or columns, each [word][kWidth]. Words beyond the terms are 0; what is in
// the last panel's place of rows that are missing does not matter.
template <int64_t kWidth, class W>
void pack_words(const Block& from, Word* to) {
  constexpr int64_t kStep = std::min<int64_t>(16, kWidth);
  constexpr __mmask16 kStore = (1u << kStep) - 1;
  const int64_t words = (from.terms + W::kTerms - 1) / W::kTerms;
  auto place = [&](int64_t row) { return to + row / kWidth * kWidth * words + row % kWidth; };
  if (from.k_stride != W::kSize) {
    for (int64_t w = 0; w < words; ++w) {
      const char* line = from.data + w * from.k_stride;
      for (int64_t row = 0; row < from.count; row += kStep)
        _mm512_mask_storeu_epi32(place(row) + w * kWidth, kStore,
                                 W::load(line + row * W::kSize, W::mask(std::min(kStep, from.count - row))));
    }
    return;
  }
  for (int64_t row = 0; row < from.count; row += kStep) {
    const char* lines[kStep];
    for (int64_t i = 0; i < kStep; ++i)
      lines[i] = from.data + std::min(row + i, from.count - 1) * from.stride;
    for (int64_t w = 0; w < words; w += 16) {
      const int64_t term = w * W::kTerms;
      const uint32_t mask = W::mask(from.terms - term);
      __m512i x[16];
      KDFAST_UNROLL for (int64_t i = 0; i < 16; ++i) {
        x[i] = i < kStep ? W::load(lines[i] + term * W::kSize, mask) : _mm512_setzero_si512();
      }
      transpose(x);
      Word* panel = place(row) + w * kWidth;
      if (words - w >= 16) {
        KDFAST_UNROLL for (int i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(panel + i * kWidth, kStore, x[i]);
      } else {
        for (int64_t i = 0; i < words - w; ++i) _mm512_mask_storeu_epi32(panel + i * kWidth, kStore, x[i]);
      }
    }
  }
}

template <int64_t kWidth, bool kPairs>
void pack(const Block& from, DType dtype, Word* to) {
  if (kPairs) return pack_words<kWidth, Words<DType::kBFloat16, kPairs>>(from, to);
  if (dtype == DType::kFloat) return pack_words<kWidth, Words<DType::kFloat, false>>(from, to);
  if (dtype == DType::kHalf) return pack_words<kWidth, Words<DType::kHalf, false>>(from, to);
  return pack_words<kWidth, Words<DType::kBFloat16, false>>(from, to);
}

template <bool kPairs>
void tile(const Word* a, const Word* b, int64_t words, float* out, int64_t stride, int64_t rows,
          int64_t columns, bool add) {
  __m512 sums[kRows][kVectors];
  KDFAST_UNROLL for (auto& row : sums) { KDFAST_UNROLL for (__m512& sum : row) sum = _mm512_setzero_ps(); }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += 16) __builtin_prefetch(out + i * stride + j, 1);
  for (int64_t w = 0; w < words; ++w, a += kRows, b += kColumns) {
    __m512 y[kVectors];
    KDFAST_UNROLL for (int j = 0; j < kVectors; ++j) y[j] = _mm512_loadu_ps(b + 16 * j);
    KDFAST_UNROLL for (int i = 0; i < kRows; ++i) {
      const __m512 x = _mm512_castsi512_ps(_mm512_set1_epi32(a[i]));
      KDFAST_UNROLL for (int j = 0; j < kVectors; ++j) {
        if constexpr (kPairs)
          sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)x, (__m512bh)y[j]);
        else
          sums[i][j] = _mm512_fmadd_ps(x, y[j], sums[i][j]);
      }
    }
  }
  KDFAST_UNROLL for (int i = 0; i < kRows; ++i) {
    if (i >= rows) return;
    KDFAST_UNROLL for (int j = 0; j < kVectors; ++j) {
      const int64_t left = columns - 16 * j;
      const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1;
      float* at = out + i * stride + 16 * j;
      if (add) sums[i][j] = _mm512_add_ps(sums[i][j], _mm512_maskz_loadu_ps(mask, at));
      _mm512_mask_storeu_ps(at, mask, sums[i][j]);
    }
  }
}

struct Range {
  int64_t begin, end;
  Range scaled(int64_t by, int64_t most) const { return {begin * by, std::min(end * by, most)}; }
};

struct Free {
  void operator()(Word* p) const { std::free(p); }
};

template <bool kPairs>
void rectangle(const MatmulArgs& args, Range rows, Range columns) {
  static thread_local const std::unique_ptr<Word, Free> memory(
      (Word*)std::aligned_alloc(4096, (kBlockRows + kColumns) * kDepth * sizeof(Word)));
  Word *a = memory.get() + kColumns * kDepth, *b = memory.get();
  constexpr int64_t kTerms = kPairs ? 2 * kDepth : kDepth;
  for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
    const int64_t m = std::min(kBlockRows, rows.end - row);
    for (int64_t k = 0; k < args.k; k += kTerms) {
      const int64_t terms = std::min(kTerms, args.k - k), words = kPairs ? (terms + 1) / 2 : terms;
      pack<kRows, kPairs>(Block(args.a, row, m, k, terms), args.a.dtype, a);
      for (int64_t column = columns.begin; column < columns.end; column += kColumns) {
        const int64_t n = std::min(kColumns, columns.end - column);
        pack<kColumns, kPairs>(Block(args.b, column, n, k, terms), args.b.dtype, b);
        float* out = args.out + row * args.out_stride + column;
        for (int64_t i = 0; i < m; i += kRows)
          tile<kPairs>(a + i * words, b, words, out + i * args.out_stride, args.out_stride,
                       std::min(kRows, m - i), n, args.add || k > 0);
      }
    }
  }
}

}  // namespace products

void matmul(const MatmulArgs& args, int64_t begin, int64_t end) {
  using namespace products;
  const bool pairs = args.a.dtype == DType::kBFloat16 && args.b.dtype == DType::kBFloat16 &&
                     args.a.k_stride == 1 && args.b.k_stride == 1;
  const bool by_columns = args.n >= args.m;
  const int64_t along = by_columns ? args.row_units() : args.column_units();
  for (int64_t unit = begin; unit < end;) {
    // whole lines of units, or a part of one
    const int64_t line = unit / along, first = unit % along;
    const int64_t lines = first || end - unit < along ? 1 : (end - unit) / along;
    const int64_t last = std::min(along, first + end - unit);
    const Range across{line, line + lines}, part{first, last};
    const Range rows = (by_columns ? part : across).scaled(MatmulArgs::kUnitRows, args.m);
    const Range columns = (by_columns ? across : part).scaled(MatmulArgs::kUnitColumns, args.n);
    (pairs ? rectangle<true> : rectangle<false>)(args, rows, columns);
    unit += lines * (last - first);
  }
}

}  // namespace
}  // namespace kdfast
