"""Row mathematics: a row's loss and its gradient's coefficients from its sums, and the merging of sums.

In base 2, Q_i = 2^((s_i - student_offset) log2(e) / T), P_i = 2^((t_i - teacher_offset) log2(e) / T') or a probability
as it is given, and E_i = 2^((s_i - student_offset) log2(e)). An offset is any number near the largest logit, -inf where
every class is masked. It is subtracted from the logits themselves, which leaves no rounding error of its own however
large they are. exp2_scales has the factors in full.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.arguments import TOKEN_STATS, Inputs, Settings
from kdfast.divergences import DIVERGENCES, times
from kdfast.rows import row_weights

LN2 = math.log(2)


class Sums(NamedTuple):
    """Sums over some classes of a row, each (rows,): the columns of the table that `sums` returns."""

    student_offset: Any
    student_total: Any  # sum Q
    teacher_offset: Any  # 0 where probabilities are given
    teacher_total: Any  # sum P
    hard_total: Any  # sum E
    over_teacher: Any  # sum of the divergence's over_teacher(P, log2 Q, log2(Q / P)), where it is linear
    label: Any  # log2 E of the label; -inf where the label is not among these classes
    exponents: Any  # sum of log2 E, for label smoothing
    classes: Any  # their number
    over_student: Any  # likewise of over_student(Q, log2(Q / P)); if D is not linear, sum of its psi_apart
    phi: Any  # sum of phi(p, q), where D is not linear; needs the other sums of all classes
    psi: Any


class Coefficients(NamedTuple):
    """The gradient is a function of the logits and of these, each (rows,): the columns of the table of `stats`.

    q = Q / student_total        p = P / teacher_total        q1 = E / hard_total

        q (level + slope ln(q / p)) - teacher p      of a linear divergence
        soft (psi(p, q) - q center)                  of the others, center being the sum of psi
        soft (s - t - teacher_offset - center)       of logit_mse, center being the mean

    each plus hard q1 - uniform - [i = y] label. Where psi is psi_apart, the slope is not 0.
    """

    student_offset: Any
    student_total: Any
    teacher_offset: Any
    teacher_total: Any  # the divisor of P: 1 for given probabilities
    hard_total: Any
    level: Any
    slope: Any
    teacher: Any
    soft: Any
    center: Any
    hard: Any
    label: Any
    uniform: Any
    # standardized logits: T divides s * student_unit and t * teacher_unit; tilt * (s - mean) is added
    mean: Any
    tilt: Any
    student_unit: Any
    teacher_unit: Any
    teacher_mean: Any
    # dkd, whose totals leave out the label: the whole gradient at the label
    at_label: Any


FURTHER_COLUMNS = 4  # Triton's, for each teacher after the first: triton/spec.py's Further
MOST_TEACHERS = 8  # that Triton's kernels take: more are one


def table_columns(namespace: str, device: str, teachers: int, indices: Tensor | None = None) -> int:
    """The number of columns of the table that a namespace's `stats` returns and `grad` takes."""
    has_further = (namespace.endswith("triton") or device == "cuda") and teachers <= MOST_TEACHERS
    further = max(0, teachers - 1) if has_further else 0
    entries = 0 if indices is None else indices.shape[-1]  # of a sparse teacher's classes the soft gradient
    if indices is not None and namespace.startswith("sharded_"):
        entries += 1 + TOKEN_STATS  # that of the rest, and what the entries' log-probabilities need
    return len(Coefficients._fields) + further * FURTHER_COLUMNS + entries


def shares(settings: Settings) -> tuple[float, float] | None:
    """The factors of over_teacher and over_student in D; None where D is not linear."""
    beta = settings.beta
    linear = {"cross_entropy": (1.0, 0.0), "forward_kl": (1.0, 0.0), "reverse_kl": (0.0, 1.0)}
    return (beta, 1 - beta) if settings.divergence == "symmetric_kl" else linear.get(settings.divergence)


def over_teacher(p: Tensor, log_q: Tensor, above: Tensor, settings: Settings) -> Tensor:
    """The terms of the sum of this name; above is log2(Q / P)."""
    return -times(p, log_q if settings.divergence == "cross_entropy" else above)


def is_softmaxed(inputs: Inputs, settings: Settings) -> bool:
    """Whether p is P / sum P, and not a given probability."""
    if len(inputs.teachers) > 1:
        return settings.ensemble == "geometric"
    return settings.target == "logits"


def is_distribution(inputs: Inputs, settings: Settings) -> bool:
    """Whether p sums to 1, which given probabilities need not: then no divergence is below 0."""
    if settings.missing:
        return settings.missing != "truncate"
    return settings.target == "logits" or is_softmaxed(inputs, settings)


def _rescale(total: Tensor, d: Tensor) -> Tensor:
    """total * 2^d; infinite where total is, unless 2^d is 0 in every precision."""
    rescaled = torch.where(total.isinf(), total, total * torch.exp2(d))
    return torch.where(d < -1100, torch.where(total.isnan(), total, 0), rescaled)


def finite(offset: Tensor) -> Tensor:
    """The offset; 0 where it is -inf, which would make exponents NaN."""
    return torch.where(offset == -math.inf, 0, offset)


class Exp2Scales(NamedTuple):
    """What logits less their offsets are multiplied by to be exponents to base 2, each 0-dim or (rows,)."""

    student: Tensor
    teacher: Tensor
    hard: Tensor


def exp2_scales(inputs: Inputs, settings: Settings, like: Tensor) -> Exp2Scales:
    def of(values: Tensor | None, number: float, logit_scale: float) -> Tensor:
        if values is None:
            return torch.full((), logit_scale / number / LN2, dtype=like.dtype, device=like.device)
        return logit_scale / LN2 / values.flatten().to(like.dtype)

    hard = unit(settings)
    teacher = 1.0 if settings.teacher_softcap else settings.teacher_logit_scale
    temperatures, temperature = inputs.teacher_temperatures, settings.teacher_temperature
    if settings.target != "logits":
        temperatures, temperature, teacher = None, 1.0, 1.0
    return Exp2Scales(
        of(inputs.temperatures, settings.temperature, hard), of(temperatures, temperature, teacher), of(None, 1.0, hard)
    )  # fmt: skip


def unit(settings: Settings) -> float:
    """The scale of the student's logits as the sums have them: softcapped ones are scaled already."""
    return 1.0 if settings.softcap else settings.logit_scale


def merge(shards: Sequence[Tensor] | Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """The sums of whole rows from those of their shards, each (rows, len(Sums._fields)); or all in one tensor.

    With d = (old - new offset) * scale, total' = total * 2^d and over' = over * 2^d + over_teacher(total', ...).
    """
    x = Sums(*(shards if isinstance(shards, Tensor) else torch.stack(list(shards))).unbind(-1))  # each (shards, rows)
    scale = exp2_scales(inputs, settings, x.label)
    student_offset, teacher_offset = x.student_offset.amax(0), x.teacher_offset.amax(0)  # NaN stays
    student = torch.where(x.student_offset == student_offset, 0, x.student_offset - student_offset)
    teacher = torch.where(x.teacher_offset == teacher_offset, 0, x.teacher_offset - teacher_offset)
    ds, dt = student * scale.student, teacher * scale.teacher
    q, p = _rescale(x.student_total, ds), _rescale(x.teacher_total, dt)
    exponents = (finite(x.student_offset) - finite(student_offset)) * scale.hard
    merged = Sums(
        student_offset, q.sum(0), teacher_offset, p.sum(0), _rescale(x.hard_total, student * scale.hard).sum(0),
        over_teacher=(_rescale(x.over_teacher, dt) + over_teacher(p, ds, ds - dt, settings)).sum(0),
        label=(x.label + exponents).amax(0), exponents=(x.exponents + x.classes * exponents).sum(0),
        classes=x.classes.sum(0), over_student=(_rescale(x.over_student, ds) + times(q, ds - dt)).sum(0),
        phi=x.phi.sum(0), psi=x.psi.sum(0),
    )  # fmt: skip
    return torch.stack(merged, -1)


def losses_and_coefficients(sums: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """Row losses, weights included, (rows,), and the coefficients, (rows, len(Coefficients._fields)).

    Both are 0 where the weight is 0. The divisor of a scalar reduction is not in them.
    """
    x = Sums(*sums.unbind(-1))
    nothing = torch.zeros_like(x.classes)
    temperature = nothing + settings.temperature if inputs.temperatures is None else inputs.temperatures.flatten()
    temperature = temperature.to(nothing.dtype)
    weights = row_weights(inputs, settings)
    weight = nothing + 1 if weights is None else weights.flatten().to(nothing.dtype)
    c = Coefficients(*[nothing] * len(Coefficients._fields))
    c = c._replace(
        **{name: getattr(x, name) for name in Coefficients._fields if name in Sums._fields and name != "label"}
    )
    c = c._replace(student_unit=nothing + 1, teacher_unit=nothing + 1)
    loss = nothing
    if inputs.teachers and settings.alpha:
        softmaxed = is_softmaxed(inputs, settings)
        total = x.teacher_total if softmaxed else nothing + 1
        log_q, log_p = -x.student_total.log2(), -total.log2()
        mass, factor = (
            x.teacher_total / total,
            settings.alpha * (temperature if settings.t_squared else 1 / temperature),
        )
        factor = torch.where(x.classes == 1, 0, factor)  # a single class always has q = 1
        parts = shares(settings)
        c = c._replace(teacher_total=total)
        if parts is None:
            of = DIVERGENCES.get(settings.divergence)  # not of classifiers.py, whose numbers are nobody's
            divergence = x.phi + (of.first_order(settings.beta) if of else 0) * (mass - 1)
            c = c._replace(soft=weight * factor, center=x.psi)
            if of and of.psi_apart:
                apart = -4 * x.over_student < x.psi  # psi would lose digits of what is below 1/4 of its sum
                c = c._replace(slope=apart.to(nothing.dtype), center=torch.where(apart, x.over_student, x.psi))
        else:
            divergence, psi = nothing, nothing
            if parts[0]:
                rest = over_teacher(mass, log_q, log_q - log_p, settings)
                divergence = divergence + parts[0] * LN2 * (x.over_teacher / total + rest)
                psi = psi - parts[0] * mass
            if parts[1]:
                of_student = parts[1] * LN2 * (x.over_student / x.student_total + (log_q - log_p))
                divergence, psi = divergence + of_student, psi + of_student
            w = weight * factor
            c = c._replace(level=-w * psi, slope=w * parts[1], teacher=w * parts[0])
        if is_distribution(inputs, settings):  # rounding may leave less than 0
            divergence = divergence.clamp(min=0)
        loss = loss + settings.alpha * divergence * (temperature.square() if settings.t_squared else 1)
    log_hard, h, e = x.hard_total.log2(), settings.hard_weight, settings.label_smoothing
    if h:
        hard = (1 - e) * (log_hard - x.label).clamp(min=0) + (e * (log_hard - x.exponents / x.classes) if e else 0)
        loss = loss + h * LN2 * hard
        c = c._replace(hard=weight * h, label=weight * h * (1 - e), uniform=weight * h * e / x.classes)
    if settings.z_loss:
        lse = log_hard * LN2 + x.student_offset * unit(settings)
        lse = torch.where(lse == -math.inf, math.nan, lse)  # every class is masked
        loss = loss + settings.z_loss * lse.square()
        c = c._replace(hard=c.hard + weight * 2 * settings.z_loss * lse)
    kept = weight != 0
    table = torch.where(kept.unsqueeze(-1), torch.stack(c, -1), 0)
    return torch.where(kept, weight * loss, 0), table
