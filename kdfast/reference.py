"""The truth: every loss in plain PyTorch, on any device, with gradients by autograd.

Notation, per row: s the student's logits, t the teacher's, T the temperature, y the label, q = softmax(s / T),
p = softmax(t / T'), q1 = softmax(s). A row's loss is (Hinton, Vinyals & Dean 2015, section 2)

    l = w * [ alpha * T^2 * D(p, q) + hard_weight * CE(y, q1) ],      D = sum_i phi(p_i, q_i) of divergences.py

The functions named like the operators of ops.py are their plain implementation.
"""

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from kdfast.arguments import Inputs, Settings
from kdfast.divergences import DIVERGENCES


def logit_mse(s: Tensor, t: Tensor) -> Tensor:
    """1 / (2 V) * sum (s_i - t_i)^2 on centred rows, (..., V) -> (...): the paper's limit for high T."""
    difference = s - t
    return (difference - difference.mean(-1, keepdim=True)).square().mean(-1) / 2


def _column(value: Tensor | None, number: float, like: Tensor) -> Tensor:
    """A setting that is a number or one per row, (...), as a column (..., 1)."""
    if value is None:
        return torch.tensor(number, dtype=torch.float64, device=like.device).to(like.dtype)
    return value.to(like.dtype).unsqueeze(-1)


def _first_classes(logits: Tensor, settings: Settings) -> Tensor:
    return logits.detach() if settings.vocab_size < 0 else logits.detach()[..., : settings.vocab_size]


def _weighted_sum(weights: list[float], tensors: list[Tensor]) -> Tensor:
    return torch.stack([w * x for w, x in zip(weights, tensors, strict=True)]).sum(0)


def teacher_distribution(teachers: list[Tensor], temperature: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """p and log p, each (..., V), of one teacher or of an ensemble."""
    weights = settings.teacher_weights
    if settings.target == "logits":
        logs = [t / temperature for t in teachers]
        if len(teachers) == 1 or settings.ensemble == "arithmetic":
            logs = [torch.log_softmax(x, -1) for x in logs]
    else:
        logs = [t.log() if settings.target == "probs" else t for t in teachers]
    if len(teachers) == 1:
        return (teachers[0] if settings.target == "probs" else logs[0].exp()), logs[0]
    if settings.ensemble == "geometric":
        log_p = torch.log_softmax(_weighted_sum(weights, logs), -1)
        return log_p.exp(), log_p
    probs = teachers if settings.target == "probs" else [x.exp() for x in logs]
    p = _weighted_sum(weights, probs)
    return p, p.log()


def row_losses(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Each row's loss, (..., V) -> (...), differentiable in the student."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    keep = kept_rows(student, inputs, settings)
    s = student if settings.vocab_size < 0 else student[..., : settings.vocab_size]
    s = torch.where(keep.unsqueeze(-1), s.to(dtype), 0)  # rows that drop out do so whatever they hold
    loss = s.new_zeros(s.shape[:-1])
    if settings.alpha:
        teachers = [torch.where(keep.unsqueeze(-1), _first_classes(t, settings).to(dtype), 0) for t in inputs.teachers]
        loss = loss + settings.alpha * _soft_losses(s, teachers, inputs, settings)
    if inputs.labels is not None and settings.hard_weight:
        index = torch.where(keep, inputs.labels, 0).unsqueeze(-1)
        loss = loss - settings.hard_weight * torch.log_softmax(s, -1).gather(-1, index).squeeze(-1)
    loss = torch.where(keep, loss, 0)
    return loss if inputs.weight is None else loss * torch.where(keep, inputs.weight.to(dtype), 0)


def _soft_losses(s: Tensor, teachers: list[Tensor], inputs: Inputs, settings: Settings) -> Tensor:
    """T^2 * D(p, q) of each row, (...)."""
    if settings.divergence == "logit_mse":
        return logit_mse(s, _weighted_sum(settings.teacher_weights, teachers))
    temperature = _column(inputs.temperatures, settings.temperature, s)
    at = _column(inputs.teacher_temperatures, settings.teacher_temperature, s)
    p, log_p = teacher_distribution(teachers, at, settings)
    log_q = torch.log_softmax(s / temperature, -1)
    phi = DIVERGENCES[settings.divergence].phi(p, log_q.exp(), log_p, log_q, settings.beta)
    return (phi * temperature.square() if settings.t_squared else phi).sum(-1)


def kept_rows(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Which rows, (...), have a term in the loss: not ignored, and not of weight 0."""
    keep = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if inputs.labels is not None:
        keep &= inputs.labels != settings.ignore_index
    if inputs.weight is not None:
        keep &= inputs.weight != 0
    return keep


def denominator(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """What the sum of the rows' losses is divided by, 0-dim; 0 for a mean over nothing."""
    one = student.new_ones((), dtype=torch.float64 if student.dtype == torch.float64 else torch.float32)
    if settings.reduction == "batchmean":
        return one * (student.shape[0] if student.dim() > 1 else 1)
    if settings.reduction != "mean":
        return one
    if inputs.normalizer is not None:
        return inputs.normalizer.detach().to(one.dtype)
    if settings.divisor:
        return one * settings.divisor
    keep = kept_rows(student, inputs, settings)
    return (keep if inputs.weight is None else torch.where(keep, inputs.weight, 0)).sum(dtype=torch.float64).to(one)


def check_values(student: Tensor, inputs: Inputs, settings: Settings) -> None:
    """The errors that depend on a tensor's values. Not on a GPU, where looking would mean to wait for it."""
    if student.device.type != "cpu":
        return
    vocab = settings.vocab_size if settings.vocab_size >= 0 else student.shape[-1]
    if inputs.labels is not None:
        labels = inputs.labels.flatten()
        bad = ((labels < 0) | (labels >= vocab)) & (labels != settings.ignore_index)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"labels: label {int(labels[row])} in row {row} is out of range: with V = {vocab} it must be in "
                f"[0, {vocab - 1}] or ignore_index ({settings.ignore_index})"
            )
    for name, value, zero in (
        ("weight", inputs.weight, True),
        ("temperature", inputs.temperatures, False),
        ("teacher_temperature", inputs.teacher_temperatures, False),
    ):
        if value is not None:
            value = value.flatten().double()
            bad = ~(((value >= 0) if zero else (value > 0)) & value.isfinite())
            if bad.any():
                row = int(bad.nonzero()[0])
                rule = ">= 0" if zero else "> 0"
                raise ValueError(f"{name}: {value[row].item():g} in row {row}, but it must be finite and {rule}")


def _reduced(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    rows = row_losses(student, inputs, settings)
    if settings.reduction == "none":
        return rows
    divisor = denominator(student, inputs, settings)
    return torch.where(divisor == 0, 0, rows.sum() / torch.where(divisor == 0, 1, divisor))


def _autograd_included() -> AbstractContextManager[None]:
    """An operator called from a compiled graph runs below autograd; its own gradients need it all the same."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)


def _gradient(student: Tensor, inputs: Inputs, settings: Settings, grad_loss: Tensor | None) -> list[Tensor]:
    check_values(student, inputs, settings)
    with torch.enable_grad(), _autograd_included():
        leaf = student.detach().requires_grad_()
        loss = _reduced(leaf, inputs, settings)
        if not loss.requires_grad:  # neither term has a weight
            return [loss, torch.zeros_like(student, memory_format=torch.contiguous_format)]
        (grad,) = torch.autograd.grad(loss, leaf, grad_loss)
    return [loss.detach(), grad.contiguous()]


def loss_grad(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """The reduced loss, 0-dim, and its gradient, (..., V) in the student's dtype."""
    loss, grad = _gradient(student, inputs, settings, None)
    return loss, grad


def loss_grad_(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """loss_grad with the gradient written over the student's logits."""
    loss, grad = loss_grad(student, inputs, settings)
    student.copy_(grad)
    return loss


# A row's statistics, with y = logit * log2(e) / T - offset and an offset near the row's largest y. A backend may choose
# another offset than the maximum; log2(sum) + offset is the same everywhere.
STATS = (
    "student_offset",
    "teacher_offset",
    "student_sum",
    "teacher_sum",
    "hard_sum",
    "teacher_running",
    "student_running",
)


def stats(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """The loss under `reduction`, and the row statistics (rows, len(STATS)) from which `grad` goes on."""
    check_values(student, inputs, settings)
    loss = _reduced(student.detach(), inputs, settings)
    student_stats = _offset_and_sum(student, inputs.temperatures, settings.temperature, settings, loss.dtype)
    teacher = inputs.teachers[0] if inputs.teachers else student
    teacher_stats = _offset_and_sum(
        teacher, inputs.teacher_temperatures, settings.teacher_temperature, settings, loss.dtype
    )
    s = _first_classes(student, settings).to(loss.dtype)
    hard_sum = (s - s.amax(-1, keepdim=True)).exp().sum(-1)
    columns = (
        student_stats[0],
        teacher_stats[0],
        student_stats[1],
        teacher_stats[1],
        hard_sum,
        0 * hard_sum,
        0 * hard_sum,
    )
    return loss, torch.stack(columns, -1).reshape(-1, len(STATS))


def _offset_and_sum(
    logits: Tensor, temperatures: Tensor | None, temperature: float, settings: Settings, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    z = _first_classes(logits, settings).to(dtype) / _column(temperatures, temperature, logits.to(dtype))
    high = z.amax(-1, keepdim=True)
    return high.squeeze(-1) / math.log(2), (z - high).exp().sum(-1)


def grad(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> Tensor:  # (..., V)
    """The gradient for the loss's own gradient: (...) with reduction "none", else 0-dim. Recomputed, not read off."""
    return _gradient(student, inputs, settings, grad_loss)[1]


def grad_(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> None:
    student.copy_(grad(student, stats, grad_loss, inputs, settings))


def scale_(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, 0-dim; nothing is read or written where that is 1, which on a GPU nobody waits to see."""
    if grad.device.type != "cpu" or factor.item() != 1:
        grad.mul_(factor)


def tempered_softmax(
    logits: Tensor, temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype
) -> Tensor:
    """softmax or log_softmax of logits / temperature, (..., V)."""
    z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    z = z / _column(temperatures, temperature, z)
    return (torch.log_softmax(z, -1) if log else torch.softmax(z, -1)).to(dtype).contiguous()


def tempered_softmax_backward(
    grad: Tensor, output: Tensor, temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype
) -> Tensor:
    """p * (g - sum p g) / T, for the logarithm (g - p * sum g) / T, in the logits' dtype."""
    wide = torch.float64 if torch.float64 in (output.dtype, dtype) else torch.float32
    g, y = grad.to(wide), output.to(wide)
    z = g - y.exp() * g.sum(-1, True) if log else y * (g - (y * g).sum(-1, True))
    return (z / _column(temperatures, temperature, z)).to(dtype).contiguous()
