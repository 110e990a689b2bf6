// kdfast._C: what this build is and which instruction set it picks here, for kdfast.backends().
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

template <typename Predicate>
py::tuple isas(Predicate wanted) {
  py::list names;
  for (kdfast::Isa isa : kdfast::kAllIsas)
    if (wanted(isa)) names.append(kdfast::name(isa));
  return py::tuple(names);
}

py::dict build() {
  py::dict facts;
  facts["version"] = KDFAST_VERSION;
  facts["compiler"] = KDFAST_COMPILER;
  facts["isas"] = isas(kdfast::compiled);
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build", &build, "Facts of this build: version, compiler, the instruction sets compiled.");
  m.def(
      "usable_isas", [] { return isas(kdfast::usable); },
      "The compiled instruction sets that run here, best last.");
  m.def(
      "isa", [] { return kdfast::name(kdfast::chosen()); },
      "The instruction set that this process uses; ValueError where KDFAST_CPU_ISA names none that is "
      "usable.");
}
