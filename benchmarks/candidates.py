"""The candidates, all on the same logits: calls of kdfast, the memory floors, and the peers.

kdfast
    kdfast          kd_loss and backward, the default call: a fresh gradient for a leaf
    kdfast inplace  with inplace=True: the gradient overwrites the logits
    1, 2 threads    the same with this number of threads
    kdfast forward  kd_loss under no_grad
    kdfast softmax  tempered_softmax under no_grad
    jsd inplace     kdfast inplace with that divergence; the same for the others
    with metrics    kdfast inplace with that option; the same for the others of OPTIONS
floors
    floor kept      reads both logits and writes a third array, always the same one
    floor fresh     writes one that each call allocates
    floor reads     reads both logits
peers
    eager           the usual recipe, in the logits' own dtype: the yardstick for bf16 too
    eager jsd       the recipe with that divergence; the same for the others
    eager in fp32   the recipe on logits.float()
    eager forward   the recipe under no_grad
    eager softmax   torch.softmax(logits / T)
    torch.compile   the recipe compiled
    liger           Liger-Kernel's chunked loss without the head, compiled as Liger compiles it; its other losses
                    need Triton and do not run on a CPU
    trl             TRL's generalized_jsd_loss for beta = 0, without a hard term
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from benchmarks import floor
from benchmarks.cases import Workload
from benchmarks.timing import Candidate
from kdfast.divergences import names

ALPHA = 0.9
LIGER_CHUNK = 1024  # rows, Liger's default

OPTIONS: dict[str, dict[str, Any]] = {
    "metrics": {"return_metrics": True},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-4},  # PaLM's
    "softcap": {"softcap": 30.0},  # Gemma 2's
    "both softcaps": {"softcap": 30.0, "teacher_softcap": 30.0},
    "standardize": {"standardize": True},
}


class Data:
    """The tensors of a workload: at most four arrays of the logits' size."""

    def __init__(self, workload: Workload) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (workload.rows, workload.vocab)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[workload.dtype]
        self.temperature = workload.temperature
        self.student = (3.0 * torch.randn(shape, generator=generator)).to(dtype)  # (rows, vocab)
        self.teacher = (3.0 * torch.randn(shape, generator=generator)).to(dtype)  # (rows, vocab)
        self.labels = torch.randint(workload.vocab, shape[:1], generator=generator)  # (rows,)
        self._spare: dict[str, Tensor] = {}

    def spare(self, use: str) -> Tensor:
        """An array of the student's size whose pages are mapped; made at its first use."""
        if use not in self._spare:
            self._spare[use] = self.student.clone()
        return self._spare[use]

    def leaf(self) -> Tensor:
        """The student as a leaf without a gradient."""
        return self.student.detach().requires_grad_()

    def non_leaf(self) -> Tensor:
        """A copy of the student as the output of a layer: inplace=True does not accept a leaf."""
        logits = self.spare("inplace").copy_(self.student).detach()
        return _Layer.apply(torch.zeros((), requires_grad=True), logits)


class _Layer(torch.autograd.Function):
    """Makes logits a non-leaf without copying them."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


def recipe(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Six lines of PyTorch. The gradient is kd_loss's, the value less by the teacher's entropy."""
    log_q = F.log_softmax(student / temperature, dim=-1)
    p = F.softmax(teacher / temperature, dim=-1)
    soft = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
    hard = F.cross_entropy(student, labels)
    return ALPHA * soft + (1 - ALPHA) * hard


def soft_terms(divergence: str, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T^2 * D of each row by its formula, at the default beta."""
    if divergence == "logit_mse":
        difference = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
        return difference.square().mean(-1) / 2
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    p, q = log_p.exp(), log_q.exp()

    def kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        return (a * (log_a - log_b)).sum(-1)

    beta = 0.1 if divergence.startswith("skew") else 0.5
    terms: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": lambda: -(p * log_q).sum(-1),
        "forward_kl": lambda: kl(p, log_p, log_q),
        "reverse_kl": lambda: kl(q, log_q, log_p),
        "symmetric_kl": lambda: beta * kl(p, log_p, log_q) + (1 - beta) * kl(q, log_q, log_p),
        "jsd": lambda: _jsd(p, q, log_p, log_q, (beta * p + (1 - beta) * q).log(), beta),
        "skew_forward_kl": lambda: kl(p, log_p, (beta * p + (1 - beta) * q).log()),
        "skew_reverse_kl": lambda: kl(q, log_q, (beta * q + (1 - beta) * p).log()),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
        "hellinger": lambda: 1 - ((log_p + log_q) / 2).exp().sum(-1),
        "dkd": lambda: _dkd(student / temperature, teacher / temperature, labels),
    }
    return temperature**2 * terms[divergence]()


def _dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Decoupled KD with its published weights, as its authors wrote it: a softmax with the label masked."""
    label = F.one_hot(labels, student.shape[-1]).bool()
    parts = []
    for z in (student, teacher):
        p = (F.softmax(z, dim=-1) * label).sum(-1)
        parts.append((torch.stack([p, 1 - p], -1), F.log_softmax(z - 1000.0 * label, dim=-1)))
    (binary_q, log_q), (binary_p, log_p) = parts
    target = F.kl_div(binary_q.log(), binary_p, reduction="none").sum(-1)
    return target + 8.0 * F.kl_div(log_q, log_p.exp(), reduction="none").sum(-1)


def _jsd(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, log_m: Tensor, beta: float) -> Tensor:
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)


def trl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """generalized_jsd_loss (1.16) for beta = 0, which is forward KL, of the rows whose label is not -100."""
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    kept = labels != -100
    return terms[kept].sum() / kept.sum()


def family_recipe(divergence: str) -> Callable[..., Tensor]:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        soft = soft_terms(divergence, student, teacher, labels, temperature).mean()
        return ALPHA * soft + (1 - ALPHA) * F.cross_entropy(student, labels)

    return loss


def recipe_in_fp32(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return recipe(student.float(), teacher.float(), labels, temperature)


def _liger_chunk(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, rows: int) -> Tensor:
    """LigerFusedLinearJSDLoss (0.8.5) without the head, for beta = 0, which is forward KL."""
    log_q1 = F.log_softmax(student.float(), dim=-1)
    hard = F.nll_loss(log_q1, labels, reduction="sum")
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    soft = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1).sum()
    return (ALPHA * soft + (1 - ALPHA) * hard) / rows


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at the first use: the compiler alone takes seconds to import."""
    return torch.compile(function, dynamic=False)


@functools.cache
def _liger_grad() -> Callable[..., Any]:
    return _compiled(torch.func.grad_and_value(_liger_chunk))


def liger(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> list[Tensor]:
    """The gradient, chunk by chunk, computed in forward as in Liger."""
    chunks = zip(*(x.split(LIGER_CHUNK) for x in (student, teacher, labels)), strict=True)
    return [_liger_grad()(s, t, y, temperature, len(labels))[0] for s, t, y in chunks]


def kd_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, **kwargs: Any) -> Tensor:
    return kdfast.kd_loss(student, teacher, labels, temperature=temperature, alpha=ALPHA, **kwargs)


def _trained(data: Data, loss: Callable[..., Tensor]) -> Candidate:
    """Loss and gradient for a leaf."""
    return Candidate(data.leaf, lambda s: loss(s, data.teacher, data.labels, data.temperature).backward())


def _inplace(data: Data, threads: int | None = None, **options: Any) -> Candidate:
    def run(student: Tensor) -> None:
        arguments = student, data.teacher, data.labels, data.temperature
        loss = kd_loss(*arguments, inplace=True, **options)
        (loss[0] if "return_metrics" in options else loss).backward()

    return Candidate(data.non_leaf, run, threads)


def _forward(function: Callable[..., Any], *args: Any) -> Candidate:
    """The value alone, under no_grad."""
    without_grad = torch.no_grad()(function)
    return Candidate(lambda: None, lambda _: without_grad(*args))


def candidate(name: str, data: Data) -> Candidate:
    """The candidate of this name; the top of this file lists them."""
    student, teacher, labels, temperature = data.student, data.teacher, data.labels, data.temperature
    makers: dict[str, Callable[[], Candidate]] = {
        "kdfast": lambda: _trained(data, kd_loss),
        "kdfast inplace": lambda: _inplace(data),
        "1 thread": lambda: _inplace(data, threads=1),
        "2 threads": lambda: _inplace(data, threads=2),
        "kdfast forward": lambda: _forward(kd_loss, student, teacher, labels, temperature),
        "kdfast softmax": lambda: _forward(kdfast.tempered_softmax, student, temperature),
        "floor kept": lambda: Candidate(
            lambda: data.spare("floor"), lambda out: floor.read_write(student, teacher, out)
        ),
        "floor fresh": lambda: Candidate(
            lambda: None, lambda _: floor.read_write(student, teacher, torch.empty_like(student))
        ),
        "floor reads": lambda: _forward(floor.read_only, student, teacher),
        "eager": lambda: _trained(data, recipe),
        "eager in fp32": lambda: _trained(data, recipe_in_fp32),
        "eager forward": lambda: _forward(recipe, student, teacher, labels, temperature),
        "eager softmax": lambda: _forward(lambda: torch.softmax(student / temperature, dim=-1)),
        "torch.compile": lambda: _trained(data, _compiled(recipe)),
        "trl": lambda: _trained(data, trl),
        "liger": lambda: Candidate(lambda: None, lambda _: liger(student, teacher, labels, temperature)),
    }
    for divergence in names():
        makers[f"{divergence} inplace"] = lambda d=divergence: _inplace(data, divergence=d)
        makers[f"eager {divergence}"] = lambda d=divergence: _trained(data, family_recipe(d))
    for option, settings in OPTIONS.items():
        makers[f"with {option}"] = lambda settings=settings: _inplace(data, **settings)
    makers["with weights"] = lambda: _inplace(data, row_weight=torch.rand(len(data.labels)) + 0.5)
    return makers[name]()


def gradient_error(data: Data, rows: int = 16) -> float:
    """The error of kdfast's gradient against the recipe in fp64, relative to the largest entry."""
    args = data.teacher[:rows], data.labels[:rows]
    student = data.student[:rows].clone().requires_grad_()
    kd_loss(student, *args, data.temperature).backward()
    truth = data.student[:rows].double().requires_grad_()
    recipe(truth, args[0].double(), args[1], data.temperature).backward()
    assert student.grad is not None
    assert truth.grad is not None
    return float((student.grad - truth.grad).abs().max() / truth.grad.abs().max())
