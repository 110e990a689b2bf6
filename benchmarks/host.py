"""`python -m benchmarks.host`: how long the host takes for a call on Triton's kernels, and what the call launches.

(8, 1000) bf16, T = 2, labels. Triton's own launcher runs, in C, on a stub of CUDA's driver library, which launches
nothing; so no GPU is needed, and what a GPU would add is missing: some microseconds a launch in CUDA's driver and for
torch.cuda's guard of the device. A row of kernels shorter than these times waits for the host.

The times are the medians of batches of calls, and the best batch.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast import choice, rows
from kdfast.arguments import take_flat

BUILD = Path(__file__).parents[1] / "build" / "host"
STUB = Path(__file__).with_name("libcuda_stub.c")
BATCHES, CALLS = 30, 50


def load_stub() -> Any:
    """The stub, built where it is not there yet, and Triton's driver on top of it, for CPU tensors."""
    library = BUILD / "libcuda.so.1"
    BUILD.mkdir(parents=True, exist_ok=True)
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    options = ["-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    subprocess.run([os.environ.get("CC", "cc"), *options, "-o", library, STUB], check=True)
    stub = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    stub.stub_launched.restype = ctypes.c_char_p
    triton.knobs.nvidia.libcuda_path = str(BUILD)
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device=None: 0
            self.get_device_capability = lambda device=None: (9, 0)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())
    choice._triton_takes.add("cpu")  # whose tensors no other driver of NVIDIA's takes
    rows.check_values = lambda *args: None  # it looks at CPU tensors alone
    return stub


class TorchLaunches(TorchDispatchMode):
    """PyTorch's operators that a GPU has a launch for, also those inside of kdfast's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "kdfast_triton":
            from kdfast.triton import ops

            implementation = getattr(ops, name)
            with self:
                return (implementation if name == "scale_" else take_flat(implementation))(*args)
        if not (func.is_view or "empty" in name):
            self.found.append(name)
        return func(*args, **kwargs or {})


def calls() -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(8, 1000, generator=generator).bfloat16() for _ in range(2))
    labels = torch.randint(1000, (8,), generator=generator)
    labels[0] = -100
    weight = torch.rand(8, generator=generator)
    leaf, half = student.clone().requires_grad_(), student.half().requires_grad_()
    one = torch.ones(())

    def step(leaf: torch.Tensor, *given: Any, **settings: Any) -> None:
        leaf.grad = None
        loss = kdfast.kd_loss(leaf, teacher, *given, temperature=2.0, backend="triton", **settings)
        loss.backward(one if loss.dim() == 0 else one.expand_as(loss))

    return {
        "labels, forward and backward": lambda: step(leaf, labels),
        "labels and row_weight": lambda: step(leaf, labels, row_weight=weight),
        "labels, normalizer=100": lambda: step(leaf, labels, normalizer=100),
        "no labels": lambda: step(leaf),
        "reduction none": lambda: step(leaf, labels, reduction="none"),
        "fp16": lambda: step(half, labels),
        "without a gradient": lambda: kdfast.kd_loss(student, teacher, labels, temperature=2.0, backend="triton"),
        "scale_ alone": lambda: torch.ops.kdfast_triton.scale_(student, one),
    }


def microseconds(call: Callable[[], Any]) -> list[float]:
    found = []
    for _ in range(BATCHES):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        found.append((time.thread_time() - start) / CALLS * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", metavar="CALL", help="of the call of this name, by cProfile, which doubles times")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stub = load_stub()
    print(f"torch {torch.__version__}, Triton {triton.__version__}; (8, 1000) bf16; us a call, and its launches")
    for name, call in calls().items():
        if options.profile:
            if name == options.profile:
                import cProfile

                call()
                cProfile.runctx("for _ in range(2000): call()", {}, {"call": call}, sort="tottime")
            continue
        call()  # compiles
        stub.stub_forget()
        with TorchLaunches() as of_torch:
            call()
        ours = [stub.stub_launched(i).decode() for i in range(stub.stub_launches())]
        times = microseconds(call)
        print(
            f"  {name:30} {statistics.median(times):6.0f} (best {min(times):.0f})   "
            f"{len(ours)} + {len(of_torch.found)}: {', '.join(ours)}; torch's {', '.join(of_torch.found) or 'none'}"
        )


if __name__ == "__main__":
    main()
