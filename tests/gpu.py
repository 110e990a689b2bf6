"""What Triton's kernels run on here: a GPU, the emulator of GPU kernels, or Triton's own interpreter.

The emulator, tools/ptxemu, runs the compiled PTX on CPU tensors, finds accesses out of bounds, misaligned or racing,
and counts bytes. Without it, and without a GPU, the kernels are interpreted, which checks the values alone; the
environment variable KDFAST_TEST_INTERPRET=1 asks for that.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"
CAPABILITIES = (80, 90)
NEEDS_EMULATOR = "needs tools/ptxemu, which runs compiled GPU kernels on the CPU, and triton and numpy"

ON_DEVICE = torch.cuda.is_available()
EMULATED = (
    not ON_DEVICE
    and os.environ.get("KDFAST_TEST_INTERPRET") != "1"
    and (TOOLS / "ptxemu").is_dir()
    and all(map(find_spec, ("triton", "numpy")))
)
INTERPRETED = not ON_DEVICE and not EMULATED

if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
if EMULATED:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("PTXEMU_CACHE", str(ROOT / "build" / "ptxemu"))  # of what the emulator compiles of itself
    sys.path.insert(0, str(TOOLS))


def emulator() -> Any:
    from ptxemu import triton_driver

    return triton_driver


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
    emulator().activate(cap=80)
