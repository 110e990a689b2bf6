"""Rows in chunks, and each chunk's logits: what the fused linear losses go over.

Rows that drop out are left out of the products. On a GPU, where to know how many they are would mean to wait for it,
they take part as zeros.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast import reference
from kdfast.arguments import Heads, Inputs, Settings
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


class Chunk(NamedTuple):
    rows: slice | Tensor  # which of all
    hidden: Tensor  # (rows, H)
    logits: Tensor  # (rows, V)
    inputs: Inputs  # the rows' own
    kept: Tensor | None  # (rows,); None: all


class Chunks:
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
            if inputs.normalizer is None:
                total = torch.where(total == 0, 1, total)  # of no rows
            if hidden.dtype == torch.float16:
                # neither a mean's gradient nor a row's weight is known to fit into a float16 factor of a product
                if self.inputs.weight is not None and len(self.inputs.weight):
                    weight = self.inputs.weight.to(total.dtype)
                    largest = weight.max()
                    largest = torch.where(largest == 0, 1, largest)
                    self.inputs, total = self.inputs._replace(weight=weight / largest), total / largest
                self.divisor, settings = total, settings._replace(reduction="sum", divisor=0.0)
            else:
                settings = settings._replace(reduction="mean", divisor=0.0)
                self.inputs = self.inputs._replace(normalizer=total)
        self.settings = settings

    def __iter__(self) -> Iterator[Chunk]:
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
            yield Chunk(rows, hidden, student[: part.stop - start], Inputs(teachers, *columns), kept)

    def _logits(self, of: Head, hidden: Tensor, rows: slice | Tensor, kept: Tensor | None, out: Tensor) -> Tensor:
        """Writes the logits of some rows to the first of `out`; returns the rows' hidden states as an operand."""
        hidden = hidden[rows].to(of.operand_dtype)
        if kept is not None:
            hidden = torch.where(kept.unsqueeze(-1), hidden, 0)
        of.logits(hidden, out[: len(hidden)])
        return hidden


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
