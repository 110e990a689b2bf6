"""What benchmarks.gpu measures on: the device's clock and memory, the host's time of a call, and the device's state."""

from __future__ import annotations

import json
import re
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.timing import Candidate, flush_caches

_FLUSH_BYTES = 512 << 20  # twice the largest last-level cache of today's GPUs; at least four times the L2
HOST_CALLS = 30


def first_line(*command: str) -> str:
    """The first line that a command prints; empty where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(
        command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return (done.stdout.splitlines() or [""])[0] if done.returncode == 0 else ""


def nvidia_state(uuid: str) -> str:
    device = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    line = first_line("nvidia-smi", f"--id={device}", query, "--format=csv,noheader")
    fields = line.split(", ")
    if len(fields) != 5:
        return line or "unknown"
    return "multiprocessors {}, memory {}, {} of {}, {} C".format(*fields)


def amd_state(index: int) -> str:
    line = first_line("rocm-smi", "--showclocks", "--showpower", "--showtemp", "--json")
    try:
        card = json.loads(line)[f"card{index}"]
    except (ValueError, KeyError):
        return line or "unknown"
    wanted = re.compile(r"[sm]clk clock speed|Power \(W\)|\(Sensor junction\)")
    return ", ".join(f"{key.strip(':')} {value}" for key, value in card.items() if wanted.search(key))


def _seconds(candidate: Candidate, synchronize: Callable[[], None]) -> float:
    argument = candidate.prepare()
    synchronize()
    start = time.perf_counter()
    result = candidate.run(argument)
    seconds = time.perf_counter() - start
    del result, argument
    return seconds


class Gpu:
    """Measures with the device's clock."""

    name = "cuda"

    def __init__(self) -> None:
        size = max(_FLUSH_BYTES, 4 * getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0))
        self._flush = torch.empty(size // 4, device=self.name)

    def milliseconds(self, candidate: Candidate) -> float:
        argument = candidate.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self._flush.zero_()
        self._flush.sum()  # a read, so that no candidate waits for its write-back
        start.record()
        result = candidate.run(argument)  # queued while the flush runs: hides the host's time up to its length
        end.record()
        end.synchronize()
        del result, argument
        return float(start.elapsed_time(end))

    def peak(self, candidate: Candidate) -> int:
        argument = candidate.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = candidate.run(argument)
        torch.cuda.synchronize()
        del result, argument
        return int(torch.cuda.max_memory_allocated() - before)

    def host_microseconds(self, candidate: Candidate) -> float:
        """The host's time of a call, which ends before the device's."""
        return 1e6 * statistics.median(_seconds(candidate, torch.cuda.synchronize) for _ in range(HOST_CALLS))

    def state(self) -> str:
        """Clocks, power and temperature, as the vendor's tool says now."""
        properties = torch.cuda.get_device_properties()
        return amd_state(torch.cuda.current_device()) if torch.version.hip else nvidia_state(str(properties.uuid))


class Host:
    """The CPU, which replaces the GPU in a dry run."""

    name = "cpu"

    def milliseconds(self, candidate: Candidate) -> float:
        argument = candidate.prepare()
        flush_caches()
        start = time.perf_counter()
        candidate.run(argument)
        return 1e3 * (time.perf_counter() - start)

    def peak(self, candidate: Candidate) -> int:
        argument = candidate.prepare()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        candidate.run(argument)
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    def host_microseconds(self, candidate: Candidate) -> float:
        return 1e6 * _seconds(candidate, lambda: None)

    def state(self) -> str:
        return ""
