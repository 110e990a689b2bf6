"""The build: its objects, its libraries, its wheels, and the choice of an instruction set."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kdfast
from kdfast import choice

ROOT = Path(__file__).parents[1]
PACKAGE = Path(kdfast.__file__).parent
LIBRARY = PACKAGE / "libkdfast.so"
CUDA_LIBRARY = PACKAGE / "libkdfast_cuda.so"  # where nvcc was found
SMOKE = Path(__file__).with_name("smoke.py")
KINDS = {"cpu": "1", "reference": "0"}  # the backend that a CPU gets: KDFAST_BUILD_EXT

# Tests of the build's files may be skipped only where kdfast was not built here.
built_here = pytest.mark.skipif(
    not LIBRARY.exists() or not (PACKAGE.parent / "CMakeLists.txt").exists(),
    reason="kdfast is an installed or a pure-Python package here, not a compiled checkout",
)
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="there is no checkout around the tests")


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=os.environ | environment)


def symbols(path: Path, *options: str) -> list[list[str]]:
    """Lines of `nm`, split: [address,] kind, name."""
    listing = run("nm", *options, path)
    assert listing.returncode == 0, listing.stderr
    return [line.split() for line in listing.stdout.splitlines()]


# -- objects and library -----------------------------------------------------------------------------------------------


@built_here
@pytest.mark.parametrize("isa", choice.backends()["cpu"]["build"]["isas"] if LIBRARY.exists() else [])
def test_objects_of_an_isa_define_no_weak_symbols(isa):
    # The linker keeps one of several weak definitions: it may be the AVX-512 one, on a machine without AVX-512.
    build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles" / f"row_kernels_{isa}.dir"
    objects = list(build.rglob("*.o"))
    assert objects, f"no object files under {build}"
    for path in objects:
        defined = symbols(path, "--defined-only", "--demangle")
        assert any(f"row_kernels_{isa}" in " ".join(line) for line in defined)
        assert [line for line in defined if line[1] in "WwVvu"] == []


@built_here
def test_the_kernels_alone_give_the_right_numbers():
    """Without torch: `make arm-check` runs the same program on another architecture."""
    cmake = Path(sys.executable).with_name("cmake")
    if not cmake.exists():
        pytest.skip("cmake is not installed beside this Python")
    build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    done = run(cmake, "--build", build, "--target", "kernel_check")
    assert done.returncode == 0, done.stdout + done.stderr
    checked = run(build / "kernel_check")
    assert checked.returncode == 0, checked.stdout


@built_here
@pytest.mark.parametrize("library", (LIBRARY, CUDA_LIBRARY), ids=lambda path: path.stem)
def test_a_library_needs_only_torchs_stable_abi(library):
    if not library.exists():
        pytest.skip("there is no nvcc here, or KDFAST_CUDA is 0")
    # glibc's and libstdc++'s names carry a version (name@VERSION); lower-case kinds may stay undefined.
    foreign = [name for kind, name in symbols(library, "-D", "--undefined-only") if kind == "U" and "@" not in name]
    assert foreign
    assert [name for name in foreign if not re.match(r"aoti_torch_|torch_", name)] == []


# Of manylinux_2_28, PyTorch's own wheels' platform: the newest symbols that it has.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@built_here
@pytest.mark.skipif(platform.machine() != "x86_64", reason="a wheel is built for x86-64 alone")
def test_the_library_loads_where_pytorchs_wheels_do():
    versions = [name.split("@")[-1].split("_") for _, name in symbols(LIBRARY, "-D", "--undefined-only") if "@" in name]
    assert versions
    newer = [version for version in versions if tuple(map(int, version[1].split("."))) > NEWEST[version[0]]]
    assert newer == [], "csrc/cpu/older_libraries.cpp has what else is newer"


# -- the choice of an instruction set ----------------------------------------------------------------------------------


def isa_with(wanted: str) -> subprocess.CompletedProcess[str]:
    """The isa of backends() after a loss has been computed, when a later choice has no effect."""
    code = "import os, torch, kdfast; x = torch.ones(2, 3); kdfast.kd_loss(x, x, backend='cpu');"
    code += "os.environ['KDFAST_CPU_ISA'] = 'baseline'; print(kdfast.backends()['cpu']['isa'])"
    return run(sys.executable, "-c", code, KDFAST_CPU_ISA=wanted, PYTHONPATH=str(PACKAGE.parent))


@built_here
def test_the_best_isa_is_chosen_by_default():  # test_isa.py tests each of the others
    assert choice.usable_isas()[0] == "baseline"
    assert isa_with("").stdout.strip() == choice.usable_isas()[-1]


@built_here
@pytest.mark.parametrize("wanted", ["AVX2", "baseline,avx2", "mmx"])
def test_an_unusable_isa_raises_an_error_that_lists_usable_ones(wanted):
    message = isa_with(wanted).stderr.splitlines()[-1]
    usable = ", ".join(choice.usable_isas())
    assert message == f"ValueError: KDFAST_CPU_ISA: '{wanted}' is not usable here; it may be one of {usable}"


# -- wheels ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def wheel(request, tmp_path_factory):
    """(kind, wheel), built from this checkout with its build directory; other files go to a temporary directory."""
    if request.param == "cpu" and not LIBRARY.exists():
        pytest.skip("kdfast is a pure-Python package here")
    tmp = tmp_path_factory.mktemp(request.param)
    command = f"setup.py build -b {tmp}/build egg_info -e {tmp} bdist_wheel -b {tmp}/bdist -d {tmp}".split()
    done = run(sys.executable, *command, KDFAST_BUILD_EXT=KINDS[request.param])
    assert done.returncode == 0, done.stderr
    assert ("PURE PYTHON" in done.stderr) == (request.param == "reference")
    (path,) = tmp.glob("*.whl")
    return request.param, path


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
    kind, path = wheel
    sources = [source for pattern in ("*.py", "py.typed") for source in PACKAGE.rglob(pattern)]
    expected = {str(source.relative_to(PACKAGE.parent)) for source in sources}
    if kind == "cpu":
        expected |= {f"kdfast/{path.name}" for path in (LIBRARY, CUDA_LIBRARY) if path.exists()}
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected
    assert path.name.startswith(f"kdfast-{kdfast.__version__}-")
    assert path.name.endswith("-py3-none-any.whl") == (kind == "reference")


def test_a_wheel_works_and_warns_once_if_it_is_pure_python(wheel, tmp_path):
    kind, path = wheel
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    done = run(sys.executable, SMOKE, kind, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


@pytest.mark.parametrize(("insist", "status"), [("", 0), ("1", 1)])
def test_without_a_compiler_install_is_pure_python_unless_forbidden(insist, status, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    environment |= {"PATH": str(tmp_path), "KDFAST_BUILD_EXT": insist}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == status
    assert "no C++ compiler" in done.stderr
    assert ("PURE PYTHON" in done.stderr) == (status == 0)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("wanted", "option"), [("0", "OFF"), ("", "AUTO"), ("1", "ON")])
def test_cuda_kernels_are_built_if_nvcc_is_found_and_not_disabled(wanted, option, tmp_path):
    spy = tmp_path / "setup.py"  # prints the CMake commands of the real one
    spy.write_text(
        "import subprocess\nsubprocess.run = lambda command, **_: print(*command)\n"
        f"exec(open('setup.py').read(), {{'__file__': {str(ROOT / 'setup.py')!r}, '__name__': '__main__'}})"
    )
    printed = run(sys.executable, spy, "build_ext", "--inplace", KDFAST_CUDA=wanted).stdout
    assert f"-DKDFAST_CUDA={option}" in printed
    if not wanted and os.environ.get("KDFAST_CUDA") != "0":  # else this build was made without them
        assert CUDA_LIBRARY.exists(), "nvcc is here, but its library is not"


@pytest.mark.parametrize("compiler", [{"CXX": "false"}, {"CUDACXX": "false", "KDFAST_CUDA": "1"}], ids=lambda x: min(x))
def test_a_failing_compiler_fails_the_install(compiler, tmp_path):
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "kdfast"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    done = run(sys.executable, "setup.py", "build", cwd=tmp_path, KDFAST_BUILD_EXT="", **compiler)
    assert done.returncode != 0
    assert "PURE PYTHON" not in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_cpp_headers_match_the_arguments_that_python_defines():
    spec = importlib.util.spec_from_file_location("write_operators", ROOT / "tools" / "write_operators.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.files().items():
        assert (ROOT / "csrc" / name).read_text() == text, f"csrc/{name}: run `python tools/write_operators.py`"
