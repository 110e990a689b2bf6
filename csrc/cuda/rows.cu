// The row kernels for one type of logits, KDFAST_STORAGE, known by the name KDFAST_STORAGE_NAME.
//
// Each divergence as a row by a warp, by blocks that keep it, by a block in sweeps. reverse_kl is
// symmetric_kl's kernels with beta 0; dkd has none.
#include "launch.h"
#include "row_kernels.cuh"

#define KDFAST_TEXT_(x) #x
#define KDFAST_TEXT(x) KDFAST_TEXT_(x)
#define KDFAST_JOIN_(a, b) a##b
#define KDFAST_JOIN(a, b) KDFAST_JOIN_(a, b)

namespace kdfast {
namespace {

template <class D>
constexpr bool kHasKernel = !std::is_same_v<D, ReverseKL> && !std::is_same_v<D, DKD>;

template <class S, class D>
const void* row_function(Shape shape) {
  if constexpr (!kHasKernel<D>) {
    return nullptr;
  } else {
    if (shape == Shape::kWarp) return (const void*)&warp_rows<S, D>;
    return shape == Shape::kKept ? (const void*)&block_rows<S, D, true>
                                 : (const void*)&block_rows<S, D, false>;
  }
}

}  // namespace

Kernel KDFAST_JOIN(row_kernel_, KDFAST_STORAGE_NAME)(Divergence divergence, Shape shape) {
#define KERNEL(Type)                                                                               \
  return {row_function<KDFAST_STORAGE, Type>(shape),                                               \
          shape == Shape::kWarp   ? "warp_rows<" KDFAST_TEXT(KDFAST_STORAGE) ", " #Type ">"        \
          : shape == Shape::kKept ? "block_rows<" KDFAST_TEXT(KDFAST_STORAGE) ", " #Type ", true>" \
                                  : "block_rows<" KDFAST_TEXT(KDFAST_STORAGE) ", " #Type ", false>"}
  switch (divergence) {
#define X(name, Type)       \
  case Divergence::k##Type: \
    KERNEL(Type);
    KDFAST_DIVERGENCES
#undef X
    case Divergence::kNone:
      KERNEL(NoDivergence);
  }
  return {};
}

}  // namespace kdfast
