"""The exchange of rows' sums between the processes of a group, in which all raise where one of them is wrong."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast import rows
from kdfast.arguments import OTHER_SHARD, Inputs
from kdfast.processes import DTYPES, FAILED, Agreement, Facts, check_states, gather
from kdfast.row_math import Sums

IGNORED = OTHER_SHARD + 1  # ignore_index of local labels, which no class of a shard can be


def local_indices(indices: Tensor, start: int | Tensor, classes: int) -> Tensor:
    """Classes counted from a shard's first one; those of other shards, and of none, are OTHER_SHARD."""
    indices = indices.long()
    here = (indices >= start) & (indices < start + classes)
    return torch.where(here, indices - start, OTHER_SHARD)


def local_labels(labels: Tensor, ignore_index: int, start: int | Tensor, classes: int) -> Tensor:
    """local_indices of labels; those that are ignored are IGNORED."""
    return torch.where(labels == ignore_index, IGNORED, local_indices(labels, start, classes))


def refuse_missing(missing: Tensor, name: str) -> None:
    """missing: which entries, (rows, K), are wanted and no process has. On a CPU one is an error."""
    if missing.device.type == "cpu" and missing.any():
        row, entry = missing.nonzero()[0].tolist()
        raise IndexError(f"{name}: entry {entry} of row {row} is out of range: no process of the group has this class")


def no_sums(student: Tensor) -> Tensor:
    """The sums of no classes."""
    nothing = torch.zeros(student.shape[:-1].numel(), dtype=rows.loss_dtype(student), device=student.device)
    x = Sums(*[nothing] * len(Sums._fields))
    low = nothing - math.inf
    return torch.stack(x._replace(student_offset=low, teacher_offset=low, label=low), -1)


class Exchange:
    """What one call tells the other processes, and hears from them."""

    def __init__(self, group: Any, labels: Tensor | None) -> None:
        """labels: as they were given, for an error."""
        self.group, self.labels = group, labels
        self.local_labels: Tensor | None = None  # of all rows, where sums are those of a chunk
        self.agreement: Agreement | None = None
        self.teachers = 0, 0  # Facts' whole and split
        self.is_over = False  # nobody waits for this process

    def begin(self, like: Tensor, classes: int, kept: int = 0, always: bool = False) -> None:
        """Begins the agreement, once, and on a CPU alone: reading it on a GPU would synchronize. like: (..., V)."""
        if self.agreement is None and (always or like.device.type == "cpu"):
            self.agreement = self._agreement(like, classes, kept)

    def check(self) -> None:
        """On a CPU an error, the same in all processes, where one has failed or does not fit the others."""
        if self.agreement is not None and self.agreement.table.device.type == "cpu":
            self.agreement.check()

    def _agreement(self, like: Tensor, classes: int, kept: int = 0) -> Agreement:
        rows, state = like.shape[:-1].numel(), DTYPES.index(like.dtype)
        return Agreement(self.group, Facts(classes, rows, kept, *self.teachers, state), like.device)

    def first_class(self, like: Tensor, classes: int) -> int | Tensor:
        """This process's first class; on a GPU 0-dim, there."""
        sizes, before = self._agreement(like, classes), dist.get_rank(self.group)
        if like.device.type == "cpu":
            self.is_over = True  # where this raises, all processes do
            of_all = sizes.check()
            self.is_over = False
            return sum(of_all[:before])
        return sizes.classes()[:before].sum()

    def fail(self, like: Any) -> None:
        """Tells the other processes that this one has failed, so that they raise instead of waiting for it.

        like: (..., V), the logits or hidden states, or whatever was given for them.
        """
        if self.is_over:
            return
        like = like if isinstance(like, Tensor) and like.dim() else torch.empty(0)
        if like.device.type == "cpu":
            if self.agreement is None:
                Agreement(self.group, Facts(), like.device).classes()
                return
            try:
                self.agreement.check()
            except (RuntimeError, ValueError):
                return  # all processes raise it
        self.sums(no_sums(like), None, like, failed=True)

    def sums(self, own: Tensor, inputs: Inputs | None, student: Tensor, failed: bool = False) -> Tensor:
        """The sums of all processes, (processes, rows, columns). own: (rows, columns).

        Where one has failed, or none has a label: an error on a CPU, NaN in the rows on a GPU.
        """
        on_cpu = student.device.type == "cpu"
        self.check()
        found = own.new_zeros(len(own), 1)
        labels = None if inputs is None else inputs.labels
        if labels is not None:
            found = (labels.reshape(-1, 1) != OTHER_SHARD).to(own.dtype)  # an ignored one counts as found
        state = torch.full_like(found, FAILED if failed else DTYPES.index(student.dtype))
        every = gather(torch.cat([own, found, state], 1), self.group)
        if failed or not len(own):
            return every[..., :-2]
        if on_cpu:
            check_states([int(x) for x in every[:, 0, -1].tolist()])
            if labels is not None and not (is_found := every[..., -2].amax(0) > 0).all():
                self._raise_for_label(is_found)
            return every[..., :-2]
        is_right = every[..., -1].amin(0) != FAILED
        if labels is not None:
            is_right &= every[..., -2].amax(0) > 0
        return torch.where(is_right[:, None], every[..., :-2], math.nan)

    def _raise_for_label(self, is_found: Tensor) -> None:
        if self.local_labels is not None:
            is_found = gather((self.local_labels.flatten() != OTHER_SHARD).to(torch.uint8), self.group).amax(0) > 0
        row = int((~is_found).nonzero()[0])
        label = "a label" if self.labels is None else f"label {self.labels.reshape(-1)[row].item()}"
        raise IndexError(
            f"labels: {label} in row {row} is out of range: no process of the group has it, and it is not ignore_index"
        )
