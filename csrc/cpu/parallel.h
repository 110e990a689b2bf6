// The chosen instruction set's kernels, and the split of their work over torch's threads.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <stdexcept>

#include "isa.h"
#include "row_kernels.h"

namespace kdfast {
namespace {

const RowKernels& kernels() {
  static const RowKernels& chosen_kernels = []() -> const RowKernels& {
    switch (chosen_isa()) {
#define X(isa)   \
  case Isa::isa: \
    return row_kernels_##isa();
      KDFAST_ISAS
#undef X
      default:
        throw std::runtime_error("kdfast: no kernels for this processor");
    }
  }();
  return chosen_kernels;
}

// A forked child has none of OpenMP's threads, and waiting for them hangs: it uses no threads.
bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// f over [0, units) by torch's threads, each taking at least some ten microseconds of work.
template <class F>
void in_parallel(int64_t units, int64_t classes, const F& f) {
  kernels();  // here, because an error in a thread would lose its message
  if (forked) return f(0, units);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, classes));
  torch::stable::parallel_for(0, units, grain, f);
}

}  // namespace
}  // namespace kdfast
