"""What the processes of a group tell each other, with torch.distributed. Every collective of the losses is here."""

from functools import reduce
from operator import or_
from typing import Any, NamedTuple

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


class Facts(NamedTuple):
    """What a process says of itself."""

    classes: int = 0
    rows: int = 0
    kept: int = 0  # of the rows, where some are left out of the exchange
    whole: int = 0  # a bit for each teacher that has other classes than this process
    split: int = 0  # a bit for each one that has as many, and would be cut elsewhere if it were whole
    state: int = FAILED  # or the index of the logits' dtype


class Agreement:
    """Each process says how many classes and rows it has, and of which dtype, or that it has failed.

    A message of 48 bytes, sent while sums are computed. Rows are not exchanged before it has come: gloo ends the whole
    program where a message is longer than its receiver expects.
    """

    def __init__(self, group: Any, facts: Facts, device: torch.device) -> None:
        self.table, self.work = gather_later(torch.tensor(facts, device=device), group)

    def classes(self) -> Tensor:
        """(processes,), on the device."""
        self.work.wait()
        return self.table[:, 0]

    def check(self) -> list[int]:
        """The classes of all processes; an error, the same in all, where one has failed or does not fit the others."""
        self.classes()
        classes, rows, kept, whole, split, states = self.table.t().tolist()
        check_states(states)
        everywhere = "in all processes of process_group"
        if len(set(rows)) > 1:
            raise ValueError(f"student_logits: must have the same rows {everywhere}, not {rows}")
        if len(set(kept)) > 1:
            raise ValueError(f"labels: with row_weight, must keep the same rows {everywhere}, not {kept}")
        if reduce(or_, whole) & reduce(or_, split):
            raise ValueError(
                f"teacher: must be split {everywhere} or whole in all; one has as many classes as a process has: pass "
                "each process its own"
            )
        return classes


def check_states(states: list[int]) -> None:
    for rank, state in enumerate(states):
        if state == FAILED:
            raise RuntimeError(f"process_group: process {rank} of the group failed; its own error says why")
    if len(set(states)) > 1:
        names = ", ".join(str(DTYPES[state]) for state in states)
        raise RuntimeError(f"student_logits: must have one dtype in all processes of process_group, not {names}")
