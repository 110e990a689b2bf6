"""Cross-entropies of logits and of a head, without a teacher."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdfast.integrations.liger import own
from kdfast.linear import linear_kd_loss
from kdfast.linear_tokens import linear_token_log_probs
from kdfast.losses import kd_loss
from kdfast.options import Reduction

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # loss, z-loss, accuracy, predicted classes


def cross_entropy(
    _input: Tensor,  # (rows, V)
    target: Tensor,  # (rows,)
    weight: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> Outputs:
    """Cross-entropy and lse_square_scale * logsumexp^2. Unlike Liger's it leaves the logits as they are."""
    options = ignore_index, lse_square_scale, label_smoothing, reduction, softcap
    returns = return_z_loss, return_token_accuracy
    reason = _reason(weight, lse_square_scale, label_smoothing, any(returns))
    if reason:
        arguments = _input, target, weight, *options, *returns, return_predicted_tokens
        return own.run("LigerCrossEntropyLoss", reason, own.CROSS_ENTROPY, *arguments)
    row_weight = None if weight is None else _weights_of_labels(weight, target, ignore_index)
    loss = partial(kd_loss, _input, None, target, row_weight=row_weight)
    predicted = None
    if return_predicted_tokens:
        predicted = _input.detach().argmax(-1).masked_fill(target == ignore_index, -1)
    return *_hard_term(loss, target, *options, *returns), predicted


def fused_linear_cross_entropy(
    _input: Tensor,  # (rows, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (rows,)
    bias: Tensor | None = None,  # (V,)
    ce_weight: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    *chunks: Any,  # sizes of chunks and names of kernels
) -> Outputs:
    """cross_entropy of a head's logits. use_token_scaling weighs each row by its label's probability, detached."""
    options = ignore_index, lse_square_scale, label_smoothing, reduction, softcap
    returns = return_z_loss, return_token_accuracy
    reason = _reason(ce_weight, lse_square_scale, label_smoothing, any(returns) or use_token_scaling)
    if return_predicted_tokens:
        reason = "return_predicted_tokens"
    elif use_token_scaling and any(returns):
        reason = "use_token_scaling with other outputs than the loss"
    if reason:
        arguments = _input, weight, target, bias, ce_weight, *options, return_z_loss, accum_dtype, use_token_scaling
        arguments += return_token_accuracy, return_predicted_tokens, *chunks
        return own.run("LigerFusedLinearCrossEntropyLoss", reason, own.LINEAR_CROSS_ENTROPY, *arguments)
    rows: dict[str, Any] = {}
    if ce_weight is not None:
        rows = {"row_weight": _weights_of_labels(ce_weight, target, ignore_index)}
    elif use_token_scaling:
        rows = {"row_weight": _probabilities(_input, weight, target, bias, softcap, ignore_index)}
        if reduction == "mean":  # over the number of rows, not over the sum of the weights
            rows["normalizer"] = (target != ignore_index).sum()
    accumulate = accum_dtype or torch.float32
    head = partial(linear_kd_loss, _input, weight, None, None, target, student_bias=bias, accumulate_dtype=accumulate)
    return *_hard_term(partial(head, **rows), target, *options, *returns), None


def _reason(weight: Tensor | None, z_loss: float, label_smoothing: float, others: bool) -> str:
    """What kdfast does not compute: a class's weight as its rows' holds for the plain cross-entropy alone."""
    if weight is not None and (z_loss or label_smoothing or others):
        return "weights of classes with smoothing, z-loss, token scaling or other outputs than the loss"
    return ""


def _weights_of_labels(weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return weight[target.masked_fill(target == ignore_index, 0)]


@torch.no_grad()
def _probabilities(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None, ignore_index: int
) -> Tensor:
    tokens = linear_token_log_probs(hidden, weight, target, bias=bias, softcap=softcap, ignore_index=ignore_index)
    return tokens.log_probs.exp()


def _hard_term(
    loss_of: Callable[..., Any],
    target: Tensor,
    ignore_index: int,
    lse_square_scale: float,
    label_smoothing: float,
    reduction: Reduction,
    softcap: float | None,
    return_z_loss: bool,
    return_token_accuracy: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, its z-loss and the accuracy, the latter two detached."""
    wants_metrics = return_z_loss or return_token_accuracy
    loss = loss_of(
        alpha=0.0,
        z_loss=lse_square_scale,
        label_smoothing=label_smoothing,
        softcap=softcap,
        ignore_index=ignore_index,
        reduction=reduction,
        return_metrics=wants_metrics,
    )
    if not wants_metrics:
        return loss, None, None
    loss, metrics = loss
    ignored = target == ignore_index
    hard, accuracy = metrics.hard, metrics.accuracy
    if reduction == "none":
        accuracy = accuracy.masked_fill(ignored, 0.0)
    elif reduction == "sum":
        hard = hard * (~ignored).sum()
    z_loss = (loss.detach() - hard).masked_fill(ignored if reduction == "none" else ignored.all(), 0.0)
    return loss, z_loss if return_z_loss else None, accuracy if return_token_accuracy else None
