"""A loss, the same in plain PyTorch, and what torch.func and forward-mode AD make of a call."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from cases import F64
from torch import Tensor, func
from torch.autograd import forward_ad

from kdfast import kd_loss, linear_kd_loss

ROWS, VOCAB, HIDDEN, T = 4, 7, 3, 2.0
TWICE = "differentiable once"
VMAP = r"do not support torch\.vmap"


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator("cpu").manual_seed(shape[0]), device="cpu")


STUDENT, TEACHER, TANGENT = numbers(3 * ROWS, VOCAB).split(ROWS)
LABELS = torch.tensor([0, 3, -100, 6])
HEADS = (numbers(ROWS, HIDDEN), numbers(VOCAB, HIDDEN), numbers(VOCAB))  # hidden states, weight, bias
HEAD_TANGENTS = tuple(x.flip(0) for x in HEADS)


def plain(student: Tensor, reduction: str) -> Tensor:
    """The loss of these tests in plain PyTorch."""
    soft = -T * T * (F.softmax(TEACHER / T, -1) * F.log_softmax(student / T, -1)).sum(-1)
    rows = 0.9 * soft + 0.1 * F.cross_entropy(student, LABELS, reduction="none")
    rows = torch.where(LABELS == -100, 0, rows)
    return rows if reduction == "none" else rows.sum() / 3


def kd(reduction: str, backend: str | None = None, **settings: Any) -> Callable[[Tensor], Tensor]:
    return lambda s: kd_loss(
        s, TEACHER.to(s.dtype), LABELS, temperature=T, reduction=reduction, backend=backend, **settings
    )


def linear(reduction: str, backend: str | None = None) -> Callable[..., Tensor]:
    settings = {"temperature": T, "reduction": reduction, "backend": backend, "chunk_rows": 3}
    return lambda hidden, weight, bias: linear_kd_loss(
        hidden, weight, TEACHER, None, LABELS, student_bias=bias, **settings
    )


def plain_linear(reduction: str) -> Callable[..., Tensor]:
    return lambda hidden, weight, bias: plain(hidden @ weight.T + bias, reduction)


def summed(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: call(*args).sum()


def dual(call: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(call(*map(forward_ad.make_dual, primals, tangents))))


# name: what is made of a call, its arguments and their tangents
REVERSE: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x, v: func.grad(summed(f), tuple(range(len(x))))(*x),
    "grad_and_value": lambda f, x, v: func.grad_and_value(summed(f))(*x),
    "vjp": lambda f, x, v: func.vjp(f, *x)[1](3 * torch.ones_like(f(*x))),
}
FORWARD: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, x, v: func.jvp(f, x, v),
    "jacfwd": lambda f, x, v: func.jacfwd(f)(*x),
    "linearize": lambda f, x, v: func.linearize(f, *x)[1](*v),
    "dual_level": dual,
}
