"""Sparse teachers for the tests, and their losses written out row by row, without any code of kdfast."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DIVERGENCES, F64, ON_GPU, batch
from torch import Tensor

from kdfast import TopKTargets, kd_loss

FORMS = ("tail", "conditional", "renormalize", "truncate")
TRUNCATE = ("cross_entropy", "forward_kl")  # all that "truncate" takes
INFINITE = ("reverse_kl", "symmetric_kl")  # what "renormalize" does not take
INF, NAN = math.inf, math.nan


def is_form(missing: str, divergence: str) -> bool:
    """Whether kd_loss takes them together; dkd and logit_mse take no sparse teacher."""
    if missing == "truncate":
        return divergence in TRUNCATE
    return missing != "renormalize" or divergence not in INFINITE


def _x_log(x: Tensor, y: Tensor) -> Tensor:
    """x log(x / y), 0 where x is 0."""
    return torch.where(x == 0, 0, x * (torch.where(x == 0, 1, x) / torch.where(x == 0, 1, y)).log())


def _jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * _x_log(p, m) + (1 - beta) * _x_log(q, m)


PHI: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "cross_entropy": lambda p, q, beta: -p * q.log(),
    "forward_kl": lambda p, q, beta: _x_log(p, q),
    "reverse_kl": lambda p, q, beta: _x_log(q, p),
    "symmetric_kl": lambda p, q, beta: beta * _x_log(p, q) + (1 - beta) * _x_log(q, p),
    "jsd": _jsd,
    "skew_forward_kl": lambda p, q, beta: _x_log(p, beta * p + (1 - beta) * q),
    "skew_reverse_kl": lambda p, q, beta: _x_log(q, beta * q + (1 - beta) * p),
    "tvd": lambda p, q, beta: (p - q).abs() / 2,
    "hellinger": lambda p, q, beta: (
        -torch.where(p * q == 0, 0, torch.where(p * q == 0, 1, p * q).sqrt())
    ),  # and 1 a row
}
BETA = {"symmetric_kl": 0.3, "jsd": 0.7, "skew_forward_kl": 0.2, "skew_reverse_kl": 0.2}  # not the defaults


def plain_row(z: Tensor, indices: Tensor, log_probs: Tensor, missing: str, divergence: str) -> Tensor:
    """D of one row: z = s / T, (V,); indices and log_probs, (K,)."""

    def phi(p: Tensor, q: Tensor) -> Tensor:
        return PHI[divergence](p, q, BETA.get(divergence, 0.0))

    present = [(int(i), x) for i, x in zip(indices, log_probs.to(z.dtype), strict=True) if x != -INF]
    if not present:
        return 0 * z.sum()
    classes = [i for i, _ in present]
    others = [i for i in range(len(z)) if i not in classes]
    p, q = torch.stack([x for _, x in present]).exp(), torch.softmax(z, -1)
    p_rest, q, q_rest = (1 - p.sum()).clamp(min=0), q[classes], q[others].sum()
    if missing == "conditional":
        q = q / q.sum()
    if missing in ("conditional", "renormalize"):
        p, p_rest = p / p.sum(), 0 * p_rest
    loss = phi(p, q).sum() + (divergence == "hellinger")
    if others and (missing == "tail" or (missing == "renormalize" and divergence != "cross_entropy")):
        loss = loss + phi(p_rest, q_rest)
    return loss


def plain_losses(z: Tensor, teacher: TopKTargets, missing: str, divergence: str) -> Tensor:
    """D of each row, (rows,); z: (rows, V)."""
    rows = zip(z, *teacher, strict=True)
    return torch.stack([plain_row(*row, missing, divergence) for row in rows])


def gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    """A loss of the student's logits, and its gradient there; of row losses the sum's."""
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf)
    value.sum().backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def sparse_batch(
    rows: int, vocab: int, k: int, dtype: torch.dtype = F64, temperature: Any = 1.0, *, gaps: bool = False
) -> tuple[Tensor, TopKTargets, Tensor]:
    """A student, its teacher's top k, and labels. With `gaps` rows have k, k - 1, ... 1 entries, in turn."""
    student, teacher, labels = batch(rows, vocab, dtype)
    log_probs, indices = torch.log_softmax(teacher.double() / temperature, -1).topk(k, -1)
    if gaps:
        absent = torch.arange(k) >= k - torch.arange(rows).unsqueeze(-1) % k
        log_probs, indices = log_probs.masked_fill(absent, -INF), indices.masked_fill(absent, -1)
    return student, TopKTargets(indices, log_probs.to(dtype)), labels


OF_P_AND_Q = tuple(d for d in DIVERGENCES if d not in ("dkd", "logit_mse"))
COMBINATIONS = [(form, d) for form in FORMS for d in OF_P_AND_Q if is_form(form, d)]
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}  # in fp64, whose 1 - P loses digits where P is near 1


def options(missing: str, divergence: str = "", **others: Any) -> dict[str, Any]:
    """By default jsd, whose two sides have infinities nowhere; "truncate" does not take it."""
    divergence = divergence or ("jsd" if missing != "truncate" else "forward_kl")
    return {"missing": missing, "divergence": divergence, "beta": BETA.get(divergence), **others}


def kd(student: Tensor, teacher: Any, labels: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """kd_loss and its gradient in the logits; of row losses the sum's."""
    return gradient(lambda s: kd_loss(s.clone(), teacher, labels, **settings), student)


def skip_most(backend: str, full: bool, divergence: str) -> None:
    """Triton compiles for seconds for each: test_calls.py has them all."""
    if backend in ON_GPU and not full and divergence not in ("forward_kl", "jsd"):
        pytest.skip("in the full tier")
