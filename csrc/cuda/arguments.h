// A call as the row kernels take it, by value. No torch here, and no CUDA.
#pragma once

#include <type_traits>

#include "../rows.h"
#include "../settings.h"

namespace kdfast {

constexpr int kBlockThreads = 256;  // of a block
constexpr int kMostThreads = 512;   // of one that has a multiprocessor for itself
constexpr int kWarpThreads = 128;   // of one in which each warp has a row
constexpr int kMostBlocks = 16;     // of a cluster

constexpr int kAhead = 4;  // pairs of packs in flight per thread, from global to shared memory
constexpr int kPairBytes = 2 * 16;

// Of a row: whole warps' of them, so that each reads whole sectors.
KDFAST_ALWAYS_INLINE int packs_per_block(int packs, int blocks) {
  return blocks == 1 ? packs : ((packs + blocks - 1) / blocks + 31) / 32 * 32;
}

// How a number per row is stored.
enum class Number { kFloat, kBFloat16, kHalf, kBool };

struct RowsArgs {
  int rows, vocab;
  int width;              // of the student with its padding: the gradient beyond vocab is 0
  Matrix student, grad;   // grad.data null: none is wanted
  Matrix teacher;         // aligned as the student; data null: none is read
  Divergence divergence;  // kNone: there is no teacher

  const int64_t* labels;   // (rows) or null, as are all that follow
  const void* row_weight;  // 0: the row is not kept
  Number row_weight_type;
  const float *temperatures, *teacher_temperatures;
  const float* normalizer;  // 0-dim: a further divisor of the sum of losses; 0 where no row is kept
  float* losses;            // shares of the loss: row_weight / (divisor * normalizer) * l
  float* row_metrics;       // (kMetrics, rows)
  float* new_table;         // (rows, kCoefficients)
  // Backward, from that table and the logits alone: row r's gradient is multiplied by
  // grad_loss[r * grad_loss_step].
  const float *table, *grad_loss;
  int grad_loss_step;
  // The numbers among the settings, in fp32; temperatures: where there is none per row.
#define KDFAST_FIELD(type, name) std::conditional_t<std::is_same_v<type, double>, float, type> name;
  KDFAST_NUMBERS(KDFAST_FIELD)
#undef KDFAST_FIELD
  float rest;  // 1 - beta
};

struct ScaleArgs {
  Matrix grad;
  int rows, width;
  const float* factor;  // 0-dim
};

}  // namespace kdfast
