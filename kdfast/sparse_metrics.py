"""SparseKDMetrics: of operators that make nothing of the logits' size, and K + 1 numbers a row."""

import math
from typing import Any

import torch
from torch import Tensor

from kdfast.arguments import Inputs, KDMetrics, Settings, SparseKDMetrics
from kdfast.divergences import times
from kdfast.reference import as_column
from kdfast.rows import kept_rows, mean_metrics, row_weights
from kdfast.sparse_rows import entries_of, is_given, soft_losses


def reduced_metrics(ops: Any, student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """(9,) or, with reduction "none", (9, ...)."""
    student = student.detach()
    own = student_metrics(ops, student, inputs, settings)
    entries = entries_of(student, inputs, settings)
    log_p = entries.log_p if is_given(settings) else torch.log_softmax(entries.log_p, -1)
    log_q_k, _, log_rest, _ = ops.token_stats(
        student, entries.indices, inputs.temperatures, settings.temperature, settings.logit_scale, settings.softcap,
        settings.vocab_size, False,
    )  # fmt: skip
    log_q = torch.cat([log_q_k, log_rest.unsqueeze(-1)], -1)
    if settings.missing == "conditional":
        is_empty = (entries.indices < 0).all(-1, keepdim=True)
        rest = torch.where(is_empty, 0, -math.inf).to(log_q.dtype)
        log_q = torch.log_softmax(torch.cat([log_q_k, rest], -1), -1)
    p = log_p.exp()
    soft = soft_losses(log_p, log_q, as_column(inputs.temperatures, settings.temperature, p), settings)
    at = entries.log_p[..., :-1].argmax(-1, keepdim=True)
    likeliest = entries.indices.gather(-1, at).squeeze(-1)
    metrics = SparseKDMetrics(
        soft=soft,
        hard=own.hard,
        kl=times(p, log_p - log_q).sum(-1),
        student_entropy=own.student_entropy,
        teacher_entropy=-times(p, log_p).sum(-1),
        agreement=(_argmax(student, settings) == likeliest).to(soft.dtype),
        accuracy=own.accuracy,
        student_mass=log_q_k.exp().sum(-1),
        teacher_mass=entries.log_p[..., :-1].exp().sum(-1),
    )
    table = torch.where(kept_rows(student, inputs, settings), torch.stack(tuple(metrics)), math.nan)
    return mean_metrics(table, row_weights(inputs, settings), settings)


def student_metrics(ops: Any, student: Tensor, inputs: Inputs, settings: Settings) -> KDMetrics:
    """Of each row, (...); those that need a teacher are NaN."""
    alone = inputs._replace(teachers=[], indices=None, teacher_temperatures=None, normalizer=None)
    settings = settings._replace(alpha=0.0, missing="", target="logits", reduction="none", divisor=0.0)
    return KDMetrics(*ops.stats(student, *alone, *settings)[2].unbind())


def _argmax(student: Tensor, settings: Settings) -> Tensor:
    """The first of the largest classes, (...). Scaling and softcapping keep the order."""
    return (student if settings.vocab_size < 0 else student[..., : settings.vocab_size]).argmax(-1)
