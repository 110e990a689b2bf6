"""token_log_probs and linear_token_log_probs of classes that are split over processes."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from kdfast.arguments import IGNORED
from kdfast.exchange import Exchange, local_indices
from kdfast.parallel import Shard, as_number, real_classes
from kdfast.rows import as_matrix
from kdfast.sharded_entries import token_values
from kdfast.sharded_reference import spread_gradient
from kdfast.token_autograd import Numbers

Results = tuple[Tensor, Tensor, Tensor]


def begin(like: Tensor, shard: Shard, numbers: Numbers) -> tuple[int | Tensor, int, Numbers]:
    """This process's first class, how many real ones it has, and the numbers for these. like: (..., V)."""
    exchange, here = Exchange(shard.group, None), like.shape[-1]
    start: int | Tensor = exchange.first_class(like, here) if shard.start is None else shard.start
    exchange.begin(like, here)
    if exchange.agreement is not None:
        exchange.agreement.check()
    if numbers.vocab_size < 0:
        return start, here, numbers
    real = real_classes(numbers.vocab_size, as_number(start, "vocab_size"), here)
    return start, real, numbers._replace(vocab_size=real)


def split_values(
    logits: Tensor, entries: Tensor, temperatures: Tensor | None, numbers: Numbers, shard: Shard
) -> Results:
    """entries: (..., K), as tokens.check_ids has them, of all classes."""
    start, real, numbers = begin(logits, shard, numbers)
    return _values(logits, entries, temperatures, start, real, numbers, shard.group)


def split_linear_values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Tensor,
    temperatures: Tensor | None,
    numbers: Numbers,
    shard: Shard,
    chunk_rows: int,
    reduce_hidden: bool,
) -> Results:
    """The logits of chunk_rows at a time; backward computes them again."""
    like = hidden.new_empty(()).expand(*hidden.shape[:-1], len(weight))
    start, real, numbers = begin(like, shard, numbers)
    rows = as_matrix(spread_gradient(hidden, shard.group) if reduce_hidden else hidden)
    flat = as_matrix(entries)
    by_row = None if temperatures is None else temperatures.reshape(-1)

    def chunk(x: Tensor, weight: Tensor, bias: Tensor | None, own: slice) -> Results:
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
        return _values(logits, flat[own], None if by_row is None else by_row[own], start, real, numbers, shard.group)

    parts = [slice(at, min(at + chunk_rows, len(rows))) for at in range(0, len(rows), chunk_rows)] or [slice(0, 0)]
    done: list[Any] = [checkpoint(chunk, rows[own], weight, bias, own, use_reentrant=False) for own in parts]
    log_probs, entropy, log_rest = (torch.cat(each) for each in zip(*done, strict=True))
    shape = hidden.shape[:-1]
    return log_probs.view(entries.shape), entropy.view(shape), log_rest.view(shape)


def _values(
    logits: Tensor, entries: Tensor, temperatures: Tensor | None, start: Any, real: int, numbers: Numbers, group: Any
) -> Results:
    ignored = entries[..., :1] == IGNORED
    local = local_indices(entries, start, real)
    return token_values(logits, local, entries >= 0, ignored, temperatures, numbers, group)
