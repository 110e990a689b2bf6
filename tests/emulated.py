"""The CUDA backend on CPU tensors: its glue and launchers compiled for the host, its kernels' PTX on the emulator.

`compiled()` compiles csrc/cuda once per state of the sources, into build/emulated; the operators of `kdfast_cuda` are
then registered for the CPU, and what they launch comes to `_launch` below.
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
STORAGES = {"bf16": "__nv_bfloat16", "fp16": "__half", "fp32": "float", "general": "General"}
FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", "-DKDFAST_EMULATED")
UNITS = {
    **{f"rows_{k}": ("rows.cu", f"-DKDFAST_STORAGE={s}", f"-DKDFAST_STORAGE_NAME={k}") for k, s in STORAGES.items()},
    "reductions": ("reductions.cu",),
    "launch": ("launch.cu",),
}  # fmt: skip


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


def _changed(name: str, *files: Path) -> bool:
    """Whether what `name` is made of is not what it was when it was last made; it is made then."""
    stamp, now = BUILD / f"{name}.stamp", _digest(*files)
    changed = not stamp.exists() or stamp.read_text() != now
    stamp.unlink(missing_ok=True)
    return changed


def _made(name: str, *files: Path) -> None:
    (BUILD / f"{name}.stamp").write_text(_digest(*files))


def _compile_unit(name: str, file: str, *flags: str) -> None:
    """The object of a unit, with PTX alone in it, and that PTX beside it."""
    source = SOURCES / "cuda" / file
    if _changed(name, source):
        architectures = [f"-gencode=arch=compute_{each},code=compute_{each}" for each in gpu.CAPABILITIES]
        keep = BUILD / name
        keep.mkdir(exist_ok=True)
        output = ("--keep", f"--keep-dir={keep}", "-o", BUILD / f"{name}.o")
        _run(["nvcc", "-c", source, *FLAGS, *flags, *architectures, *output])
        for each in gpu.CAPABILITIES:
            for ptx in keep.glob(f"*compute_{each}.ptx"):
                ptx.rename(BUILD / f"{name}.{each}.ptx")
        shutil.rmtree(keep)
    _made(name, source)


def _compile_library() -> None:
    sources = [SOURCES / "cuda" / file for file in ("ops.cpp", *{unit[0] for unit in UNITS.values()})]
    if _changed("library", *sources):
        package = Path(torch.__file__).parent
        definitions = ("-DKDFAST_EMULATED", "-DKDFAST_CUDA_KEY=CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000")
        runtime = Path(str(shutil.which("nvcc"))).resolve().parents[1]
        static = next(iter(sorted(runtime.rglob("libcudart_static.a"))))
        objects = [BUILD / f"{name}.o" for name in UNITS]
        options = ("-std=c++17", "-O1", "-shared", "-fPIC", *definitions, "-isystem", package / "include")
        libraries = (static, package / "lib" / "libtorch_cpu.so", "-ldl", "-lrt", "-lpthread")
        _run(["g++", *options, "-o", LIBRARY, sources[0], *objects, *libraries])
    _made("library", *sources)


@lru_cache
def compiled() -> Path:
    """The library; the PTX is beside it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:  # the tests' processes compile it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda unit: _compile_unit(unit[0], *unit[1]), UNITS.items()))
        _compile_library()
    return LIBRARY


def _unit_of(kernel: str) -> str:
    if kernel.startswith("general_rows"):
        return "rows_general"
    return next((f"rows_{k}" for k, storage in STORAGES.items() if f"<{storage}," in kernel), "reductions")


_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64
)  # fmt: skip
_SEEN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


class Planned(NamedTuple):
    launched: tuple[str, int, int, int, int]  # kernel, blocks, threads, blocks of a cluster, bytes of shared memory
    findings: tuple[()] = ()


class Emulator:
    def __init__(self) -> None:
        path = compiled()
        torch.ops.load_library(str(path))
        self.library = ctypes.CDLL(str(path))
        self.reports: list[Any] = []
        self.errors: list[BaseException] = []
        self.spans: dict[int, int] = {}
        self.capability = 0
        self.running = True
        self.callbacks = (_LAUNCH(self._launch), _SEEN(self._saw))  # kept alive
        for name, callback in zip(("kdfast_launch", "kdfast_seen"), self.callbacks, strict=True):
            ctypes.c_void_p.in_dll(self.library, name).value = ctypes.cast(callback, ctypes.c_void_p).value
        self.set_capability(90)

    def set_capability(self, capability: int) -> None:
        self.capability = ctypes.c_int.in_dll(self.library, "kdfast_capability").value = capability

    @lru_cache  # noqa: B019
    def module(self, unit: str, capability: int) -> Any:
        from ptxemu.cuda import load_ptx

        return load_ptx((BUILD / f"{unit}.{capability}.ptx").read_text(), capability)

    @lru_cache  # noqa: B019
    def kernels(self, unit: str, capability: int) -> dict[str, str]:
        """{name as the launchers have it: mangled name}."""
        mangled = list(self.module(unit, capability).kernels())
        done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
        readable = (re.sub(r"\(anonymous namespace\)::|kdfast::|^void ", "", name) for name in done.stdout.split("\n"))
        return dict(zip((name.split("(")[0].replace(" ", "") for name in readable), mangled, strict=False))

    def _saw(self, data: int | None, size: int) -> None:
        if data is None:  # a new call: what the one before it saw may be gone
            self.spans.clear()
        elif size:
            self.spans[data] = max(size, self.spans.get(data, 0))

    def _launch(self, name: bytes, grid: int, block: int, cluster: int, shared: int, argument: int, size: int) -> None:
        if not self.running:
            self.reports.append(Planned((name.decode(), grid, block, cluster, shared)))
            return
        try:
            self.run(name.decode(), grid, block, cluster, shared, ctypes.string_at(argument, size))
        except BaseException as error:  # cannot pass through C
            self.errors.append(error)

    def run(self, name: str, grid: int, block: int, cluster: int, shared: int, argument: bytes) -> None:
        from ptxemu import machine, parser
        from ptxemu.triton_driver import Memory, bytes_at

        unit = _unit_of(name)
        module = self.module(unit, self.capability)
        entry = module.mod.find_entry(self.kernels(unit, self.capability)[name.replace(" ", "")])
        memory = Memory()
        words = np.frombuffer(bytearray(argument), np.uint64).copy()
        for at, word in enumerate(words):  # the pointers among them
            for start, length in self.spans.items():
                if start <= word < start + length:
                    if start not in memory.known:
                        memory.known[start] = memory.gmem.add(f"at{start:x}", bytes_at(start, length))
                    words[at] = memory.known[start].base + int(word) - start
                    break
        program = machine.program_for(module.mod, entry)
        running = machine.Machine(
            program, (grid, 1, 1), (block, 1, 1), words.view(np.uint8), memory.gmem, shared, (cluster, 1, 1),
            machine.Options(),
        )  # fmt: skip
        report = running.launch()
        report.kernel = parser.demangle(entry.name)
        report.launched = (name, grid, block, cluster, shared)
        self.reports.append(report)


@lru_cache
def emulator() -> Emulator:
    return Emulator()


@contextmanager
def kernels(capability: int = 90, run: bool = True) -> Iterator[list[Any]]:
    """`backend="cuda"` takes CPU tensors meanwhile; the launches' reports, which must be without findings.

    run=False: they are planned and not run, and have nothing but `launched`.
    """
    e = emulator()
    before, failure = e.capability, choice.cuda_failure
    e.set_capability(capability)
    e.reports, e.errors, e.spans, e.running = [], [], {}, run
    choice.cuda_failure = lambda device: None
    try:
        yield e.reports
    finally:
        e.set_capability(before)
        choice.cuda_failure = failure
    if e.errors:
        raise e.errors[0]
    found = [f"{report.launched}: {finding}" for report in e.reports for finding in report.findings]
    assert not found, "\n".join(found)


@contextmanager
def clusters_of(most: int) -> Iterator[None]:
    """As if the device had no room for clusters of more blocks."""
    value = ctypes.c_int.in_dll(emulator().library, "kdfast_most_blocks")
    before, value.value = value.value, most
    try:
        yield
    finally:
        value.value = before
