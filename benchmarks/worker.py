"""One process of a run: measures workloads with the instruction set that the environment names.

It reads a job as JSON from standard input, writes a line for each finished workload to standard output, and progress to
standard error. Each instruction set needs a process of its own: it is fixed when kdfast is loaded.
"""

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

import kdfast
from benchmarks import candidates, timing
from benchmarks.cases import Workload

TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # relative to the largest entry; coarse: tests check the numbers


class _Progress:
    """Prints progress: on a terminal one line that changes, else a line every few seconds."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.started = self.printed = time.monotonic()

    def __call__(self, what: str, last: bool = False) -> None:
        now = time.monotonic()
        line = f"{self.title}  {now - self.started:3.0f} s  {what}"
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or now - self.printed > 3:
            print(line, file=sys.stderr, flush=True)
            self.printed = now


def measure(workload: Workload, names: list[str], rounds: int, title: str) -> dict[str, Any]:
    """Samples, in seconds, of the named candidates on one workload."""
    progress = _Progress(title)
    progress("making logits")
    data = candidates.Data(workload)
    error = candidates.gradient_error(data)
    if not error < TOLERANCE[workload.dtype]:
        raise RuntimeError(f"{workload.name}: kdfast's gradient is off by {error:.1e} of its largest entry")
    table = {name: candidates.candidate(name, data) for name in names}
    samples = timing.interleave(table, rounds, workload.cold, workload.repeats, progress)
    progress("done", last=True)
    return {
        "workload": asdict(workload),
        "samples": samples,
        "gradient_error": error,
        "isa": kdfast.backends()["cpu"].get("isa"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kdfast": kdfast.__version__,
    }


def main() -> None:
    job = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")  # results alone; what libraries print goes to standard error
    os.dup2(2, 1)
    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    for task in job["tasks"]:
        result = measure(Workload(**task["workload"]), task["candidates"], job["rounds"], task["title"])
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
