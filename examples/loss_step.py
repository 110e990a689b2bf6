"""What one step of a distillation loss costs at a vocabulary's size: its time, and the memory that it takes.

Loss and gradient, fp32, T = 2, alpha = 0.9 with labels: kdfast beside the usual recipe in plain PyTorch and beside
torch.compile of it. Times are medians of interleaved steps. Memory is measured in a fresh process for each of them: how
far one step, after another to warm up, raises the process's resident memory at its peak (Linux counts it), gradient
included. The logits of student and teacher are there before and do not count.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import peak_of
from torch import Tensor

import kdfast

TEMPERATURE, ALPHA = 2.0, 0.9


def recipe(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Distillation as it is usually written."""
    log_q = F.log_softmax(student / TEMPERATURE, dim=-1)
    p = F.softmax(teacher / TEMPERATURE, dim=-1)
    soft = F.kl_div(log_q, p, reduction="batchmean")
    hard = F.cross_entropy(student, labels)
    return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "PyTorch": recipe,
    "torch.compile": torch.compile(recipe),
    "kdfast": kdfast.KDLoss(temperature=TEMPERATURE, alpha=ALPHA),
    "kdfast, inplace=True": kdfast.KDLoss(temperature=TEMPERATURE, alpha=ALPHA, inplace=True),
}


class Network(torch.autograd.Function):
    """Stands for the student: gives out its logits, which are not a leaf then, and takes their gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class Batch:
    """Logits and labels on which steps run."""

    def __init__(self, rows: int, vocab: int):
        torch.manual_seed(0)
        self.original, self.teacher = 3 * torch.randn(rows, vocab), 3 * torch.randn(rows, vocab)
        self.student, self.labels = self.original.clone(), torch.randint(vocab, (rows,))
        self.weight = torch.zeros((), requires_grad=True)

    def step(self, loss: Loss) -> float:
        """Loss and gradient, as one step of training needs them; seconds."""
        self.student.copy_(self.original)  # inplace=True has left its gradient there
        start = time.perf_counter()
        loss(Network.apply(self.weight, self.student), self.teacher, self.labels).backward()
        return time.perf_counter() - start

    def medians(
        self, losses: dict[str, Loss], repeats: int, on_step: Callable[[], object] = lambda: None
    ) -> dict[str, float]:
        """Seconds of a step of each loss, which has run before. on_step is called once per repeat."""
        seconds: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(repeats):
            for name, loss in losses.items():
                seconds[name].append(self.step(loss))
            on_step()
        return {name: statistics.median(values) for name, values in seconds.items()}


class Cost(NamedTuple):
    seconds: float | None  # None: it cannot run here
    megabytes: float | None  # None: not known
    note: str = ""  # why not


def costs(
    rows: int, vocab: int, repeats: int, without: tuple[str, ...] = (), on_step: Callable[[], object] = lambda: None
) -> dict[str, Cost]:
    """For each of LOSSES. on_step is called repeats + 2 * len(LOSSES) times."""
    batch, able, found = Batch(rows, vocab), {}, {}
    for name, loss in LOSSES.items():
        try:
            if name in without:
                raise RuntimeError("left out")
            batch.step(loss)  # compiles, loads, warms up
            able[name] = loss
        except Exception as error:  # torch.compile needs a C++ compiler, and has several ways to say that there is none
            found[name] = Cost(None, None, _brief(str(error).strip().splitlines()[0]))
        on_step()
    seconds = batch.medians(able, repeats, on_step)
    for name in LOSSES:
        if name in able:
            command = [sys.executable, __file__, name, str(rows), str(vocab)]
            child = subprocess.run(command, capture_output=True, text=True)
            memory = int(child.stdout) / 1e6 if child.returncode == 0 else None
            note = "" if child.returncode == 0 else _brief(child.stderr.strip().splitlines()[-1])
            found[name] = Cost(seconds[name], memory, note)
        on_step()
    return {name: found[name] for name in LOSSES}


def _brief(message: str) -> str:
    return message if len(message) <= 90 else message[:89] + "…"


def _print_peak_memory(name: str, rows: int, vocab: int) -> None:
    """The bytes that a step adds to this process at its peak."""
    batch = Batch(rows, vocab)
    batch.step(LOSSES[name])
    batch.student.copy_(batch.original)
    print(peak_of(lambda: batch.step(LOSSES[name])))


if __name__ == "__main__":
    _print_peak_memory(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
