"""The row operators for rows whose classes are split over the processes of a group.

Each process has the logits of some classes. Its sums of these are exchanged by one all_gather, 14 numbers a row, and
merged in the order of the processes, so that all have the same bits; a divergence that is not linear exchanges its own
two or three sums as well. The gradient of a process's logits follows from them without another collective.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast import chunks, linear_ops, row_math, rows, sharded_reference, sharded_sparse
from kdfast.arguments import Heads, Inputs, Settings, drop_unused, take_flat, take_flat_heads, with_numbers
from kdfast.divergences import DIVERGENCES, OTHERS
from kdfast.exchange import Exchange, no_sums
from kdfast.processes import all_reduce, gather
from kdfast.sharded_token_ops import ShardedTokens
from kdfast.torch_private import enable_autograd


class ShardedRows:
    """Has the methods that autograd.py and linear_ops.py call of a namespace of operators, over that namespace.

    Losses that have no table of sums are sharded_reference.py's, and so is their gradient.
    """

    is_sharded = True

    def __init__(self, ops: Any, group: Any, labels: Tensor | None = None, reduce_hidden: bool = True) -> None:
        """labels: as they were given, for an error; reduce_hidden: whether linear losses sum up grad_hidden."""
        self.ops, self.group, self.reduce_hidden = ops, group, reduce_hidden
        self.exchange = Exchange(group, labels)

        def flat(function: Callable[..., Any]) -> Callable[..., Any]:
            return take_flat(with_numbers(function))

        def flat_heads(function: Callable[..., Any]) -> Callable[..., Any]:
            return take_flat_heads(with_numbers(function))

        self.stats, self.grad, self.grad_ = flat(self._stats), flat(self._grad), flat(self._grad_)
        self.loss_grad_ = flat(self._loss_grad_)
        self.linear_loss_grad = flat_heads(self._linear_loss_grad)
        self.linear_stats, self.linear_grad = flat_heads(self._linear_stats), flat_heads(self._linear_grad)

    @property
    def name(self) -> str:
        return f"sharded_{self.ops.name}"

    def scale_(self, grad: Tensor, factor: Tensor) -> None:
        self.ops.scale_(grad, factor)

    def first_class(self, like: Tensor, classes: int) -> int | Tensor:
        return self.exchange.first_class(like, classes)

    # ---- the operators ----

    def _stats(self, student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
        student = student.detach()
        metrics = rows.no_metrics(student)
        of_loss, every = drop_unused(inputs, settings._replace(metrics=False))
        self.exchange.begin(student, _real_classes(student.shape[-1], settings), always=bool(every.missing))
        if settings.metrics or not (every.missing or has_sums(of_loss, every)):
            self.exchange.sums(no_sums(student), inputs, student)
            with torch.no_grad():
                losses, by_row = sharded_reference.row_losses(student, inputs, settings, self.group)
            if settings.metrics:
                metrics = rows.mean_metrics(by_row, rows.row_weights(inputs, settings), settings)
        columns = row_math.table_columns(self.name, student.device.type, len(inputs.teachers), inputs.indices)
        if every.missing:
            losses, table = self._sparse_losses(student, of_loss, every)
        elif has_sums(of_loss, every):
            losses, table = self._losses_and_coefficients(student, of_loss, every)
            table = torch.nn.functional.pad(table, (0, columns - table.shape[1]))
        else:
            table = losses.new_zeros(losses.numel(), columns)  # which nobody reads
        return reduce(losses, student, inputs, settings), table, metrics

    def _losses_and_coefficients(self, student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
        """The losses of whole rows, (...), and the coefficients of their gradient, in every process the same bits."""
        settings = settings._replace(reduction="sum", divisor=0.0)
        has_classes = _has_classes(student, settings)
        try:
            sums = self.ops.sums(student, *inputs, *settings) if has_classes else no_sums(student)
        except Exception:
            self.exchange.fail(student)
            raise
        merged = row_math.merge(self.exchange.sums(sums, inputs, student), inputs, settings)
        if inputs.teachers and row_math.shares(settings) is None:
            columns = 3 if DIVERGENCES[settings.divergence].psi_apart else 2
            own = sums.new_zeros(len(sums), columns)
            if has_classes:
                own = self.ops.pointwise_sums(student, merged, *inputs, *settings)[:, -columns:]
            merged = torch.cat([merged[:, :-columns], gather(own, self.group).sum(0)], 1)
        # of the logits this operator reads only the shape: those of one class do where there is none
        one = student.new_zeros(()).expand(*student.shape[:-1], 1)
        few = inputs._replace(teachers=[one.to(t.dtype) for t in inputs.teachers])
        if few.labels is not None:
            few = few._replace(labels=few.labels.clamp(max=0))
        losses, table = self.ops.losses_and_coefficients(one, merged, *few, *settings._replace(vocab_size=-1))
        return losses.view(student.shape[:-1]), table

    def _sparse_losses(self, student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
        """The losses of whole rows, (...), and a table of the other terms' coefficients and of soft_stats'."""
        assert self.exchange.agreement is not None
        parts, columns = sharded_sparse.parts_of(student, inputs, settings), len(row_math.Coefficients._fields)
        if parts.has_other_terms():
            losses, table = self._losses_and_coefficients(student, parts.inputs, parts.settings)
        else:
            if inputs.labels is None:
                self.exchange.check()
            else:
                self.exchange.sums(no_sums(student), inputs, student)  # a label that nobody has is an error
            losses = torch.zeros(student.shape[:-1], dtype=rows.loss_dtype(student), device=student.device)
            table = losses.new_zeros(losses.numel(), columns)
        classes = self.exchange.agreement.classes().sum()
        soft, of_soft = sharded_sparse.soft_stats(self._tokens(), student, inputs, settings, classes, parts)
        weights = rows.row_weights(inputs, settings)
        if weights is not None:
            soft = torch.where(weights == 0, 0, soft * weights)
        return losses + soft, torch.cat([table[:, :columns], of_soft], -1)

    def _sparse_grad(
        self, student: Tensor, table: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings
    ) -> Tensor:
        parts, columns = sharded_sparse.parts_of(student, inputs, settings), len(row_math.Coefficients._fields)
        wide, other = student, None
        if parts.has_other_terms():
            wide = student.to(rows.loss_dtype(student))  # the sum is rounded once
            other = self._grad(wide, table[:, :columns].contiguous(), grad_loss, parts.inputs, parts.settings)
        factor, weights = grad_loss, rows.row_weights(inputs, settings)
        if settings.reduction != "none":
            total = rows.denominator(student, inputs, settings)
            factor = (grad_loss / torch.where(total == 0, 1, total)).expand(student.shape[:-1])
        if weights is not None:
            factor = torch.where(weights == 0, 0, factor * weights)
        grad = sharded_sparse.soft_grad(self._tokens(), wide, table[:, columns:], factor, inputs.temperatures, parts)
        return grad if other is None else grad.add_(other).to(student.dtype)

    def _tokens(self) -> ShardedTokens:
        return ShardedTokens(self.ops, self.group, of="teacher.indices")

    def _grad(self, student: Tensor, table: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
        inputs, settings = drop_unused(inputs, settings._replace(metrics=False))
        if settings.missing:
            return self._sparse_grad(student, table, grad_loss, inputs, settings)
        if not has_sums(inputs, settings):
            with torch.enable_grad(), enable_autograd():
                leaf = student.detach().requires_grad_()
                losses, _ = sharded_reference.row_losses(leaf, inputs, settings, self.group)
                loss = reduce(losses, student, inputs, settings)
                (grad,) = torch.autograd.grad(loss, leaf, grad_loss)
            return grad.contiguous()
        if not _has_classes(student, settings):
            return torch.zeros_like(student, memory_format=torch.contiguous_format)
        return self.ops.grad(student, table, grad_loss, *inputs, *settings)

    def _grad_(self, student: Tensor, table: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> None:
        inputs, settings = drop_unused(inputs, settings._replace(metrics=False))
        if has_sums(inputs, settings) and _has_classes(student, settings):
            self.ops.grad_(student, table, grad_loss, *inputs, *settings)
        else:
            student.copy_(self._grad(student, table, grad_loss, inputs, settings))

    def _loss_grad_(self, student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
        loss, table, metrics = self._stats(student, inputs, settings)
        self._grad_(student, table, torch.ones_like(loss), inputs, settings)
        return loss, metrics

    def _linear_loss_grad(self, heads: Heads, inputs: Inputs, settings: Settings) -> tuple[Tensor, ...]:
        heads = self._agreed_chunks(heads, inputs, settings)
        loss, *grads, metrics = linear_ops.loss_grad(self, heads, inputs, settings, self.reduce_hidden)
        return loss, *self._reduce_hidden(heads, grads), metrics

    def _linear_stats(self, heads: Heads, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
        heads = self._agreed_chunks(heads, inputs, settings)
        return linear_ops.stats(self, heads, inputs, settings)

    def _linear_grad(
        self, heads: Heads, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings
    ) -> tuple[Tensor, ...]:
        if not heads.chunk_rows:
            heads = self._agreed_chunks(heads, inputs, settings)
        grads = linear_ops.grad(self, heads, stats, grad_loss, inputs, settings, self.reduce_hidden)
        return self._reduce_hidden(heads, grads)

    def _agreed_chunks(self, heads: Heads, inputs: Inputs, settings: Settings) -> Heads:
        """chunk_rows of 0 become those of the largest shard: each chunk is a collective, in all processes."""
        hidden, here = heads.student_hidden, len(heads.student_weight)
        self.exchange.local_labels = inputs.labels
        vocab = here if settings.vocab_size < 0 else settings.vocab_size
        try:
            rows.check_values(hidden, inputs, settings._replace(vocab_size=vocab))
        except Exception:
            self.exchange.fail(hidden)
            raise
        kept = int(rows.kept_rows(hidden, inputs, settings).sum()) if hidden.device.type == "cpu" else 0
        self.exchange.begin(
            hidden, _real_classes(here, settings), kept, always=not heads.chunk_rows or bool(settings.missing)
        )
        if self.exchange.agreement is not None:
            classes = self.exchange.agreement.check()
            if not heads.chunk_rows:
                heads = heads._replace(chunk_rows=chunks.default_rows(max(1, *classes), hidden.device.type))
        return heads

    def _reduce_hidden(self, heads: Heads, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each process's classes have a part in the gradient of the hidden states."""
        if heads.grad_hidden and self.reduce_hidden:
            dtype = linear_ops.grad_dtype(heads.student_hidden.dtype)
            return all_reduce(grads[0], self.group).to(dtype), *grads[1:]
        return tuple(grads)


def has_sums(inputs: Inputs, settings: Settings) -> bool:
    """Whether the rows' sums of row_math.py serve this loss."""
    if not inputs.teachers:
        return True
    if settings.missing:
        return False
    is_mixed = settings.target == "logits" and settings.ensemble == "arithmetic" and len(inputs.teachers) > 1
    return not (is_mixed or settings.standardize or settings.divergence in OTHERS)


def reduce(losses: Tensor, student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """The loss under `reduction`."""
    if settings.reduction == "none":
        return losses
    total = rows.denominator(student, inputs, settings)
    return torch.where(total == 0, 0, losses.sum() / torch.where(total == 0, 1, total))


def _real_classes(here: int, settings: Settings) -> int:
    return here if settings.vocab_size < 0 else min(here, settings.vocab_size)


def _has_classes(student: Tensor, settings: Settings) -> bool:
    return student.shape[-1] > 0 and settings.vocab_size != 0
