"""The fused linear losses: a few rows' logits at a time, and what the row kernels make of them.

For a chunk of rows, with hidden states h (rows, H) and a head W (V, H), b (V,):

    s = h W^T + b        the student's logits, and the teacher's likewise
    g = d loss / d s     by the row kernels, in the place of s
    d h = g W,  d W += g^T h,  d b += the sum of g over the rows

so each product that has to be done is done once, and two chunks of logits are all that there is of size V beside the
gradient of W. The loss's denominator is taken over all rows beforehand, so a mean is exact whatever the chunks.

Rows that drop out are left out of the products. On a GPU, where to know how many they are would mean to wait for it,
they take part as zeros.

The functions named like the operators of ops.py are their implementation on every device, over the row operators of
one backend, `ops`.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast import reference
from kdfast.arguments import Heads, Inputs, KDMetrics, Settings
from kdfast.products import Head, head

LOGITS = 3 << 24  # of a chunk on a CPU, 201 MB in fp32
LEAST_ROWS, MOST_ROWS = 256, 512
GPU_LOGITS = 1 << 28  # 1 GB in fp32
GPU_LEAST_ROWS, GPU_MOST_ROWS = 1024, 4096


def default_rows(vocab: int, device: str) -> int:
    """Rows of a chunk: as few as keep the products efficient.

    Measured on a CPU (two cores of a Zen 3, `python -m benchmarks.linear --chunk-rows`): of the time of whole products
    a call takes with 64, 128, 256, 512 and 1024 rows 1.69, 1.41, 1.15, 1.07 and 1.01 at V = 32000, and 1.52, 1.08,
    1.00, 0.88 and 1.14 at 128000. So 512 rows, but fewer where their logits would take more than 201 MB, and never
    fewer than 256. On a GPU reckoned, not measured: 1024 rows are 8 tiles of 128, enough beside a vocabulary's hundreds
    to fill the multiprocessors, and reading the head once a chunk then takes a small part of a product's time.
    """
    if device == "cpu":
        return min(MOST_ROWS, max(LEAST_ROWS, LOGITS // vocab))
    return min(GPU_MOST_ROWS, max(GPU_LEAST_ROWS, GPU_LOGITS // vocab))


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the gradients that forward makes: float16's wait in fp32 for the loss scaler's factor, see autograd.py."""
    return torch.float32 if dtype == torch.float16 else dtype


def loss_grad(
    ops: Any, heads: Heads, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The reduced loss, its gradients in hidden states, weight and bias, (0,) where not wanted, and the metrics."""
    chunks, gradients = _Chunks(heads, inputs, settings), _Gradients(heads, settings)
    results = _Results(chunks, settings)
    for chunk in chunks:
        loss, metrics = ops.loss_grad_(chunk.logits, *chunk.inputs, *chunks.settings)
        gradients.add(chunk, chunks)
        results.add(chunk, loss, metrics)
    return results.loss(), *gradients.done(chunks.divisor), results.metrics()


def stats(ops: Any, heads: Heads, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The loss under `reduction`, the row statistics of all rows, from which `grad` goes on, and the metrics."""
    chunks = _Chunks(heads, inputs, settings)
    results = _Results(chunks, settings)
    collected = chunks.hidden.new_zeros((chunks.rows, len(reference.STATS)), dtype=chunks.loss_dtype)
    for chunk in chunks:
        loss, of_chunk, metrics = ops.stats(chunk.logits, *chunk.inputs, *chunks.settings)
        collected[chunk.rows] = of_chunk
        results.add(chunk, loss, metrics)
    return results.loss(), collected, results.metrics()


def grad(
    ops: Any, heads: Heads, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for the gradients of the rows' losses, (...), of reduction "none"."""
    settings = settings._replace(metrics=False)
    chunks, gradients = _Chunks(heads, inputs, settings), _Gradients(heads, settings)
    grad_loss = grad_loss.flatten()
    for chunk in chunks:
        ops.grad_(chunk.logits, stats[chunk.rows], grad_loss[chunk.rows], *chunk.inputs, *chunks.settings)
        gradients.add(chunk, chunks)
    return gradients.done(chunks.divisor)


class _Chunk(NamedTuple):
    rows: slice | Tensor  # which of all
    hidden: Tensor  # (rows, H)
    logits: Tensor  # (rows, V)
    inputs: Inputs  # the rows' own
    kept: Tensor | None  # (rows,); None: all


class _Chunks:
    """The rows in chunks, each with its logits, which the next one overwrites."""

    def __init__(self, heads: Heads, inputs: Inputs, settings: Settings) -> None:
        vocab = len(heads.student_weight) if settings.vocab_size < 0 else settings.vocab_size
        settings = settings._replace(vocab_size=vocab)
        reference.check_values(heads.student_hidden, inputs, settings)
        self.hidden, self.shape = _matrix(heads.student_hidden), heads.student_hidden.shape[:-1]
        self.rows, self.vocab, self.at_once = len(self.hidden), vocab, heads.chunk_rows
        self.loss_dtype = torch.float64 if self.hidden.dtype == torch.float64 else torch.float32
        self.student = _head(heads.student_weight, heads.student_bias, vocab)
        self.teacher_hidden = self.teacher = None
        if heads.teacher_hidden is not None and heads.teacher_weight is not None:
            self.teacher_hidden = _matrix(heads.teacher_hidden)
            self.teacher = _head(heads.teacher_weight, heads.teacher_bias, vocab)
        self.inputs = Inputs(
            [t.detach() for t in inputs.teachers],
            _column(inputs.labels),
            _column(inputs.weight),
            None,
            _column(inputs.temperatures),
            _column(inputs.teacher_temperatures),
        )
        self._drop(heads.student_hidden, inputs, settings)
        self._divide(heads.student_hidden, inputs, settings)

    def _drop(self, hidden: Tensor, inputs: Inputs, settings: Settings) -> None:
        """Which rows take part: all; on a CPU those that are kept; on a GPU all, the others as zeros."""
        self.kept = self.index = None
        if inputs.labels is None and inputs.weight is None:
            return
        kept = reference.kept_rows(hidden, inputs, settings).flatten()
        if not _may_look(hidden):
            self.kept = kept
        elif not kept.all():
            self.index = kept.nonzero().squeeze(-1)

    def _divide(self, hidden: Tensor, inputs: Inputs, settings: Settings) -> None:
        """A chunk's settings, and what is left to divide by at the end."""
        self.divisor: Tensor | None = None
        if settings.reduction != "none":
            total = reference.denominator(hidden, inputs, settings)
            total = torch.where(total == 0, 1, total)  # of no rows
            if hidden.dtype == torch.float16:  # a mean's gradient is too small for a float16 factor of a product
                self.divisor, settings = total, settings._replace(reduction="sum", divisor=0.0)
            else:
                settings = settings._replace(reduction="mean", divisor=0.0)
                self.inputs = self.inputs._replace(normalizer=total)
        self.settings = settings

    def __iter__(self) -> Iterator[_Chunk]:
        count = self.rows if self.index is None else len(self.index)
        size = math.ceil(count / max(1, math.ceil(count / self.at_once)))  # chunks of one size
        student = self.hidden.new_empty((size, self.vocab), dtype=self.student.logits_dtype)
        teacher = None
        if self.teacher is not None:
            teacher = self.hidden.new_empty((size, self.vocab), dtype=self.teacher.logits_dtype)
        for start in range(0, count, max(1, size)):
            part = slice(start, min(start + size, count))
            rows = part if self.index is None else self.index[part]
            kept = None if self.kept is None else self.kept[part]
            inputs = self.inputs
            if self.teacher is not None and self.teacher_hidden is not None and teacher is not None:
                self._logits(self.teacher, self.teacher_hidden, rows, kept, teacher)
                teachers = [teacher[: part.stop - start]]
            else:
                teachers = [_rows(t, rows) for t in inputs.teachers]
            hidden = self._logits(self.student, self.hidden, rows, kept, student)
            columns = (c if c is None or c.dim() == 0 else c[rows] for c in inputs[1:])
            yield _Chunk(rows, hidden, student[: part.stop - start], Inputs(teachers, *columns), kept)

    def _logits(self, of: Head, hidden: Tensor, rows: slice | Tensor, kept: Tensor | None, out: Tensor) -> Tensor:
        """Writes the logits of some rows to the first of `out`; returns the rows' hidden states as an operand."""
        hidden = hidden[rows].to(of.operand_dtype)
        if kept is not None:
            hidden = torch.where(kept.unsqueeze(-1), hidden, 0)
        of.logits(hidden, out[: len(hidden)])
        return hidden


class _Gradients:
    """The gradients as chunks add to them."""

    def __init__(self, heads: Heads, settings: Settings) -> None:
        hidden, weight = heads.student_hidden, heads.student_weight
        self.none, self.shape = hidden, hidden.shape
        self.hidden = self.weight = self.bias = None
        self.dtypes = [grad_dtype(x.dtype) for x in (hidden, weight, weight)]
        wide = torch.promote_types(weight.dtype, heads.accumulate_dtype)
        if heads.grad_hidden:
            self.hidden = hidden.new_zeros((math.prod(self.shape[:-1]), self.shape[-1]), dtype=self.dtypes[0])
        if heads.grad_weight:
            self.weight = weight.new_empty(weight.shape, dtype=wide)
        if heads.grad_bias:
            self.bias = weight.new_zeros(len(weight), dtype=torch.promote_types(weight.dtype, torch.float32))
        self.first = True

    def add(self, chunk: _Chunk, chunks: _Chunks) -> None:
        """Of a chunk whose logits have become their gradient."""
        student = chunks.student
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


class _Results:
    """Losses and metrics as chunks add to them."""

    def __init__(self, chunks: _Chunks, settings: Settings) -> None:
        self.chunks, self.by_row, self.wanted = chunks, settings.reduction == "none", settings.metrics
        self.losses: list[Tensor] = []
        self.metrics_of_chunks: list[Tensor] = []
        self.weights: list[Tensor] = []
        if self.by_row:
            of_rows = chunks.hidden.new_zeros(chunks.rows, dtype=chunks.loss_dtype)
            self.of_rows, self.metrics_of_rows = (
                of_rows,
                of_rows.new_full((len(KDMetrics._fields), chunks.rows), math.nan),
            )

    def add(self, chunk: _Chunk, loss: Tensor, metrics: Tensor) -> None:
        if self.by_row:
            self.of_rows[chunk.rows] = loss
            if self.wanted:
                self.metrics_of_rows[:, chunk.rows] = metrics
            return
        self.losses.append(loss)
        if self.wanted:  # means over the chunk, with the loss's weights
            weight = chunk.inputs.weight
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


def _may_look(x: Tensor) -> bool:
    """Whether what it holds may decide what is done: on a GPU that would mean to wait for it."""
    return x.device.type == "cpu"


def _head(weight: Tensor, bias: Tensor | None, vocab: int) -> Head:
    """The products with the first `vocab` classes."""
    return head(weight.detach()[:vocab], None if bias is None else bias.detach()[:vocab])


def _matrix(x: Tensor) -> Tensor:
    """(..., n) as (rows, n)."""
    return x.detach().reshape(-1, x.shape[-1])


def _column(x: Tensor | None) -> Tensor | None:
    """(...) as (rows,)."""
    return None if x is None else x.detach().reshape(-1)


def _rows(teacher: Tensor, rows: slice | Tensor) -> Tensor:
    """Some rows of a teacher's (..., V), of whose layout no copy is made."""
    try:
        return teacher.view(-1, teacher.shape[-1])[rows]
    except RuntimeError:  # strides that no matrix has, as those of a sequence without its last position
        index = rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop, device=teacher.device)
        return teacher[torch.unravel_index(index, teacher.shape[:-1])]
