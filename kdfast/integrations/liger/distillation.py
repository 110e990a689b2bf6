"""Distillation losses of logits and of heads."""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdfast.integrations.liger import own
from kdfast.linear import linear_kd_loss
from kdfast.losses import kd_loss

CHUNK_SIZE = 1024  # the chunked loss's default


def fused_ce_tvd(
    student_logits: Tensor,  # (rows, V)
    teacher_logits: Tensor,  # (rows, V)
    target: Tensor,  # (rows,)
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and tvd, of each row: two losses, as the caller may weigh their rows apart."""
    loss = partial(kd_loss, student_logits, labels=target, ignore_index=ignore_index, reduction="none")
    return loss(teacher=None, alpha=0.0), loss(teacher=teacher_logits, alpha=1.0, divergence="tvd")


def fused_linear_jsd(
    student_input: Tensor,  # (rows, H)
    student_weight: Tensor,  # (V, H)
    teacher_input: Tensor,  # (rows, H')
    teacher_weight: Tensor,  # (V, H')
    shift_labels: Tensor | None = None,  # (rows,)
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
    jsd_impl: None = None,
    jsd_mode: None = None,
) -> Tensor:
    """The mean of jsd over the kept rows, without T^2."""
    return linear_kd_loss(
        student_input,
        student_weight,
        teacher_input,
        teacher_weight,
        divergence="jsd",
        beta=float(jsd_beta),
        temperature=temperature,
        t_squared=False,
        row_weight=own.kept_rows(shift_labels, ignore_index),
        accumulate_dtype=accum_dtype or torch.float32,
    )


def fused_linear_kl_div(
    student_input: Tensor,  # (rows, H)
    student_weight: Tensor,  # (V, H)
    target: Tensor,  # (rows, V), probabilities
    shift_labels: Tensor | None = None,  # (rows,)
    reduction: str = "batchmean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    eps: float = own.EPS,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """KL(target, q) without T^2: its sum over the kept rows, divided by their number, or by that of their classes."""
    if reduction not in own.OVER_ROWS:
        raise ValueError(f"reduction: {reduction!r} is not one of {', '.join(map(repr, own.OVER_ROWS))}")
    if eps > own.EPS:
        arguments = student_input, student_weight, target, shift_labels, reduction, ignore_index, temperature, eps
        return own.run("LigerFusedLinearKLDivLoss", f"eps > {own.EPS}", own.LINEAR_KL_DIV, *arguments, accum_dtype)
    return linear_kd_loss(
        student_input,
        student_weight,
        target,
        None,
        target="probs",
        divergence="forward_kl",
        temperature=temperature,
        t_squared=False,
        alpha=1 / target.shape[-1] if reduction == "mean" else 1.0,
        hard_weight=0.0,
        reduction=own.OVER_ROWS[reduction],
        row_weight=own.kept_rows(shift_labels, ignore_index),
        accumulate_dtype=accum_dtype or torch.float32,
    )


def chunked_jsd(
    student_input: Tensor,  # (..., H)
    student_weight: Tensor,  # (V, H)
    teacher_input: Tensor,  # (..., H')
    teacher_weight: Tensor,  # (V', H')
    true_labels: Tensor,  # (...)
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V',)
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    compiled: bool = True,
    chunk_size: int = CHUNK_SIZE,
    return_soft_hard_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """weight_soft_loss * jsd at T, without T^2, + weight_hard_loss * CE: a mean over the kept rows; and both terms."""
    if min(weight_hard_loss, weight_soft_loss) < 0:
        heads = student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias
        weights = weight_hard_loss, weight_soft_loss, beta, ignore_index, temperature, compiled, chunk_size
        arguments = *heads, *weights, return_soft_hard_loss
        return own.run("LigerFusedLinearJSDLoss", "negative weights", own.CHUNKED_JSD, *arguments)
    # Without a hard term labels are only compared with ignore_index, and need not be classes.
    has_hard_term = weight_hard_loss != 0 or return_soft_hard_loss
    labels = true_labels if has_hard_term else None
    row_weight = None if has_hard_term else own.kept_rows(true_labels, ignore_index)
    loss: Any = partial(
        linear_kd_loss,
        student_input,
        student_weight,
        teacher_input,
        teacher_weight,
        labels,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        alpha=weight_soft_loss,
        hard_weight=weight_hard_loss,
        divergence="jsd",
        beta=float(beta),
        temperature=temperature,
        t_squared=False,
        vocab_size=_classes(student_weight, teacher_weight),
        ignore_index=ignore_index,
        row_weight=row_weight,
        chunk_rows=None if chunk_size == CHUNK_SIZE else chunk_size * max(1, student_input[:1, ..., 0].numel()),
    )
    if not return_soft_hard_loss:
        return loss()
    total, metrics = loss(return_metrics=True)
    is_empty = (true_labels == ignore_index).all()  # where the metrics are NaN
    return total, metrics.soft.masked_fill(is_empty, 0.0), metrics.hard.masked_fill(is_empty, 0.0)


def _classes(student_weight: Tensor, teacher_weight: Tensor) -> int | None:
    """vocab_size: the student's where the teacher has more classes."""
    student, teacher = len(student_weight), len(teacher_weight)
    if teacher <= student:
        return None
    warnings.warn(
        f"LigerFusedLinearJSDLoss: the teacher has {teacher} classes and the student {student}; kdfast leaves those "
        "beyond out, where Liger gives the student logits of 0",
        stacklevel=4,
    )
    return student
