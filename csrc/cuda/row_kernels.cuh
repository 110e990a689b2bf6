// The row kernels: loss and gradient of a row by a warp, a block, or a cluster of blocks.
//
// Pass A sums exps over the classes, pass B phi and psi, where the divergence is not linear; row_math.h makes
// of the sums the row's loss and coefficients, and pass C of these and of the logits the gradient.
//
// A row is divided among the blocks of a cluster, each of which keeps its part in shared memory (kKeep), so
// that every logit is read once; or one block goes over it in sweeps, each from the end where the one before
// it stopped, for the last classes read are those that the caches still hold.
//
// S is the type of all logits, and student and teacher are aligned alike: the vectors of one are those of the
// other. A row's classes before the first multiple of 32 bytes, and those after the last whole vector, are
// "ends": of one thread each, of the first block.
#pragma once

#include "metric_sums.cuh"
#include "row_packs.cuh"

namespace kdfast {
namespace {

// What a block's threads share beside the kept logits.
template <class D>
struct Shared {
  ReduceBuffer<RowSums<D>> sums;
  ReduceBuffer<PointwiseSums<D>> pointwise;
  ReduceBuffer<MetricSums<D>> metrics;
  float columns[kCoefficients];
  float label_logit;
  RowInputs inputs;
};

// From the logits a row's loss and metrics, which are written, and its coefficients.
template <class D, class Team, class Packs>
__device__ inline Coefficients<float> loss_and_coefficients(const RowsArgs& a, const Row& row, Team& team,
                                                            Packs& packs, Shared<D>& shared) {
  const RowScale& scale = row.scale;
  float label_logit = team.read_ahead([&] { return scale.label < 0 ? 0 : packs.student_logit(scale.label); });
  RowSums<D> sums = RowSums<D>::identity();
  packs.read([&](int, const auto& s, const auto& t) { sums.template add<Team::kShort>(s, t, scale); });
  if (row.index == team.first_row()) team.wait_for_start();
  team.publish(shared.label_logit, label_logit);
  sums = team.all_reduce(sums, shared.sums, scale);
  label_logit = team.published(shared.label_logit, label_logit);
  const Scales<float> scales = scales_of(sums);
  PointwiseSums<D> pointwise{};
  if constexpr (D::kPointwise) {
    packs.reread([&](int, const auto& s, const auto& t) { pointwise.add(s, t, scales, scale); });
    pointwise = team.all_reduce(pointwise, shared.pointwise, scale);
  }

  const Sums<float> of_row = to_sums(sums, pointwise, label_logit, (float)a.vocab, scale);
  Coefficients<float> c;
  const RowLoss<float> loss = loss_and_coefficients<D>(of_row, row.terms(a, of_row), c);
  if (team.is_first_warp()) write_row(a, row, loss.loss, c);
  if (a.metrics) {
    MetricSums<D> metrics = MetricSums<D>::identity();
    if constexpr (!D::kDifference) {  // whose others are of softmaxes: see call.h
      packs.reread([&](int first, const auto& s, const auto& t) { metrics.add(s, t, first, scales, scale); });
      metrics = team.all_reduce(metrics, shared.metrics, scale);
    }
    if (team.is_first_thread())
      metrics.write_metrics(a, row.index, row.is_kept && !row.is_bad, scale.label, loss);
  }
  return c;
}

template <class D, class Packs>
__device__ inline void write_gradient(const Gradient<D>& gradient, const RowScale& scale, Packs& packs) {
  packs.reread([&](int first, const auto& s, const auto& t) {
    constexpr int kN = std::decay_t<decltype(s)>::kN;
    float g[kN];
    gradient(s, t, scale, g);
    if ((unsigned)(scale.label - first) < (unsigned)kN) {  // one pack of the row has the label
#pragma unroll
      for (int i = 0; i < kN; ++i) g[i] -= first + i == scale.label ? gradient.label : 0;
    }
    packs.store(first, g);
  });
}

template <class Team, class S, class D, bool kKeep>
__device__ inline void compute_rows(const RowsArgs& a, uint4* kept, Shared<D>& shared) {
  Team team;
  for (uint32_t index = team.first_row(); index < (uint32_t)a.rows; index += team.row_stride()) {
    RowPacks<Team, S, D, kKeep> packs(team, a, index, kept);
    const RowInputs inputs = team.broadcast(shared.inputs, [&] { return load_inputs<S, D>(a, index); });
    const Row row(a, index, inputs);
    if (!row.is_kept) packs.drop();
    Gradient<D> gradient;
    if (a.table) {
      if (index == team.first_row()) team.wait_for_start();
      if constexpr (D::kDifference) team.sync();  // the gradient may go where other blocks read first logits
      gradient = {load_coefficients(a, row, team, shared.columns), inputs.grad_loss * a.logit_scale,
                  row.scale};
      if constexpr (kKeep) packs.read([](int, const auto&, const auto&) {});
    } else {
      gradient = {loss_and_coefficients(a, row, team, packs, shared), a.logit_scale, row.scale};
    }
    if (packs.grad) {
      row.is_kept ? write_gradient(gradient, row.scale, packs) : packs.store_zeros(a);
      packs.store_zeros_behind(a);
    }
    // before the next row's sums are written to the same buffers
    if (index + team.row_stride() < (uint32_t)a.rows) team.sync();
  }
}

// 5 blocks of a multiprocessor, which most divergences get without asking
template <class S, class D>
__global__ void __launch_bounds__(kWarpThreads, 5) warp_rows(const __grid_constant__ RowsArgs a) {
  extern __shared__ uint4 kept[];
  __shared__ Shared<D> unused;
  compute_rows<WarpTeam, S, D, true>(a, kept + (threadIdx.x >> 5) * 2 * (a.vocab / kVec<S>), unused);
}

// With the registers of 3 forward_kl spills from sm_100 on, and on sm_120 cross_entropy.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMostAtOnce = 2;
#else
constexpr int kMostAtOnce = 3;
#endif
// Blocks of a multiprocessor, whose registers are shared out accordingly. With 80 each jsd and symmetric_kl
// spill, and sweeps, of which two run at once. They are given as one of so many threads, which it may be.
template <class D, bool kKeep>
constexpr int kBlocksAtOnce = D::kPointwise || (D::kTeacher && D::kStudent) || !kKeep ? 2 : kMostAtOnce;

template <class S, class D, bool kKeep>
__global__ void __launch_bounds__(kBlockThreads* kBlocksAtOnce<D, kKeep>, 1)
    block_rows(const __grid_constant__ RowsArgs a) {
  extern __shared__ uint4 kept[];
  __shared__ Shared<D> shared;
  compute_rows<BlockTeam, S, D, kKeep>(a, kept, shared);
}

}  // namespace
}  // namespace kdfast
