"""The CUDA backend on CPU tensors: its glue and launchers as they are, its kernels' PTX on the emulator.

`compiled()` compiles csrc/cuda once per state of the sources, into build/emulated, with cpp/cuda_stub.cpp in the place
of the CUDA runtime; the operators of `kdfast_cuda_rows` are then registered for the CPU, and what they launch comes to
`_launch` below.
"""

import ctypes
import fcntl
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gpu
import numpy as np
import torch

from kdfast import choice

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "emulated"
LIBRARY = BUILD / "libkdfast_emulated.so"
STUB = Path(__file__).parent / "cpp" / "cuda_stub.cpp"
STORAGES = {"bf16": "__nv_bfloat16", "fp16": "__half", "fp32": "float"}
FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC")
UNITS = {
    **{f"rows_{k}": ("rows.cu", f"-DKDFAST_STORAGE={s}", f"-DKDFAST_STORAGE_NAME={k}") for k, s in STORAGES.items()},
    "scale": ("scale.cu",),
    "launch": ("launch.cu",),
}  # fmt: skip
WRAPPED = (  # calls of ops.cpp that come to the stub first
    "aoti_torch_get_data_ptr", "torch_get_mutable_data_ptr", "torch_get_const_data_ptr", "aoti_torch_get_device_index",
    "dlopen", "dlsym",
)  # fmt: skip


def why_not() -> str | None:
    if gpu.ON_DEVICE:
        return "there is a GPU, which the cuda backend runs on by itself"
    if not gpu.EMULATED:
        return gpu.NEEDS_EMULATOR
    if shutil.which("nvcc") is None:
        return "needs nvcc, which compiles the kernels"
    return None if SOURCES.exists() else "there are no sources around the tests"


def _run(command: list[Any]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _digest(*files: Path) -> str:
    state = hashlib.sha256(torch.__version__.encode() + Path(__file__).read_bytes())
    for path in (*sorted(SOURCES.glob("*.h")), *sorted((SOURCES / "cuda").glob("*h")), *files):
        state.update(path.read_bytes())
    return state.hexdigest()


def _is_stale(name: str, *files: Path) -> bool:
    """Whether the sources of `name` differ from those that it was last compiled from."""
    stamp, now = BUILD / f"{name}.stamp", _digest(*files)
    stale = not stamp.exists() or stamp.read_text() != now
    stamp.unlink(missing_ok=True)  # until it is compiled
    return stale


def _write_stamp(name: str, *files: Path) -> None:
    (BUILD / f"{name}.stamp").write_text(_digest(*files))


def _compile_unit(name: str, file: str, *flags: str) -> None:
    """The object of a unit, with nothing but PTX in it, and that PTX beside it."""
    source = SOURCES / "cuda" / file
    if _is_stale(name, source):
        architectures = [f"-gencode=arch=compute_{each},code=compute_{each}" for each in gpu.CAPABILITIES]
        keep = BUILD / name
        keep.mkdir(exist_ok=True)
        output = ("--keep", f"--keep-dir={keep}", "-o", BUILD / f"{name}.o")
        _run(["nvcc", "-c", source, *FLAGS, *flags, *architectures, *output])
        for each in gpu.CAPABILITIES:
            for ptx in keep.glob(f"*compute_{each}.ptx"):
                ptx.rename(BUILD / f"{name}.{each}.ptx")
        shutil.rmtree(keep)
    _write_stamp(name, source)


def _compile_library() -> None:
    sources = [STUB, *(SOURCES / "cuda" / file for file in ("ops.cpp", *sorted({unit[0] for unit in UNITS.values()})))]
    if _is_stale("library", *sources):
        package = Path(torch.__file__).parent
        options = ("-std=c++17", "-O1", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", package / "include")
        objects = [BUILD / f"{name}.o" for name in ("stub", *UNITS)]
        _run(["nvcc", "-c", STUB, *options, "-Xcompiler=-fPIC", "-o", objects[0]])  # it knows where CUDA's headers are
        # -Bsymbolic: the stub's functions, whatever else in the process has their names
        linking = ("-shared", "-fPIC", "-Wl,-Bsymbolic", *(f"-Wl,--wrap={name}" for name in WRAPPED))
        libraries = (package / "lib" / "libtorch_cpu.so", "-ldl")
        _run(["g++", *options, *linking, "-DKDFAST_CUDA_KEY=CPU", "-o", LIBRARY, sources[1], *objects, *libraries])
    _write_stamp("library", *sources)


@lru_cache
def compiled() -> Path:
    """The library, with the PTX beside it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:  # the tests' processes compile it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda unit: _compile_unit(unit[0], *unit[1]), UNITS.items()))
        _compile_library()
    return LIBRARY


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
_MEMORY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
USUAL_SHARED = 48 << 10  # what a kernel may have of shared memory without being allowed more
INVALID_VALUE, OUT_OF_RESOURCES, LAUNCH_FAILURE = 1, 701, 719  # of cudaError_t


class Launch(NamedTuple):
    kernel: str
    grid: int
    block: int
    cluster: int  # blocks
    shared: int  # bytes


class Planned(NamedTuple):
    launched: Launch
    findings: tuple[()] = ()


class Emulator:
    def __init__(self) -> None:
        path = compiled()
        torch.ops.load_library(str(path))
        self.library = ctypes.CDLL(str(path))
        self.demangle = self.library["__cxa_demangle"]
        self.demangle.restype = ctypes.c_char_p
        self.reports: list[Any] = []
        self.errors: list[BaseException] = []
        self.spans: dict[int, int] = {}
        self.capability, self.most_blocks = 90, 16
        self.running = True
        self.callbacks = (_LAUNCH(self._launch), _MEMORY(self._add_memory))  # kept alive
        for name, callback in zip(("stub_launch", "stub_memory"), self.callbacks, strict=True):
            ctypes.c_void_p.in_dll(self.library, name).value = ctypes.cast(callback, ctypes.c_void_p).value

    def use(self, capability: int) -> None:
        self.capability = capability
        self.library.stub_use(capability, self.most_blocks)

    @lru_cache  # noqa: B019
    def module(self, unit: str, capability: int) -> Any:
        from ptxemu.cuda import load_ptx

        return load_ptx((BUILD / f"{unit}.{capability}.ptx").read_text(), capability)

    @lru_cache  # noqa: B019
    def units(self, capability: int) -> dict[str, str]:
        """{mangled name of a kernel: its unit}."""
        found = {unit: (BUILD / f"{unit}.{capability}.ptx").read_text() for unit in UNITS}
        return {name: unit for unit, ptx in found.items() for name in re.findall(r"\.entry (\w+)\(", ptx)}

    @lru_cache  # noqa: B019
    def readable(self, kernel: bytes) -> str:
        name = self.demangle(kernel, None, None, None).decode()
        return re.sub(r"\(anonymous namespace\)::|kdfast::|^void ", "", name).split("(")[0]

    def _add_memory(self, data: int | None, size: int) -> None:
        if data is None:  # a new call: the memory of the one before it may be freed
            self.spans.clear()
            return
        for start, length in list(self.spans.items()):  # what overlaps this was freed
            if start < data + size and data < start + length:
                del self.spans[start]
        self.spans[data] = size

    def _launch(
        self, name: bytes, grid: int, block: int, cluster: int, shared: int, allowed: int, arguments: Any
    ) -> int:
        launch = Launch(self.readable(name), grid, block, cluster, shared)
        if not self.running:
            self.reports.append(Planned(launch))
            return 0
        try:
            return self.run(name.decode(), launch, allowed, arguments)
        except BaseException as error:  # cannot pass through C
            self.errors.append(error)
            return LAUNCH_FAILURE

    def run(self, name: str, launch: Launch, allowed: int, arguments: Any) -> int:
        """Runs a kernel, unless a device would refuse it."""
        from ptxemu import machine

        module = self.module(self.units(self.capability)[name], self.capability)
        entry = module.mod.find_entry(name)
        program = machine.program_for(module.mod, entry)
        if launch.block > np.prod(entry.directives.get(".maxntid", launch.block)):
            return OUT_OF_RESOURCES
        if launch.shared + program.static_shared > max(allowed + program.static_shared, USUAL_SHARED):
            return INVALID_VALUE
        if allowed + program.static_shared > self.library.stub_shared():
            return INVALID_VALUE
        memory, words = self.translated(entry.params, arguments)
        blocks = (launch.grid, 1, 1), (launch.block, 1, 1)
        options = machine.Options()
        report = machine.Machine(
            program, *blocks, words, memory.gmem, launch.shared, (launch.cluster, 1, 1), options
        ).launch()
        report.launched = launch
        self.reports.append(report)
        return 0

    def translated(self, params: Any, arguments: Any) -> tuple[Any, Any]:
        """Memory and arguments as the emulator takes them: a pointer is into known memory, or points nowhere."""
        from ptxemu.triton_driver import Memory, bytes_at

        memory = Memory()
        given = b"".join(ctypes.string_at(arguments[i], each.size) for i, each in enumerate(params))
        words = np.frombuffer(bytearray(given), np.uint64)
        for at, word in enumerate(words.tolist()):
            for start, length in self.spans.items():
                if start <= word < start + length:
                    if start not in memory.known:
                        memory.known[start] = memory.gmem.add(f"at{start:x}", bytes_at(start, length))
                    words[at] = memory.known[start].base + word - start
                    break
        return memory, words.view(np.uint8)


@lru_cache
def emulator() -> Emulator:
    return Emulator()


@contextmanager
def kernels(capability: int = 90, run: bool = True) -> Iterator[list[Any]]:
    """`backend="cuda"` takes CPU tensors meanwhile; the launches' reports, which must be without findings.

    run=False: launches are planned and not run; a report has nothing but `launched`.
    """
    e = emulator()
    before, failure = e.capability, choice.cuda_failure
    e.use(capability)
    e.reports, e.errors, e.spans, e.running = [], [], {}, run
    choice.cuda_failure = lambda *device: None
    try:
        yield e.reports
    finally:
        e.use(before)
        choice.cuda_failure = failure
        if e.errors:
            raise e.errors[0]
    found = [f"{report.launched}: {finding}" for report in e.reports for finding in report.findings]
    assert not found, "\n".join(found)
    assert e.library.cudaGetLastError() == 0, "an error is left for the next check to report"
    assert e.library.stub_device() == 0, "another device was left current"


@contextmanager
def clusters_of(most: int) -> Iterator[None]:
    """As if the device had no room for clusters of more blocks."""
    e = emulator()
    before, e.most_blocks = e.most_blocks, most
    try:
        yield
    finally:
        e.most_blocks = before
