"""Losses of given probabilities and log-probabilities."""

import math
from typing import Any

import torch
from torch import Tensor

from kdfast.integrations.liger import own
from kdfast.losses import kd_loss


def _is_normalized(log_q: Tensor, kept: Tensor | None) -> bool:
    """Whether the probabilities of each kept row sum to 1, up to the rounding of log_q."""
    squares = kd_loss(
        log_q.detach(), None, alpha=0.0, hard_weight=0.0, z_loss=1.0, row_weight=kept, reduction="none"
    )  # (logsumexp of a row)^2
    return bool((squares <= max(8 * torch.finfo(log_q.dtype).eps, 1e-4) ** 2).all())


def _kl_terms(log_p: Tensor, log_q: Tensor, p: Tensor | None = None) -> Tensor:
    """p log(p / q) of each class, without a sum; 0 where p = 0."""
    p = log_p.exp() if p is None else p
    absent = p == 0
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    return p * (log_p - log_q)


def _jsd_terms(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """beta p log(p / m) + (1 - beta) q log(q / m) of each class, without a sum; 0 where p = q = 0."""
    if beta == 0:
        return _kl_terms(log_p, log_q)
    if beta == 1:
        return _kl_terms(log_q, log_p)
    absent = (log_q == -math.inf) & (log_p == -math.inf)
    log_q, log_p = log_q.masked_fill(absent, 0.0), log_p.masked_fill(absent, 0.0)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    terms = beta * _kl_terms(log_p, log_m) + (1 - beta) * _kl_terms(log_q, log_m)
    return terms.masked_fill(absent, 0.0)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def jsd(
    log_q: Tensor,  # (rows, V), the student's
    log_p: Tensor,  # (rows, V), the teacher's
    shift_labels: Tensor | None = None,  # (rows,)
    beta: float = 0.5,
    ignore_index: int = -100,
    jsd_impl: None = None,
    jsd_mode: None = None,
) -> Tensor:
    """The mean of jsd over the kept rows, of log-probabilities."""
    kept = own.kept_rows(shift_labels, ignore_index)
    if _is_normalized(log_q, kept):
        return kd_loss(log_q, log_p, target="log_probs", divergence="jsd", beta=float(beta), row_weight=kept)
    if kept is not None:
        log_q, log_p = log_q[kept], log_p[kept]
    terms = _jsd_terms(_at_least_float32(log_q), _at_least_float32(log_p.detach()), float(beta))
    return terms.sum() / max(len(log_q), 1)


def kl_div(
    y_pred: Tensor,  # (rows, V), log-probabilities
    y_true: Tensor,  # (rows, V), probabilities, or log-probabilities with log_target
    reduction: str = "batchmean",
    log_target: bool = False,
    eps: float = own.EPS,
) -> Tensor:
    """KL(y_true, y_pred), reduced as F.kl_div does."""
    alpha = 1 / y_pred.shape[-1] if reduction == "mean" else 1.0
    if reduction != "none" and (log_target or eps <= own.EPS) and _is_normalized(y_pred, None):
        target: Any = "log_probs" if log_target else "probs"
        options: Any = {"alpha": alpha, "hard_weight": 0.0, "reduction": own.OVER_ROWS[reduction]}
        return kd_loss(y_pred, y_true, target=target, divergence="forward_kl", **options)
    y_true = _at_least_float32(y_true.detach())
    p, log_p = (y_true.exp(), y_true) if log_target else (y_true, y_true.clamp_min(eps).log())
    terms = _kl_terms(log_p, _at_least_float32(y_pred), p)
    if reduction == "none":
        return terms
    return terms.sum() * alpha / (max(len(terms), 1) if own.OVER_ROWS[reduction] == "mean" else 1)


def tvd(
    p: Tensor,  # (rows, V), the student's probabilities
    q: Tensor,  # (rows, V), the teacher's
    shift_labels: Tensor | None = None,  # (rows,)
    reduction: str = "batchmean",
    ignore_index: int = -100,
) -> Tensor:
    """0.5 |p - q| of each class, or its sum: over the kept rows, over their number, or over their classes."""
    if p.device.type != "cpu":
        arguments = p, q, shift_labels, reduction, ignore_index
        return own.run("LigerTVDLoss", "distances of given probabilities", own.TVD, *arguments)
    rows: Tensor | int = max(len(p), 1)
    if shift_labels is not None:
        ignored = shift_labels == ignore_index
        p, q = (x.masked_fill(ignored.unsqueeze(-1), 0.0) for x in (p, q))
        rows = (~ignored).sum().clamp_min(1)
    terms = 0.5 * (_at_least_float32(p) - _at_least_float32(q.detach())).abs()
    if reduction == "none":
        return terms
    divisors = {"sum": 1, "batchmean": rows, "mean": rows * p.shape[-1]}
    return terms.sum() / divisors[reduction]
