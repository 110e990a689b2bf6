"""What the processes of a group tell each other, with torch.distributed. Every collective of the losses is here."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FAILED = -1  # in place of the index of a dtype
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13


def gather(x: Tensor, group: Any) -> Tensor:
    """The tensors of all processes, (processes, *x.shape)."""
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    _all_gather(out.view(-1, *x.shape[1:]), x.contiguous(), group=group)
    return out


def gather_later(x: Tensor, group: Any) -> tuple[Tensor, Any]:
    """The same, to be read when wait() of the second result has returned."""
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    return out, _all_gather(out.view(-1, *x.shape[1:]), x.contiguous(), group=group, async_op=True)


def all_reduce(x: Tensor, group: Any, largest: bool = False) -> Tensor:
    """The sum over the processes, or the largest, written over x."""
    dist.all_reduce(x, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
    return x


class Agreement:
    """Each process says how many classes and rows it has, and of which dtype, or that it has failed.

    A message of 32 bytes, sent while sums are computed. Rows are not exchanged before it has come: gloo ends the whole
    program where a message is longer than its receiver expects.
    """

    def __init__(self, group: Any, like: Tensor, classes: int = 0, kept: int = 0, failed: bool = False) -> None:
        """like: (..., V), the logits, or (0,) where they are not known; kept: the rows, where some are left out."""
        rows = like.shape[:-1].numel()
        state = FAILED if failed else DTYPES.index(like.dtype)
        self.table, self.work = gather_later(torch.tensor([classes, rows, kept, state], device=like.device), group)

    def classes(self) -> Tensor:
        """(processes,), on the device."""
        self.work.wait()
        return self.table[:, 0]

    def check(self) -> list[int]:
        """The classes of all processes; an error, the same in all, where one has failed or does not fit the others."""
        self.classes()
        classes, rows, kept, states = self.table.t().tolist()
        check_states(states)
        if len(set(rows)) > 1:
            raise ValueError(f"student_logits: must have the same rows in all processes of process_group, not {rows}")
        if len(set(kept)) > 1:
            raise ValueError(
                f"labels: with row_weight, must keep the same rows in all processes of process_group, not {kept}"
            )
        return classes


def check_states(states: list[int]) -> None:
    for rank, state in enumerate(states):
        if state == FAILED:
            raise RuntimeError(f"process_group: process {rank} of the group failed; its own error says why")
    if len(set(states)) > 1:
        names = ", ".join(str(DTYPES[state]) for state in states)
        raise RuntimeError(f"student_logits: must have one dtype in all processes of process_group, not {names}")
