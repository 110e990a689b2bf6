"""What the benchmarks measure on: how a device's times, its memory and the host's time are taken, and what it is."""

import importlib.metadata
import json
import platform
import re
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import torch

import kdfast
from benchmarks import memory, timing
from benchmarks.cases import Workload
from benchmarks.timing import Candidate

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


def cpu_name() -> str:
    """The CPU's model name, with its family and model: virtual machines say no more than AMD EPYC of several kinds."""
    info = Path("/proc/cpuinfo")
    found = dict(
        re.findall(r"^(model name|cpu family|model)\s*: (.+)$", info.read_text() if info.exists() else "", re.M)
    )
    name = found.get("model name") or platform.processor() or platform.machine()
    return f"{name}, family {found['cpu family']} model {found['model']}" if "cpu family" in found else name


def _nvidia_state(uuid: str) -> str:
    device = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    line = first_line("nvidia-smi", f"--id={device}", query, "--format=csv,noheader")
    fields = line.split(", ")
    if len(fields) != 5:
        return line or "unknown"
    return "multiprocessors {}, memory {}, {} of {}, {} C".format(*fields)


def _amd_state(index: int) -> str:
    line = first_line("rocm-smi", "--showclocks", "--showpower", "--showtemp", "--json")
    try:
        card = json.loads(line)[f"card{index}"]
    except (ValueError, KeyError):
        return line or "unknown"
    wanted = re.compile(r"[sm]clk clock speed|Power \(W\)|\(Sensor junction\)")
    return ", ".join(f"{key.strip(':')} {value}" for key, value in card.items() if wanted.search(key))


def _driver() -> str:
    """The version of NVIDIA's or AMD's kernel driver."""
    amd = Path("/sys/module/amdgpu/version")
    nvidia = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return nvidia or (amd.read_text().strip() if amd.exists() else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class Cpu:
    """Measures in this process. The host's time of a call is its time."""

    name = "cpu"
    tensors = "cpu"

    def seconds(self, candidate: Candidate, workload: Workload) -> float:
        return timing.sample(candidate, workload.cold, workload.repeats)

    def peak(self, candidate: Candidate) -> int | None:
        """The bytes that a call adds. A CPU's depend on what this process has freed: picture.py measures them."""
        return None

    def host(self, candidate: Candidate) -> float | None:
        """Seconds in which the host is done with a call, where that is not when the device is."""
        return None

    def state(self) -> str:
        """Clocks, power and temperature, where a vendor's tool says them."""
        return ""

    def machine(self) -> str:
        return cpu_name()

    def isa(self) -> str:
        """The instruction set of kdfast's kernels."""
        return kdfast.backends()["cpu"].get("isa") or "reference"

    def facts(self) -> dict[str, str]:
        versions = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
        commit = first_line("git", "describe", "--always", "--dirty", "--exclude", "*")
        return {
            "machine": self.machine(),
            "driver": _driver(),
            "threads": str(torch.get_num_threads()),
            "isa": self.isa(),
            "torch": ", ".join(
                [torch.__version__, *(f"{name} {version}" for name, version in versions.items() if version)]
            ),
            "triton": _version("triton"),
            "liger-kernel": _version("liger-kernel"),
            "kdfast": kdfast.__version__ + f", commit {commit}" * bool(commit),
        }


class DryRun(Cpu):
    """The CPU, which replaces a GPU: single calls, and times mean nothing."""

    name = "dry run"

    def __init__(self, runs_kernels: str) -> None:
        self.runs_kernels = runs_kernels

    def seconds(self, candidate: Candidate, workload: Workload) -> float:
        return timing.sample(candidate, True, 1)

    def peak(self, candidate: Candidate) -> int | None:
        argument = candidate.prepare()
        return memory.added(lambda: candidate.run(argument))

    def host(self, candidate: Candidate) -> float | None:
        return timing.sample(candidate, False, 1)

    def machine(self) -> str:
        return f"{cpu_name()}, kernels by {self.runs_kernels}"


class Gpu(Cpu):
    """Measures with the device's clock."""

    name = tensors = "cuda"

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties()
        size = max(_FLUSH_BYTES, 4 * getattr(self.properties, "L2_cache_size", 0))
        self._flush = torch.empty(size // 4, device=self.tensors)

    def seconds(self, candidate: Candidate, workload: Workload) -> float:
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
        return float(start.elapsed_time(end)) / 1e3

    def peak(self, candidate: Candidate) -> int | None:
        argument = candidate.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = candidate.run(argument)
        torch.cuda.synchronize()
        del result, argument
        return int(torch.cuda.max_memory_allocated() - before)

    def host(self, candidate: Candidate) -> float | None:
        """With an idle device."""
        found = []
        for _ in range(HOST_CALLS):
            argument = candidate.prepare()
            torch.cuda.synchronize()
            start = time.perf_counter()
            result = candidate.run(argument)
            found.append(time.perf_counter() - start)
            del result, argument
        return statistics.median(found)

    def state(self) -> str:
        hip = torch.version.hip
        return _amd_state(torch.cuda.current_device()) if hip else _nvidia_state(str(self.properties.uuid))

    def machine(self) -> str:
        return torch.cuda.get_device_name()

    def isa(self) -> str:
        compiled_for = f"sm_{self.properties.major}{self.properties.minor}"
        return self.properties.gcnArchName if torch.version.hip else compiled_for
