"""The reference's other half: the sums of rows, and a gradient as a function of logits and coefficients.

reference.py has the truth, with gradients by autograd. These functions are the plain implementation of the operators
that go through row_math.py: `stats`, `grad`, and the operators of vocabulary shards.
"""

import math

import torch
from torch import Tensor

from kdfast import row_math
from kdfast.arguments import Inputs, Settings
from kdfast.divergences import DIVERGENCES, OTHERS, times
from kdfast.reference import (
    Rows,
    as_column,
    differentiate,
    prepare_rows,
    reduced_loss,
    reduced_metrics,
    student_exponents,
    teacher_distribution,
)
from kdfast.row_math import LN2, Coefficients, Sums, finite, over_teacher
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
        table = loss.new_zeros(student.shape[:-1].numel(), len(Coefficients._fields))
    return loss, table, reduced_metrics(student, inputs, settings)


def sums(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """row_math.Sums of the classes that are here, (rows, columns), phi and psi not among them."""
    rows, y_s, y_t = _exponents(student, inputs, settings)
    y_1, nothing = rows.s / LN2, rows.s.new_zeros(len(rows.s))
    dtype = loss_dtype(student)
    so, ho = (_offset(y, dtype) for y in (y_s, y_1))
    log_q, log_e = y_s - finite(so), y_1 - finite(ho)
    x = Sums(*[nothing] * len(Sums._fields))
    x = x._replace(
        student_offset=so.squeeze(-1), student_total=torch.exp2(log_q).sum(-1), label=nothing - math.inf,
        hard_offset=ho.squeeze(-1), hard_total=torch.exp2(log_e).sum(-1), exponents=log_e.sum(-1),
        classes=nothing + y_s.shape[-1],
    )  # fmt: skip
    if rows.labels is not None:
        x = x._replace(label=torch.where(_is_label(rows.labels, log_e.shape[-1]), log_e, -math.inf).amax(-1))
    if y_t is not None:
        to = _offset(y_t, dtype) if row_math.is_softmaxed(inputs, settings) else torch.zeros_like(so)
        log_p = y_t - finite(to)
        p, above = torch.exp2(log_p), log_q - log_p
        x = x._replace(teacher_offset=to.squeeze(-1), teacher_total=p.sum(-1))
        if row_math.shares(settings) is not None:
            x = x._replace(
                over_teacher=over_teacher(p, log_q, above, settings).sum(-1),
                over_student=times(torch.exp2(log_q), above).sum(-1),
            )
    return torch.stack(x, -1).to(dtype)


def pointwise_sums(student: Tensor, sums: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Sums of all shards with phi and psi of the classes that are here."""
    _, y_s, y_t = _exponents(student, inputs, settings)
    if y_t is None or row_math.shares(settings) is not None or settings.divergence in OTHERS:
        return sums.clone()
    x = Sums(*sums.double().unbind(-1))
    if not row_math.is_softmaxed(inputs, settings):
        x = x._replace(teacher_total=torch.exp2(-x.teacher_offset))
    p, q, log_p, log_q = _distributions(x, y_s, y_t)
    phi, psi = (f(p, q, log_p, log_q, settings.beta) for f in DIVERGENCES[settings.divergence][:2])
    phi = phi - row_math.first_order(settings) * (p - q)
    return torch.cat([sums[:, :-2], torch.stack((phi.sum(-1), psi.sum(-1)), -1).to(sums.dtype)], -1)


def losses_and_coefficients(student: Tensor, sums: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """row_math.losses_and_coefficients on any device."""
    return row_math.losses_and_coefficients(sums, inputs, settings)


def grad(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> Tensor:  # (..., V)
    """The gradient for the loss's own gradient: (...) with reduction "none", else 0-dim, by row_math.Coefficients."""
    if not _has_coefficients(settings):
        return differentiate(student, inputs, settings, grad_loss)[1]
    check_values(student, inputs, settings)
    student = student.detach()
    rows, y_s, y_t = _exponents(student, inputs, settings)
    flat = Coefficients(*stats.double().unbind(-1))
    c = Coefficients(*(column.unsqueeze(-1) for column in flat))
    q1 = torch.exp2(rows.s / LN2 - finite(c.hard_offset)) / c.hard_total
    g = times(c.hard + torch.zeros_like(q1), q1) - c.uniform
    if y_t is not None and settings.alpha:
        p, q, log_p, log_q = _distributions(flat, y_s, y_t)
        if row_math.shares(settings) is None:
            psi = DIVERGENCES[settings.divergence].psi(p, q, log_p, log_q, settings.beta)
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
    """The losses of classifiers.py have none."""
    return settings.divergence not in OTHERS and not settings.standardize


def _flatten(inputs: Inputs) -> Inputs:
    """Each (rows,), the teachers (rows, V)."""
    return Inputs(
        [as_matrix(t) for t in inputs.teachers],
        *(x if x is None or x.dim() == 0 else x.flatten() for x in inputs[1:]),
    )


def _exponents(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Rows, Tensor, Tensor | None]:
    """The rows, flattened, and the exponents to base 2 of q and p, each (rows, V), before any offset.

    Those of p are log2 p where it is given, or a mixture. In fp64: an offset may be large, and its subtraction is not
    fused with the product.
    """
    inputs = _flatten(inputs)
    rows = prepare_rows(as_matrix(student), inputs, settings)
    rows = rows._replace(s=rows.s.double(), teachers=[t.double() for t in rows.teachers])
    y_s = student_exponents(rows, inputs, settings)[1] / LN2
    if not rows.teachers:
        return rows, y_s, None
    temperature = as_column(inputs.teacher_temperatures, settings.teacher_temperature, rows.s)
    _, log_p, z = teacher_distribution(rows.teachers, temperature, settings)
    return rows, y_s, (z if row_math.is_softmaxed(inputs, settings) else log_p) / LN2


def _offset(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest exponent of a row, (rows, 1), as a table of this dtype has it."""
    return y.amax(-1, keepdim=True).to(dtype).to(y.dtype)


def _is_label(labels: Tensor, classes: int) -> Tensor:
    """Which classes are the row's label, (rows, classes); none where the label is in another shard."""
    return torch.arange(classes, device=labels.device).eq(labels)


def _distributions(x: Sums | Coefficients, y_s: Tensor, y_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, q, log p, log q from exponents, and from the rows' offsets and totals."""
    columns = (c.unsqueeze(-1) for c in (x.student_offset, x.student_total, x.teacher_offset, x.teacher_total))
    student_offset, student_total, teacher_offset, teacher_total = columns
    log_q = (y_s - finite(student_offset) - student_total.log2()) * LN2
    log_p = (y_t - finite(teacher_offset) - teacher_total.log2()) * LN2
    return log_p.exp(), log_q.exp(), log_p, log_q
