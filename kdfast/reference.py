"""The truth: every loss in plain PyTorch, on any device, with gradients by autograd.

Notation, per row: s the student's logits, t the teacher's, T the temperature, y the label, q = softmax(s / T),
p = softmax(t / T'), q1 = softmax(s). A row's loss is (Hinton, Vinyals & Dean 2015, section 2)

    l = w * [ alpha * T^2 * D(p, q) + hard_weight * CE(y, q1) + z_loss * logsumexp(s)^2 ]

with D = sum_i phi(p_i, q_i) of divergences.py. Logits are first scaled, then softcapped; `standardize` is for D alone.

A function named like an operator of ops.py is its plain implementation. reference_sums.py has the operators that go
through the sums and coefficients of row_math.py.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast import row_math, sparse_rows
from kdfast.arguments import Inputs, Settings
from kdfast.classifiers import dkd, logit_mse, standardize
from kdfast.divergences import DIVERGENCES, times
from kdfast.rows import check_values, divisor, kept_rows, loss_dtype, mean_metrics, no_metrics, row_weights
from kdfast.torch_private import enable_autograd


def as_column(value: Tensor | None, number: float, like: Tensor) -> Tensor:
    """A setting that is a number or one per row, (...), as a column (..., 1)."""
    if value is None:
        return torch.full((), number, dtype=like.dtype, device=like.device)  # torch.tensor waits for a GPU
    return value.to(like.dtype).unsqueeze(-1)


def _real_classes(logits: Tensor, settings: Settings) -> Tensor:
    return logits.detach() if settings.vocab_size < 0 else logits.detach()[..., : settings.vocab_size]


def _weighted_sum(weights: list[float], tensors: list[Tensor]) -> Tensor:
    return torch.stack([w * x for w, x in zip(weights, tensors, strict=True)]).sum(0)


def teacher_distribution(
    teachers: list[Tensor], temperature: Tensor, labels: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """p, log p, and log p before a constant of the row is subtracted, each (..., V): one teacher's or an ensemble's."""
    weights = settings.teacher_weights
    logs = (
        [_less_maximum(t, labels, settings) / temperature for t in teachers]
        if settings.target == "logits"
        else teachers
    )
    if len(teachers) == 1 or settings.ensemble == "geometric":
        z = joint_logits(logs, settings)
        is_given = len(teachers) == 1 and settings.target != "logits"
        log_p = z if is_given else torch.log_softmax(z, -1)
        return (teachers[0] if is_given and settings.target == "probs" else log_p.exp()), log_p, z
    if settings.target == "logits":
        logs = [torch.log_softmax(x, -1) for x in logs]
    p = _weighted_sum(weights, teachers if settings.target == "probs" else [x.exp() for x in logs])
    return p, p.log(), p.log()


def _less_maximum(z: Tensor, labels: Tensor | None, settings: Settings) -> Tensor:
    """The row's logits less their maximum, which softmax has no need of: T may make infinities of large ones.

    dkd's second part is of the other classes, which would lose digits to a label far above them.
    """
    others = z.detach()
    if settings.divergence == "dkd":
        others = others.scatter(-1, labels, -math.inf)  # type: ignore[arg-type]
    return z - row_math.finite(others.amax(-1, keepdim=True))


def joint_logits(teachers: list[Tensor], settings: Settings) -> Tensor:
    """Of one teacher or a geometric ensemble; the logarithms of probabilities."""
    logs = [t.log() for t in teachers] if settings.target == "probs" else teachers
    return logs[0] if len(logs) == 1 else _weighted_sum(settings.teacher_weights, logs)


def softcap(z: Tensor, cap: float) -> Tensor:
    """cap * tanh(z / cap), but a masked class stays masked; the logits themselves where there is no cap."""
    if not cap:
        return z
    masked = z == -math.inf
    return torch.where(masked, -math.inf, cap * torch.tanh(torch.where(masked, 0, z) / cap))


class Rows(NamedTuple):
    """What the terms of a loss take."""

    s: Tensor  # (..., V), the real classes, scaled and softcapped; 0 in dropped rows, whatever they hold
    teachers: list[Tensor]  # the same; none that is sparse
    labels: Tensor | None  # (..., 1); 0 in dropped rows
    kept: Tensor  # (...)


def prepare_rows(student: Tensor, inputs: Inputs, settings: Settings) -> Rows:
    dtype = loss_dtype(student)
    kept = kept_rows(student, inputs, settings)
    s = student if settings.vocab_size < 0 else student[..., : settings.vocab_size]
    s = softcap(settings.logit_scale * torch.where(kept.unsqueeze(-1), s.to(dtype), 0), settings.softcap)
    teachers = []
    for t in inputs.teachers if not settings.missing else ():
        t = torch.where(kept.unsqueeze(-1), _real_classes(t, settings).to(dtype), 0)
        teachers.append(softcap(settings.teacher_logit_scale * t, settings.teacher_softcap))
    labels = None if inputs.labels is None else torch.where(kept, inputs.labels, 0).unsqueeze(-1)
    return Rows(s, teachers, labels, kept)


def row_losses(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Each row's loss, (..., V) -> (...), differentiable in the student."""
    rows = prepare_rows(student, inputs, settings)
    loss = rows.s.new_zeros(rows.s.shape[:-1])
    if settings.alpha:
        loss = loss + settings.alpha * _soft_losses(rows, inputs, settings)
    if rows.labels is not None and settings.hard_weight:
        loss = loss + settings.hard_weight * _hard_losses(rows, settings)
    if settings.z_loss:
        z = torch.logsumexp(rows.s, -1)
        loss = loss + settings.z_loss * torch.where(z == -math.inf, math.nan, z).square()
    loss = torch.where(rows.kept, loss, 0)
    return loss if inputs.row_weight is None else loss * torch.where(rows.kept, inputs.row_weight.to(loss.dtype), 0)


def _hard_losses(rows: Rows, settings: Settings) -> Tensor:
    """CE(y, q1), (...), for y smoothed as F.cross_entropy smooths it."""
    loss = -torch.log_softmax(rows.s, -1).gather(-1, rows.labels).squeeze(-1)  # type: ignore[arg-type]
    e = settings.label_smoothing
    if not e:
        return loss
    z = rows.s - rows.s.detach().amax(-1, keepdim=True)  # the mean of these has a smaller error
    return (1 - e) * loss + e * (torch.logsumexp(z, -1) - z.mean(-1))


def _soft_losses(rows: Rows, inputs: Inputs, settings: Settings) -> Tensor:
    """T^2 * D(p, q) of each row, (...)."""
    if settings.divergence == "logit_mse":
        s, t = rows.s, rows.teachers
        if settings.standardize:
            s, t = standardize(s), [standardize(x) for x in t]
        return logit_mse(s, _weighted_sum(settings.teacher_weights, t))
    temperature, x = _distributions(rows, inputs, settings)
    if settings.divergence == "dkd":
        divergence = dkd(*x, rows.labels, settings.dkd_weights)  # type: ignore[arg-type]
    else:
        of = DIVERGENCES[settings.divergence]
        divergence = of.phi(x.p, x.log_q.exp(), x.log_p, x.log_q, settings.beta).sum(-1)
        if settings.missing or not row_math.is_distribution(inputs, settings):
            divergence = divergence + of.first_order(settings.beta) * (x.p.sum(-1) - 1)
    if row_math.is_distribution(inputs, settings):  # rounding may leave less than 0
        divergence = divergence - divergence.detach().clamp(max=0)
    return divergence * temperature.square().squeeze(-1) if settings.t_squared else divergence


def student_exponents(rows: Rows, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """T, as a column or a number, and the student's logits / T, less their maximum."""
    temperature = as_column(inputs.temperatures, settings.temperature, rows.s)
    z = standardize(rows.s) if settings.standardize else rows.s
    return temperature, _less_maximum(z, rows.labels, settings) / temperature


class _Distributions(NamedTuple):
    """p and q, each (..., V), and their logarithms; z are these before a constant of the row is subtracted.

    With a sparse teacher they are of its entries and their rest, (..., K + 1).
    """

    p: Tensor
    log_p: Tensor
    p_z: Tensor
    log_q: Tensor
    q_z: Tensor


def _distributions(rows: Rows, inputs: Inputs, settings: Settings) -> tuple[Tensor, _Distributions]:
    """T, as a column or a number, and p and q at it."""
    teacher_temperature = as_column(inputs.teacher_temperatures, settings.teacher_temperature, rows.s)
    teachers = [standardize(t) for t in rows.teachers] if settings.standardize else rows.teachers
    if settings.missing:
        temperature = as_column(inputs.temperatures, settings.temperature, rows.s)
        entries = sparse_rows.entries_of(rows.s, inputs, settings)
        z = _less_maximum(sparse_rows.logits_read(rows.s, entries, settings), None, settings) / temperature
        log_p = entries.log_p if sparse_rows.is_given(settings) else torch.log_softmax(entries.log_p, -1)
        log_q = sparse_rows.student_log_probs(z, entries, settings)
        return temperature, _Distributions(log_p.exp(), log_p, log_p, log_q, log_q)
    temperature, z = student_exponents(rows, inputs, settings)
    p = teacher_distribution(teachers, teacher_temperature, rows.labels, settings)
    return temperature, _Distributions(*p, torch.log_softmax(z, -1), z)


def row_metrics(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """KDMetrics of each row, (7, ...); NaN in dropped rows. sparse_metrics.py has those of sparse teachers."""
    rows = prepare_rows(student.detach(), inputs, settings)
    nan = torch.full_like(rows.s[..., 0], math.nan)
    soft = hard = kl = teacher_entropy = agreement = accuracy = nan
    best = rows.s.argmax(-1)
    if rows.labels is not None:
        hard = _hard_losses(rows, settings)
        accuracy = (best == rows.labels.squeeze(-1)).to(nan.dtype)
    log_q = torch.log_softmax(student_exponents(rows, inputs, settings)[1], -1)
    student_entropy = -times(log_q.exp(), log_q).sum(-1)
    if rows.teachers:
        soft = _soft_losses(rows, inputs, settings)
        _, x = _distributions(rows, inputs, settings)
        kl = times(x.p, x.log_p - log_q).sum(-1)
        teacher_entropy = -times(x.p, x.log_p).sum(-1)
        # one teacher's logits may differ where its probabilities are equal
        teacher = rows.teachers[0] if len(rows.teachers) == 1 else x.log_p
        agreement = (best == teacher.argmax(-1)).to(nan.dtype)
    metrics = (soft, hard, kl, student_entropy, teacher_entropy, agreement, accuracy)
    return torch.where(rows.kept, torch.stack(metrics), math.nan)


def reduced_metrics(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """KDMetrics, (7,) or, with reduction "none", (7, ...); (0,) where they are not wanted."""
    if not settings.metrics:
        return no_metrics(student)
    return mean_metrics(row_metrics(student, inputs, settings), row_weights(inputs, settings), settings)


def reduced_loss(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """The loss under `reduction`, 0-dim or (...), differentiable in the student."""
    losses = row_losses(student, inputs, settings)
    if settings.reduction == "none":
        return losses
    number, tensor = divisor(student, row_weights(inputs, settings), inputs, settings)
    if tensor is None:
        return losses.sum() / number
    tensor = tensor.to(losses.dtype)
    return torch.where(tensor == 0, 0, losses.sum() / torch.where(tensor == 0, 1, tensor))


def differentiate(
    student: Tensor, inputs: Inputs, settings: Settings, grad_loss: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by autograd, (..., V)."""
    check_values(student, inputs, settings)
    with torch.enable_grad(), enable_autograd():
        leaf = student.detach().requires_grad_()
        loss = reduced_loss(leaf, inputs, settings)
        if not loss.requires_grad:  # neither term has a weight
            return loss, torch.zeros_like(student, memory_format=torch.contiguous_format)
        (grad,) = torch.autograd.grad(loss, leaf, grad_loss)
    return loss.detach(), grad.contiguous()


def loss_grad(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced loss, 0-dim, its gradient, (..., V) in the student's dtype, and the metrics."""
    loss, grad = differentiate(student, inputs, settings, None)
    return loss, grad, reduced_metrics(student, inputs, settings)


def loss_grad_(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """loss_grad with the gradient written over the student's logits."""
    loss, grad, metrics = loss_grad(student, inputs, settings)
    student.copy_(grad)
    return loss, metrics


def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, 0-dim. A CPU skips a factor of 1; on a GPU reading it would synchronize."""
    if grad.device.type != "cpu" or factor.item() != 1:
        grad.mul_(factor)


def tempered_softmax(
    logits: Tensor, temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype
) -> Tensor:
    """softmax or log_softmax of logits / temperature, (..., V)."""
    z = logits.to(loss_dtype(logits))
    z = z / as_column(temperatures, temperature, z)
    return (torch.log_softmax(z, -1) if log else torch.softmax(z, -1)).to(dtype).contiguous()


def tempered_softmax_backward(
    grad: Tensor, output: Tensor, temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype
) -> Tensor:
    """p * (g - sum p g) / T, for the logarithm (g - p * sum g) / T, in the logits' dtype."""
    wide = torch.float64 if torch.float64 in (output.dtype, dtype) else torch.float32
    g, y = grad.to(wide), output.to(wide)
    z = g - y.exp() * g.sum(-1, True) if log else y * (g - (y * g).sum(-1, True))
    return (z / as_column(temperatures, temperature, z)).to(dtype).contiguous()
