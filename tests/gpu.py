"""What Triton's kernels run on here: a GPU, the emulator of GPU kernels, or Triton's own interpreter.

The emulator runs the compiled PTX on CPU tensors, finds accesses out of bounds, misaligned or racing, and counts bytes.
The environment variable KDFAST_PTXEMU names the folder that holds its package, ptxemu. Without it, and without a GPU,
the kernels are interpreted, which checks the values alone.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

ON_DEVICE = torch.cuda.is_available()
EMULATED = not ON_DEVICE and "KDFAST_PTXEMU" in os.environ
INTERPRETED = not ON_DEVICE and not EMULATED
CAPABILITIES = (80, 90)
NEEDS_EMULATOR = "needs KDFAST_PTXEMU, the folder of the package ptxemu, which runs compiled GPU kernels on the CPU"

if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
if EMULATED:
    sys.path.insert(0, os.environ["KDFAST_PTXEMU"])


def emulator() -> Any:
    from ptxemu import triton_driver

    return triton_driver


def forget_reads_before_a_barrier() -> None:
    """Mends a fault of the emulator: it took reads by two warps for unordered although their block had met in between,
    if another block of the launch had not come that far (a row that drops out overtakes the others)."""
    from ptxemu.memory import SharedMemory

    check_read = SharedMemory.check_read

    def mended(self: Any, machine: Any, threads: Any, offset: Any, width: int, *rest: Any) -> None:
        granules, each = self.shadow.granules(offset, width)
        met = machine.bar_time[machine.slot_of[threads]].repeat(each)
        self.shadow.r_time[granules[self.shadow.r_time[granules] <= met]] = -1
        check_read(self, machine, threads, offset, width, *rest)

    SharedMemory.check_read = mended


@contextmanager
def kernels(capability: int = 80, **options: Any) -> Iterator[list[Any]]:
    """Triton's kernels on what there is; on the emulator the launches' reports, which must be without findings.

    On a GPU new tensors lie there meanwhile, for Triton takes no others.
    """
    if not EMULATED:
        torch.set_default_device("cuda" if ON_DEVICE else None)
        try:
            yield []
        finally:
            torch.set_default_device(None)
        return
    driver = emulator()
    driver.activate(cap=capability, **options)
    with driver.record() as reports:
        yield reports
    found = [f"{report.kernel}: {finding}" for report in reports for finding in report.findings]
    assert not found, "\n".join(found)


if EMULATED:
    forget_reads_before_a_barrier()
    emulator().activate(cap=80)
