"""The autograd Functions of the linear losses. autograd.py says when each is applied, and what `fast` means."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kdfast.arguments import Heads, Inputs, Settings, drop_unused
from kdfast.autograd import save, saved, saved_inputs
from kdfast.derivatives import check_backward, check_jvp, is_transformed, scale
from kdfast.rows import loss_dtype
from kdfast.torch_private import apply_function, below_autograd, forward_ad_is_active, graph_is_kept, next_level

NO_ROW_TANGENTS = (
    "linear_kd_loss with reduction='none' does not support forward-mode AD. Take a scalar reduction, or kd_loss"
)


def linear_loss(heads: Heads, inputs: Inputs, settings: Settings, ops: Any) -> tuple[Tensor, Tensor]:
    """autograd.row_loss for hidden states and heads."""
    calls_operator = torch.compiler.is_compiling() or is_transformed()
    if not torch.compiler.is_compiling() and forward_ad_is_active():  # what has a tangent need not require grad
        heads = heads._replace(grad_hidden=True, grad_weight=True, grad_bias=heads.student_bias is not None)
    wants_grad = heads.grad_hidden or heads.grad_weight or heads.grad_bias
    in_forward = wants_grad and settings.reduction != "none"
    results: tuple[Tensor, ...]
    if wants_grad and not calls_operator:
        function = LinearLossGrad if in_forward else LinearStats
        results = apply_function(function, *heads[:3], heads[3:], inputs, settings, ops, True)
    else:
        operator = ops.linear_loss_grad if in_forward else ops.linear_stats
        with nullcontext() if calls_operator else below_autograd():
            results = operator(*heads, *inputs, *settings)
    return results[0], results[-1]


class LinearLossGrad(torch.autograd.Function):
    """linear_loss_grad: forward computes the loss and its gradients, and backward scales them.

    float16 gradients stay fp32 until then, so that a loss scaler's factor is applied before they are rounded.
    """

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        heads: tuple[Any, ...],  # what follows in Heads
        inputs: Inputs,
        settings: Settings,
        ops: Any,
        fast: bool,
    ) -> tuple[Tensor, ...]:  # 0-dim, three gradients, and the metrics
        with below_autograd() if fast else next_level():
            return ops.linear_loss_grad(hidden, weight, bias, *heads, *inputs, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dtype, ctx.wanted, ctx.ops, ctx.fast = inputs[0].dtype, inputs[3][-3:], *inputs[-2:]
        ctx.transformed = not ctx.fast and is_transformed()
        ctx.save_for_backward(*output[1:-1])
        if ctx.transformed:
            ctx.save_for_forward(*output[1:-1])
        ctx.mark_non_differentiable(*output[1 if ctx.fast else -1 :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> Any:
        grad_loss = check_backward(ctx, grad_loss, others)
        if grad_loss is None:
            return (None,) * 8
        grads = _computed(ctx.saved_tensors, ctx.needs_input_grad, ctx.wanted)
        keep_saved = not ctx.fast or torch.compiler.is_compiling() or graph_is_kept()
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            if keep_saved or ctx.dtype == torch.float16:
                grads[i] = (grad * grad_loss).to(ctx.dtype)
            else:
                scale(ctx.ops, grad, grad_loss)
        return *grads, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        grads = _computed(ctx.saved_tensors, [t is not None for t in tangents[:3]], ctx.wanted)
        terms = [(g * t).sum(dtype=loss_dtype(g)) for g, t in zip(grads, tangents, strict=False) if g is not None]
        return sum(terms), *check_jvp(*ctx.saved_tensors), None


class LinearStats(torch.autograd.Function):
    """linear_stats: for reduction "none", grad_loss is known in backward only, which computes the logits again."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        heads: tuple[Any, ...],
        inputs: Inputs,
        settings: Settings,
        ops: Any,
        fast: bool,
    ) -> tuple[Tensor, ...]:  # (...), the table, and the metrics
        with below_autograd() if fast else next_level():
            return ops.linear_stats(hidden, weight, bias, *heads, *inputs, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *student, heads, given, settings, ctx.ops, ctx.fast = inputs
        given, ctx.settings = drop_unused(given, settings._replace(metrics=False))
        ctx.numbers, ctx.transformed = heads[3:-3], not ctx.fast and is_transformed()
        save(ctx, *student, output[1], *heads[:3], *given[1:], *given.teachers)
        ctx.mark_non_differentiable(*output[1 if ctx.fast else -1 :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> Any:
        grad_loss = check_backward(ctx, grad_loss, others)
        if grad_loss is None:
            return (None,) * 8
        hidden, weight, bias, stats, *rest = saved(ctx)
        wanted = ctx.needs_input_grad[:3]
        heads = (hidden, weight, bias, *rest[:3], *ctx.numbers, *wanted)
        call = (*saved_inputs(rest[3:]), *ctx.settings)
        if ctx.settings.reduction == "none":
            grads = ctx.ops.linear_grad(*heads, stats, grad_loss, *call)
        else:  # of a graph that was exported without gradients
            grads = [grad * grad_loss for grad in ctx.ops.linear_loss_grad(*heads, *call)[1:-1]]
        grads = [grad.to(hidden.dtype) if want else None for grad, want in zip(grads, wanted, strict=True)]
        return *grads, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(NO_ROW_TANGENTS)


def _computed(grads: Any, needed: Any, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients that are needed, all of which must have been wanted when the operator was called."""
    found: list[Tensor | None] = []
    for name, grad, need, want in zip(("hidden", "weight", "bias"), grads, needed, wanted, strict=False):
        if need and not want:
            raise RuntimeError(f"linear_loss_grad: the gradient of the student's {name} was not asked for in forward")
        found.append(grad if need else None)
    return found
