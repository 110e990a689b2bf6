"""A row's numbers between the passes over its classes: sums go up, coefficients come down.

In base 2, with Q_i = 2^(s_i log2(e) / T - student_offset), P_i = 2^(t_i log2(e) / T' - teacher_offset) and
E_i = 2^(s_i log2(e) - hard_offset), or P_i a probability as it is given. An offset is any number near the largest
exponent, -inf where every class is masked.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.arguments import Inputs, Settings
from kdfast.divergences import times
from kdfast.rows import row_weights

LN2 = math.log(2)


class Sums(NamedTuple):
    """Of some classes of a row, each (rows,): the columns of what `sums` returns. Sums of shards can be merged."""

    student_offset: Any
    student_total: Any  # sum Q
    teacher_offset: Any  # 0 where probabilities are given
    teacher_total: Any  # sum P
    hard_offset: Any
    hard_total: Any  # sum E
    over_teacher: Any  # sum of the divergence's over_teacher(P, log2 Q, log2(Q / P)), where it is linear
    over_student: Any  # sum of its over_student(Q, log2(Q / P))
    label: Any  # log2 E of the label; -inf where it is not among these classes
    exponents: Any  # sum of log2 E, for label smoothing
    classes: Any  # how many
    phi: Any  # sum of phi(p, q) but for first_order, where D is not linear: known once the others are merged
    psi: Any


class Coefficients(NamedTuple):
    """What the gradient is a function of beside the logits, each (rows,): the columns of what `stats` returns.

    q = Q / student_total        p = P / teacher_total        q1 = E / hard_total

        q (level + slope ln(q / p)) - teacher p      of a linear divergence
        soft (psi(p, q) - q center)                  of the others, center being the sum of psi
        soft (s - t - teacher_offset - center)       of logit_mse, center being the mean

    and to each of them is added hard q1 - uniform - [i = y] label.
    """

    student_offset: Any
    student_total: Any
    teacher_offset: Any
    teacher_total: Any  # what P is divided by: 1 for probabilities as they are given
    hard_offset: Any
    hard_total: Any
    level: Any
    slope: Any
    teacher: Any
    soft: Any
    center: Any
    hard: Any
    label: Any
    uniform: Any
    # standardized logits: s * student_unit and t * teacher_unit are what T divides; tilt * (s - mean) is added
    mean: Any
    tilt: Any
    student_unit: Any
    teacher_unit: Any
    teacher_mean: Any
    # dkd, whose totals leave the label out: the whole gradient at the label
    at_label: Any


FURTHER_COLUMNS = 4  # Triton's, of each teacher but the first: triton/spec.py's Further


def table_columns(namespace: str, device: str, teachers: int) -> int:
    """Of the table that `stats` returns and `grad` takes, of a namespace's operators."""
    further = max(0, teachers - 1) if namespace.endswith("triton") or device == "cuda" else 0
    return len(Coefficients._fields) + further * FURTHER_COLUMNS


def shares(settings: Settings) -> tuple[float, float] | None:
    """What D has of the linear divergences' sums over the teacher and over the student; None where it is not linear."""
    beta = settings.beta
    linear = {"cross_entropy": (1.0, 0.0), "forward_kl": (1.0, 0.0), "reverse_kl": (0.0, 1.0)}
    return (beta, 1 - beta) if settings.divergence == "symmetric_kl" else linear.get(settings.divergence)


def first_order(settings: Settings) -> float:
    """The factor of p - q in phi, which the sum of phi leaves out, lest it drown the rest where p is near q."""
    beta = settings.beta
    factors = {"skew_forward_kl": 1 - beta, "skew_reverse_kl": beta - 1, "hellinger": -0.5}
    return factors.get(settings.divergence, 0.0)


def over_teacher(p: Tensor, log_q: Tensor, above: Tensor, settings: Settings) -> Tensor:
    return -times(p, log_q if settings.divergence == "cross_entropy" else above)


def is_softmaxed(inputs: Inputs, settings: Settings) -> bool:
    """Whether P becomes p by its own sum, and not as it is given."""
    if len(inputs.teachers) > 1:
        return settings.ensemble == "geometric"
    return settings.target == "logits"


def _scaled(total: Tensor, d: Tensor) -> Tensor:
    """total * 2^d; 0 where 2^d is 2^-inf, and infinite where total is and 2^d only underflows."""
    moved = torch.where(total.isinf(), total, total * torch.exp2(d))
    return torch.where(d == -math.inf, torch.where(total.isnan(), total, 0), moved)


def _finite(offset: Tensor) -> Tensor:
    return torch.where(offset == -math.inf, 0, offset)


def merge(shards: Sequence[Tensor], settings: Settings) -> Tensor:
    """The sums of rows of whose classes each shard has some, each (rows, len(Sums._fields)), in the shards' order.

    To bring sums to a common offset, d = old - new: total' = total * 2^d, part' = (part + D's part(total, ...)) * 2^d.
    """
    tables = [Sums(*shard.unbind(-1)) for shard in shards]
    offsets = {}
    for name in ("student_offset", "teacher_offset", "hard_offset"):
        offsets[name] = torch.stack([getattr(x, name) for x in tables]).amax(0)  # NaN stays
    moved = []
    for x in tables:
        ds, dt, dh = (torch.where(old == new, 0, old - new) for old, new in (
            (x.student_offset, offsets["student_offset"]), (x.teacher_offset, offsets["teacher_offset"]),
            (x.hard_offset, offsets["hard_offset"]),
        ))  # fmt: skip
        exponents = _finite(x.hard_offset) - _finite(offsets["hard_offset"])
        moved.append(x._replace(
            student_total=_scaled(x.student_total, ds), teacher_total=_scaled(x.teacher_total, dt),
            hard_total=_scaled(x.hard_total, dh),
            over_teacher=_scaled(x.over_teacher + over_teacher(x.teacher_total, ds, ds - dt, settings), dt),
            over_student=_scaled(x.over_student + times(x.student_total, ds - dt), ds),
            label=x.label + exponents, exponents=x.exponents + x.classes * exponents,
        ))  # fmt: skip
    columns = {}
    for name in Sums._fields:
        stacked = torch.stack([getattr(x, name) for x in moved])
        columns[name] = offsets.get(name, stacked.amax(0) if name == "label" else stacked.sum(0))
    return torch.stack(Sums(**columns), -1)


def losses_and_coefficients(sums: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """Row losses, weights included, (rows,), and the coefficients, (rows, len(Coefficients._fields)): 0 where the
    weight is. A scalar reduction's divisor is not in them."""
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
        total = x.teacher_total if softmaxed else torch.exp2(-x.teacher_offset)
        log_q, log_p = -x.student_total.log2(), -x.teacher_total.log2() if softmaxed else x.teacher_offset
        mass, factor = (
            x.teacher_total / total,
            settings.alpha * (temperature if settings.t_squared else 1 / temperature),
        )
        factor = torch.where(x.classes == 1, 0, factor)  # a single class always has q = 1
        parts = shares(settings)
        c = c._replace(teacher_total=total)
        if parts is None:
            divergence = x.phi + first_order(settings) * (mass - 1)
            c = c._replace(soft=weight * factor, center=x.psi)
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
        loss = loss + settings.alpha * divergence * (temperature.square() if settings.t_squared else 1)
    log_hard, h, e = x.hard_total.log2(), settings.hard_weight, settings.label_smoothing
    if h:
        hard = (1 - e) * (log_hard - x.label) + (e * (log_hard - x.exponents / x.classes) if e else 0)
        loss = loss + h * LN2 * hard
        c = c._replace(hard=weight * h, label=weight * h * (1 - e), uniform=weight * h * e / x.classes)
    if settings.z_loss:
        lse = (log_hard + x.hard_offset) * LN2
        lse = torch.where(lse == -math.inf, math.nan, lse)  # every class is masked
        loss = loss + settings.z_loss * lse.square()
        c = c._replace(hard=c.hard + weight * 2 * settings.z_loss * lse)
    kept = weight != 0
    table = torch.where(kept.unsqueeze(-1), torch.stack(c, -1), 0)
    return torch.where(kept, weight * loss, 0), table
