#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace kdfast {

const char* name(Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(isa)];
}

bool is_compiled(Isa isa) {
#define X(which) \
  if (isa == Isa::which) return true;
  KDFAST_ISAS
#undef X
  return false;
}

namespace {

// Whether this machine has the flags that CMakeLists.txt compiles the set with.
bool is_supported(Isa isa) {
  if (isa == Isa::baseline) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned a, b, c = 0, d;  // not every compiler knows "f16c" by name
  bool yes = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (isa >= Isa::avx512)
    yes = yes && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa >= Isa::avx512_bf16) yes = yes && __builtin_cpu_supports("avx512bf16");
  return yes;
#else
  return false;
#endif
}

Isa choose() {
  const char* wanted = std::getenv("KDFAST_CPU_ISA");
  Isa best = Isa::baseline;
  std::string choices;
  for (Isa isa : kAllIsas) {
    if (!is_usable(isa)) continue;
    if (wanted && std::string(wanted) == name(isa)) return isa;
    choices += std::string(choices.empty() ? "" : ", ") + name(isa);
    best = isa;
  }
  if (!wanted || !*wanted) return best;
  throw std::invalid_argument(std::string("KDFAST_CPU_ISA: '") + wanted +
                              "' is not usable here; it may be one of " + choices);
}

}  // namespace

bool is_usable(Isa isa) { return is_compiled(isa) && is_supported(isa); }

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

bool is_matmul_faster() {
#if defined(__x86_64__)
  return chosen_isa() == Isa::avx512_bf16 && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace kdfast
