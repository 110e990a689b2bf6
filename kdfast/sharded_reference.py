"""Every loss of rows whose classes are split over a group, in plain PyTorch: reference.py's formulas, sum by sum.

For what has no table of sums: several teachers' mean, decoupled KD, logit_mse, standardized logits, and metrics. A
number of a row is the same in all processes, and so is its gradient where numbers of rows are made of it. `total` makes
one from a sum over a process's classes. `spread` takes one to the classes: its gradient is the sum of all processes'.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast import row_math
from kdfast.arguments import Inputs, Settings
from kdfast.divergences import DIVERGENCES, times
from kdfast.processes import all_reduce, gather
from kdfast.reference import as_column, prepare_rows


class _Total(torch.autograd.Function):
    """The sum over the processes, of which each has the gradient of its own addend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return all_reduce(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_reduce(grad.clone(), ctx.group), None


class SplitRows:
    """The sums of reference.py over the classes of all processes. labels, here: (...), of this process's classes."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def total(self, x: Tensor) -> Tensor:
        """The sum over all classes, (...), of (..., V of this process)."""
        return _Total.apply(x.sum(-1), self.group)

    def add_up(self, x: Tensor) -> Tensor:
        """The sum over the processes, each of which has an addend for every element."""
        return _Total.apply(x, self.group)

    def spread(self, x: Tensor) -> Tensor:
        """A number of each row, (...), for use with its classes, (..., 1)."""
        return _Spread.apply(x, self.group).unsqueeze(-1)

    def largest(self, z: Tensor) -> Tensor:
        """(...), without a gradient; -inf where there is no class."""
        high = z.detach().amax(-1) if z.shape[-1] else z.new_full(z.shape[:-1], -math.inf)
        return all_reduce(high, self.group, largest=True)

    def log_sum(self, z: Tensor) -> Tensor:
        """log of the sum of exp z, (...)."""
        high = row_math.finite(self.largest(z))
        total = self.total((z - high.unsqueeze(-1)).exp())
        return torch.where(total == 0, -math.inf, torch.where(total == 0, 1, total).log()) + high

    def log_softmax(self, z: Tensor) -> Tensor:
        high = row_math.finite(self.largest(z)).unsqueeze(-1)  # T may make infinities of large ones
        return z - high - self.spread(self.log_sum(z - high))

    def pick(self, x: Tensor, is_label: Tensor) -> Tensor:
        """x at the label, (...)."""
        return self.total(torch.where(is_label, x, 0))

    def argmax(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The process and the class in it of the first of the largest, each (...)."""
        best = z.max(-1) if z.shape[-1] else None
        value = z.new_full(z.shape[:-1], -math.inf) if best is None else best.values
        at = torch.zeros(z.shape[:-1], dtype=torch.int64, device=z.device) if best is None else best.indices
        values, places = gather(value, self.group), gather(at, self.group)
        rank = values.argmax(0, keepdim=True)
        return rank.squeeze(0), places.gather(0, rank).squeeze(0)


def standardize(z: Tensor, classes: Tensor, split: SplitRows) -> Tensor:
    """classifiers.standardize; classes: of all processes, (...)."""
    mean = split.total(z) / classes
    centred = z - split.spread(mean)
    variance = split.total(centred.square()) / (classes - 1).clamp(min=1)
    is_flat = variance == 0
    deviation = torch.where(is_flat, 0, torch.where(is_flat, 1, variance).sqrt())
    return centred / split.spread(1e-7 + deviation)


def teacher_log_probs(teachers: list[Tensor], temperature: Tensor, settings: Settings, split: SplitRows) -> Tensor:
    """log p, (..., V of this process), of one teacher or of an ensemble."""
    weights = settings.teacher_weights
    if settings.target == "logits":
        highs = [row_math.finite(split.largest(t)).unsqueeze(-1) for t in teachers]
        logs = [(t - high) / temperature for t, high in zip(teachers, highs, strict=True)]
    else:
        logs = [t.log() for t in teachers] if settings.target == "probs" else teachers
    if len(teachers) == 1 and settings.target != "logits":
        return logs[0]
    if len(teachers) == 1 or settings.ensemble == "geometric":
        return split.log_softmax(torch.stack([w * x for w, x in zip(weights, logs, strict=True)]).sum(0))
    if settings.target == "logits":
        logs = [split.log_softmax(x) for x in logs]
    return torch.stack([w * x.exp() for w, x in zip(weights, logs, strict=True)]).sum(0).log()


def row_losses(student: Tensor, inputs: Inputs, settings: Settings, group: Any) -> tuple[Tensor, Tensor]:
    """Each row's loss, (...), differentiable in the student, and KDMetrics of the rows, (7, ...) or (9, ...).

    labels and indices count from this process's first class; see exchange.local_labels.
    """
    from kdfast.sharded_entries import soft_terms

    split = SplitRows(group)
    rows = prepare_rows(student, inputs, settings)
    s, nothing = rows.s, rows.s.detach().new_zeros(rows.s.shape[:-1])
    classes = split.total(torch.ones_like(s)).detach()
    is_label = torch.zeros_like(s, dtype=torch.bool)
    if rows.labels is not None:
        is_label = torch.arange(s.shape[-1], device=s.device) == rows.labels
    loss, nan = nothing, torch.full_like(nothing, math.nan)
    soft = hard = kl = student_entropy = teacher_entropy = agreement = accuracy = nan
    lse = split.log_sum(s)
    if rows.labels is not None and (settings.hard_weight or settings.metrics):
        e = settings.label_smoothing
        hard = lse - split.pick(s, is_label)
        if e:
            hard = (1 - e) * hard + e * (lse - split.total(s) / classes)
        if settings.hard_weight:
            loss = loss + settings.hard_weight * hard
    if settings.z_loss:
        loss = loss + settings.z_loss * torch.where(lse == -math.inf, math.nan, lse).square()
    temperature = as_column(inputs.temperatures, settings.temperature, s)
    if settings.metrics or (inputs.teachers and settings.alpha):
        z = standardize(s, classes, split) if settings.standardize else s
        tempered = (z - row_math.finite(split.largest(z)).unsqueeze(-1)) / temperature
        log_q = split.log_softmax(tempered)
    sparse: dict[str, Tensor] = {}
    if settings.missing and inputs.teachers:
        soft, sparse = soft_terms(tempered, temperature, log_q, inputs, settings, classes, split)  # for metrics alone
    if rows.teachers:
        teachers = [standardize(t, classes, split) if settings.standardize else t for t in rows.teachers]
        log_p = teacher_log_probs(
            teachers, as_column(inputs.teacher_temperatures, settings.teacher_temperature, s), settings, split
        )
        if settings.divergence == "logit_mse":
            t = torch.stack([w * x for w, x in zip(settings.teacher_weights, teachers, strict=True)]).sum(0)
            d = z - t
            soft = split.total((d - split.spread(split.total(d) / classes)).square()) / (2 * classes)
        else:
            soft = _divergence(log_p, log_q, is_label, inputs, settings, split)
            if settings.t_squared:
                soft = soft * temperature.squeeze(-1).square() if temperature.dim() else soft * temperature.square()
        if settings.alpha:
            loss = loss + settings.alpha * soft
    weight = nothing + 1 if inputs.row_weight is None else inputs.row_weight.to(nothing.dtype)
    loss = torch.where(rows.kept, loss * torch.where(rows.kept, weight, 0), 0)
    if not settings.metrics:
        return loss, nothing.new_empty(0)
    with torch.no_grad():
        student_entropy = -split.total(times(log_q.exp(), log_q))
        best = split.argmax(s)
        if rows.labels is not None:
            mine = dist.get_rank(group)
            is_best = (best[0] == mine) & (best[1] == rows.labels.squeeze(-1))
            accuracy = split.total(is_best.to(nan.dtype).unsqueeze(-1))
        if rows.teachers:
            p = log_p.exp()
            kl, teacher_entropy = split.total(times(p, log_p - log_q)), -split.total(times(p, log_p))
            best_t = split.argmax(rows.teachers[0] if len(rows.teachers) == 1 else log_p)
            agreement = ((best[0] == best_t[0]) & (best[1] == best_t[1])).to(nan.dtype)
        masses: list[Tensor] = []
        if sparse:
            kl, teacher_entropy = sparse["kl"], sparse["teacher_entropy"]
            is_likeliest = (best[0] == dist.get_rank(group)) & (best[1] == sparse["likeliest"])
            agreement = split.total(is_likeliest.to(nan.dtype).unsqueeze(-1))
            masses = [sparse["student_mass"], sparse["teacher_mass"]]
        metrics = torch.stack([soft, hard, kl, student_entropy, teacher_entropy, agreement, accuracy, *masses])
    return loss, torch.where(rows.kept, metrics, math.nan).detach()


def _divergence(
    log_p: Tensor, log_q: Tensor, is_label: Tensor, inputs: Inputs, settings: Settings, split: SplitRows
) -> Tensor:
    if settings.divergence == "dkd":
        divergence = _decoupled(log_p, log_q, is_label, settings.dkd_weights, split)
    else:
        of = DIVERGENCES[settings.divergence]
        divergence = split.total(of.phi(log_p.exp(), log_q.exp(), log_p, log_q, settings.beta))
        if not row_math.is_distribution(inputs, settings):
            divergence = divergence + of.first_order(settings.beta) * (split.total(log_p.exp()) - 1)
    if row_math.is_distribution(inputs, settings):  # rounding may leave less than 0
        divergence = divergence - divergence.detach().clamp(max=0)
    return divergence


def _decoupled(log_p: Tensor, log_q: Tensor, is_label: Tensor, weights: list[float], split: SplitRows) -> Tensor:
    """classifiers.dkd."""
    rest_p, rest_q = (torch.where(is_label, -math.inf, x) for x in (log_p, log_q))
    log_rest_p, log_rest_q = split.log_sum(rest_p), split.log_sum(rest_q)
    divergence = torch.zeros_like(log_rest_p)
    is_alone = log_rest_p == -math.inf  # the teacher leaves the other classes nothing
    if weights[0]:
        log_p_y, log_q_y = split.pick(log_p, is_label), split.pick(log_q, is_label)
        target = times(log_p_y.exp(), log_p_y - log_q_y)
        divergence = divergence + weights[0] * (target + times(log_rest_p.exp(), log_rest_p - log_rest_q))
    if weights[1]:
        p = rest_p - split.spread(torch.where(is_alone, 0, log_rest_p))
        q = rest_q - split.spread(torch.where(log_rest_q == -math.inf, 0, log_rest_q))
        divergence = divergence + weights[1] * split.total(times(p.exp(), p - q))
    return divergence
