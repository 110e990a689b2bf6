// The divergence that a call names, as a type.
#pragma once

#include "../divergences.h"
#include "../rows.h"

namespace kdfast {
namespace {

// f of the divergence's struct.
template <class F>
void dispatch_divergence(Divergence divergence, F f) {
  switch (divergence) {
#define X(name, Type)       \
  case Divergence::k##Type: \
    return f(Type{});
    KDFAST_DIVERGENCES
#undef X
    case Divergence::kNone:
      return f(NoDivergence{});
  }
}

}  // namespace
}  // namespace kdfast
