"""The fused linear losses of a sparse teacher with missing="conditional": no class but its entries is read.

Without a hard term and z-loss such a loss is a dense one over K classes a row:

    z_k = h . W[i_k] + b[i_k]        (rows, K)
    g   = d loss / d z               by the row operators, with the log-probabilities as the teacher's logits
    d h = sum_k g_k W[i_k],  d W[i] += the sum of g_k h over the entries of class i,  d b likewise

That takes K products of length H a row, and no buffer of size V but the weight's gradient. Each of these sums is an
embedding bag: of the weight's rows for d h, and of hidden states, sorted by class, for d W. One thread sums a bag, in
one order, so a gradient has the same bits in every run, with any number of threads.

An absent entry takes the place of an entry of its row that is there, with g = 0; a row without any, and a dropped row,
has zero hidden states. So nothing of a class that no kept row names is read, and a GPU need not wait to count them.

Metrics need all classes, and take a pass of their own, by chunks.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import linear_ops, sparse_rows
from kdfast.arguments import Heads, Inputs, Settings
from kdfast.linear_checks import product_like
from kdfast.products import SLICE, grad_dtype
from kdfast.row_math import table_columns
from kdfast.rows import as_matrix, check_values, kept_rows, loss_dtype, no_metrics, row_weights
from kdfast.torch_private import entry_products

GATHERED = 1 << 23  # bytes of the widened rows of a 16-bit head at a time: they stay in a CPU's cache


def reads_entries_alone(inputs: Inputs, settings: Settings) -> bool:
    """Whether the loss needs no class but the entries'."""
    has_hard = inputs.labels is not None and settings.hard_weight != 0
    return settings.missing == "conditional" and not (has_hard or settings.z_loss)


def loss_grad(
    ops: Any, heads: Heads, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = Call(heads, inputs, settings)
    loss, _ = ops.loss_grad_(call.z, *call.inputs, *call.settings)
    return loss, *call.gradients(), _metrics(ops, heads, inputs, settings)


def stats(ops: Any, heads: Heads, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(heads, inputs, settings)
    loss, dense_table, _ = ops.stats(call.z, *call.inputs, *call.settings)
    columns = table_columns(ops.name, call.z.device.type, len(inputs.teachers), inputs.indices)
    table = dense_table.new_zeros((len(dense_table), columns))
    table[:, : dense_table.shape[1]] = dense_table
    return loss, table, _metrics(ops, heads, inputs, settings)


def grad(
    ops: Any, heads: Heads, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(heads, inputs, settings)
    columns = table_columns(ops.name, call.z.device.type, len(inputs.teachers))
    ops.grad_(call.z, stats[:, :columns].contiguous(), grad_loss, *call.inputs, *call.settings)
    return call.gradients()


def _metrics(ops: Any, heads: Heads, inputs: Inputs, settings: Settings) -> Tensor:
    return linear_ops.stats(ops, heads, inputs, settings)[2] if settings.metrics else no_metrics(heads.student_hidden)


class Entries(NamedTuple):
    """The classes of each row's K entries, and which rows have any."""

    places: Tensor  # (rows, K), each of a class that the row reads
    has_any: Tensor  # (rows, 1), a kept row's


class Call:
    """The logits of the entries, (..., K), the arguments of the dense row operators, and the heads' gradients."""

    def __init__(self, heads: Heads, inputs: Inputs, settings: Settings) -> None:
        self.heads, hidden, weight = heads, heads.student_hidden.detach(), heads.student_weight.detach()
        like = product_like(hidden, weight)
        check_values(like, inputs, settings)
        sparse = sparse_rows.entries_of(like, inputs, settings)
        absent = sparse.indices < 0
        has_any = ~absent.all(-1, keepdim=True) & kept_rows(like, inputs, settings).unsqueeze(-1)
        some = sparse.indices.amax(-1, keepdim=True).clamp(min=0)
        places = torch.where(has_any, torch.where(absent, some, sparse.indices), 0)
        self.entries = Entries(as_matrix(places), as_matrix(has_any))
        self.hidden = torch.where(self.entries.has_any, as_matrix(hidden), 0)
        self.weight = weight

        z = self._products().view(places.shape)
        if heads.student_bias is not None:
            z = z + heads.student_bias.detach().to(z.dtype)[places]
        # a row without entries is certain of one class, on both sides
        first = torch.arange(places.shape[-1], device=z.device) == 0
        nothing = torch.where(first, 0, -math.inf).to(z.dtype)
        self.z = torch.where(has_any, torch.where(absent, -math.inf, z), nothing)
        log_p = torch.where(absent.all(-1, keepdim=True), nothing, sparse.log_p[..., :-1])
        self.inputs = inputs._replace(
            teachers=[log_p], labels=None, row_weight=row_weights(inputs, settings), indices=None
        )
        self.settings = settings._replace(
            missing="", target="logits", teacher_temperature=1.0, vocab_size=-1, metrics=False
        )

    def _products(self) -> Tensor:
        """h . W[i_k], (rows, K), in fp32 or fp64."""
        if self._needs_no_copy():
            return entry_products(self.hidden, self.weight, self.entries.places)
        z = self.hidden.new_empty(self.entries.places.shape, dtype=loss_dtype(self.hidden))
        for rows, gathered in self._gathered():
            z[rows] = _row_products(self.hidden[rows].to(z.dtype), gathered)
        return z

    def _needs_no_copy(self) -> bool:
        return _is_cpu(self.weight) and self.weight.dtype.itemsize > 2

    def _gathered(self) -> Any:
        """Some rows at a time, and the head's rows of their entries, (rows, K, H), in fp32 or fp64."""
        dtype, (rows, count) = loss_dtype(self.weight), self.entries.places.shape
        hidden_size = self.weight.shape[1]
        limit = GATHERED if _is_cpu(self.weight) else 16 * GATHERED
        step = max(1, limit // (count * hidden_size * dtype.itemsize))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            places = self.entries.places[part]
            yield part, self.weight.index_select(0, places.flatten()).to(dtype).view(*places.shape, hidden_size)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden states, weight and bias, (0,) where not wanted; z holds g by now."""
        heads, like = self.heads, self.heads.student_hidden
        g = as_matrix(self.z)
        results = [like.new_empty(0, dtype=grad_dtype(like.dtype))] * 3
        if heads.grad_hidden:
            results[0] = self._to_hidden(g).to(grad_dtype(like.dtype)).view(like.shape)
        if heads.grad_weight or heads.grad_bias:
            ordered, order = self.entries.places.flatten().sort(stable=True)
            starts = torch.searchsorted(ordered, torch.arange(len(self.weight) + 1, device=g.device))
            g, rows = g.flatten()[order], order // g.shape[1]
            if heads.grad_weight:
                results[1] = self._to_weight(g, rows, starts)
            if heads.grad_bias:
                numbers = torch.arange(len(g), device=g.device)
                results[2] = F.embedding_bag(numbers, g.unsqueeze(-1), starts[:-1], mode="sum").squeeze(-1)
                results[2] = results[2].to(grad_dtype(like.dtype))
        return results[0], results[1], results[2]

    def _to_hidden(self, g: Tensor) -> Tensor:
        if self.weight.dtype == g.dtype:
            total = F.embedding_bag(self.entries.places, self.weight, mode="sum", per_sample_weights=g)
        else:
            total = g.new_empty((len(g), self.weight.shape[1]))
            for rows, gathered in self._gathered():
                total[rows] = torch.bmm(g[rows].unsqueeze(1), gathered).squeeze(1)
        return torch.where(self.entries.has_any, total, 0)

    def _to_weight(self, g: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
        """(V, H), from entries sorted by class. Where it is narrower than the sums a CPU takes slices of classes."""
        dtype, wide = grad_dtype(self.weight.dtype), torch.promote_types(g.dtype, self.heads.accumulate_dtype)
        g, hidden = g.to(wide), self.hidden.to(wide)
        if dtype == wide or not _is_cpu(self.weight):
            total = F.embedding_bag(rows, hidden, starts[:-1], mode="sum", per_sample_weights=g)
            return total.to(dtype)
        total = self.weight.new_empty(self.weight.shape, dtype=dtype)
        for start in range(0, len(total), SLICE):
            part = starts[start : start + SLICE + 1]
            own = slice(int(part[0]), int(part[-1]))
            total[start : start + SLICE] = F.embedding_bag(
                rows[own], hidden, part[:-1] - part[0], mode="sum", per_sample_weights=g[own]
            )
        return total


def _is_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _row_products(x: Tensor, gathered: Tensor) -> Tensor:
    """x[i] . gathered[i, k], (rows, K). On a CPU torch.bmm of one column takes some times as long."""
    if not _is_cpu(x):
        return torch.bmm(gathered, x.unsqueeze(-1)).squeeze(-1)
    rows, count, _ = gathered.shape
    return entry_products(x, gathered.flatten(0, 1), torch.arange(rows * count).view(rows, count))
