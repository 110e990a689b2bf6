"""The autograd Functions of tokens' log-probabilities. autograd.py says when each is applied, and what `fast` means.

Forward saves five numbers per row, and backward computes the gradient of whichever results have one.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.autograd import save, saved
from kdfast.derivatives import check_backward, is_transformed
from kdfast.torch_private import apply_function, below_autograd, next_level

NO_TANGENTS = "kdfast's token log-probabilities do not support forward-mode AD. Take torch.func.grad, or vjp"

# log_probs (..., K), entropy (...) or (0,), log_rest (...), and the table
Results = tuple[Tensor, Tensor, Tensor, Tensor]


class Numbers(NamedTuple):
    """token_stats' arguments that are not tensors, in their order; token_grad has all but the last."""

    temperature: float  # where there are no temperatures of rows
    logit_scale: float
    softcap: float  # 0: none
    vocab_size: int  # -1: all classes
    entropy: bool  # whether it is computed


def token_values(logits: Tensor, ids: Tensor, temperatures: Tensor | None, numbers: Numbers, ops: Any) -> Results:
    """The results of token_stats, with a graph where the logits want a gradient."""
    calls_operator = torch.compiler.is_compiling() or is_transformed()
    if logits.requires_grad and torch.is_grad_enabled() and not calls_operator:
        return apply_function(TokenStats, logits, ids, temperatures, numbers, ops, True)
    with nullcontext() if calls_operator else below_autograd():
        return ops.token_stats(logits, ids, temperatures, *numbers)


def linear_token_values(
    head: tuple[Tensor, Tensor, Tensor | None],  # hidden states, weight, bias
    ids: Tensor,
    temperatures: Tensor | None,
    numbers: Numbers,
    chunks: tuple[int, torch.dtype],
    ops: Any,
) -> Results:
    """The results of linear_token_stats, with a graph where the head wants a gradient."""
    if torch.compiler.is_compiling() or is_transformed():
        return ops.linear_token_stats(*head, ids, temperatures, *numbers, *chunks)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in head):
        return apply_function(LinearTokenStats, *head, ids, temperatures, numbers, *chunks, ops, True)
    with below_autograd():
        return ops.linear_token_stats(*head, ids, temperatures, *numbers, *chunks)


class _Stats(torch.autograd.Function):
    """What the Functions share: their last two arguments are `ops` and `fast`."""

    @staticmethod
    def keep(ctx: Any, ops: Any, fast: bool, results: Results, *tensors: Tensor | None) -> None:
        ctx.ops, ctx.fast, ctx.transformed = ops, fast, not fast and is_transformed()
        save(ctx, results[-1], *tensors)
        if fast:
            ctx.mark_non_differentiable(results[-1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def check(ctx: Any, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """The gradients of log_probs, entropy and log_rest."""
        return [check_backward(ctx, grad, grads[3:]) for grad in grads[:3]]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(NO_TANGENTS)


class TokenStats(_Stats):
    """token_stats, and in backward token_grad."""

    @staticmethod
    def forward(
        logits: Tensor, ids: Tensor, temperatures: Tensor | None, numbers: Numbers, ops: Any, fast: bool
    ) -> Results:
        with below_autograd() if fast else next_level():
            return ops.token_stats(logits, ids, temperatures, *numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        logits, ids, temperatures, ctx.numbers, ops, fast = inputs
        _Stats.keep(ctx, ops, fast, output, logits, ids, temperatures)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        checked = _Stats.check(ctx, grads)
        if all(each is None for each in checked):
            return (None,) * 6
        stats, logits, ids, temperatures = saved(ctx)
        with below_autograd() if ctx.fast and not torch.compiler.is_compiling() else nullcontext():
            grad = ctx.ops.token_grad(logits, ids, stats, *checked, None, temperatures, *ctx.numbers[:-1])
        return grad, None, None, None, None, None


class LinearTokenStats(_Stats):
    """linear_token_stats, and in backward linear_token_grad, which computes the logits again."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperatures: Tensor | None,
        numbers: Numbers,
        chunk_rows: int,
        accumulate_dtype: torch.dtype,
        ops: Any,
        fast: bool,
    ) -> Results:
        with below_autograd() if fast else next_level():
            call = temperatures, *numbers, chunk_rows, accumulate_dtype
            return ops.linear_token_stats(hidden, weight, bias, ids, *call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        *tensors, ctx.numbers, chunk_rows, accumulate_dtype, ops, fast = inputs
        ctx.chunks = chunk_rows, accumulate_dtype
        _Stats.keep(ctx, ops, fast, output, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        checked = _Stats.check(ctx, grads)
        if all(each is None for each in checked):
            return (None,) * 10
        stats, hidden, weight, bias, ids, temperatures = saved(ctx)
        wanted = ctx.needs_input_grad[:3]
        call = temperatures, *ctx.numbers[:-1], *ctx.chunks, *wanted
        results = ctx.ops.linear_token_grad(hidden, weight, bias, ids, stats, *checked, *call)
        heads = [grad.to(hidden.dtype) if want else None for grad, want in zip(results, wanted, strict=True)]
        return *heads, *(None,) * 7
