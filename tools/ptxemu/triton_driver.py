"""Triton driver that runs compiled kernels on the emulator, against CPU tensors in place.

Example:
    from ptxemu import triton_driver as D

    D.activate(cap=80)
    kernel[grid](cpu_tensor, ..., num_warps=4)
    print(D.last)
"""

import contextlib
import time

import numpy as np

from . import machine, parser
from .errors import PTXError
from .memory import GlobalMemory, bytes_at

last = None
options = machine.Options()
_recorders = []
_ptx = {}
_active = None

_PROPERTIES = {
    75: dict(max_shared_mem=65536, multiprocessor_count=40),
    80: dict(max_shared_mem=166912, multiprocessor_count=108),
    86: dict(max_shared_mem=101376, multiprocessor_count=84),
    89: dict(max_shared_mem=101376, multiprocessor_count=128),
    90: dict(max_shared_mem=232448, multiprocessor_count=132),
}
_SCALARS = {
    "i1": np.int8,
    "i8": np.int8,
    "i16": np.int16,
    "i32": np.int32,
    "i64": np.int64,
    "u1": np.uint8,
    "u8": np.uint8,
    "u16": np.uint16,
    "u32": np.uint32,
    "u64": np.uint64,
    "fp16": np.float16,
    "fp32": np.float32,
    "f32": np.float32,
    "fp64": np.float64,
}


class _Event:
    def __init__(self, enable_timing=False, **kw):
        self.t = 0.0

    def record(self, stream=None):
        self.t = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return (other.t - self.t) * 1e3


class _DeviceInterface:
    Event = _Event

    @staticmethod
    def synchronize(*a):
        pass

    @staticmethod
    def current_device():
        return _active.cap if _active else 0

    @staticmethod
    def current_stream(*a):
        return type("Stream", (), {"cuda_stream": 0})()

    @staticmethod
    def set_device(d):
        pass

    @staticmethod
    def get_device_capability(d=None):
        return divmod(_active.cap, 10)


class Utils:
    """The part of the native driver module that the Triton runtime asks for."""

    def __init__(self, cap):
        self.cap = cap

    def load_binary(self, name, binary, shared, device):
        return (name, name, 0, 0, 1024)

    def get_device_properties(self, device):
        p = dict(_PROPERTIES.get(self.cap, _PROPERTIES[80]))
        p.update(max_num_regs=65536, warpSize=32, sm_clock_rate=1410000, mem_clock_rate=1215000, mem_bus_width=5120)
        return p

    def unload_module(self, *a):
        pass

    def set_printf_fifo_size(self, n):
        pass


def _remember(module, function, name, metadata_group, hash_):
    for file, path in metadata_group.items():
        if file.endswith(".ptx"):
            _ptx[hash_] = str(path)


def _ptx_of(metadata):
    path = _ptx.get(metadata.hash)
    if path is None:
        from triton.runtime.cache import get_cache_manager

        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        if path is None:
            raise PTXError(f"PTX text of {metadata.name} not found in the Triton cache")
        _ptx[metadata.hash] = path
    with open(path) as f:
        return f.read()


def _flatten(sig, args):
    for s, a in zip(sig, args, strict=False):
        if isinstance(s, tuple):
            yield from _flatten(s, a)
        elif s != "constexpr":
            yield s, a


class Memory:
    """Maps tensor storages and arrays to virtual addresses for one launch."""

    def __init__(self):
        self.gmem = GlobalMemory()
        self.known = {}
        self.keep = []

    def pointer(self, obj, name):
        """Virtual address for a tensor, numpy array, integer or None."""
        if obj is None:
            return 0
        if isinstance(obj, (int, np.integer)):
            return int(obj)
        if isinstance(obj, np.ndarray):
            base = obj
            while isinstance(base.base, np.ndarray):
                base = base.base
            start = base.__array_interface__["data"][0]
            nbytes = base.nbytes
            at = obj.__array_interface__["data"][0]
            if not base.flags.c_contiguous and not base.flags.f_contiguous:
                raise PTXError(f"{name}: owner of the array is not contiguous")
        else:
            storage = obj.untyped_storage()
            start, nbytes, at = storage.data_ptr(), storage.nbytes(), obj.data_ptr()
            if obj.device.type != "cpu":
                raise PTXError(f"{name}: only CPU tensors can be passed")
        if nbytes == 0:
            return 0
        region = self.known.get(start)
        if region is None:
            self.keep.append(obj)
            region = self.known[start] = self.gmem.add(name, bytes_at(start, nbytes))
        return region.base + at - start


def _unwrap(a):
    base = getattr(a, "base", None)
    if base is not None and hasattr(base, "data_ptr") and not hasattr(a, "untyped_storage"):
        return base
    return a


class Launcher:
    def __init__(self, src, metadata):
        self.src, self.metadata = src, metadata
        self.names = list(src.signature.keys())
        self.signature = list(src.signature.values())

    def __call__(self, gx, gy, gz, stream, function, kernel_metadata, launch_metadata, enter_hook, exit_hook, *args):
        global last
        if enter_hook is not None:
            enter_hook(launch_metadata)
        md = self.metadata
        text = _ptx_of(md)
        mod = parser.parse(text)
        prog = machine.program_for(mod, mod.find_entry(md.name))
        num_ctas = getattr(md, "num_ctas", 1)
        mem = Memory()
        names = []
        for n, s in zip(self.names, self.signature, strict=False):
            names.extend(
                [f"{n}.{i}" for i in range(len(s))] if isinstance(s, tuple) else [n] if s != "constexpr" else []
            )
        params = prog.entry.params
        size = params[-1].offset + params[-1].size if params else 0
        buf = np.zeros(size, np.uint8)
        items = list(_flatten(self.signature, args))
        for i, (ty, a) in enumerate(items):
            p = params[i]
            name = str(names[i]) if i < len(names) else p.name
            if ty[0] == "*":
                v = np.array([mem.pointer(_unwrap(a), name)], np.uint64)
            elif ty in ("bf16",):
                v = (np.array([a], np.float32).view(np.uint32) >> 16).astype(np.uint16)
            elif ty in _SCALARS:
                dt = _SCALARS[ty]
                v = (
                    np.array([a]).astype(dt)
                    if ty[0] == "f"
                    else np.array(
                        [int(a) & (2 ** (8 * np.dtype(dt).itemsize) - 1)], np.dtype(f"u{np.dtype(dt).itemsize}")
                    )
                )
            else:
                raise PTXError(f"argument {name} of type {ty} is not supported")
            raw = v.view(np.uint8)
            if raw.size > p.size:
                raw = raw[: p.size]
            buf[p.offset : p.offset + raw.size] = raw
        blocks = gx * gy * gz * num_ctas
        scratch = getattr(md, "global_scratch_size", 0) or 0
        if scratch:
            p = params[len(items)]
            store = np.zeros(scratch * blocks + 512, np.uint8)
            mem.keep.append(store)
            v = np.array([mem.gmem.add("global scratch", store).base], np.uint64)
            buf[p.offset : p.offset + 8] = v.view(np.uint8)
        if num_ctas != 1:
            raise PTXError("num_ctas > 1 is not supported")
        if gx * gy * gz > 0:
            m = machine.Machine(
                prog, (gx, gy, gz), (md.num_warps * 32, 1, 1), buf, mem.gmem, md.shared, options=options
            )
            rep = m.launch()
            rep.kernel = md.name
            rep.ptx = text
            rep.metadata = md
            last = rep
            for r in _recorders:
                r.append(rep)
        if exit_hook is not None:
            exit_hook(launch_metadata)


class Driver:
    def __init__(self, cap):
        self.cap = cap
        self.utils = Utils(cap)
        self.launcher_cls = Launcher
        self.get_current_stream = lambda dev=None: 0
        # one device number per capability keeps compiled kernels of different targets apart
        self.get_current_device = lambda: cap
        self.set_current_device = lambda dev: None
        self.get_device_capability = lambda dev=None: divmod(cap, 10)

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.cap, 32)

    def get_device_interface(self):
        return _DeviceInterface

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    @staticmethod
    def is_active():
        return True

    def get_benchmarker(self):
        def bench(call, *, quantiles=None, **kw):
            t = time.perf_counter()
            call()
            ms = (time.perf_counter() - t) * 1e3
            return [ms] * len(quantiles) if quantiles else ms

        return bench

    def get_empty_cache_for_benchmark(self):
        import torch

        return torch.zeros(1, dtype=torch.int)

    def clear_cache(self, cache):
        pass

    def assemble_tensormap_to_arg(self, tensormaps_info, args):
        return args


def _without_machine_code(backend=None, stages=None, *others):
    """Triton's hook into its stages: the emulator runs PTX, so ptxas need not run for NVIDIA's targets.

    Such kernels have keys of their own in Triton's cache, where a device would find no machine code.
    """
    if stages is None:
        return "ptxemu", "ptxemu"
    if "cubin" in stages:
        stages["cubin"] = lambda source, metadata: b""


def activate(cap=80, assemble=False, **opts):
    """Make Triton compile for compute capability `cap` and run on the emulator; returns the driver.

    assemble: whether ptxas makes machine code too, which nothing here runs.
    """
    global _active, options
    import triton

    options = machine.Options(**opts)
    if hasattr(triton.knobs.runtime, "add_stages_inspection_hook"):
        triton.knobs.runtime.add_stages_inspection_hook = None if assemble else _without_machine_code
    hook = triton.knobs.runtime.kernel_load_start_hook
    if hasattr(hook, "add"):
        hook.add(_remember)
    _active = Driver(cap)
    triton.runtime.driver.set_active(_active)
    return _active


def deactivate(previous=None):
    """Forget the emulator as Triton's driver (or go back to a former one, as returned by activate)."""
    global _active
    import triton

    _active = previous if isinstance(previous, Driver) else None
    triton.runtime.driver._active = previous
    if _active is None and getattr(triton.knobs.runtime, "add_stages_inspection_hook", None) is _without_machine_code:
        triton.knobs.runtime.add_stages_inspection_hook = None


@contextlib.contextmanager
def record():
    """Collect the reports of all launches in the block."""
    got = []
    _recorders.append(got)
    try:
        yield got
    finally:
        for i, r in enumerate(_recorders):
            if r is got:
                del _recorders[i]
                break


def static_report(report_or_kernel, cap=None):
    """KernelStatic of a launch report or of the object returned by kernel[grid](...)."""
    from . import static

    ptx = getattr(report_or_kernel, "ptx", None)
    md = report_or_kernel.metadata
    if ptx is None:
        ptx = report_or_kernel.asm["ptx"]
    if cap is None:
        arch = md.target.arch if hasattr(md.target, "arch") else md.target["arch"]
        cap = int(arch)
    rep = static.static_report_ptx(ptx, cap)
    return next(iter(rep.values()))
