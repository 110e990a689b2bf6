"""KDFAST_AUTOTUNE=1, set before the first call: plans chosen by measurement, not by launch.py's rules.

Rows of one kind are measured once for all their numbers up to the same power of 2. The choices are kept in Triton's
folder of compiled kernels, for this device, this Triton and this kdfast, so that the next process measures nothing.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from kdfast import __version__

MOST_ROWS = 16384  # more of them are many times as many as a device has room for

Choice = TypeVar("Choice")
is_wanted = os.environ.get("KDFAST_AUTOTUNE") == "1"
_places: dict[str, dict[str, int]] = {}  # of the fastest choices among all; by device and versions, then by kind


def choose(
    kind: Hashable,
    rows: int,
    choices: Callable[[], Iterable[Choice]],
    output: Tensor,
    run: Callable[[Choice, Tensor], Any],
) -> Choice:
    """The fastest of the choices, whose order is the same for all numbers of rows; run: launches one, which writes."""
    where = f"{_device_name(output.device)}, Triton {triton.__version__}, kdfast {__version__}"
    known = _places.setdefault(where, {})
    if not known:
        known.update(_read().get(where, {}))
    name = repr((min(MOST_ROWS, triton.next_power_of_2(rows)), kind))
    all_choices = list(choices())
    if known.get(name, len(all_choices)) >= len(all_choices):
        if _is_capturing(output.device):  # which forbids to wait for a measurement
            return all_choices[0]
        known[name] = _fastest(all_choices, torch.empty_like(output), run)  # the output may be the student
        _write(where, known)
    return all_choices[known[name]]


def _fastest(choices: list[Choice], scratch: Tensor, run: Callable[[Choice, Tensor], Any]) -> int:
    bench = triton.runtime.driver.active.get_benchmarker()

    def milliseconds(choice: Choice) -> float:
        try:
            return bench(lambda: run(choice, scratch), quantiles=[0.5])[0]
        except Exception:  # it takes more registers or threads than there are; Triton and drivers raise many types
            return math.inf

    times = list(map(milliseconds, choices))
    return times.index(min(times))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(triton.runtime.driver.active.get_current_target())


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _file() -> Path:
    return Path(triton.knobs.cache.dir) / "kdfast-autotune.json"


def _read() -> dict[str, dict[str, int]]:
    try:
        found = json.loads(_file().read_text())
    except (OSError, ValueError):  # there is none, or another process is at it
        return {}
    return found if isinstance(found, dict) else {}


def _write(where: str, known: dict[str, int]) -> None:
    others = _read()
    text = json.dumps(others | {where: others.get(where, {}) | known}, indent=1)
    new = _file().with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):  # a folder that cannot be written costs the next process its measurements
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text)
        new.replace(_file())
