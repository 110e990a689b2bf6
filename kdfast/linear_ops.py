"""The fused linear losses: a few rows' logits at a time, and what the row kernels make of them.

For a chunk of rows, with hidden states h (rows, H) and a head W (V, H), b (V,):

    s = h W^T + b        the student's logits, and the teacher's likewise
    g = d loss / d s     by the row kernels, in the place of s
    d h = g W,  d W += g^T h,  d b += the sum of g over the rows

so each product that has to be done is done once, and two chunks of logits are all that there is of size V beside the
gradient of W. The loss's denominator is taken over all rows beforehand, so a mean is exact whatever the chunks.

The functions named like the operators of ops.py are their implementation on every device, over the row operators of
one backend, `ops`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kdfast.arguments import Heads, Inputs, KDMetrics, Settings, measured_apart
from kdfast.chunks import Chunk, Chunks
from kdfast.row_math import table_columns


def loss_grad(
    ops: Any, heads: Heads, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reduced loss, its gradients in hidden states, weight and bias, (0,) where not wanted, and the metrics."""
    chunks, gradients = Chunks(heads, inputs, settings), Gradients(heads)
    results = Results(chunks, settings)
    for chunk in chunks:
        of_loss, left, apart = measured_apart(ops, chunk.logits, chunk.inputs, chunks.settings)
        loss, metrics = ops.loss_grad_(chunk.logits, *of_loss, *left)
        gradients.add(chunk, chunks)
        results.add(chunk, loss, metrics if apart is None else apart)
    return results.loss(), *gradients.done(chunks.divisor), results.metrics()


def stats(ops: Any, heads: Heads, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The loss under `reduction`, the table of all rows, from which `grad` goes on, and the metrics."""
    chunks = Chunks(heads, inputs, settings)
    results = Results(chunks, settings)
    columns = table_columns(ops.name, chunks.hidden.device.type, len(inputs.teachers))
    collected = chunks.hidden.new_zeros((chunks.rows, columns), dtype=chunks.loss_dtype)
    for chunk in chunks:
        of_loss, left, apart = measured_apart(ops, chunk.logits, chunk.inputs, chunks.settings)
        loss, of_chunk, metrics = ops.stats(chunk.logits, *of_loss, *left)
        collected[chunk.rows, : of_chunk.shape[1]] = of_chunk  # which has fewer where its loss reads no teacher
        results.add(chunk, loss, metrics if apart is None else apart)
    return results.loss(), collected, results.metrics()


def grad(
    ops: Any, heads: Heads, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for the gradients of the rows' losses, (...), of reduction "none"."""
    chunks, gradients = Chunks(heads, inputs, settings), Gradients(heads)
    grad_loss = grad_loss.flatten()
    for chunk in chunks:
        ops.grad_(chunk.logits, stats[chunk.rows], grad_loss[chunk.rows], *chunk.inputs, *chunks.settings)
        gradients.add(chunk, chunks)
    return gradients.done(chunks.divisor)


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the gradients that forward makes: float16's wait in fp32 for the loss scaler's factor, see autograd.py."""
    return torch.float32 if dtype == torch.float16 else dtype


class Gradients:
    """The gradients as chunks add to them."""

    def __init__(self, heads: Heads) -> None:
        hidden, weight = heads.student_hidden, heads.student_weight
        self.none, self.shape = hidden, hidden.shape
        self.hidden = self.weight = self.bias = None
        self.dtypes = [grad_dtype(x.dtype) for x in (hidden, weight, weight)]
        wide = torch.promote_types(grad_dtype(weight.dtype), heads.accumulate_dtype)
        if heads.grad_hidden:
            self.hidden = hidden.new_zeros((math.prod(self.shape[:-1]), self.shape[-1]), dtype=self.dtypes[0])
        if heads.grad_weight:
            self.weight = weight.new_empty(weight.shape, dtype=wide)
        if heads.grad_bias:
            self.bias = weight.new_zeros(len(weight), dtype=torch.promote_types(weight.dtype, torch.float32))
        self.first = True

    def add(self, chunk: Chunk, chunks: Chunks) -> None:
        """Of a chunk whose logits have become their gradient."""
        student = chunks.student.head
        if self.bias is not None:
            self.bias[: chunks.vocab] += chunk.logits.sum(0, dtype=self.bias.dtype)
        if self.hidden is None and self.weight is None:
            return
        gradient = chunk.logits.to(student.operand_dtype)
        if self.hidden is not None:
            self.hidden[chunk.rows] = student.to_hidden(gradient).to(self.hidden.dtype)
        if self.weight is not None:
            student.add_to_weight(gradient, chunk.hidden, self.weight[: chunks.vocab], self.first)
            if self.first:
                self.weight[chunks.vocab :] = 0
        self.first = False

    def done(self, divisor: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if self.first and self.weight is not None:
            self.weight.zero_()
        results = []
        for total, dtype in zip((self.hidden, self.weight, self.bias), self.dtypes, strict=True):
            if total is None:
                results.append(self.none.new_empty(0, dtype=dtype))
                continue
            total = total if divisor is None else total.div_(divisor)
            results.append(total.to(dtype))
        if self.hidden is not None:
            results[0] = results[0].view(self.shape)
        return results[0], results[1], results[2]


class Results:
    """Losses and metrics as chunks add to them."""

    def __init__(self, chunks: Chunks, settings: Settings) -> None:
        self.chunks, self.by_row, self.wanted = chunks, settings.reduction == "none", settings.metrics
        self.losses: list[Tensor] = []
        self.metrics_of_chunks: list[Tensor] = []
        self.weights: list[Tensor] = []
        if self.by_row:
            self.of_rows = chunks.hidden.new_zeros(chunks.rows, dtype=chunks.loss_dtype)
            self.metrics_of_rows = self.of_rows.new_full((len(KDMetrics._fields), chunks.rows), math.nan)

    def add(self, chunk: Chunk, loss: Tensor, metrics: Tensor) -> None:
        if self.by_row:
            self.of_rows[chunk.rows] = loss
            if self.wanted:
                self.metrics_of_rows[:, chunk.rows] = metrics
            return
        self.losses.append(loss)
        if self.wanted:  # means over the chunk, with the loss's weights
            weight = chunk.inputs.row_weight
            weight = loss.new_ones(len(chunk.logits)) if weight is None else weight.to(loss.dtype)
            total = (weight if chunk.kept is None else torch.where(chunk.kept, weight, 0)).sum()
            self.weights.append(total)
            self.metrics_of_chunks.append(torch.where(total == 0, 0, metrics * total))

    def loss(self) -> Tensor:
        if self.by_row:
            return self.of_rows.view(self.chunks.shape)
        if not self.losses:
            return self.chunks.hidden.new_zeros((), dtype=self.chunks.loss_dtype)
        total = torch.stack(self.losses).sum()
        return total if self.chunks.divisor is None else total / self.chunks.divisor

    def metrics(self) -> Tensor:
        like = self.chunks.hidden
        if not self.wanted:
            return like.new_empty(0, dtype=self.chunks.loss_dtype)
        if self.by_row:
            return self.metrics_of_rows.view(len(KDMetrics._fields), *self.chunks.shape)
        if not self.weights:
            return like.new_full((len(KDMetrics._fields),), math.nan, dtype=self.chunks.loss_dtype)
        return torch.stack(self.metrics_of_chunks).sum(0) / torch.stack(self.weights).sum()  # 0 / 0 where none is kept
