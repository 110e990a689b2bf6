"""Builds the CPU variant of the Hub kernel that tools/hub_kernel.py writes, loads it by `kernels` and uses it.

`python tools/hub_check.py build/hub` does what kernel-builder does with build.toml, by CMake: every source once, with
its section's flags, into one library over Python's and torch's stable ABIs. Then it checks the library as
kernel-builder's own checker does, and holds a loss of the loaded kernel to the reference, beside kdfast itself.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import cmake
import kernel_abi_check
import kernels
import kernels_data
import ninja
import torch
from hub_kernel import write

import kdfast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNIQUE = "check0"  # kernel-builder takes the commit
VARIANT = "torch-stable-abi210-cpu-x86_64-linux"
CMAKE = """cmake_minimum_required(VERSION 3.20)
project(kdfast_hub LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_SKIP_RPATH ON)
add_library({name} MODULE {sources})
set_target_properties({name} PROPERTIES PREFIX "" SUFFIX ".abi3.so")
target_compile_definitions({name} PRIVATE CPU_KERNEL TORCH_EXTENSION_NAME={name} Py_LIMITED_API=0x03090000
                                          TORCH_TARGET_VERSION=0x020a000000000000)
target_compile_options({name} PRIVATE -fno-gnu-unique)
target_include_directories({name} PRIVATE {here})
target_include_directories({name} SYSTEM PRIVATE {torch}/include {python})
target_link_libraries({name} PRIVATE {torch}/lib/libtorch_cpu.so)
install(TARGETS {name} LIBRARY DESTINATION .)
"""
SECTION = """set_source_files_properties({sources} PROPERTIES INCLUDE_DIRECTORIES "{include}")
set_property(SOURCE {sources} APPEND PROPERTY COMPILE_OPTIONS "{flags}")
"""
# What kernel-builder writes beside them.
REGISTRATION = """#pragma once
#include <Python.h>
#define KDFAST_JOIN_(a, b) a##b
#define KDFAST_JOIN(a, b) KDFAST_JOIN_(a, b)
#define KDFAST_TEXT_(a) #a
#define KDFAST_TEXT(a) KDFAST_TEXT_(a)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)
#define REGISTER_EXTENSION(name)                                                                          \\
  PyMODINIT_FUNC KDFAST_JOIN(PyInit_, name)() {                                                           \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, KDFAST_TEXT(name), nullptr, 0, nullptr, nullptr, \\
                                 nullptr, nullptr, nullptr};                                              \\
    return PyModule_Create(&module);                                                                      \\
  }
"""
OPS = """import torch

from . import {name}

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
"""


def build(kernel: Path, settings: dict, name: str) -> Path:
    """The folder of the variant, as kernel-builder installs it."""
    work, variant = kernel.parent / "check", kernel / "build" / VARIANT
    work.mkdir(exist_ok=True)
    (work / "registration.h").write_text(REGISTRATION)
    sections = [settings["torch"], *(part for part in settings["kernel"].values() if part["backend"] == "cpu")]
    torch_folder = Path(torch.__file__).parent
    sources, properties = [], ""
    for section in sections:
        paths = " ".join(str(kernel / path) for path in section["src"])
        include = ";".join(str(kernel / path) for path in section["include"])
        flags = ";".join(section.get("cxx-flags", []))
        sources.append(paths)
        properties += SECTION.format(sources=paths, include=include, flags=flags)
    python = sysconfig.get_path("include")
    text = CMAKE.format(name=name, sources=" ".join(sources), here=work, torch=torch_folder, python=python)
    (work / "CMakeLists.txt").write_text(text + properties)
    tool, make = Path(cmake.CMAKE_BIN_DIR) / "cmake", Path(ninja.BIN_DIR) / "ninja"
    folder = work / "build"
    release = ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_MAKE_PROGRAM={make}"]
    subprocess.run([tool, "-G", "Ninja", "-S", work, "-B", folder, *release], check=True)
    subprocess.run([tool, "--build", folder], check=True)
    subprocess.run([tool, "--install", folder, "--prefix", variant], check=True)
    return variant


def finish(variant: Path, settings: dict, name: str) -> None:
    """The Python files and metadata.json of a variant."""
    package = variant.parents[1] / "torch-ext" / "kdfast"
    for path in package.rglob("*.py"):
        target = variant / path.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    (variant / "_ops.py").write_text(OPS.format(name=name))
    general = settings["general"]
    digest = kernels_data.Digest.hash_variant(kernels_data.DigestAlgorithm.SHA256, variant)
    metadata = {
        "id": name, "name": general["name"], "version": general["version"], "license": general["license"],
        "python-depends": [], "backend": {"type": "cpu"}, "digest": {"algorithm": "sha256", "files": digest.files},
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2))


def check_objects(folder: Path) -> None:
    """One set's object must not define what the linker may take for all: it would not run on another processor."""
    for path in folder.rglob("row_kernels_*.o"):
        listing = subprocess.run(["nm", "--defined-only", path], check=True, capture_output=True, text=True).stdout
        if weak := [line for line in listing.splitlines() if line.split()[1] in "WwVvu"]:
            sys.exit(f"{path.name} defines weak symbols: {weak}")


def check_abi(library: Path) -> None:
    """What the Hub asks of a library: manylinux_2_28, and Python 3.9's stable ABI."""
    found = kernel_abi_check.ObjectFile(library)
    problems = [*found.check_manylinux("manylinux_2_28"), *found.check_python_abi("3.9")]
    if problems:
        sys.exit(f"{library.name}: {', '.join(map(str, problems))}")


def loss_and_gradient(package, student: torch.Tensor, *args: object, **keywords: object):
    loss = package.kd_loss(student, *args, **keywords)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def use(kernel: Path) -> None:
    hub = kernels.get_local_kernel(kernel, backend="cpu")
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 16, 1000)
    labels = torch.randint(1000, (16,))
    student.requires_grad_()
    expected = loss_and_gradient(kdfast, student, teacher, labels, temperature=2.0, backend="reference")
    for keywords in ({}, {"backend": "reference"}):
        found = loss_and_gradient(hub, student, teacher, labels, temperature=2.0, **keywords)
        torch.testing.assert_close(found, expected)
    compiled = torch.compile(lambda *args: hub.kd_loss(*args, temperature=2.0), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher, labels).detach(), expected[0])
    facts = hub.backends()
    assert facts["by_device"]["cpu"] == "cpu", facts
    assert hub.kd_loss is not kdfast.kd_loss
    print(f"{hub.__name__}: {facts['cpu']}")


if __name__ == "__main__":
    kernel = Path(sys.argv[1]).resolve() / "kdfast"
    write(kernel)
    settings = tomllib.loads((kernel / "build.toml").read_text())
    name = f"_{settings['general']['name']}_cpu_{UNIQUE}"
    variant = build(kernel, settings, name)
    finish(variant, settings, name)
    check_objects(kernel.parent / "check")
    check_abi(variant / f"{name}.abi3.so")
    use(kernel)
