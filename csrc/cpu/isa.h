// The instruction sets for which the row kernels are compiled, and the choice of one at run time.
#pragma once

// CMake passes the sets of this build as X(baseline) X(avx2) ...
#ifndef KDFAST_ISAS
#define KDFAST_ISAS X(baseline)
#endif

namespace kdfast {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };  // each includes those before it

inline constexpr Isa kAllIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

const char* name(Isa isa);

// Whether this build has kernels for it.
bool is_compiled(Isa isa);

// Whether it is compiled, and this processor and operating system run it.
bool is_usable(Isa isa);

// The best usable set, or the one that the environment variable KDFAST_CPU_ISA names: read once per process.
// Throws std::invalid_argument where that is not usable.
Isa chosen_isa();

// Whether matmul.h's products are faster here than PyTorch's, of which MKL has its best code for Intel's
// processors alone.
bool is_matmul_faster();

}  // namespace kdfast
