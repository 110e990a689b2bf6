"""The truth: every loss in plain PyTorch, on any device, with gradients by autograd.

Notation, per row: s the student's logits, t the teacher's, T the temperature, y the label, q = softmax(s / T),
p = softmax(t / T'), q1 = softmax(s). A row's loss is (Hinton, Vinyals & Dean 2015, section 2)

    l = w * [ alpha * T^2 * D(p, q) + hard_weight * CE(y, q1) + z_loss * logsumexp(s)^2 ]

with D = sum_i phi(p_i, q_i) of divergences.py. Logits are softcapped first of all; `standardize` is for D alone.

The functions named like the operators of ops.py are their plain implementation.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast import row_math
from kdfast.arguments import Inputs, KDMetrics, Settings
from kdfast.divergences import DIVERGENCES, OTHERS, times
from kdfast.row_math import Coefficients, Sums, over_teacher
from kdfast.rows import check_values, denominator, divisor, kept_rows, loss_dtype, mean_metrics, no_metrics, row_weights
from kdfast.torch_private import autograd_included


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


def teacher_distribution(
    teachers: list[Tensor], temperature: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """p, log p, and log p as it was before a constant of the row, each (..., V), of one teacher or of an ensemble."""
    weights = settings.teacher_weights
    if settings.target == "logits":
        logs = [t / temperature for t in teachers]
    else:
        logs = [t.log() if settings.target == "probs" else t for t in teachers]
    if len(teachers) == 1 or settings.ensemble == "geometric":
        z = logs[0] if len(teachers) == 1 else _weighted_sum(weights, logs)
        as_given = len(teachers) == 1 and settings.target != "logits"
        log_p = z if as_given else torch.log_softmax(z, -1)
        return (teachers[0] if as_given and settings.target == "probs" else log_p.exp()), log_p, z
    if settings.target == "logits":
        logs = [torch.log_softmax(x, -1) for x in logs]
    p = _weighted_sum(weights, teachers if settings.target == "probs" else [x.exp() for x in logs])
    return p, p.log(), p.log()


def softcapped(z: Tensor, cap: float) -> Tensor:
    """cap * tanh(z / cap), but a masked class stays masked; the logits themselves where there is no cap."""
    if not cap:
        return z
    masked = z == -math.inf
    return torch.where(masked, -math.inf, cap * torch.tanh(torch.where(masked, 0, z) / cap))


def standardized(z: Tensor) -> Tensor:
    """(z - mean) / (1e-7 + deviation), the sample deviation: Logit Standardization, Sun et al., CVPR 2024."""
    z = z - z[..., :1].detach()  # equal logits leave nothing for a rounded mean to differ from
    centred = z - z.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(1, z.shape[-1] - 1)
    flat = variance == 0  # of one class, or of equal logits: the deviation and its gradient are 0
    return centred / (1e-7 + torch.where(flat, 0, torch.where(flat, 1, variance).sqrt()))


LN2 = math.log(2)


class _Rows(NamedTuple):
    """What the terms of a loss are over."""

    s: Tensor  # (..., V), of the real classes, softcapped; 0 in rows that drop out, whatever they hold
    teachers: list[Tensor]  # the same
    labels: Tensor | None  # (..., 1), of rows that drop out 0
    keep: Tensor  # (...)


def _rows(student: Tensor, inputs: Inputs, settings: Settings) -> _Rows:
    dtype = loss_dtype(student)
    keep = kept_rows(student, inputs, settings)
    s = student if settings.vocab_size < 0 else student[..., : settings.vocab_size]
    s = softcapped(settings.logit_scale * torch.where(keep.unsqueeze(-1), s.to(dtype), 0), settings.softcap)
    teachers = []
    for t in inputs.teachers:
        t = torch.where(keep.unsqueeze(-1), _first_classes(t, settings).to(dtype), 0)
        teachers.append(softcapped(settings.teacher_logit_scale * t, settings.teacher_softcap))
    labels = None if inputs.labels is None else torch.where(keep, inputs.labels, 0).unsqueeze(-1)
    return _Rows(s, teachers, labels, keep)


def row_losses(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Each row's loss, (..., V) -> (...), differentiable in the student."""
    rows = _rows(student, inputs, settings)
    loss = rows.s.new_zeros(rows.s.shape[:-1])
    if settings.alpha:
        loss = loss + settings.alpha * _soft_losses(rows, inputs, settings)
    if rows.labels is not None and settings.hard_weight:
        loss = loss + settings.hard_weight * _hard_losses(rows, settings)
    if settings.z_loss:
        z = torch.logsumexp(rows.s, -1)
        loss = loss + settings.z_loss * torch.where(z == -math.inf, math.nan, z).square()
    loss = torch.where(rows.keep, loss, 0)
    return loss if inputs.row_weight is None else loss * torch.where(rows.keep, inputs.row_weight.to(loss.dtype), 0)


def _hard_losses(rows: _Rows, settings: Settings) -> Tensor:
    """CE(y, q1), (...), for y smoothed as F.cross_entropy smooths it."""
    loss = -torch.log_softmax(rows.s, -1).gather(-1, rows.labels).squeeze(-1)  # type: ignore[arg-type]
    e = settings.label_smoothing
    if not e:
        return loss
    z = rows.s - rows.s.detach().amax(-1, keepdim=True)  # whose mean is off by less
    return (1 - e) * loss + e * (torch.logsumexp(z, -1) - z.mean(-1))


def _soft_losses(rows: _Rows, inputs: Inputs, settings: Settings) -> Tensor:
    """T^2 * D(p, q) of each row, (...)."""
    if settings.divergence == "logit_mse":
        s, t = rows.s, rows.teachers
        if settings.standardize:
            s, t = standardized(s), [standardized(x) for x in t]
        return logit_mse(s, _weighted_sum(settings.teacher_weights, t))
    x = _distributions(rows, inputs, settings)
    if settings.divergence == "dkd":
        divergence = dkd(x, rows.labels, settings.dkd_weights)  # type: ignore[arg-type]
    else:
        phi = DIVERGENCES[settings.divergence].phi
        divergence = phi(x.p, x.log_q.exp(), x.log_p, x.log_q, settings.beta).sum(-1)
    return divergence * x.temperature.square().squeeze(-1) if settings.t_squared else divergence


class _Pair(NamedTuple):
    """What a divergence is over, each (..., V); z are the logarithms before a constant of the row."""

    temperature: Tensor  # (..., 1), or a number
    p: Tensor
    log_p: Tensor
    p_z: Tensor
    log_q: Tensor
    q_z: Tensor


def _student_z(rows: _Rows, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """T, and the student's logits / T."""
    temperature = _column(inputs.temperatures, settings.temperature, rows.s)
    return temperature, (standardized(rows.s) if settings.standardize else rows.s) / temperature


def _distributions(rows: _Rows, inputs: Inputs, settings: Settings) -> _Pair:
    at = _column(inputs.teacher_temperatures, settings.teacher_temperature, rows.s)
    teachers = [standardized(t) for t in rows.teachers] if settings.standardize else rows.teachers
    temperature, z = _student_z(rows, inputs, settings)
    return _Pair(temperature, *teacher_distribution(teachers, at, settings), torch.log_softmax(z, -1), z)


def dkd(x: _Pair, labels: Tensor, weights: list[float]) -> Tensor:
    """w_0 * KL of (y, not y) + w_1 * KL over the classes that are not y, (...): Decoupled KD, Zhao et al., CVPR 2022.

    What no class is left for adds 0: of one class, or where the teacher gives the others no probability.
    """
    is_label = torch.zeros_like(x.p, dtype=torch.bool).scatter_(-1, labels, True)
    divergence = torch.zeros_like(x.p[..., 0])
    if weights[0]:
        mass = torch.where(is_label, 0, x.p).sum(-1)
        log_ratio = (x.log_p - x.log_q).gather(-1, labels).squeeze(-1)
        rest_ratio = _log_sum(x.log_p, is_label) - _log_sum(x.log_q, is_label)
        target = times(x.p.gather(-1, labels).squeeze(-1), log_ratio) + times(mass, rest_ratio.squeeze(-1))
        divergence = divergence + weights[0] * target
    if weights[1]:
        p_rest, q_rest = _among_others(x.p_z, is_label), _among_others(x.q_z, is_label)
        divergence = divergence + weights[1] * times(p_rest.exp(), p_rest - q_rest).sum(-1)
    return divergence


def _without(z: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor]:
    """z with the label masked, but 0 in rows that have nothing else, and which those are, (..., 1)."""
    rest = torch.where(is_label, -math.inf, z)
    nothing = (rest == -math.inf).all(-1, keepdim=True)
    return torch.where(nothing, 0, rest), nothing


def _log_sum(z: Tensor, is_label: Tensor) -> Tensor:
    """log of the sum of exp z over the other classes, (..., 1)."""
    rest, nothing = _without(z, is_label)
    return torch.where(nothing, -math.inf, torch.logsumexp(rest, -1, keepdim=True))


def _among_others(z: Tensor, is_label: Tensor) -> Tensor:
    """log of the softmax over the other classes, (..., V); -inf at the label, and where there is no other."""
    rest, nothing = _without(z, is_label)
    return torch.where(nothing, -math.inf, torch.log_softmax(rest, -1))


def row_metrics(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """KDMetrics of each row, (7, ...); NaN in rows that drop out."""
    rows = _rows(student.detach(), inputs, settings)
    nan = torch.full_like(rows.s[..., 0], math.nan)
    soft = hard = kl = teacher_entropy = agreement = accuracy = nan
    best = rows.s.argmax(-1)
    if rows.labels is not None:
        hard = _hard_losses(rows, settings)
        accuracy = (best == rows.labels.squeeze(-1)).to(nan.dtype)
    log_q = torch.log_softmax(_student_z(rows, inputs, settings)[1], -1)
    student_entropy = -times(log_q.exp(), log_q).sum(-1)
    if rows.teachers:
        soft = _soft_losses(rows, inputs, settings)
        x = _distributions(rows, inputs, settings)
        kl = times(x.p, x.log_p - log_q).sum(-1)
        teacher_entropy = -times(x.p, x.log_p).sum(-1)
        one = len(rows.teachers) == 1  # whose logits differ where their probabilities may not
        agreement = (best == (rows.teachers[0] if one else x.log_p).argmax(-1)).to(nan.dtype)
    metrics = KDMetrics(soft, hard, kl, student_entropy, teacher_entropy, agreement, accuracy)
    return torch.where(rows.keep, torch.stack(metrics), math.nan)


def metrics(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """KDMetrics, (7,) or, with reduction "none", (7, ...); (0,) where they are not wanted."""
    if not settings.metrics:
        return no_metrics(student)
    return mean_metrics(row_metrics(student, inputs, settings), row_weights(inputs, settings), settings)


def _reduced(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    rows = row_losses(student, inputs, settings)
    if settings.reduction == "none":
        return rows
    by = divisor(student, row_weights(inputs, settings), inputs, settings)
    if by.tensor is None:
        return rows.sum() / by.number
    by_tensor = by.tensor.to(rows.dtype)
    return torch.where(by_tensor == 0, 0, rows.sum() / torch.where(by_tensor == 0, 1, by_tensor))


def _gradient(student: Tensor, inputs: Inputs, settings: Settings, grad_loss: Tensor | None) -> list[Tensor]:
    check_values(student, inputs, settings)
    with torch.enable_grad(), autograd_included():
        leaf = student.detach().requires_grad_()
        loss = _reduced(leaf, inputs, settings)
        if not loss.requires_grad:  # neither term has a weight
            return [loss, torch.zeros_like(student, memory_format=torch.contiguous_format)]
        (grad,) = torch.autograd.grad(loss, leaf, grad_loss)
    return [loss.detach(), grad.contiguous()]


def loss_grad(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The reduced loss, 0-dim, its gradient, (..., V) in the student's dtype, and `metrics`."""
    loss, grad = _gradient(student, inputs, settings, None)
    return loss, grad, metrics(student, inputs, settings)


def loss_grad_(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """loss_grad with the gradient written over the student's logits."""
    loss, grad, measured = loss_grad(student, inputs, settings)
    student.copy_(grad)
    return loss, measured


def _has_coefficients(settings: Settings) -> bool:
    """Not so the losses of image classifiers, which are more than a sum over p and q."""
    return settings.divergence not in OTHERS and not settings.standardize


def stats(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The loss under `reduction`, row_math.Coefficients of the rows, from which `grad` goes on, and `metrics`."""
    check_values(student, inputs, settings)
    student = student.detach()
    loss = _reduced(student, inputs, settings)
    if _has_coefficients(settings):
        of_rows = pointwise_sums(student, sums(student, inputs, settings), inputs, settings)
        table = row_math.losses_and_coefficients(of_rows, inputs, settings)[1]
    else:
        table = loss.new_zeros(student.shape[:-1].numel(), len(Coefficients._fields))
    return loss, table, metrics(student, inputs, settings)


def _matrix(x: Tensor) -> Tensor:
    """(..., V) as (rows, V)."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _flat(inputs: Inputs) -> Inputs:
    """Each (rows,), the teachers (rows, V)."""
    return Inputs(
        [_matrix(t) for t in inputs.teachers], *(x if x is None or x.dim() == 0 else x.flatten() for x in inputs[1:])
    )


def _exponents(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[_Rows, Tensor, Tensor | None]:
    """The rows, flattened, and the exponents to base 2 of q and p, each (rows, V), before any offset; p's are log2 p
    where it is given, or a mixture. In fp64: an offset may be large, and nothing fuses its subtraction."""
    inputs = _flat(inputs)
    rows = _rows(_matrix(student), inputs, settings)
    rows = rows._replace(s=rows.s.double(), teachers=[t.double() for t in rows.teachers])
    z = _student_z(rows, inputs, settings)[1] / LN2
    if not rows.teachers:
        return rows, z, None
    at = _column(inputs.teacher_temperatures, settings.teacher_temperature, rows.s)
    _, log_p, p_z = teacher_distribution(rows.teachers, at, settings)
    return rows, z, (p_z if row_math.is_softmaxed(inputs, settings) else log_p) / LN2


def _offset(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest exponent of a row, (rows, 1), as a table of this dtype has it."""
    return y.amax(-1, keepdim=True).to(dtype).to(y.dtype)


def _is_label(labels: Tensor, classes: int) -> Tensor:
    """Which classes are the row's label, (rows, classes); none where another shard has it."""
    return torch.arange(classes, device=labels.device).eq(labels)


def sums(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """row_math.Sums of the classes that are here, (rows, columns), phi and psi not among them."""
    rows, y_s, y_t = _exponents(student, inputs, settings)
    y_1, nothing = rows.s / LN2, rows.s.new_zeros(len(rows.s))
    dtype = loss_dtype(student)
    so, ho = (_offset(y, dtype) for y in (y_s, y_1))
    log_q, log_e = (y - torch.where(offset == -math.inf, 0, offset) for y, offset in ((y_s, so), (y_1, ho)))
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
        log_p = y_t - torch.where(to == -math.inf, 0, to)
        p, above = torch.exp2(log_p), log_q - log_p
        x = x._replace(teacher_offset=to.squeeze(-1), teacher_total=p.sum(-1))
        if row_math.shares(settings) is not None:
            x = x._replace(
                over_teacher=over_teacher(p, log_q, above, settings).sum(-1),
                over_student=times(torch.exp2(log_q), above).sum(-1),
            )
    return torch.stack(x, -1).to(dtype)


def _pair(x: Any, y_s: Tensor, y_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, q, log p, log q from exponents, and from the rows' offsets and totals."""
    columns = (c.unsqueeze(-1) for c in (x.student_offset, x.student_total, x.teacher_offset, x.teacher_total))
    so, student_total, to, teacher_total = columns
    log_q = (y_s - torch.where(so == -math.inf, 0, so) - student_total.log2()) * LN2
    log_p = (y_t - torch.where(to == -math.inf, 0, to) - teacher_total.log2()) * LN2
    return log_p.exp(), log_q.exp(), log_p, log_q


def pointwise_sums(student: Tensor, sums: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Sums of all shards with phi and psi of the classes that are here."""
    rows, y_s, y_t = _exponents(student, inputs, settings)
    if y_t is None or row_math.shares(settings) is not None or settings.divergence in OTHERS:
        return sums.clone()
    x = Sums(*sums.double().unbind(-1))
    if not row_math.is_softmaxed(inputs, settings):
        x = x._replace(teacher_total=torch.exp2(-x.teacher_offset))
    p, q, log_p, log_q = pair = _pair(x, y_s, y_t)
    phi, psi = (f(*pair, settings.beta) for f in DIVERGENCES[settings.divergence][:2])
    phi = phi - row_math.first_order(settings) * (p - q)
    return torch.cat([sums[:, :-2], torch.stack((phi.sum(-1), psi.sum(-1)), -1).to(sums.dtype)], -1)


def losses_and_coefficients(student: Tensor, sums: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """row_math.losses_and_coefficients on any device."""
    return row_math.losses_and_coefficients(sums, inputs, settings)


def grad(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> Tensor:  # (..., V)
    """The gradient for the loss's own gradient: (...) with reduction "none", else 0-dim, by row_math.Coefficients."""
    if not _has_coefficients(settings):
        return _gradient(student, inputs, settings, grad_loss)[1]
    check_values(student, inputs, settings)
    student = student.detach()
    rows, y_s, y_t = _exponents(student, inputs, settings)
    of_rows = Coefficients(*stats.double().unbind(-1))
    c = Coefficients(*(column.unsqueeze(-1) for column in of_rows))
    q1 = torch.exp2(rows.s / LN2 - torch.where(c.hard_offset == -math.inf, 0, c.hard_offset)) / c.hard_total
    g = times(c.hard + torch.zeros_like(q1), q1) - c.uniform
    if y_t is not None and settings.alpha:
        p, q, log_p, log_q = pair = _pair(of_rows, y_s, y_t)
        if row_math.shares(settings) is None:
            g = g + c.soft * (DIVERGENCES[settings.divergence].psi(*pair, settings.beta) - q * c.center)
        else:
            g = g + times(q, c.level + times(c.slope + torch.zeros_like(q), log_q - log_p)) - times(c.teacher, p)
    if rows.labels is not None:
        g = g - torch.where(_is_label(rows.labels, g.shape[-1]), c.label, 0)
    if settings.softcap:
        g = torch.where(rows.s == -math.inf, 0, g * (1 - (rows.s / settings.softcap).square()))
    factor = settings.logit_scale * (
        grad_loss.to(g.dtype) / denominator(student, inputs, settings) if settings.reduction != "none" else grad_loss
    )
    g = torch.where(rows.keep.unsqueeze(-1), g * factor.to(g.dtype).expand(student.shape[:-1]).reshape(len(g), 1), 0)
    out = torch.zeros_like(student, memory_format=torch.contiguous_format)
    out[..., : g.shape[-1]] = g.view(*student.shape[:-1], g.shape[-1]).to(student.dtype)
    return out


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
    z = logits.to(loss_dtype(logits))
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
