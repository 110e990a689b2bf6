"""How benchmarks.gpu measures: the candidates of a case are checked, then timed in turns.

roofline        a copy on the device of as many bytes as the case must move: it reads half and writes half
kdfast cuda     kd_loss and backward on the CUDA kernels, a fresh gradient; forward_kl, whose value is the recipe's
  ... inplace   the gradient overwrites the logits
  ... graph     the first as a CUDA graph that is replayed, without the host's time, where the case asks for it
kdfast triton   the same on the Triton kernels
eager           the recipe of candidates.py, in the logits' own dtype
torch.compile   the recipe compiled
liger           the recipe with Liger-Kernel's divergence: softmaxes and hard term stay PyTorch's
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from benchmarks import candidates
from benchmarks.cases import Workload
from benchmarks.gpu_cases import Case
from benchmarks.gpu_device import Gpu, Host
from benchmarks.gpu_report import Row
from benchmarks.timing import Candidate
from benchmarks.worker import TOLERANCE

KDFAST = {  # the backend by name, so that no other one takes the call
    "kdfast cuda": "cuda",
    "kdfast cuda inplace": "cuda",
    "kdfast cuda graph": "cuda",
    "kdfast triton": "triton",
    "kdfast triton inplace": "triton",
    "kdfast triton graph": "triton",
}
NAMES = ("roofline", *KDFAST, "eager", "torch.compile", "liger")
WARM_UP = 3
CHECKED_ROWS = 16  # gradients of these are compared; the loss of all rows
_CHUNK = 1 << 22  # logits in fp64 at a time


class Data(candidates.Data):
    """The tensors of a workload, made on the device."""

    def __init__(self, workload: Workload, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (workload.rows, workload.vocab)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[workload.dtype]
        logits = [torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(3) for _ in range(2)]
        self.temperature = workload.temperature
        self.student, self.teacher = logits  # (rows, vocab)
        self.labels = torch.randint(workload.vocab, shape[:1], generator=generator, device=device)  # (rows,)
        self._spare = {}


def liger(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    log_q = F.log_softmax(student / temperature, dim=-1)
    p = F.softmax(teacher / temperature, dim=-1)
    soft = LigerKLDIVLoss(reduction="batchmean")(log_q, p) * temperature**2
    return candidates.ALPHA * soft + (1 - candidates.ALPHA) * F.cross_entropy(student, labels)


def _copy(nbytes: int, device: str) -> Candidate:
    """Reads and writes `nbytes` in all. Its arrays are freed after each call, to leave memory for the peers."""

    def prepare() -> list[Tensor]:
        return [torch.empty(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(2)]

    return Candidate(prepare, lambda pair: pair[0].copy_(pair[1]))


def _captured(student: Tensor, train: Callable[[Tensor], Tensor]) -> Candidate:
    """The replay of a CUDA graph of `train`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(student)  # the first call compiles and loads, which a capture does not allow
    torch.cuda.current_stream().wait_stream(side)
    student.grad = None  # the graph has memory of its own for it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train(student)

    def replay(_: Tensor) -> Tensor:
        graph.replay()
        return loss

    return Candidate(lambda: student, replay)


def _candidate(name: str, case: Case, data: Data) -> Candidate:
    if name == "roofline":
        return _copy(case.nbytes, data.student.device.type)
    inplace = name.endswith("inplace")
    loss: Callable[..., Tensor] = liger if name == "liger" else candidates.recipe
    if backend := KDFAST.get(name):
        loss = partial(
            kdfast.kd_loss, alpha=candidates.ALPHA, divergence="forward_kl", inplace=inplace, backend=backend
        )
    if name == "torch.compile":
        loss = torch.compile(loss, dynamic=False)
    args = {"teacher": data.teacher, "labels": data.labels, "temperature": data.temperature}

    def train(student: Tensor) -> Tensor:
        value = loss(student, **args)
        value.backward()
        return value.detach()

    if name.endswith("graph"):
        return _captured(data.leaf(), train)
    if not case.with_grad:
        return Candidate(lambda: data.student, torch.no_grad()(lambda student: loss(student, **args)))
    return Candidate(data.non_leaf if inplace else data.leaf, train)


def _why_not(name: str, is_dry: bool) -> str:
    """Why a candidate cannot run here; empty where it can."""
    if backend := KDFAST.get(name):
        if backend == "cuda" and (is_dry or torch.version.cuda is None):
            return "left out: needs an NVIDIA GPU"
        if is_dry and name.endswith("graph"):
            return "left out: needs a GPU"
        return kdfast.backends()[backend]["why_not"] or ""
    if is_dry:
        return {"torch.compile": "left out: would compile for the CPU", "liger": "left out: needs a GPU"}.get(name, "")
    is_there = name != "liger" or importlib.util.find_spec("liger_kernel")
    return "" if is_there else "left out: liger-kernel is not installed"


class _Truth:
    """The recipe in fp64: its value over all rows, its gradient for some of them."""

    def __init__(self, data: Data) -> None:
        count, vocab = data.student.shape
        chunks = (x.split(max(1, _CHUNK // vocab)) for x in (data.student, data.teacher, data.labels))
        self.loss = 0.0
        for s, t, y in zip(*chunks, strict=True):
            value = candidates.recipe(s.double(), t.double(), y, data.temperature)
            self.loss += float(value) * len(s) / count
        self.rows = torch.linspace(0, count - 1, min(CHECKED_ROWS, count)).long().to(data.student.device)
        s, t, y = (x[self.rows] for x in (data.student, data.teacher, data.labels))
        s = s.double().requires_grad_()
        (grad,) = torch.autograd.grad(candidates.recipe(s, t.double(), y, data.temperature), s)
        self.grad = grad * (len(self.rows) / count)  # (rows, vocab), of the mean over all rows

    def check(self, row: Row, candidate: Candidate) -> None:
        """Sets the errors of the loss, and of the gradient relative to each row's largest entry."""
        student = candidate.prepare()
        loss = abs(float(candidate.run(student)) - self.loss) / abs(self.loss)
        gradient = 0.0
        if row.case.with_grad:
            found = student.grad if student.is_leaf else student.detach()  # in-place: the logits are overwritten
            off = (found[self.rows].double() - self.grad).abs().amax(-1) / self.grad.abs().amax(-1)
            gradient = float(off.max())
        row.errors = loss, gradient
        tolerance = TOLERANCE[row.case.workload.dtype]
        if not (loss < tolerance and gradient < tolerance):  # also if one is NaN
            row.note = f"WRONG: loss off by {loss:.1e}, gradient by {gradient:.1e}"


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU


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
            row.note, row.samples, row.peak, row.host = note, [], None, None
        _free_memory()  # here the exception no longer keeps its frames' tensors alive


def measure(case: Case, device: Gpu | Host, repeats: int, title: str) -> list[Row]:
    """The rows of a case. Every repeat shuffles the candidates, so that a changing clock favours none."""
    say = partial(print, f"{title}:", file=sys.stderr, flush=True)
    wanted = {"inplace": case.with_grad, "graph": case.graph}
    names = [name for name in NAMES if wanted.get(name.split()[-1], True)]
    rows = {name: Row(case, name, note=_why_not(name, device.name == "cpu")) for name in names}
    ready = {}
    torch.compiler.reset()  # it stops compiling after some shapes
    _free_memory()
    with _note_failures(*(row for row in rows.values() if not row.note)):
        say("logits and the truth")
        data = Data(case.workload, device.name)
        truth = _Truth(data)
        for name, row in rows.items():
            if row.note:
                continue
            say(name)
            with _note_failures(row):
                candidate = _candidate(name, case, data)
                if name != "roofline":
                    truth.check(row, candidate)
                for _ in range(WARM_UP):
                    device.milliseconds(candidate)
                row.peak = None if name == "roofline" else device.peak(candidate)
                row.host = device.host_microseconds(candidate)
                ready[name] = candidate
        say(f"{repeats} repeats")
        order = random.Random(0)
        for _ in range(repeats):
            for name in order.sample(list(ready), len(ready)):
                with _note_failures(rows[name]):
                    rows[name].samples.append(device.milliseconds(ready[name]))
                if not rows[name].samples:
                    del ready[name]
    state = device.state()  # the clocks are still those of the last repeat
    for row in rows.values():
        row.state = state
    return list(rows.values())
