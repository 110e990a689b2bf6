"""CUDA sources on the emulator.

Example:
    from ptxemu.cuda import load_cu

    m = load_cu('kernels.cu', cap=80)
    report = m.launch('kernel_name', grid, block, (array, tensor, 3, 1.5), smem=0)
"""

import hashlib
import os
import subprocess
import tempfile

import numpy as np

from . import machine, parser, static
from .errors import PTXError
from .triton_driver import Memory

_cache = {}


def nvcc():
    path = static.tool("nvcc")
    if path is None:
        raise PTXError("nvcc not found")
    return path


def compile_cu(path, cap, flags):
    """PTX text of a .cu file (cached within the process by content and flags)."""
    with open(path, "rb") as f:
        text = f.read()
    key = (hashlib.sha256(text).hexdigest(), os.path.abspath(path), cap, tuple(flags))
    if key in _cache and not flags_have_includes(text):
        return _cache[key]
    with tempfile.TemporaryDirectory() as d:
        out = os.path.join(d, "k.ptx")
        cmd = [nvcc(), "-ptx", f"-arch=sm_{cap}", "-lineinfo", "-std=c++17", *flags, path, "-o", out]
        r = subprocess.run(cmd, capture_output=True, text=True)
        if r.returncode:
            raise PTXError(f"nvcc failed:\n{r.stderr}{r.stdout}")
        with open(out) as f:
            _cache[key] = f.read()
    return _cache[key]


def flags_have_includes(text):
    return b'#include "' in text


def _triple(x):
    x = (x,) if isinstance(x, (int, np.integer)) else tuple(x)
    return tuple(int(v) for v in x) + (1,) * (3 - len(x))


class Module:
    def __init__(self, ptx, cap, path=None):
        self.ptx, self.cap, self.path = ptx, cap, path
        self.mod = parser.Parser(ptx).parse()
        self.last = None
        self._static = None

    def kernels(self):
        """{mangled name: readable name} of all kernels."""
        return {f.name: parser.demangle(f.name) for f in self.mod.entries()}

    def global_array(self, name, dtype=np.uint8):
        """Contents of a __device__ or __constant__ variable as a writable array."""
        if self.mod.entries():
            machine.program_for(self.mod, self.mod.entries()[0])
        regions = self.mod.regions
        hit = [
            r
            for n, r in regions.items()
            if n == name or parser.demangle(n) == name or parser.demangle(n).split("::")[-1] == name
        ]
        if len(hit) != 1:
            raise PTXError(f"no variable {name!r}; present: {sorted(regions)}")
        return hit[0].data.view(dtype)

    def launch(self, name, grid, block, args=(), smem=0, cluster=None, **opts):
        """Run a kernel; returns the LaunchReport (also kept as .last)."""
        from . import triton_driver

        entry = self.mod.find_entry(name)
        prog = machine.program_for(self.mod, entry)
        mem = Memory()
        params = entry.params
        if len(args) != len(params):
            raise PTXError(f"{name} takes {len(params)} arguments, {len(args)} given")
        size = params[-1].offset + params[-1].size if params else 0
        buf = np.zeros(size, np.uint8)
        for i, (p, a) in enumerate(zip(params, args, strict=False)):
            raw = self.pack(p, a, mem, f"arg{i}")
            if raw.size > p.size:
                raise PTXError(f"argument {i} has {raw.size} bytes, parameter {p.size}")
            buf[p.offset : p.offset + raw.size] = raw
        block = _triple(block)
        limit = entry.directives.get(".maxntid") or entry.directives.get(".reqntid")
        threads = block[0] * block[1] * block[2]
        if threads > 1024 or (limit and threads > int(np.prod(limit))):
            raise PTXError(f"{threads} threads per block exceed the limit of the kernel ({limit or 1024})")
        cl = cluster or entry.directives.get(".reqnctapercluster") or (1, 1, 1)
        m = machine.Machine(prog, _triple(grid), block, buf, mem.gmem, smem, _triple(cl), machine.Options(**opts))
        rep = m.launch()
        rep.kernel = parser.demangle(entry.name)
        rep.ptx = self.ptx
        self.last = rep
        for r in triton_driver._recorders:
            r.append(rep)
        return rep

    @staticmethod
    def pack(p, a, mem, name):
        """Bytes of one kernel argument."""
        t = p.type
        if p.count is not None:  # structure passed by value
            raw = a if isinstance(a, (bytes, bytearray)) else np.ascontiguousarray(a).tobytes()
            return np.frombuffer(raw, np.uint8)
        if hasattr(a, "untyped_storage") or isinstance(a, np.ndarray) and a.ndim >= 0 and not np.isscalar(a):
            if p.size != 8:
                raise PTXError(f"{name}: array given for a parameter of type .{t}")
            return np.array([mem.pointer(a, name)], np.uint64).view(np.uint8)
        if a is None:
            return np.zeros(p.size, np.uint8)
        if t in ("f32", "f64", "f16"):
            return np.array([a], {"f32": np.float32, "f64": np.float64, "f16": np.float16}[t]).view(np.uint8)
        if isinstance(a, (float, np.floating)):
            kind = {4: np.float32, 8: np.float64, 2: np.float16}[p.size]
            return np.array([a], kind).view(np.uint8)
        n = p.size
        return np.frombuffer((int(a) & ((1 << 8 * n) - 1)).to_bytes(n, "little"), np.uint8)

    def static_report(self):
        """{kernel name: KernelStatic} from ptxas and the disassembler."""
        if self._static is None:
            rep = static.static_report_ptx(self.ptx, self.cap)
            self._static = {parser.demangle(k): v for k, v in rep.items()}
        return self._static


def load_cu(path, cap=80, flags=()):
    """Compile a .cu file with nvcc and make its kernels callable."""
    path = os.fspath(path)
    return Module(compile_cu(path, cap, list(flags)), cap, path)


def load_ptx(text, cap=80):
    """Kernels of PTX text."""
    return Module(text, cap)
