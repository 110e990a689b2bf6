"""Fake tensors: the shapes and dtypes of each operator's results, which torch.compile traces with."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast import products
from kdfast.arguments import TOKEN_STATS, Heads, Inputs, Settings, metrics_count, take_flat, take_flat_heads
from kdfast.row_math import Coefficients, Sums, table_columns
from kdfast.rows import loss_dtype


def _new_loss(student: Tensor, settings: Settings) -> Tensor:
    shape = student.shape[:-1] if settings.reduction == "none" else ()
    return student.new_empty(shape, dtype=loss_dtype(student))


def _new_metrics(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """KDMetrics as one tensor: (7,) or (7, ...); (0,) where none are wanted. A sparse teacher has 9."""
    shape = (0,)
    if settings.metrics:
        shape = (metrics_count(inputs), *(student.shape[:-1] if settings.reduction == "none" else ()))
    return student.new_empty(shape, dtype=loss_dtype(student))


def _new_grad(student: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return student.new_empty(student.shape, dtype=dtype)


def _new_table(student: Tensor, columns: int) -> Tensor:
    rows = math.prod(student.shape[:-1])  # .numel() would fix a symbolic size
    return student.new_empty((rows, columns), dtype=loss_dtype(student))


def _new_head_gradients(heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = heads.student_hidden, heads.student_weight
    wanted = (heads.grad_hidden, hidden.shape), (heads.grad_weight, weight.shape), (heads.grad_bias, weight.shape[:1])
    dtype = products.grad_dtype(hidden.dtype)
    grad_hidden, grad_weight, grad_bias = (
        hidden.new_empty(shape if want else (0,), dtype=dtype) for want, shape in wanted
    )
    return grad_hidden, grad_weight, grad_bias


def _token_stats(logits: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, rows = loss_dtype(logits), logits.shape[:-1]
    return (
        logits.new_empty(ids.shape, dtype=dtype),
        logits.new_empty(rows if entropy else (0,), dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        _new_table(logits, TOKEN_STATS),
    )


def _linear_token_stats(hidden: Tensor, weight: Tensor, bias: Any, ids: Tensor, *numbers: Any) -> tuple[Tensor, ...]:
    return _token_stats(hidden, ids, numbers[-3])


def _linear_token_grad(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    *_, chunk_rows, dtype, grad_hidden, grad_weight, grad_bias = others
    wanted = grad_hidden, grad_weight, grad_bias
    return _new_head_gradients(Heads(hidden, weight, bias, None, None, None, chunk_rows, dtype, *wanted))


_FAKES: dict[str, Callable[..., Any]] = {
    "loss_grad": take_flat(
        lambda student, inputs, settings: (
            _new_loss(student, settings),
            _new_grad(student),
            _new_metrics(student, inputs, settings),
        )
    ),
    "loss_grad_": take_flat(
        lambda student, inputs, settings: (_new_loss(student, settings), _new_metrics(student, inputs, settings))
    ),
    "loss_grad_as": take_flat(
        lambda student, dtype, inputs, settings: (
            _new_loss(student, settings),
            _new_grad(student, dtype),
            _new_metrics(student, inputs, settings),
        )
    ),
    "sums": take_flat(lambda student, inputs, settings: _new_table(student, len(Sums._fields))),
    "pointwise_sums": take_flat(lambda student, sums, inputs, settings: _new_table(student, len(Sums._fields))),
    "losses_and_coefficients": take_flat(
        lambda student, sums, inputs, settings: (
            sums.new_empty(sums.shape[:1]),
            _new_table(student, len(Coefficients._fields)),
        )
    ),
    "grad": take_flat(lambda student, stats, grad_loss, inputs, settings: _new_grad(student)),
    "grad_": take_flat(lambda student, stats, grad_loss, inputs, settings: None),
    "grad_as": take_flat(lambda student, dtype, stats, grad_loss, inputs, settings: _new_grad(student, dtype)),
    "linear_loss_grad": take_flat_heads(
        lambda heads, inputs, settings: (
            _new_loss(heads.student_hidden, settings),
            *_new_head_gradients(heads),
            _new_metrics(heads.student_hidden, inputs, settings),
        )
    ),
    "linear_grad": take_flat_heads(lambda heads, stats, grad_loss, inputs, settings: _new_head_gradients(heads)),
    "scale_": lambda grad, factor: None,
    "token_stats": lambda logits, ids, *numbers: _token_stats(logits, ids, numbers[-1]),
    "token_grad": lambda logits, *others: _new_grad(logits),
    "token_grad_as": lambda logits, dtype, *others: _new_grad(logits, dtype),
    "linear_token_stats": _linear_token_stats,
    "linear_token_grad": _linear_token_grad,
    "tempered_softmax": lambda logits, temperatures, temperature, log, dtype: logits.new_empty(
        logits.shape, dtype=dtype
    ),
    "tempered_softmax_backward": lambda grad, output, temperatures, temperature, log, dtype: output.new_empty(
        output.shape, dtype=dtype
    ),
}


def fake(name: str, namespace: str) -> Callable[..., Any]:
    """The fake implementation of an operator of a namespace."""
    if name in _FAKES:
        return _FAKES[name]

    def stats(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
        columns = table_columns(namespace, student.device.type, len(inputs.teachers), inputs.indices)
        table = _new_table(student, columns)
        return _new_loss(student, settings), table, _new_metrics(student, inputs, settings)

    if name == "stats":
        return take_flat(stats)
    return take_flat_heads(lambda heads, *others: stats(heads.student_hidden, *others))
