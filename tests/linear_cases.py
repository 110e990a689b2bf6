"""What the tests of the linear losses share, and how they judge.

The truth is F.linear and the reference in fp64. The error may be twice that of plain PyTorch in fp32 plus a few ulp of
the largest number, and half an ulp more for 16-bit gradients, which are rounded once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64, to_default_device
from judge import half_ulp, one_thread
from torch import Tensor

import kdfast

ROWS, HIDDEN, TEACHER_HIDDEN, VOCAB = 13, 8, 12, 50


class Case:
    """Hidden states, heads and labels, one of them ignored; the teacher has another width."""

    def __init__(self, dtype: torch.dtype = F32, rows: int = ROWS, vocab: int = VOCAB, bias: bool = True) -> None:
        made = {"generator": torch.Generator("cpu").manual_seed(rows * 1000 + vocab), "dtype": F64, "device": "cpu"}
        self.hidden = torch.randn(rows, HIDDEN, **made)
        self.weight = 0.7 * torch.randn(vocab, HIDDEN, **made)  # logits of standard deviation 2
        self.bias = torch.randn(vocab, **made) if bias else None
        self.teacher_hidden = torch.randn(rows, TEACHER_HIDDEN, **made)
        self.teacher_weight = 0.6 * torch.randn(vocab, TEACHER_HIDDEN, **made)
        for field, value in vars(self).items():
            setattr(self, field, to_default_device(value if value is None else value.to(dtype)))
        labels = torch.randint(vocab, (rows,), generator=made["generator"], device="cpu")
        labels[rows // 3] = -100
        self.labels, self.teacher_bias = to_default_device(labels), None

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        student = (self.hidden, self.weight, self.bias)
        return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in student if x is not None]

    def teacher_logits(self, dtype: torch.dtype | None = None) -> Tensor:
        head = (self.teacher_hidden, self.teacher_weight, self.teacher_bias)
        return F.linear(*(x if x is None else x.to(dtype or x.dtype) for x in head))

    def loss(self, leaves: list[Tensor], labels: Tensor | None, teacher: Any = None, **settings: Any) -> Any:
        """The fused loss of what `leaves` returns; by default with the teacher's hidden states and head."""
        settings["student_bias"] = leaves[2] if len(leaves) > 2 else None
        if teacher is not None:
            return kdfast.linear_kd_loss(*leaves[:2], teacher, None, labels, **settings)
        head = self.teacher_hidden, self.teacher_weight
        return kdfast.linear_kd_loss(*leaves[:2], *head, labels, teacher_bias=self.teacher_bias, **settings)


Results = tuple[Tensor, list[Tensor], Any]


def fused_results(
    case: Case, labels: Tensor | None, teacher: Any = None, grad: Tensor | None = None, **settings: Any
) -> Results:
    """Loss, gradients in hidden states, weight and bias, and metrics."""
    leaves = case.leaves()
    return results_of(case.loss(leaves, labels, teacher, **settings), leaves, grad)


def plain_results(
    case: Case,
    labels: Tensor | None,
    dtype: torch.dtype,
    teacher: Any = None,
    grad: Tensor | None = None,
    **settings: Any,
) -> Results:
    """The same by F.linear and the reference, in that dtype."""
    leaves = case.leaves(dtype)
    settings = {k: v for k, v in settings.items() if k not in ("chunk_rows", "accumulate_dtype")}
    settings["backend"] = "reference"
    teacher = case.teacher_logits(dtype) if teacher is None else teacher
    loss = kdfast.kd_loss(F.linear(*leaves), teacher, labels, **settings)
    return results_of(loss, leaves, grad)


def results_of(loss: Any, leaves: list[Tensor], grad: Tensor | None) -> Results:
    loss, metrics = loss if isinstance(loss, tuple) else (loss, ())
    if grad is None and loss.dim():  # row losses: factors of both signs
        grad = torch.linspace(-1, 2, loss.numel()).view(loss.shape)
    loss.backward(grad if grad is None else grad.to(loss.dtype))
    return loss.detach(), [x.grad for x in leaves], metrics


def check(case: Case, labels: Tensor | None, teacher: Any = None, **settings: Any) -> Results:
    """Computes the fused results and judges them."""
    got = fused_results(case, labels, teacher, **settings)
    kind = F64 if case.hidden.dtype == F64 else F32
    with one_thread():
        truth = plain_results(case, labels, F64, teacher, **settings)
        eager = truth if kind == F64 else plain_results(case, labels, kind, teacher, **settings)
    assert got[0].dtype == kind
    judge("loss", got[0], truth[0], eager[0], kind)
    for i, what in enumerate(("hidden", "weight", "bias")[: len(got[1])]):
        assert got[1][i].dtype == case.hidden.dtype
        judge(f"gradient in {what}", got[1][i], truth[1][i], eager[1][i], kind)
    for i, metric in enumerate(got[2]):
        if metric is None:  # of a sparse teacher alone
            continue
        judge(f"metric {i}", metric, truth[2][i], eager[2][i], kind)
    return got


def judge(what: str, got: Tensor, truth: Tensor, eager: Tensor, kind: torch.dtype) -> None:
    size = truth.abs().nan_to_num(0).max() if truth.numel() else 0.0
    allowed = 2 * (eager.double() - truth).abs().nan_to_num(0).amax() if truth.numel() else 0.0
    allowed = allowed + 16 * torch.finfo(kind).eps * size + torch.zeros_like(truth)
    if got.dtype in (BF16, F16):
        allowed = allowed + half_ulp(truth, got.dtype)
    missed = (got.double() - truth).abs()
    assert got.shape == truth.shape, what
    assert ((missed <= allowed) | (got.isnan() & truth.isnan())).all(), f"{what}: off by {missed.max():.3g}"


def square_case(dtype: torch.dtype = F32) -> Case:
    """A case whose teacher is as wide as its student, so that all products are of one size."""
    case = Case(dtype, rows=12, bias=False)
    case.teacher_hidden, case.teacher_weight = case.hidden.flip(0), case.weight.flip(0)
    case.labels = case.labels % VOCAB  # none ignored
    return case


def relative_error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())
