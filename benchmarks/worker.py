"""One process of a run: measures a workload with the instruction set that the environment names, which is fixed when
kdfast is loaded.

It reads a job as JSON from standard input, and writes the result to standard output and progress to standard error.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

from benchmarks.cases import Workload

TOOLS = Path(__file__).parents[1] / "tools"


def _replace_gpu() -> str:
    """Before Triton is imported, makes its kernels run on CPU tensors; returns what runs them."""
    if not ((TOOLS / "ptxemu").is_dir() and importlib.util.find_spec("numpy")):
        os.environ["TRITON_INTERPRET"] = "1"
        return "Triton's interpreter"
    os.environ.pop("TRITON_INTERPRET", None)
    if importlib.util.find_spec("triton"):  # else kdfast says what is missing
        os.environ.setdefault("PTXEMU_CACHE", str(TOOLS.with_name("build") / "ptxemu"))
        sys.path.insert(0, str(TOOLS))
        from ptxemu import triton_driver  # an emulator of GPU kernels

        triton_driver.activate(cap=90)
    return "an emulator of GPU kernels"


def main() -> None:
    job = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")  # the result alone; what libraries print goes to standard error
    os.dup2(2, 1)
    device, threads = job.pop("device"), job.pop("threads")
    replacement = _replace_gpu() if device == "dry run" else ""

    import torch  # not earlier: it may import Triton

    from benchmarks import devices
    from benchmarks.measure import measure

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks: torch sees no GPU here; --dry-run needs none")
    if threads is not None:
        torch.set_num_threads(threads)
    kinds = {"cpu": devices.Cpu, "cuda": devices.Gpu, "dry run": lambda: devices.DryRun(replacement)}
    workload = Workload(**job.pop("workload"))
    json.dump(measure(workload, device=kinds[device](), **job), out)
    out.close()


if __name__ == "__main__":
    main()
