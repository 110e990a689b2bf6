"""The chunks of rows that the fused linear losses iterate over, and each chunk's logits.

Dropped rows are skipped in the products. On a GPU, where counting them would synchronize, they are zeroed instead.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast import rows
from kdfast.arguments import Heads, Inputs, Settings
from kdfast.products import head_for

LOGITS = 1 << 25  # the most of a chunk on a CPU: 134 MB in fp32
LEAST_ROWS, MOST_ROWS = 256, 512
GPU_LOGITS = 1 << 28  # on a GPU: 1 GB in fp32
GPU_LEAST_ROWS, GPU_MOST_ROWS = 1024, 4096


def default_rows(vocab: int, device: str) -> int:
    """The rows of a chunk: as few as keep the products efficient.

    Measured on a CPU (two cores of a Zen 3, `python -m benchmarks.linear --chunk-rows`): of the time of whole products
    a call takes with 64, 128, 256, 512 and 1024 rows 1.69, 1.41, 1.15, 1.07 and 1.01 at V = 32000, and 1.52, 1.08,
    1.00, 0.88 and 1.14 at 128000. So 512 rows, but fewer where their logits would take more than 134 MB, and at least
    256: at V = 128000 chunks of 256 rows take 1.00 of the time of 342 with kdfast's own products (two cores of a Zen 5,
    bf16, H = 1024 and 2048), 1.04 with MKL's (fp32, H = 512 and 1024), and 0.75 of the memory. On a GPU this is an
    estimate, not measured: 1024 rows are 8 tiles of 128, which with a vocabulary's hundreds of tiles fill the
    multiprocessors, and reading the head once a chunk is a small part of a product's time.
    """
    if device == "cpu":
        return min(MOST_ROWS, max(LEAST_ROWS, LOGITS // vocab))
    return min(GPU_MOST_ROWS, max(GPU_LEAST_ROWS, GPU_LOGITS // vocab))


class Chunk(NamedTuple):
    rows: slice | Tensor  # their indices
    hidden: Tensor  # (rows, H)
    logits: Tensor  # (rows, V)
    inputs: Inputs  # of these rows
    kept: Tensor | None  # (rows,); None: all


class Side:
    """The student's hidden states and head, or the teacher's."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int) -> None:
        self.hidden = rows.as_matrix(hidden.detach())
        bias = None if bias is None else bias.detach()[:vocab]
        self.head = head_for(weight.detach()[:vocab], bias, len(self.hidden))

    def new_logits(self, rows: int) -> Tensor:
        return self.hidden.new_empty((rows, len(self.head.weight)), dtype=self.head.logits_dtype)

    def logits(self, rows: slice | Tensor, kept: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows' hidden states, as an operand, and their logits, written into the first rows of `out`."""
        hidden = self.hidden[rows].to(self.head.hidden_dtype)
        if kept is not None:
            hidden = torch.where(kept.unsqueeze(-1), hidden, 0)
        logits = out[: len(hidden)]
        self.head.logits(hidden, logits)
        return hidden, logits


class Chunks:
    """Iterates over chunks of rows. Each chunk's logits overwrite those of the chunk before."""

    def __init__(self, heads: Heads, inputs: Inputs, settings: Settings) -> None:
        vocab = len(heads.student_weight) if settings.vocab_size < 0 else settings.vocab_size
        settings = settings._replace(vocab_size=vocab)
        rows.check_values(heads.student_hidden, inputs, settings)
        self.student = Side(heads.student_hidden, heads.student_weight, heads.student_bias, vocab)
        self.teacher = None
        if settings.reads_teacher and heads.teacher_hidden is not None and heads.teacher_weight is not None:
            self.teacher = Side(heads.teacher_hidden, heads.teacher_weight, heads.teacher_bias, vocab)
        self.hidden, self.shape = self.student.hidden, heads.student_hidden.shape[:-1]
        self.rows, self.vocab, self.chunk_rows = len(self.hidden), vocab, heads.chunk_rows
        self.loss_dtype = rows.loss_dtype(self.hidden)
        self.inputs = Inputs(
            [t.detach() for t in inputs.teachers],
            _as_column(inputs.labels),
            _as_column(inputs.row_weight),
            None,
            _as_column(inputs.temperatures),
            _as_column(inputs.teacher_temperatures),
            None if inputs.indices is None else rows.as_matrix(inputs.indices),
        )
        self._find_kept_rows(heads.student_hidden, inputs, settings)
        self._set_divisor(heads.student_hidden, inputs, settings)

    def _find_kept_rows(self, hidden: Tensor, inputs: Inputs, settings: Settings) -> None:
        """Sets `index`, on a CPU, or `kept`, on a GPU, where rows may be dropped."""
        self.kept = self.index = None
        if inputs.labels is None and inputs.row_weight is None:
            return
        kept = rows.kept_rows(hidden, inputs, settings).flatten()
        if not _can_read_values(hidden):
            self.kept = kept
        elif not kept.all():
            self.index = kept.nonzero().squeeze(-1)

    def _set_divisor(self, hidden: Tensor, inputs: Inputs, settings: Settings) -> None:
        """Sets the settings of each chunk's loss, and the divisor that is left for the end."""
        self.divisor: Tensor | None = None
        if settings.reduction != "none":
            total = rows.denominator(hidden, inputs, settings)
            total = torch.where(total == 0, math.inf, total)  # no row is kept, and the loss is 0
            if hidden.dtype == torch.float16:
                # a mean's gradient or a row's weight may overflow or underflow as a float16 factor of a product
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
        size = math.ceil(count / max(1, math.ceil(count / self.chunk_rows)))  # of nearly equal chunks
        out = self.student.new_logits(size)
        teacher_out = None if self.teacher is None else self.teacher.new_logits(size)
        for start in range(0, count, max(1, size)):
            part = slice(start, min(start + size, count))
            rows = part if self.index is None else self.index[part]
            kept = None if self.kept is None else self.kept[part]
            teachers = [_select_rows(t, rows) for t in self.inputs.teachers]
            if self.teacher is not None and teacher_out is not None:
                teachers = [self.teacher.logits(rows, kept, teacher_out)[1]]
            hidden, logits = self.student.logits(rows, kept, out)
            columns = (c if c is None or c.dim() == 0 else c[rows] for c in self.inputs[1:])
            yield Chunk(rows, hidden, logits, Inputs(teachers, *columns), kept)


def _can_read_values(x: Tensor) -> bool:
    """Values may steer control flow on a CPU only: reading them on a GPU would synchronize."""
    return x.device.type == "cpu"


def _as_column(x: Tensor | None) -> Tensor | None:
    """(...) as (rows,)."""
    return None if x is None else x.detach().reshape(-1)


def _select_rows(teacher: Tensor, rows: slice | Tensor) -> Tensor:
    """Some rows of a teacher, (..., V), without a copy of the whole."""
    try:
        return teacher.view(-1, teacher.shape[-1])[rows]
    except RuntimeError:  # no view as a matrix, as of sequences without their last position
        index = rows if isinstance(rows, Tensor) else torch.arange(rows.start, rows.stop, device=teacher.device)
        places = []
        for size in reversed(teacher.shape[:-1]):  # torch.unravel_index would copy the shape to the device, and wait
            places.append(index % size)
            index = index // size
        return teacher[tuple(reversed(places))]
