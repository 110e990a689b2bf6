"""The floor: compiles floor.cpp on first use and calls it on tensors."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("floor.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]


def _compilers() -> list[list[str]]:
    """CXX, or those found; GCC comes first, since torch uses its OpenMP and shares the threads."""
    if os.environ.get("CXX"):
        return [shlex.split(os.environ["CXX"])]
    return [[name] for name in ("g++", "c++", "clang++") if shutil.which(name)]


def _compile(library: Path) -> None:
    """Builds the library with the first compiler that can; a temporary name allows two runs at a time."""
    unfinished = library.with_suffix(f".{os.getpid()}")
    errors = []
    for compiler in _compilers():
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(unfinished)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            unfinished.replace(library)
            return
        errors.append(f"{shlex.join(command)}\n{done.stderr}")
    raise RuntimeError("the floor needs a C++ compiler with OpenMP, such as g++ (CXX names one); " + "\n".join(errors))


@functools.cache
def _library() -> ctypes.CDLL:
    machine = [platform.node(), platform.processor(), *FLAGS, os.environ.get("CXX", "")]
    build = hashlib.sha256(" ".join(machine).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"kdfast-benchmarks-{os.getuid()}" / f"floor-{build}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        _compile(library)
    loaded = ctypes.CDLL(str(library))  # after torch, to share its OpenMP runtime and threads
    loaded.floor_read_only.restype = ctypes.c_uint64
    return loaded


def _arguments(*tensors: Tensor) -> list[object]:
    assert all(t.is_contiguous() and t.nbytes == tensors[0].nbytes for t in tensors)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    return [*pointers, ctypes.c_int64(tensors[0].nbytes), ctypes.c_int(torch.get_num_threads())]


def read_write(student: Tensor, teacher: Tensor, out: Tensor) -> Tensor:
    """Reads two arrays and writes a third of the same size, with torch's number of threads."""
    assert out.data_ptr() % 64 == 0  # streaming stores need it; torch aligns CPU tensors to it
    _library().floor_read_write(*_arguments(student, teacher, out))
    return out


def read_only(student: Tensor, teacher: Tensor) -> int:
    """Reads two arrays, with torch's number of threads."""
    return int(_library().floor_read_only(*_arguments(student, teacher)))
