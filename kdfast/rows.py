"""The rows of a loss: which are kept, their weights, the divisor of their sum, and the checks of per-row values."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.arguments import OTHER_SHARD, Inputs, Settings


def loss_dtype(student: Tensor) -> torch.dtype:
    """The dtype of losses and sums: fp32, for fp64 logits fp64."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def as_matrix(x: Tensor) -> Tensor:
    """(..., n) as (rows, n)."""
    return x.reshape(-1, x.shape[-1])


def kept_rows(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Which rows, (...), are kept: not ignored, and not of weight 0."""
    keep = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
    if inputs.labels is not None:
        keep &= inputs.labels != settings.ignore_index
    if inputs.row_weight is not None:
        keep &= inputs.row_weight != 0
    return keep


def row_weights(inputs: Inputs, settings: Settings) -> Tensor | None:
    """Each row's weight, (...), 0 in ignored rows, whatever row_weight holds there; None where all are 1.

    Written for few launches: on a GPU each conversion, and each Python number in torch.where, is one.
    """
    labels, weight = inputs.labels, inputs.row_weight
    if labels is None:
        return weight
    dtype = weight.dtype if weight is not None and weight.is_floating_point() else torch.float32
    keep = torch.ne(labels, settings.ignore_index, out=torch.empty(labels.shape, dtype=dtype, device=labels.device))
    if weight is None:
        return keep
    if weight.dtype != dtype:
        return keep.mul_(weight)
    return torch.ops.aten.threshold_backward(weight, keep, 0.5)  # the weight where keep is above 0.5, else 0


class Divisor(NamedTuple):
    """The divisor of the sum of the rows' losses."""

    number: float  # 1 where there is a tensor
    tensor: Tensor | None  # 0-dim; where it is 0, no row is kept, and the loss is 0


def sums_weights(inputs: Inputs, settings: Settings) -> bool:
    """Whether the divisor is the sum of the rows' weights, which are not all 1."""
    given = inputs.labels is not None or inputs.row_weight is not None
    return given and settings.reduction == "mean" and inputs.normalizer is None and not settings.divisor


def divisor(student: Tensor, weights: Tensor | None, inputs: Inputs, settings: Settings) -> Divisor:
    """The divisor under `reduction`; weights: the result of row_weights where sums_weights."""
    rows = student.shape[:-1].numel()
    if settings.reduction == "batchmean":
        return Divisor(max(1.0, float(student.shape[0]) if student.dim() > 1 else 1.0), None)
    if settings.reduction != "mean":
        return Divisor(1.0, None)
    if inputs.normalizer is not None:
        return Divisor(1.0, inputs.normalizer.detach())
    if settings.divisor:
        return Divisor(settings.divisor, None)
    if weights is None:
        return Divisor(max(1.0, float(rows)), None)
    return Divisor(1.0, weights.sum(dtype=loss_dtype(student)))


def denominator(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """The divisor as a 0-dim tensor of the loss's dtype."""
    number, tensor = divisor(student, row_weights(inputs, settings), inputs, settings)
    dtype = loss_dtype(student)
    return torch.full((), number, dtype=dtype, device=student.device) if tensor is None else tensor.to(dtype)


def reduce_losses(losses: Tensor, settings: Settings) -> Tensor:
    """The rows' shares of the loss, (...), or with a reduction their sum."""
    return losses if settings.reduction == "none" else losses.sum()


def mean_metrics(metrics: Tensor, weights: Tensor | None, settings: Settings) -> Tensor:
    """KDMetrics under `reduction` from those of all rows, (7, ...): (7,), NaN where no row is kept; or unchanged."""
    if settings.reduction == "none":
        return metrics
    if weights is None:
        return metrics.flatten(1).mean(1) if metrics.dim() > 1 else metrics
    weights = weights.to(metrics.dtype)
    total = torch.where(weights != 0, metrics * weights, 0)  # a dropped row's metrics may be NaN
    return (total.flatten(1).sum(1) if total.dim() > 1 else total) / weights.sum()


def no_metrics(student: Tensor) -> Tensor:
    return torch.empty(0, dtype=loss_dtype(student), device=student.device)


def check_values(student: Tensor, inputs: Inputs, settings: Settings) -> None:
    """Raises the errors that depend on a tensor's values. On a GPU it does nothing: reading them would synchronize."""
    if student.device.type != "cpu":
        return
    vocab = settings.vocab_size if settings.vocab_size >= 0 else student.shape[-1]
    kept = kept_rows(student, inputs, settings).flatten()  # other rows may hold anything
    if inputs.labels is not None:
        labels = inputs.labels.flatten()
        bad = kept & ((labels < 0) | (labels >= vocab)) & (labels != OTHER_SHARD)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"labels: label {int(labels[row])} in row {row} is out of range: with V = {vocab} it must be in "
                f"[0, {vocab - 1}] or ignore_index ({settings.ignore_index})"
            )
    check_row_values("row_weight", inputs.row_weight, kept, may_be_0=True)
    check_row_values("temperature", inputs.temperatures, kept)
    check_row_values("teacher_temperature", inputs.teacher_temperatures, kept)
    if inputs.indices is not None:
        from kdfast.sparse import check_entries

        check_entries(student, inputs, settings, vocab)


def check_row_values(name: str, value: Tensor | None, kept: Tensor, may_be_0: bool = False) -> None:
    """Raises for a value, (...), that is negative or not finite, of rows that are kept, (rows,)."""
    if value is None:
        return
    value = value.flatten().double()
    bad = kept & ~(((value >= 0) if may_be_0 else (value > 0)) & value.isfinite())
    if bad.any():
        row = int(bad.nonzero()[0])
        rule = ">= 0" if may_be_0 else "> 0"
        raise ValueError(f"{name}: {value[row].item():g} in row {row}, but it must be finite and {rule}")
