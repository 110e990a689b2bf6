// Facts of the build for kdfast/choice.py, and the instruction set that the kernels use.
#include <stdexcept>
#include <string>

#include "isa.h"

namespace kdfast {
namespace {

// Names of instruction sets with spaces between, best last.
template <class Predicate>
std::string isa_names(Predicate wanted) {
  std::string names;
  for (Isa isa : kAllIsas) {
    if (wanted(isa)) names += std::string(names.empty() ? "" : " ") + name(isa);
  }
  return names;
}

}  // namespace
}  // namespace kdfast

#define KDFAST_EXPORT extern "C" __attribute__((visibility("default")))
KDFAST_EXPORT const char* kdfast_compiler() { return KDFAST_COMPILER; }
KDFAST_EXPORT const char* kdfast_compiled_isas() {
  static const std::string names = kdfast::isa_names(kdfast::is_compiled);
  return names.c_str();
}
KDFAST_EXPORT const char* kdfast_usable_isas() {
  static const std::string names = kdfast::isa_names(kdfast::is_usable);
  return names.c_str();
}
// "yes", or else nothing: also where KDFAST_CPU_ISA names no usable set, for the kernels will say so.
KDFAST_EXPORT const char* kdfast_is_matmul_faster() {
  try {
    return kdfast::is_matmul_faster() ? "yes" : "";
  } catch (const std::exception&) {
    return "";
  }
}
// Where KDFAST_CPU_ISA names no usable set, the error's message.
KDFAST_EXPORT const char* kdfast_isa() {
  static const std::string name = [] {
    try {
      return std::string(kdfast::name(kdfast::chosen_isa()));
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
  }();
  return name.c_str();
}
