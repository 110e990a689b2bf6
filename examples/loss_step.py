"""Time and memory of one step of a distillation loss at a vocabulary's size.

Loss and gradient, fp32, T = 2, alpha = 0.9 with labels: kdfast, the usual recipe in plain PyTorch, and torch.compile of
it. Times are medians of interleaved steps. Memory is measured in a fresh process for each loss: by how much one step,
after a warm-up, raises the peak of resident memory (Linux), gradient included, the logits of student and teacher not.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import peak_memory
from torch import Tensor

import kdfast

TEMPERATURE, ALPHA = 2.0, 0.9


def recipe(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The usual recipe."""
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
    """Replaces the student: returns its logits as a non-leaf, and accepts their gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


class Batch:
    """The logits and labels of a step."""

    def __init__(self, rows: int, vocab: int):
        torch.manual_seed(0)
        self.original, self.teacher = 3 * torch.randn(rows, vocab), 3 * torch.randn(rows, vocab)
        self.student, self.labels = self.original.clone(), torch.randint(vocab, (rows,))
        self.weight = torch.zeros((), requires_grad=True)

    def step(self, loss: Loss) -> float:
        """Seconds of loss and gradient."""
        self.student.copy_(self.original)  # inplace=True has left its gradient there
        start = time.perf_counter()
        loss(Network.apply(self.weight, self.student), self.teacher, self.labels).backward()
        return time.perf_counter() - start

    def medians(
        self, losses: dict[str, Loss], repeats: int, on_step: Callable[[], object] = lambda: None
    ) -> dict[str, float]:
        """Median seconds of a step of each loss, which has warmed up. on_step is called once per repeat."""
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
    """The cost of each of LOSSES. on_step is called repeats + 2 * len(LOSSES) times."""
    batch, able, found = Batch(rows, vocab), {}, {}
    for name, loss in LOSSES.items():
        try:
            if name in without:
                raise RuntimeError("left out")
            batch.step(loss)  # compiles, loads, warms up
            able[name] = loss
        except Exception as error:  # torch.compile without a C++ compiler raises several kinds
            found[name] = Cost(None, None, _shorten(str(error).strip().splitlines()[0]))
        on_step()
    seconds = batch.medians(able, repeats, on_step)
    for name in LOSSES:
        if name in able:
            command = [sys.executable, __file__, name, str(rows), str(vocab)]
            child = subprocess.run(command, capture_output=True, text=True)
            memory = int(child.stdout) / 1e6 if child.returncode == 0 else None
            note = "" if child.returncode == 0 else _shorten(child.stderr.strip().splitlines()[-1])
            found[name] = Cost(seconds[name], memory, note)
        on_step()
    return {name: found[name] for name in LOSSES}


def _shorten(message: str) -> str:
    return message if len(message) <= 90 else message[:89] + "…"


def _print_peak_memory(name: str, rows: int, vocab: int) -> None:
    """Prints the bytes by which a step raises this process's peak."""
    batch = Batch(rows, vocab)
    batch.step(LOSSES[name])
    batch.student.copy_(batch.original)
    print(peak_memory(lambda: batch.step(LOSSES[name])))


if __name__ == "__main__":
    _print_peak_memory(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
