"""The row operators for rows whose classes are split over the processes of a group.

Each process has the logits of some classes. Its sums of these are exchanged by one all_gather, 14 numbers a row, and
merged in the order of the processes, so that all have the same bits; a divergence that is not linear exchanges its own
two sums as well. The gradient of a process's logits follows from them without another collective.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast import linear_ops, row_math, rows, sharded_reference
from kdfast.arguments import OTHER_SHARD, Heads, Inputs, Settings, take_flat, take_flat_heads
from kdfast.divergences import OTHERS
from kdfast.processes import gather
from kdfast.row_math import Sums
from kdfast.torch_private import enable_autograd

IGNORED = OTHER_SHARD + 1  # ignore_index of local labels, which no class of a shard can be
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FAILED = -1


def local_labels(labels: Tensor, ignore_index: int, start: int, classes: int) -> Tensor:
    """Labels counted from a shard's first class; those of other shards, and of none, are OTHER_SHARD."""
    here = (labels >= start) & (labels < start + classes)
    return torch.where(labels == ignore_index, IGNORED, torch.where(here, labels - start, OTHER_SHARD))


class ShardedRows:
    """Has the methods that autograd.py and linear_ops.py call of a namespace of operators, over that namespace.

    Losses that have no table of sums are sharded_reference.py's, and so is their gradient.
    """

    name = "kdfast_sharded"

    def __init__(self, ops: Any, group: Any, labels: Tensor | None = None, reduce_hidden: bool = True) -> None:
        """labels: as they were given, for an error; reduce_hidden: whether linear losses sum up grad_hidden."""
        self.ops, self.group, self.labels, self.reduce_hidden = ops, group, labels, reduce_hidden
        self.stats, self.grad, self.grad_ = take_flat(self._stats), take_flat(self._grad), take_flat(self._grad_)
        self.loss_grad_, self.scale_ = take_flat(self._loss_grad_), ops.scale_
        self.linear_loss_grad = take_flat_heads(self._linear_loss_grad)
        self.linear_stats, self.linear_grad = take_flat_heads(self._linear_stats), take_flat_heads(self._linear_grad)

    def fail(self, student: Tensor) -> None:
        """Takes part in the exchange, so that the other processes raise instead of waiting for this one."""
        self._exchange(_no_sums(student), None, student, failed=True)

    # ---- the operators ----

    def _stats(self, student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
        student = student.detach()
        if not has_sums(inputs, settings):
            self._exchange(_no_sums(student), inputs, student)
            with torch.no_grad():
                losses, metrics = sharded_reference.row_losses(student, inputs, settings, self.group)
            if settings.metrics:
                metrics = rows.mean_metrics(metrics, rows.row_weights(inputs, settings), settings)
            no_table = losses.new_zeros(losses.numel(), 0)  # by which _grad knows
            return reduce(losses, student, inputs, settings), no_table, metrics
        every = settings._replace(reduction="sum", divisor=0.0)
        has_classes = _has_classes(student, settings)
        try:
            sums = self.ops.sums(student, *inputs, *every) if has_classes else _no_sums(student)
        except Exception:
            self.fail(student)
            raise
        merged = row_math.merge(self._exchange(sums, inputs, student), inputs, settings)
        if inputs.teachers and row_math.shares(settings) is None:
            own = sums.new_zeros(len(sums), 2)
            if has_classes:
                own = self.ops.pointwise_sums(student, merged, *inputs, *every)[:, -2:]
            merged = torch.cat([merged[:, :-2], gather(own, self.group).sum(0)], 1)
        if has_classes:
            losses, table = self.ops.losses_and_coefficients(student, merged, *inputs, *every)
        else:
            losses, table = row_math.losses_and_coefficients(merged, inputs, every)
        columns = row_math.table_columns(self.ops.name, student.device.type, len(inputs.teachers))
        table = torch.nn.functional.pad(table, (0, columns - table.shape[1]))
        losses = losses.view(student.shape[:-1])
        return reduce(losses, student, inputs, settings), table, rows.no_metrics(student)

    def _grad(self, student: Tensor, table: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
        if not table.shape[1]:
            with torch.enable_grad(), enable_autograd():
                leaf = student.detach().requires_grad_()
                losses, _ = sharded_reference.row_losses(leaf, inputs, settings._replace(metrics=False), self.group)
                loss = reduce(losses, student, inputs, settings)
                (grad,) = torch.autograd.grad(loss, leaf, grad_loss)
            return grad.contiguous()
        if not _has_classes(student, settings):
            return torch.zeros_like(student, memory_format=torch.contiguous_format)
        return self.ops.grad(student, table, grad_loss, *inputs, *settings)

    def _grad_(self, student: Tensor, table: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> None:
        if table.shape[1] and _has_classes(student, settings):
            self.ops.grad_(student, table, grad_loss, *inputs, *settings)
        else:
            student.copy_(self._grad(student, table, grad_loss, inputs, settings))

    def _loss_grad_(self, student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
        loss, table, metrics = self._stats(student, inputs, settings)
        self._grad_(student, table, torch.ones_like(loss), inputs, settings)
        return loss, metrics

    def _linear_loss_grad(self, heads: Heads, inputs: Inputs, settings: Settings) -> tuple[Tensor, ...]:
        loss, *grads, metrics = linear_ops.loss_grad(self, heads, inputs, settings)
        return loss, *self._reduce_hidden(heads, grads), metrics

    def _linear_stats(self, heads: Heads, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
        return linear_ops.stats(self, heads, inputs, settings)

    def _linear_grad(
        self, heads: Heads, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings
    ) -> tuple[Tensor, ...]:
        return self._reduce_hidden(heads, linear_ops.grad(self, heads, stats, grad_loss, inputs, settings))

    def _reduce_hidden(self, heads: Heads, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each process's classes have a part in the gradient of the hidden states."""
        if heads.grad_hidden and self.reduce_hidden:
            wide = grads[0].to(torch.promote_types(grads[0].dtype, torch.float32))
            dist.all_reduce(wide, group=self.group)
            grads = wide.to(grads[0].dtype), *grads[1:]
        return tuple(grads)

    # ---- the exchange ----

    def _exchange(self, sums: Tensor, inputs: Inputs | None, student: Tensor, failed: bool = False) -> Tensor:
        """The sums of all processes, (processes, rows, columns). Raises, on a CPU, if one of them has failed."""
        found = sums.new_zeros(len(sums), 1)
        labels = None if inputs is None else inputs.labels
        if labels is not None:
            found = (labels.reshape(-1, 1) != OTHER_SHARD).to(sums.dtype)  # an ignored one counts as found
        state = torch.full_like(found, _FAILED if failed else _DTYPES.index(student.dtype))
        every = gather(torch.cat([sums, found, state], 1), self.group)
        if failed or not len(sums):
            return every[..., :-2]
        is_found = every[..., -2].amax(0) > 0
        if student.device.type == "cpu":
            self._raise_for_states(every[:, 0, -1].tolist())
            if labels is not None and not is_found.all():
                self._raise_for_label(int((~is_found).nonzero()[0]))
        elif labels is not None:
            every = torch.where(is_found[:, None], every, math.nan)
        return every[..., :-2]

    def _raise_for_states(self, states: list[float]) -> None:
        for rank, state in enumerate(states):
            if state == _FAILED:
                raise RuntimeError(f"process_group: process {rank} of the group failed; its own error says why")
        if len(set(states)) > 1:
            names = ", ".join(str(_DTYPES[int(state)]) for state in states)
            raise RuntimeError(f"student_logits: must have one dtype in all processes, not {names}")

    def _raise_for_label(self, row: int) -> None:
        label, where = "a label", ""
        if self.labels is not None:
            label, where = f"label {self.labels.reshape(-1)[row].item()}", f" in row {row}"
        raise IndexError(
            f"labels: {label}{where} is out of range: no process of the group has it, and it is not ignore_index"
        )


def has_sums(inputs: Inputs, settings: Settings) -> bool:
    """Whether the rows' sums of row_math.py serve this loss."""
    if settings.metrics:
        return False
    if not inputs.teachers:
        return True
    is_mixed = settings.target == "logits" and settings.ensemble == "arithmetic" and len(inputs.teachers) > 1
    return not (is_mixed or settings.standardize or settings.divergence in OTHERS)


def reduce(losses: Tensor, student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """The loss under `reduction`."""
    if settings.reduction == "none":
        return losses
    total = rows.denominator(student, inputs, settings)
    return torch.where(total == 0, 0, losses.sum() / torch.where(total == 0, 1, total))


def _has_classes(student: Tensor, settings: Settings) -> bool:
    return student.shape[-1] > 0 and settings.vocab_size != 0


def _no_sums(student: Tensor) -> Tensor:
    """The sums of no classes."""
    nothing = torch.zeros(student.shape[:-1].numel(), dtype=rows.loss_dtype(student), device=student.device)
    x = Sums(*[nothing] * len(Sums._fields))
    low = nothing - math.inf
    return torch.stack(x._replace(student_offset=low, teacher_offset=low, label=low), -1)
