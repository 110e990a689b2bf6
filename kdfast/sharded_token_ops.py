"""The operators of tokens whose classes are split over the processes of a group.

Each process computes the numbers of its own classes. One all_gather of K + 4 numbers a row makes of them those of all
classes, in every process the same bits. The gradient follows from them without another collective.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kdfast import linear_token_ops
from kdfast.arguments import IGNORED
from kdfast.exchange import Exchange, refuse_missing
from kdfast.processes import all_reduce, gather
from kdfast.products import grad_dtype
from kdfast.reference import as_column
from kdfast.row_math import finite
from kdfast.rows import as_matrix, loss_dtype
from kdfast.token_autograd import Numbers

ELSEWHERE = IGNORED + 1  # an id that another process has
_NOT_HERE = 1.0  # in place of a log-probability, which is at most 0
_LN2 = math.log(2)


class ShardedTokens:
    """Has the methods that token_autograd.py calls of a namespace of operators, over that namespace."""

    def __init__(self, ops: Any, group: Any, reduce_hidden: bool = True, of: str = "ids") -> None:
        """of: the ids' name in errors."""
        self.ops, self.group, self.reduce_hidden, self.of = ops, group, reduce_hidden, of

    def first_class(self, like: Tensor, classes: int) -> int | Tensor:
        return Exchange(self.group, None).first_class(like, classes)

    def agree(self, like: Tensor, classes: int) -> None:
        """On a CPU an error, the same in all processes, where one has other rows or another dtype."""
        exchange = Exchange(self.group, None)
        exchange.begin(like, classes)
        exchange.check()

    def token_stats(
        self, logits: Tensor, ids: Tensor, temperatures: Tensor | None, *numbers: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, of = logits.detach(), Numbers(*numbers)
        ignored = ids[..., :1].reshape(-1, 1) == IGNORED
        rows, like = ids.shape[:-1], torch.empty(0, dtype=loss_dtype(logits), device=logits.device)
        by_row = None if temperatures is None else temperatures.reshape(-1)
        scale = (1 if of.softcap else of.logit_scale) / as_column(by_row, of.temperature, like).squeeze(-1)
        own = self._own(logits, ids, temperatures, of, scale)
        log_probs, h, log_rest, table = self._merged(own, ids, ignored, scale, of.entropy)
        h = h.view(rows) if of.entropy else h.new_empty(0)
        return log_probs.view(ids.shape), h, log_rest.view(rows), table

    def _own(
        self, logits: Tensor, ids: Tensor, temperatures: Tensor | None, of: Numbers, scale: Tensor
    ) -> tuple[Tensor, ...]:
        """Of this process's classes (rows, K), then (rows,) each: log q of the ids; the offset; with exponents relative
        to it the logs of the sums over the ids and over the others; the entropy; the sum over the ids."""
        rows, count = ids.shape[:-1].numel(), ids.shape[-1]
        if not logits.shape[-1] or of.vocab_size == 0:
            nothing = torch.zeros(rows, dtype=loss_dtype(logits), device=logits.device)
            low = nothing - math.inf
            return nothing.unsqueeze(-1).expand(rows, count) + _NOT_HERE, low, low, low, nothing, nothing
        log_probs, _, log_rest, table = self.ops.token_stats(logits, ids, temperatures, *of)
        log_probs, log_rest = log_probs.reshape(rows, count), log_rest.reshape(-1)
        offset, of_ids, log_others, h, _ = table.unbind(-1)
        log_others = log_others * _LN2
        # where all classes are ids, by the logit of the likeliest
        flat = as_matrix(ids)
        best, at = torch.where(flat >= 0, log_probs, -math.inf).max(-1)
        z = self._logit(as_matrix(logits), flat.gather(-1, at.unsqueeze(-1)).clamp(min=0), of).squeeze(-1)
        of_all = torch.where(log_others == -math.inf, scale * (z - finite(offset)) - best, log_others - log_rest)
        log_ids = of_all + torch.log(-torch.expm1(log_rest))
        return torch.where(flat == ELSEWHERE, _NOT_HERE, log_probs), offset, log_ids, log_others, h, of_ids

    @staticmethod
    def _logit(logits: Tensor, places: Tensor, of: Numbers) -> Tensor:
        z = logits.gather(-1, places).to(loss_dtype(logits))
        return of.softcap * torch.tanh(of.logit_scale * z / of.softcap) if of.softcap else z

    def _merged(
        self, own: tuple[Tensor, ...], ids: Tensor, ignored: Tensor, scale: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The results for all classes, and this process's table."""
        log_probs, *numbers, of_ids = own
        sent = torch.cat([log_probs, torch.stack(numbers if entropy else numbers[:-1], -1)], -1)
        every, count = gather(sent, self.group), log_probs.shape[-1]
        log_probs, (offsets, log_ids, log_others, *hs) = every[..., :count], every[..., count:].unbind(-1)
        is_here = log_probs != _NOT_HERE
        wanted = (as_matrix(ids) >= 0) | (as_matrix(ids) == ELSEWHERE)
        missing = wanted & ~is_here.any(0) & ~ignored
        refuse_missing(missing, self.of)
        offset = offsets.amax(0)
        shift = scale * (finite(offsets) - finite(offset))
        log_ids, log_others = log_ids + shift, log_others + shift
        log_mass = log_of_part(torch.logaddexp(log_ids, log_others))
        h = torch.zeros_like(offset)
        if entropy:
            h = torch.where(log_mass == -math.inf, 0, log_mass.exp() * (hs[0] - log_mass)).sum(0)
        log_probs = torch.where(is_here, log_probs + log_mass.unsqueeze(-1), -math.inf).amax(0)
        log_probs = torch.where(missing, math.nan, log_probs)
        all_ids, all_others = log_sum(log_ids), log_sum(log_others)
        log_rest = log_of_part(torch.stack([all_others, all_ids]))[0]
        rank = torch.distributed.get_rank(self.group)
        others = [i for i in range(len(log_ids)) if i != rank]
        elsewhere = log_sum(log_ids[others]) if others else log_ids[rank] - math.inf
        of_ids = torch.where(log_ids[rank] == -math.inf, 0, of_ids * shift[rank].exp())
        table = torch.stack([offset, of_ids, all_others / _LN2, h, elsewhere / _LN2], -1)
        log_probs, table = torch.where(ignored, 0, log_probs), torch.where(ignored, 0, table)
        row = ignored.squeeze(-1)
        return log_probs, torch.where(row, 0, h), torch.where(row, 0, log_rest), table

    def token_grad(self, logits: Tensor, *args: Any) -> Tensor:
        return self.token_grad_as(logits, logits.dtype, *args)

    def token_grad_as(
        self,
        logits: Tensor,
        dtype: torch.dtype,
        ids: Tensor,
        stats: Tensor,
        grad_log_probs: Tensor | None,
        grad_entropy: Tensor | None,
        grad_log_rest: Tensor | None,
        grad_elsewhere: None,
        temperatures: Tensor | None,
        *numbers: Any,
    ) -> Tensor:
        if not logits.shape[-1] or numbers[-1] == 0:
            return torch.zeros_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
        elsewhere = None
        if grad_log_probs is not None:
            elsewhere = torch.where(ids == ELSEWHERE, grad_log_probs, 0).sum(-1).reshape(-1)
        gradients = grad_log_probs, grad_entropy, grad_log_rest, elsewhere
        return self.ops.token_grad_as(logits, dtype, ids, stats, *gradients, temperatures, *numbers)

    def linear_token_stats(self, *args: Any) -> tuple[Tensor, ...]:
        return linear_token_ops.token_stats(self, *args)

    def linear_token_grad(self, hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
        is_part = self.reduce_hidden and args[-3]
        grads = linear_token_ops.token_grad(self, hidden, *args, wide_hidden=is_part)
        if is_part:  # each process's classes have a part in the gradient of the hidden states
            return all_reduce(grads[0], self.group).to(grad_dtype(hidden.dtype)), *grads[1:]
        return grads


def log_sum(x: Tensor) -> Tensor:
    """log of the sum of exp x over the first dimension; -inf where there is nothing."""
    high = finite(x.amax(0))
    return (x - high).exp().sum(0).log() + high


def log_of_part(x: Tensor) -> Tensor:
    """The log of what each has of the sum of exp x over the first dimension, with its digits near 0."""
    others, nothing = torch.full_like(x, -math.inf), x == -math.inf
    if len(x) > 1:
        others = torch.stack([log_sum(torch.cat([x[:i], x[i + 1 :]])) for i in range(len(x))])
    return torch.where(nothing, -math.inf, -torch.logaddexp(torch.zeros_like(x), others - torch.where(nothing, 0, x)))
