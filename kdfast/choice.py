"""Which backend a call gets: what is compiled, what is usable here, and why not the others."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdfast import gpu_choice
from kdfast.torch_private import mark_constant_in_graphs

# 3.6, which comes with torch 2.10 and 2.11, cannot compile a kernel whose constant is a NamedTuple of NamedTuples.
_LEAST_TRITON, _LEAST_TORCH = (3, 7), "2.12"


def _load_library(name: str) -> str | None:
    """Loads the operators of a compiled library; returns why where that fails."""
    try:
        torch.ops.load_library(str(Path(__file__).with_name(name)))
    except OSError as error:
        return f"the compiled extension could not be loaded: {error}"
    return None


_cpu_failure: str | None = "its operators are not loaded yet"


def _call_library(name: str) -> str:
    """Calls a function of libkdfast.so that takes nothing and returns text."""
    function = getattr(ctypes.CDLL(str(Path(__file__).with_name("libkdfast.so"))), f"kdfast_{name}")
    function.restype = ctypes.c_char_p
    return function().decode()


def _isas(kind: str) -> tuple[str, ...]:
    return tuple(_call_library(f"{kind}_isas").split())


def usable_isas() -> tuple[str, ...]:
    """The compiled instruction sets that run here, best last."""
    return _isas("usable")


def isa() -> str:
    """The instruction set that the CPU kernels use in this process."""
    found = _call_library("isa")
    if found not in usable_isas():  # the library's message: KDFAST_CPU_ISA names no usable set
        raise ValueError(found)
    return found


def own_products_are_faster() -> bool:
    """Whether the CPU library's matrix products are faster than PyTorch's here."""
    return _cpu_failure is None and _call_library("is_matmul_faster") == "yes"


def load() -> None:
    """Loads the CPU's operators, or records why that failed."""
    global _cpu_failure
    if Path(__file__).with_name("libkdfast.so").exists():
        _cpu_failure = _load_library("libkdfast.so")
        return
    _cpu_failure = (
        "the compiled extension is missing from this install. With torch and a C++17 compiler installed, build it by "
        "`make build` in a checkout, or by `pip install --force-reinstall --no-deps --no-cache-dir` of the package"
    )


def cuda_is_compiled() -> bool:
    return Path(__file__).with_name("libkdfast_cuda.so").exists()


@lru_cache
def _load_cuda() -> str | None:
    if not cuda_is_compiled():
        return "the CUDA kernels are not in this install: it was built without nvcc, or with KDFAST_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if torch.cuda.device_count() == 0:  # unlike is_available() this does not start CUDA
        return "torch sees no CUDA device"
    if (failure := _load_library("libkdfast_cuda.so")) is not None:
        return failure
    library = ctypes.CDLL(str(Path(__file__).with_name("libkdfast_cuda.so")))
    built, driver = library.kdfast_cuda_version() // 1000, library.kdfast_driver_version() // 1000
    if driver < built:
        return f"it was built with CUDA {built}, but the driver supports CUDA {driver} at most"
    return None


@lru_cache
def _device_failure(index: int) -> str | None:
    """Why the CUDA kernels do not run on a device. Asked for no device but those that are used: it starts each."""
    capability, least = gpu_choice.capability(index), gpu_choice.LEAST_CAPABILITY
    if capability < least:
        return f"sm_{capability}, and sm_{least} is the least"
    probe = ctypes.CDLL(str(Path(__file__).with_name("libkdfast_cuda.so"))).kdfast_device_failure
    probe.restype = ctypes.c_char_p
    failure = probe(index).decode()
    return f"sm_{capability}, which loads no kernel: {failure}" if failure else None


def cuda_failure(device: str, index: int | None = None) -> str | None:
    """Why the CUDA kernels cannot take tensors of this type of device, or of this device; None where they can.

    Without an index the best device is asked, and among the best ones the current one; none before CUDA is started.
    """
    if (failure := _load_cuda()) is not None:
        return failure
    if device != "cuda":
        return f"it takes CUDA tensors, not {device} ones"
    if index is not None:
        return (failure := _device_failure(index)) and f"cuda:{index} is {failure}"
    if not torch.cuda.is_initialized():
        return None  # asking for a capability starts CUDA, after which no process may be forked
    current = torch.cuda.current_device()
    best = max(range(torch.cuda.device_count()), key=lambda i: (gpu_choice.capability(i), i == current))
    return (failure := _device_failure(best)) and f"the best device here is {failure}"


@contextmanager
def _without_starting_cuda() -> Iterator[None]:
    """Triton asks torch.cuda.is_available(), which starts CUDA unless this is set; then no process may be forked."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_triton_takes: set[str] = set()  # types of devices, so that not every call asks Triton


def triton_failure(device: str) -> str | None:
    """Why Triton cannot take tensors of this type of device; None where it can."""
    if device in _triton_takes:
        return None
    if (failure := _triton_failure(device)) is None:
        _triton_takes.add(device)
    return failure


def _triton_failure(device: str) -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton could not be imported ({error}); PyTorch's builds for CUDA and ROCm bring it along"
    if tuple(map(int, triton.__version__.split(".")[:2])) < _LEAST_TRITON:
        least = ".".join(map(str, _LEAST_TRITON))
        return f"Triton {triton.__version__} is too old, {least} is the least: torch {_LEAST_TORCH} brings it"
    if triton.knobs.runtime.interpret:
        return None
    try:
        with _without_starting_cuda():
            driver = triton.runtime.driver.active
        from triton.backends.driver import GPUDriver  # CUDA's and ROCm's, which would start CUDA to name its device

        works_on = "cuda" if isinstance(driver, GPUDriver) else driver.get_active_torch_device().type
    except Exception as error:  # Triton's drivers raise different types
        return f"Triton {triton.__version__} finds no GPU that it can launch on ({error})"
    return None if works_on == device else f"Triton launches on {works_on} tensors here, not on {device} ones"


for _function in (triton_failure, cuda_failure):
    mark_constant_in_graphs(_function)


def usable_on(device: torch.device) -> list[str]:
    """Those of "cuda" and "triton" that can take tensors of this device."""
    failures = {"cuda": cuda_failure(device.type, device.index), "triton": triton_failure(device.type)}
    return [name for name, failure in failures.items() if failure is None]


def why_not(device: str) -> str:
    """Why a device has no kernels of its own."""
    if device == "cpu" and _cpu_failure is not None:
        return _cpu_failure
    if device == "cuda" and (failure := triton_failure(device)) is not None:
        return failure
    return f"this version of kdfast has no kernels for device type {device!r}"


def namespace(backend: str | None, student: Tensor) -> Any:
    """The operators of `backend` (None: the best one for the student's device)."""
    if backend is None:
        return torch.ops.kdfast
    if backend == "reference":
        return torch.ops.kdfast_reference
    if backend == "cpu":
        if student.device.type != "cpu":
            raise RuntimeError(f"backend: 'cpu' takes CPU tensors, but student_logits is on {student.device}")
        if _cpu_failure is not None:
            raise RuntimeError(f"backend: 'cpu' is not usable here: {_cpu_failure}")
        return torch.ops.kdfast
    device = student.device
    failure = cuda_failure(device.type, device.index) if backend == "cuda" else triton_failure(device.type)
    if failure is not None:
        raise RuntimeError(f"backend: {backend!r} is not usable here: {failure}")
    return torch.ops.kdfast_cuda if backend == "cuda" else torch.ops.kdfast_triton


def backends() -> dict[str, Any]:
    """What is compiled, what is usable here, which backend each device gets, and why not the others.

    Returns:
        A dict with one entry per backend, `{"compiled": bool, "usable": bool, "why_not": str | None, ...}`, and
        `"by_device"`, which names the backend of `backend=None` for each type of device. The cpu backend also has
        `"isa"`, the instruction set of its kernels on this machine (the environment variable `KDFAST_CPU_ISA`
        overrides it), and `"build"`, facts of the build. The triton backend has `"device"`, the type of tensors
        that Triton can launch on here; it compiles at its first call, so it always counts as compiled. The cuda backend
        has `"choice"`, a list of (backend, reason): where cuda and triton are both usable, the first reason that
        holds decides. Asking does not start CUDA, so that a program may fork afterwards; until something else has
        started it, the cuda backend counts as usable whatever the devices' capabilities are.

    Examples:
        >>> backends()["reference"]
        {'compiled': True, 'usable': True, 'why_not': None}
    """
    usable = _cpu_failure is None
    cpu: dict[str, Any] = {"compiled": usable, "usable": usable, "why_not": _cpu_failure, "isa": None, "build": None}
    if usable:
        cpu |= {"isa": isa(), "build": {"compiler": _call_library("compiler"), "isas": _isas("compiled")}}
    failures = {device: triton_failure(device) for device in ("cuda", "cpu")}
    device = next((name for name, failure in failures.items() if failure is None), None)
    triton = {
        "compiled": True,
        "usable": device is not None,
        "why_not": failures["cuda"] if device is None else None,
        "device": device,
    }
    failure = cuda_failure("cuda")
    cuda = {
        "compiled": cuda_is_compiled(),
        "usable": failure is None,
        "why_not": failure,
        "choice": gpu_choice.table(),
    }
    for_cuda = "cuda" if failure is None else "triton" if failures["cuda"] is None else "reference"
    return {
        "reference": {"compiled": True, "usable": True, "why_not": None},
        "cpu": cpu,
        "triton": triton,
        "cuda": cuda,
        "by_device": {"cpu": "cpu" if usable else "reference", "cuda": for_cuda, "other": "reference"},
    }
