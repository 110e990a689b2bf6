"""Rows in chunks, and each chunk's logits: what the fused linear losses go over.

Rows that drop out are left out of the products. On a GPU, where to know how many they are would mean to wait for it,
they take part as zeros.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast import rows
from kdfast.arguments import Heads, Inputs, Settings
from kdfast.products import head

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


class Side:
    """The student's hidden states and head, or the teacher's."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int) -> None:
        self.hidden = _matrix(hidden)
        self.head = head(weight.detach()[:vocab], None if bias is None else bias.detach()[:vocab])

    def room(self, rows: int) -> Tensor:
        """For the logits of so many rows."""
        return self.hidden.new_empty((rows, len(self.head.weight)), dtype=self.head.logits_dtype)

    def logits(self, rows: slice | Tensor, kept: Tensor | None, room: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows' hidden states, as an operand, and their logits, which are the first rows of `room` then."""
        hidden = self.hidden[rows].to(self.head.operand_dtype)
        if kept is not None:
            hidden = torch.where(kept.unsqueeze(-1), hidden, 0)
        logits = room[: len(hidden)]
        self.head.logits(hidden, logits)
        return hidden, logits


class Chunks:
    """The rows in chunks, each with its logits, which the next one overwrites."""

    def __init__(self, heads: Heads, inputs: Inputs, settings: Settings) -> None:
        vocab = len(heads.student_weight) if settings.vocab_size < 0 else settings.vocab_size
        settings = settings._replace(vocab_size=vocab)
        rows.check_values(heads.student_hidden, inputs, settings)
        self.student = Side(heads.student_hidden, heads.student_weight, heads.student_bias, vocab)
        self.teacher = None
        if settings.reads_teacher and heads.teacher_hidden is not None and heads.teacher_weight is not None:
            self.teacher = Side(heads.teacher_hidden, heads.teacher_weight, heads.teacher_bias, vocab)
        self.hidden, self.shape = self.student.hidden, heads.student_hidden.shape[:-1]
        self.rows, self.vocab, self.at_once = len(self.hidden), vocab, heads.chunk_rows
        self.loss_dtype = rows.loss_dtype(self.hidden)
        self.inputs = Inputs(
            [t.detach() for t in inputs.teachers],
            _column(inputs.labels),
            _column(inputs.row_weight),
            None,
            _column(inputs.temperatures),
            _column(inputs.teacher_temperatures),
        )
        self._drop(heads.student_hidden, inputs, settings)
        self._divide(heads.student_hidden, inputs, settings)

    def _drop(self, hidden: Tensor, inputs: Inputs, settings: Settings) -> None:
        """Which rows take part: all; on a CPU those that are kept; on a GPU all, the others as zeros."""
        self.kept = self.index = None
        if inputs.labels is None and inputs.row_weight is None:
            return
        kept = rows.kept_rows(hidden, inputs, settings).flatten()
        if not _may_look(hidden):
            self.kept = kept
        elif not kept.all():
            self.index = kept.nonzero().squeeze(-1)

    def _divide(self, hidden: Tensor, inputs: Inputs, settings: Settings) -> None:
        """A chunk's settings, and what is left to divide by at the end."""
        self.divisor: Tensor | None = None
        if settings.reduction != "none":
            total = rows.denominator(hidden, inputs, settings)
            if inputs.normalizer is None:
                total = torch.where(total == 0, 1, total)  # of no rows
            if hidden.dtype == torch.float16:
                # neither a mean's gradient nor a row's weight is known to fit into a float16 factor of a product
                if self.inputs.row_weight is not None and len(self.inputs.row_weight):
                    weight = self.inputs.row_weight.to(total.dtype)
                    largest = weight.max()
                    largest = torch.where(largest == 0, 1, largest)
                    self.inputs, total = self.inputs._replace(row_weight=weight / largest), total / largest
                self.divisor, settings = total, settings._replace(reduction="sum", divisor=0.0)
            else:
                settings = settings._replace(reduction="mean", divisor=0.0)
                self.inputs = self.inputs._replace(normalizer=total)
        self.settings = settings

    def __iter__(self) -> Iterator[Chunk]:
        count = self.rows if self.index is None else len(self.index)
        size = math.ceil(count / max(1, math.ceil(count / self.at_once)))  # chunks of one size
        room = self.student.room(size)
        teacher_room = None if self.teacher is None else self.teacher.room(size)
        for start in range(0, count, max(1, size)):
            part = slice(start, min(start + size, count))
            rows = part if self.index is None else self.index[part]
            kept = None if self.kept is None else self.kept[part]
            teachers = [_rows(t, rows) for t in self.inputs.teachers]
            if self.teacher is not None and teacher_room is not None:
                teachers = [self.teacher.logits(rows, kept, teacher_room)[1]]
            hidden, logits = self.student.logits(rows, kept, room)
            columns = (c if c is None or c.dim() == 0 else c[rows] for c in self.inputs[1:])
            yield Chunk(rows, hidden, logits, Inputs(teachers, *columns), kept)


def _may_look(x: Tensor) -> bool:
    """Whether what it holds may decide what is done: on a GPU that would mean to wait for it."""
    return x.device.type == "cpu"


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
