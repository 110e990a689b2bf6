"""How a workload is measured: its candidates are checked, then timed in turns."""

import contextlib
import gc
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks import timing
from benchmarks.candidates import Data, candidate, why_not
from benchmarks.cases import Workload
from benchmarks.devices import Cpu
from benchmarks.recipes import family_recipe
from benchmarks.timing import Candidate

TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # relative to the largest entry; coarse: tests check the numbers
WARM_UP = 2  # calls, besides the check
CHECKED_ROWS = 16  # gradients of these are compared; the loss of all rows
_CHUNK = 1 << 22  # logits in fp64 at a time


@dataclass
class Row:
    """One candidate on one workload."""

    samples: list[float] = field(default_factory=list)  # seconds
    peak: int | None = None  # bytes beyond the inputs
    host: float | None = None  # seconds of the host
    errors: list[float] = field(default_factory=list)  # of the loss and the gradient, relative
    note: str = ""  # why there are no samples, or why they mean nothing


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


class _Truth:
    """The loss of a divergence in fp64: its value over all rows, its gradient for some of them."""

    def __init__(self, data: Data, divergence: str) -> None:
        recipe, (count, vocab) = family_recipe(divergence), data.student.shape
        chunks = (x.split(max(1, _CHUNK // vocab)) for x in (data.student, data.teacher, data.labels))
        self.loss = 0.0
        for s, t, y in zip(*chunks, strict=True):
            self.loss += float(recipe(s.double(), t.double(), y, data.temperature)) * len(s) / count
        self.rows = torch.linspace(0, count - 1, min(CHECKED_ROWS, count)).long().to(data.student.device)
        s, t, y = (x[self.rows] for x in (data.student, data.teacher, data.labels))
        s = s.double().requires_grad_()
        (grad,) = torch.autograd.grad(recipe(s, t.double(), y, data.temperature), s)
        self.grad = grad * (len(self.rows) / count)  # (rows, vocab), of the mean over all rows

    def errors(self, candidate: Candidate) -> list[float]:
        """The errors of the loss, and of the gradient relative to each row's largest entry."""
        student = candidate.prepare()
        errors = [abs(float(candidate.run(student)) - self.loss) / abs(self.loss)]
        if student is not None:
            found = student.grad if student.is_leaf else student.detach()  # in-place: the logits are overwritten
            off = (found[self.rows].double() - self.grad).abs().amax(-1) / self.grad.abs().amax(-1)
            errors.append(float(off.max()))
        return errors


@contextlib.contextmanager
def _note_failures(*rows: Row) -> Iterator[None]:
    """An exception becomes the rows' note; other candidates continue."""
    note = ""
    try:
        yield
    except torch.OutOfMemoryError:
        note = "out of memory"
    except Exception as error:
        traceback.print_exc()
        note = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    if note:
        for row in rows:
            row.__dict__ |= asdict(Row(note=note, errors=row.errors))
        gc.collect()  # here the exception no longer keeps its frames' tensors alive
        torch.cuda.empty_cache()  # does nothing where there is no GPU


def measure(workload: Workload, names: list[str], device: Cpu, rounds: int, title: str) -> dict[str, Any]:
    """The candidates of one workload: checked, then timed in turns."""
    say, before = _Progress(title), device.state()
    rows = {name: Row(note=why_not(name, device.name)) for name in names}
    ready: dict[str, Candidate] = {}
    slow: set[str] = set()
    truths: dict[str, _Truth] = {}
    with _note_failures(*(row for row in rows.values() if not row.note)):
        say("making logits")
        data = Data(workload, device.tensors)
        for name, row in rows.items():
            if row.note:
                continue
            say(f"checking and warming up {name}")
            with _note_failures(row):
                found = candidate(name, data)
                if key := found.divergence:
                    truths[key] = truths.get(key) or _Truth(data, key)
                    row.errors = truths[key].errors(found)
                    if not all(error < TOLERANCE[workload.dtype] for error in row.errors):  # also if one is NaN
                        row.note = "WRONG: off by " + ", ".join(f"{error:.1e}" for error in row.errors)
                for _ in range(WARM_UP):
                    seconds = device.seconds(found, workload)
                slow |= {name} if seconds > timing.SLOW else set()
                row.peak, row.host = device.peak(found), device.host(found)
                ready[name] = found
        for name in timing.turns(list(ready), slow, rounds):
            if name in ready:
                say(f"{name}, {len(rows[name].samples) + 1} of {rounds}")
                with _note_failures(rows[name]):
                    rows[name].samples.append(device.seconds(ready[name], workload))
                if not rows[name].samples:
                    del ready[name]
    say("done", last=True)
    return {
        "rows": {name: asdict(row) for name, row in rows.items()},
        "states": [before, device.state()],  # the clocks are still those of the last call
        "facts": device.facts(),
    }
