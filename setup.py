"""Drives CMake; everything else that setuptools needs is in pyproject.toml.

KDFAST_BUILD_EXT=0 builds the pure-Python package, 1 insists on the compiled one. Unset: compiled where a C++ compiler
and torch's headers are found, else pure Python. An error of the compiler is always an error of the install.
KDFAST_CUDA=0 leaves the CUDA kernels out, 1 insists on them. Unset: compiled where a working nvcc is found: on PATH, in
CUDA_HOME or in /usr/local/cuda. KDFAST_STRICT=1 makes a CUDA kernel that spills registers an error: for those who work
on them, since compilers differ.
KDFAST_SANITIZE=address,undefined instruments the C++ code. CMake's own variables (CXX, CXXFLAGS, CUDACXX,
CMAKE_BUILD_PARALLEL_LEVEL) are honoured.
"""

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def torch_dir() -> Path | None:
    """The installed torch package, found without importing it (pip's build isolation hides it from import)."""
    spec = importlib.util.find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    found += [Path(place) / "torch" for place in places]
    return next((path for path in found if (path / "include/torch/headeronly/version.h").exists()), None)


def torch_version(torch: Path) -> tuple[int, ...]:
    text = (torch / "include/torch/headeronly/version.h").read_text()
    return tuple(int(re.search(rf"TORCH_VERSION_{part} (\d+)", text)[1]) for part in ("MAJOR", "MINOR"))


def why_pure_python() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if os.environ.get("KDFAST_BUILD_EXT") == "0":
        return "KDFAST_BUILD_EXT=0"
    if sys.platform != "linux":
        return f"the C++ kernels are built on Linux only so far, and this is {sys.platform}"
    if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler (c++, g++, clang++, or the one that CXX names) was found"
    missing = [name for name in ("cmake", "ninja") if importlib.util.find_spec(name) is None]
    if missing:
        return f"the Python packages {', '.join(missing)} were not found"
    torch = torch_dir()
    if torch is None or torch_version(torch) < (2, 10):
        return "torch >= 2.10 was not found; its headers are needed, so install torch first"
    return None


class CMakeBuild(build_ext):
    """Builds in build/cmake-<python>, which is kept, and installs into the package directory."""

    def run(self) -> None:
        if not self.extensions:
            return
        import cmake
        import ninja

        sanitize = os.environ.get("KDFAST_SANITIZE", "")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{'-sanitize' if sanitize else ''}"
        package = ROOT / "kdfast" if self.editable_mode or self.inplace else Path(self.build_lib) / "kdfast"
        settings = {
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
            "TORCH_DIR": torch_dir(),
            "KDFAST_SANITIZE": sanitize,
            "KDFAST_CUDA": {"0": "OFF", "1": "ON"}.get(os.environ.get("KDFAST_CUDA", ""), "AUTO"),
            "KDFAST_STRICT": "ON" if os.environ.get("KDFAST_STRICT") == "1" else "OFF",
        }
        tool = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        subprocess.run([tool, "-G", "Ninja", "-S", ROOT, "-B", build, *defines], check=True)
        subprocess.run([tool, "--build", build], check=True)
        subprocess.run([tool, "--install", build, "--prefix", package.resolve()], check=True)

    def get_outputs(self) -> list[str]:
        return sorted(map(str, (Path(self.build_lib) / "kdfast").glob("*.so")))

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable install's files are in place already


class Wheel(bdist_wheel):
    """The libraries are tied to no Python: one wheel serves all."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


reason = why_pure_python()
if reason and os.environ.get("KDFAST_BUILD_EXT") == "1":
    sys.exit(f"kdfast: KDFAST_BUILD_EXT=1, but {reason}")
if reason:
    bar = "*" * 100
    print(f"{bar}\nkdfast: PURE PYTHON install, without the fast C++ kernels: {reason}\n{bar}", file=sys.stderr)
setup(
    ext_modules=[] if reason else [Extension("kdfast.libkdfast", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
