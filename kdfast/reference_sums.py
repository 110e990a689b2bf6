"""The reference's other half: the sums of rows, and a gradient as a function of logits and coefficients.

reference.py has the truth, with gradients by autograd. These functions are the plain implementation of the operators
that go through row_math.py: `stats`, `grad`, and the operators of vocabulary shards.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast import row_math
from kdfast.arguments import Inputs, Settings
from kdfast.divergences import DIVERGENCES, OTHERS, times
from kdfast.reference import (
    Rows,
    as_column,
    differentiate,
    joint_logits,
    prepare_rows,
    reduced_loss,
    reduced_metrics,
    teacher_distribution,
)
from kdfast.row_math import LN2, Coefficients, Exp2Scales, Sums, finite, over_teacher
from kdfast.rows import as_matrix, check_values, denominator, loss_dtype


def stats(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The loss under `reduction`, row_math.Coefficients of the rows, from which `grad` goes on, and the metrics."""
    check_values(student, inputs, settings)
    student = student.detach()
    loss = reduced_loss(student, inputs, settings)
    if _has_coefficients(settings):
        row_sums = pointwise_sums(student, sums(student, inputs, settings), inputs, settings)
        table = row_math.losses_and_coefficients(row_sums, inputs, settings)[1]
    else:
        columns = row_math.table_columns("kdfast_reference", "", 1, inputs.indices)
        table = loss.new_zeros(student.shape[:-1].numel(), columns)
    return loss, table, reduced_metrics(student, inputs, settings)


def sums(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """row_math.Sums of the classes that are here, (rows, columns), without pointwise_sums."""
    logits = _logits(student, inputs, settings)
    dtype = loss_dtype(student)
    so = _offset(logits.student, dtype)
    log_q, log_e = logits.student_exponents(so)
    nothing = torch.zeros_like(so)
    x = Sums(*[nothing] * len(Sums._fields))
    x = x._replace(
        student_offset=so, student_total=torch.exp2(log_q).sum(-1), label=nothing - math.inf,
        hard_total=torch.exp2(log_e).sum(-1), exponents=log_e.sum(-1), classes=nothing + log_q.shape[-1],
    )  # fmt: skip
    labels = logits.rows.labels
    if labels is not None:
        x = x._replace(label=torch.where(_is_label(labels, log_e.shape[-1]), log_e, -math.inf).amax(-1))
    if logits.teacher is not None:
        to = _offset(logits.teacher, dtype) if row_math.is_softmaxed(inputs, settings) else nothing
        log_p = logits.teacher_exponents(to)
        p, above = torch.exp2(log_p), log_q - log_p
        x = x._replace(teacher_offset=to, teacher_total=p.sum(-1))
        if row_math.shares(settings) is not None:
            x = x._replace(
                over_teacher=over_teacher(p, log_q, above, settings).sum(-1),
                over_student=times(torch.exp2(log_q), above).sum(-1),
            )
    return torch.stack(x, -1).to(dtype)


def pointwise_sums(student: Tensor, sums: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Sums of all shards, of which the last three, phi's and psi's, are of the classes that are here."""
    if not inputs.teachers or row_math.shares(settings) is not None or settings.divergence in OTHERS:
        return sums.clone()
    x = Sums(*sums.to(wide_dtype(student)).unbind(-1))
    if not row_math.is_softmaxed(inputs, settings):
        x = x._replace(teacher_total=torch.ones_like(x.teacher_total))
    pair = _distributions(x, _logits(student, inputs, settings))
    of, nothing = DIVERGENCES[settings.divergence], torch.zeros_like(x.psi)
    own = [f(*pair, settings.beta).sum(-1) if f else nothing for f in (of.psi_apart, of.phi, of.psi)]
    return torch.cat([sums[:, :-3], torch.stack(own, -1).to(sums.dtype)], -1)


def losses_and_coefficients(student: Tensor, sums: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """row_math.losses_and_coefficients on any device."""
    return row_math.losses_and_coefficients(sums, inputs, settings)


def grad(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> Tensor:  # (..., V)
    """The gradient for the loss's own gradient: (...) with reduction "none", else 0-dim, by row_math.Coefficients."""
    if not _has_coefficients(settings):
        return differentiate(student, inputs, settings, grad_loss)[1]
    check_values(student, inputs, settings)
    student = student.detach()
    logits = _logits(student, inputs, settings)
    rows = logits.rows
    flat = Coefficients(*stats.to(wide_dtype(student)).unbind(-1))
    c = Coefficients(*(column.unsqueeze(-1) for column in flat))
    q1 = torch.exp2(logits.student_exponents(flat.student_offset)[1]) / c.hard_total
    g = times(c.hard + torch.zeros_like(q1), q1) - c.uniform
    if logits.teacher is not None and settings.alpha:
        p, q, log_p, log_q = _distributions(flat, logits)
        if row_math.shares(settings) is None:
            of = DIVERGENCES[settings.divergence]
            psi = of.psi(p, q, log_p, log_q, settings.beta)
            if of.psi_apart:
                psi = torch.where(c.slope == 0, psi, of.psi_apart(p, q, log_p, log_q, settings.beta))
            g = g + c.soft * (psi - q * c.center)
        else:
            g = g + times(q, c.level + times(c.slope + torch.zeros_like(q), log_q - log_p)) - times(c.teacher, p)
    if rows.labels is not None:
        g = g - torch.where(_is_label(rows.labels, g.shape[-1]), c.label, 0)
    if settings.softcap:
        g = torch.where(rows.s == -math.inf, 0, g * (1 - (rows.s / settings.softcap).square()))
    factor = settings.logit_scale * grad_loss.to(g.dtype)
    if settings.reduction != "none":
        factor = factor / denominator(student, inputs, settings)
    factor = factor.expand(student.shape[:-1]).reshape(len(g), 1)
    g = torch.where(rows.kept.unsqueeze(-1), g * factor, 0)
    out = torch.zeros_like(student, memory_format=torch.contiguous_format)
    out[..., : g.shape[-1]] = g.view(*student.shape[:-1], g.shape[-1]).to(student.dtype)
    return out


def grad_(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> None:
    """`grad`, written over the student's logits."""
    student.copy_(grad(student, stats, grad_loss, inputs, settings))


def _has_coefficients(settings: Settings) -> bool:
    """The losses of classifiers.py and of sparse teachers have none here."""
    return settings.divergence not in OTHERS and not settings.standardize and not settings.missing


def _flatten(inputs: Inputs) -> Inputs:
    """Each (rows,), the teachers (rows, V)."""
    return Inputs(
        [as_matrix(t) for t in inputs.teachers],
        *(x if x is None or x.dim() == 0 else x.flatten() for x in inputs[1:]),
    )


def wide_dtype(student: Tensor) -> torch.dtype:
    """What is computed here before it is rounded: fp64 but on devices that may lack it, such as Apple's and Intel's."""
    return torch.float64 if student.device.type in ("cpu", "cuda", "meta") else loss_dtype(student)


class _Logits(NamedTuple):
    """The rows, flattened, and what exponents to base 2 are made of, as row_math.Sums has them."""

    rows: Rows
    student: Tensor  # (rows, V), of Rows but for the logit scale
    teacher: Tensor | None  # the same of the joint distribution, or its logarithm where it is not softmaxed again
    scale: Exp2Scales  # columns

    def student_exponents(self, offset: Tensor) -> tuple[Tensor, Tensor]:
        """At T and at 1, each (rows, V); offset is (rows,)."""
        z = self.student - finite(offset).unsqueeze(-1)
        return z * self.scale.student, z * self.scale.hard

    def teacher_exponents(self, offset: Tensor) -> Tensor:
        return (self.teacher - finite(offset).unsqueeze(-1)) * self.scale.teacher  # type: ignore[operator]


def _logits(student: Tensor, inputs: Inputs, settings: Settings) -> _Logits:
    inputs = _flatten(inputs)
    rows = prepare_rows(as_matrix(student), inputs, settings)
    wide = wide_dtype(student)
    scale = row_math.exp2_scales(inputs, settings, rows.s.to(wide))
    scale = Exp2Scales(*(x.unsqueeze(-1) if x.dim() else x for x in scale))
    bare = settings if settings.softcap else settings._replace(logit_scale=1.0)
    bare = bare if settings.teacher_softcap else bare._replace(teacher_logit_scale=1.0)
    x = prepare_rows(as_matrix(student), inputs, bare)
    x = x._replace(s=x.s.to(wide), teachers=[t.to(wide) for t in x.teachers])
    rows = rows._replace(s=rows.s.to(wide), teachers=[t.to(wide) for t in rows.teachers])
    if not rows.teachers:
        return _Logits(rows, x.s, None, scale)
    if row_math.is_softmaxed(inputs, settings):
        z = joint_logits(x.teachers, settings)
    else:
        temperature = as_column(inputs.teacher_temperatures, settings.teacher_temperature, rows.s)
        z = teacher_distribution(rows.teachers, temperature, rows.labels, settings)[1]
        scale = scale._replace(teacher=torch.full_like(scale.hard, 1 / LN2))
    return _Logits(rows, x.s, z, scale)


def _offset(z: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest logit of a row, (rows,), as a table of this dtype has it."""
    return z.amax(-1).to(dtype).to(z.dtype)


def _is_label(labels: Tensor, classes: int) -> Tensor:
    """Which classes are the row's label, (rows, classes); none where the label is in another shard."""
    return torch.arange(classes, device=labels.device).eq(labels)


def _distributions(x: Sums | Coefficients, logits: _Logits) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, q, log p, log q by the rows' offsets and totals."""
    log_q = (logits.student_exponents(x.student_offset)[0] - x.student_total.log2().unsqueeze(-1)) * LN2
    log_p = (logits.teacher_exponents(x.teacher_offset) - x.teacher_total.log2().unsqueeze(-1)) * LN2
    return log_p.exp(), log_q.exp(), log_p, log_q
