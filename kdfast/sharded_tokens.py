"""token_log_probs and linear_token_log_probs of classes that are split over the processes of a group."""

from typing import Any

import torch
from torch import Tensor

from kdfast import choice
from kdfast.exchange import local_indices
from kdfast.parallel import Shard, as_number, real_classes
from kdfast.sharded_operators import compiled
from kdfast.sharded_token_ops import ELSEWHERE, ShardedTokens
from kdfast.token_autograd import Numbers, linear_token_values, token_values

Results = tuple[Tensor, ...]


def begin(like: Tensor, shard: Shard, numbers: Numbers, operators: Any) -> tuple[int | Tensor, int, Numbers]:
    """This process's first class, how many real ones it has, and the numbers for these. like: (..., V)."""
    here = like.shape[-1]
    start: int | Tensor = operators.first_class(like, here) if shard.start is None else shard.start
    if not torch.compiler.is_compiling():
        operators.agree(like, here)
    if numbers.vocab_size < 0:
        return start, here, numbers
    real = real_classes(numbers.vocab_size, as_number(start, "vocab_size"), here)
    return start, real, numbers._replace(vocab_size=real)


def split_values(
    logits: Tensor, entries: Tensor, temperatures: Tensor | None, numbers: Numbers, shard: Shard, backend: str | None
) -> Results:
    """entries: (..., K), as tokens.check_ids has them, of all classes."""
    operators = _operators(choice.namespace(backend, logits), shard.group)
    start, real, numbers = begin(logits, shard, numbers, operators)
    return token_values(logits, _local_ids(entries, start, real), temperatures, numbers, operators)


def split_linear_values(
    head: tuple[Tensor, Tensor, Tensor | None],  # hidden states, weight, bias
    entries: Tensor,
    temperatures: Tensor | None,
    numbers: Numbers,
    shard: Shard,
    chunks: tuple[int, torch.dtype],
    reduce_hidden: bool,
    backend: str | None,
) -> Results:
    """The logits of a chunk of rows at a time; backward computes them again."""
    hidden, weight, _ = head
    like = hidden.new_empty(()).expand(*hidden.shape[:-1], len(weight))
    operators = _operators(choice.namespace(backend, hidden), shard.group, reduce_hidden)
    start, real, numbers = begin(like, shard, numbers, operators)
    return linear_token_values(head, _local_ids(entries, start, real), temperatures, numbers, chunks, operators)


def _operators(ops: Any, group: Any, reduce_hidden: bool = True) -> Any:
    if torch.compiler.is_compiling():
        return compiled(ops, group, reduce_hidden)
    return ShardedTokens(ops, group, reduce_hidden)


def _local_ids(entries: Tensor, start: int | Tensor, real: int) -> Tensor:
    """Ids counted from this process's first class; those that are < 0 stay."""
    local = local_indices(entries, start, real)
    return torch.where(entries < 0, entries, torch.where(local < 0, ELSEWHERE, local))
