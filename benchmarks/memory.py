"""What a call adds to this process's memory at its peak, on Linux."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any


def resident(field: str) -> int:
    """VmRSS, which is now, or VmHWM, the peak, in bytes."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(field))


def added(function: Callable[[], Any]) -> int:
    """The bytes that the call adds, with what it returns."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = resident("VmRSS")
    returned = function()
    del returned
    return resident("VmHWM") - before


def printed_by(module: str, *arguments: object) -> int:
    """The number that a module prints in a process of its own."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
