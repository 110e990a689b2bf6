"""The operators of the fused linear losses: the logits of a chunk of rows at a time, through the row operators.

For a chunk of rows, with hidden states h (rows, H) and a head W (V, H), b (V,):

    s = h W^T + b        the student's logits, and so the teacher's
    g = d loss / d s     by the row kernels, which overwrite s
    d h = g W,  d W += g^T h,  d b += the sum of g over the rows

Each product runs once. The only tensors of size V are two chunks of logits and the gradient of W, and on a GPU g where
the products take 16 bits. The denominator is computed over all rows first, so a mean does not depend on the chunks.

A function named like an operator of ops.py is its implementation on every device, over the row operators of one
backend, `ops`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kdfast.arguments import Heads, Inputs, Settings, metrics_count, metrics_of_unweighted_terms
from kdfast.chunks import Chunk, Chunks
from kdfast.products import SLICE, grad_dtype
from kdfast.row_math import table_columns
from kdfast.rows import as_matrix


def loss_grad(
    ops: Any, heads: Heads, inputs: Inputs, settings: Settings, wide_hidden: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reduced loss, the gradients of hidden states, weight and bias, (0,) where not wanted, and the metrics.

    wide_hidden: that of hidden states is not rounded to their dtype, because others are to be added.
    """
    chunks = Chunks(heads, inputs, settings)
    gradients, results = Gradients(ops, heads, chunks, wide_hidden), Results(chunks, settings)
    for chunk in chunks:
        args = metrics_of_unweighted_terms(ops, chunk.logits, chunk.inputs, chunks.settings)
        chunk_inputs, chunk_settings, own_metrics = args
        if gradients.narrow_dtype is None:
            grad = chunk.logits
            loss, metrics = ops.loss_grad_(grad, *chunk_inputs, *chunk_settings)
        else:
            dtype = gradients.narrow_dtype
            loss, grad, metrics = ops.loss_grad_as(chunk.logits, dtype, *chunk_inputs, *chunk_settings)
        gradients.add(chunk, grad)
        del grad  # its memory is the next one's, unless it is kept
        results.add(chunk, loss, metrics if own_metrics is None else own_metrics)
    return results.loss(), *gradients.result(chunks.divisor), results.metrics()


def stats(ops: Any, heads: Heads, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The loss under `reduction`, the table of all rows, from which `grad` goes on, and the metrics."""
    chunks = Chunks(heads, inputs, settings)
    results = Results(chunks, settings)
    columns = table_columns(ops.name, chunks.hidden.device.type, len(inputs.teachers), inputs.indices)
    table = chunks.hidden.new_zeros((chunks.rows, columns), dtype=chunks.loss_dtype)
    for chunk in chunks:
        args = metrics_of_unweighted_terms(ops, chunk.logits, chunk.inputs, chunks.settings)
        chunk_inputs, chunk_settings, own_metrics = args
        loss, chunk_table, metrics = ops.stats(chunk.logits, *chunk_inputs, *chunk_settings)
        table[chunk.rows, : chunk_table.shape[1]] = chunk_table  # fewer columns where the loss reads no teacher
        results.add(chunk, loss, metrics if own_metrics is None else own_metrics)
    return results.loss(), table, results.metrics()


def grad(
    ops: Any,
    heads: Heads,
    stats: Tensor,
    grad_loss: Tensor,
    inputs: Inputs,
    settings: Settings,
    wide_hidden: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for grad_loss, (...), of reduction "none"."""
    chunks = Chunks(heads, inputs, settings)
    gradients = Gradients(ops, heads, chunks, wide_hidden)
    grad_loss = grad_loss.flatten()
    columns = table_columns(ops.name, chunks.hidden.device.type, len(inputs.teachers), inputs.indices)
    stats = stats[:, :columns].contiguous()  # it has more where metrics alone read the teacher
    for chunk in chunks:
        args = stats[chunk.rows], grad_loss[chunk.rows], *chunk.inputs, *chunks.settings
        if gradients.narrow_dtype is None:
            grad = chunk.logits
            ops.grad_(grad, *args)
        else:
            grad = ops.grad_as(chunk.logits, gradients.narrow_dtype, *args)
        gradients.add(chunk, grad)
        del grad
    return gradients.result(chunks.divisor)


class Gradients:
    """Those of hidden states, weight and bias, to which each chunk adds.

    The products of 16-bit heads on a GPU take g in 16 bits. The row kernels write it so, and not over the logits,
    unless the bias needs its fp32 sums. At 2 H rows or fewer g of all chunks takes no more memory than an fp32
    accumulator of the weight's gradient, (V, H), which each chunk would read and write: g is kept, and multiplied at
    the end.
    """

    def __init__(self, ops: Any, heads: Heads, chunks: Chunks, wide_hidden: bool = False) -> None:
        hidden, weight, head = heads.student_hidden, heads.student_weight, chunks.student.head
        self.like, self.head, self.vocab = hidden, head, chunks.vocab
        self.hidden = self.weight = self.bias = None
        self.dtypes = [grad_dtype(x.dtype) for x in (hidden, weight, weight)]
        if wide_hidden:
            self.dtypes[0] = torch.promote_types(hidden.dtype, torch.float32)
        wide = torch.promote_types(grad_dtype(weight.dtype), heads.accumulate_dtype)
        is_rounded = head.gradient_dtype != head.logits_dtype and (heads.grad_hidden or heads.grad_weight)
        by_the_kernels = is_rounded and not heads.grad_bias and not getattr(ops, "is_sharded", False)
        self.narrow_dtype = head.gradient_dtype if by_the_kernels else None  # None: g overwrites the logits
        is_kept = is_rounded and wide == torch.float32 and chunks.rows <= 2 * weight.shape[1]
        self.kept: list[tuple[Tensor, Tensor]] | None = [] if is_kept else None  # g and h of each chunk
        if heads.grad_hidden:
            self.hidden = hidden.new_zeros(hidden.shape, dtype=self.dtypes[0])
        if heads.grad_weight:
            self.weight = weight.new_empty(weight.shape, dtype=self.dtypes[1] if is_kept else wide)
        if heads.grad_bias:
            self.bias = weight.new_zeros(len(weight), dtype=torch.promote_types(weight.dtype, torch.float32))
        self.first = True

    def add(self, chunk: Chunk, grad: Tensor) -> None:
        """grad: g of the chunk, (rows, V)."""
        if self.bias is not None:
            self.bias[: self.vocab] += grad.sum(0, dtype=self.bias.dtype)
        if self.hidden is None and self.weight is None:
            return
        grad = grad.to(self.head.gradient_dtype)
        if self.hidden is not None:
            as_matrix(self.hidden)[chunk.rows] = self.head.to_hidden(grad).to(self.hidden.dtype)
        if self.weight is not None:
            if self.kept is not None:
                self.kept.append((grad, chunk.hidden))
            else:
                self.head.add_to_weight(grad, chunk.hidden, self.weight[: self.vocab], self.first)
        self.first = False

    def result(self, divisor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """All three, (0,) where not wanted, divided by a number that was left for the end."""
        if self.weight is not None:
            self.weight[0 if self.first else self.vocab :] = 0
            if self.kept:
                self._multiply_kept(self.weight[: self.vocab], divisor)
        results = []
        for total, dtype in zip((self.hidden, self.weight, self.bias), self.dtypes, strict=True):
            if total is None:
                results.append(self.like.new_empty(0, dtype=dtype))
                continue
            if divisor is not None and not (total is self.weight and self.kept):
                total = total.div_(divisor)
            results.append(total.to(dtype))
        return results[0], results[1], results[2]

    def _multiply_kept(self, weight: Tensor, divisor: Tensor | None) -> None:
        """weight = the sum of g^T h over the chunks, by slices that are added up in fp32."""
        sums = weight.new_empty((min(SLICE, len(weight)), weight.shape[1]), dtype=torch.float32)
        for out, *grads in zip(
            weight.split(SLICE), *(grad.split(SLICE, 1) for grad, _ in self.kept or ()), strict=True
        ):
            total = sums[: len(out)]
            for i, (grad, (_, hidden)) in enumerate(zip(grads, self.kept or (), strict=True)):
                self.head.add_to_weight(grad, hidden, total, first=i == 0)
            out.copy_(total if divisor is None else total.div_(divisor))


class Results:
    """Accumulates losses and metrics over chunks."""

    def __init__(self, chunks: Chunks, settings: Settings) -> None:
        self.chunks, self.is_per_row, self.has_metrics = chunks, settings.reduction == "none", settings.metrics
        self.losses: list[Tensor] = []
        self.chunk_metrics: list[Tensor] = []
        self.weights: list[Tensor] = []
        if self.is_per_row:
            self.row_losses = chunks.hidden.new_zeros(chunks.rows, dtype=chunks.loss_dtype)
            self.row_metrics = self.row_losses.new_full((metrics_count(chunks.inputs), chunks.rows), math.nan)

    def add(self, chunk: Chunk, loss: Tensor, metrics: Tensor) -> None:
        if self.is_per_row:
            self.row_losses[chunk.rows] = loss
            if self.has_metrics:
                self.row_metrics[:, chunk.rows] = metrics
            return
        self.losses.append(loss)
        if self.has_metrics:  # weighted means over the chunk
            weight = chunk.inputs.row_weight
            weight = loss.new_ones(len(chunk.logits)) if weight is None else weight.to(loss.dtype)
            total = (weight if chunk.kept is None else torch.where(chunk.kept, weight, 0)).sum()
            self.weights.append(total)
            self.chunk_metrics.append(torch.where(total == 0, 0, metrics * total))

    def loss(self) -> Tensor:
        if self.is_per_row:
            return self.row_losses.view(self.chunks.shape)
        if not self.losses:
            return self.chunks.hidden.new_zeros((), dtype=self.chunks.loss_dtype)
        total = torch.stack(self.losses).sum()
        return total if self.chunks.divisor is None else total / self.chunks.divisor

    def metrics(self) -> Tensor:
        like = self.chunks.hidden
        if not self.has_metrics:
            return like.new_empty(0, dtype=self.chunks.loss_dtype)
        if self.is_per_row:
            return self.row_metrics.view(len(self.row_metrics), *self.chunks.shape)
        if not self.weights:
            return like.new_full((metrics_count(self.chunks.inputs),), math.nan, dtype=self.chunks.loss_dtype)
        return torch.stack(self.chunk_metrics).sum(0) / torch.stack(self.weights).sum()  # 0 / 0 where none is kept
