"""The autograd Functions of the row losses: when a gradient is computed, and what is saved until then.

In eager mode a public call applies a Function itself. It is `fast`: nobody else sees the gradient, so backward scales
it in-place. Under torch.compile, torch.export, torch.func and forward-mode AD a public call calls the operator, whose
kernel for autograd (operator_autograd.py) applies the same Function. It is not `fast`: the gradient is one of the
operator's results, and raises if it is differentiated. linear_autograd.py has the Functions of the linear losses.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from kdfast.arguments import Inputs, Settings, metrics_of_unweighted_terms
from kdfast.derivatives import check_backward, check_jvp, is_transformed, scale
from kdfast.rows import loss_dtype
from kdfast.torch_private import apply_function, below_autograd, forward_ad_is_active, graph_is_kept, next_level


def row_loss(student: Tensor, inputs: Inputs, settings: Settings, ops: Any, inplace: bool) -> tuple[Tensor, Tensor]:
    """The loss under settings.reduction, with a graph where the student wants a gradient, and the metrics."""
    inputs, settings, own_metrics = metrics_of_unweighted_terms(ops, student, inputs, settings)
    wants_grad = student.requires_grad and torch.is_grad_enabled()
    # fp16: a gradient computed before the loss scaler's factor is known would underflow to 0
    in_backward = settings.reduction == "none" or student.dtype == torch.float16
    results: tuple[Tensor, ...]
    if torch.compiler.is_compiling():
        results = _operator(ops, wants_grad, in_backward, inplace)(student, *inputs, *settings)
    elif is_transformed():
        student = student.float() if student.dtype == torch.float16 else student  # a tangent has no loss scaler
        operator = _operator(ops, wants_grad or forward_ad_is_active(), settings.reduction == "none", False)
        results = operator(student, *inputs, *settings)
    elif wants_grad:
        results = apply_function(Stats if in_backward else LossGrad, student, inputs, settings, ops, inplace, True)
    else:
        with below_autograd():
            results = ops.stats(student, *inputs, *settings)
    return results[0], results[-1] if own_metrics is None else own_metrics


def _operator(ops: Any, wants_grad: bool, in_backward: bool, inplace: bool) -> Any:
    if wants_grad and not in_backward:
        return ops.loss_grad_ if inplace else ops.loss_grad
    return ops.stats_for_inplace if wants_grad and inplace else ops.stats


class LossGrad(torch.autograd.Function):
    """loss_grad and loss_grad_: forward computes the loss and its gradient, and backward at most scales that."""

    @staticmethod
    def forward(
        student: Tensor, inputs: Inputs, settings: Settings, ops: Any, inplace: bool, fast: bool
    ) -> tuple[Tensor, ...]:  # 0-dim, the gradient unless it is in-place, and the metrics
        with below_autograd() if fast else next_level():
            if not inplace:
                return ops.loss_grad.default(student, *inputs, *settings)  # no other overload to look for
            results = ops.loss_grad_.default(student, *inputs, *settings)
        _mark_overwritten(student)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, _, _, ctx.ops, ctx.inplace, ctx.fast = inputs
        ctx.has_run, ctx.transformed = False, not ctx.fast and is_transformed()
        grad = student.detach() if ctx.inplace else output[1]
        ctx.save_for_backward(grad)
        if ctx.fast:
            ctx.mark_non_differentiable(*output[1:])
        else:
            ctx.mark_non_differentiable(output[-1])
        if ctx.transformed:
            ctx.save_for_forward(grad)
        ctx.set_materialize_grads(False)  # of the metrics: zeros that nobody reads

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> Any:
        grad_loss = check_backward(ctx, grad_loss, others)
        if grad_loss is None:
            return None, None, None, None, None, None
        (grad,) = ctx.saved_tensors
        if not ctx.fast or torch.compiler.is_compiling():
            return grad * grad_loss, None, None, None, None, None
        if ctx.inplace:
            if ctx.has_run:
                raise RuntimeError(
                    "kd_loss(inplace=True) can be backpropagated through once, because its gradient is in the logits' "
                    "own storage. Use inplace=False to backpropagate with retain_graph=True"
                )
            ctx.has_run = True
        elif graph_is_kept():
            return grad * grad_loss, None, None, None, None, None  # this backward may run again
        scale(ctx.ops, grad, grad_loss)
        return grad, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:
        (grad,) = ctx.saved_tensors
        return (grad * tangent).sum(dtype=loss_dtype(grad)), *check_jvp(grad), None


class Stats(torch.autograd.Function):
    """stats: forward saves a few numbers per row, and backward computes the gradient from them.

    For reduction "none", whose grad_loss is known in backward only, and for fp16.
    """

    @staticmethod
    def forward(
        student: Tensor, inputs: Inputs, settings: Settings, ops: Any, inplace: bool, fast: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # (...) or 0-dim, the table, and the metrics
        with below_autograd() if fast else next_level():
            return ops.stats(student, *inputs, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        student, given, settings, ctx.ops, ctx.inplace, ctx.fast = inputs
        ctx.settings, ctx.transformed = settings._replace(metrics=False), not ctx.fast and is_transformed()
        save(ctx, student, output[1], *given[1:], *given.teachers)
        ctx.mark_non_differentiable(*output[1 if ctx.fast else 2 :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> Any:
        grad_loss = check_backward(ctx, grad_loss, others)
        if grad_loss is None:
            return None, None, None, None, None, None
        student, stats, *rest = saved(ctx)
        arguments = (stats, grad_loss, *saved_inputs(rest), *ctx.settings)
        with below_autograd() if ctx.fast and not torch.compiler.is_compiling() else nullcontext():
            if not ctx.inplace:
                return ctx.ops.grad(student, *arguments), None, None, None, None, None
            student = student.detach()
            ctx.ops.grad_(student, *arguments)
        _mark_overwritten(student)  # so that a second backward raises
        return student, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:
        student, stats, *rest = saved(ctx)
        by_row = ctx.settings.reduction == "none"
        one = stats.new_ones(student.shape[:-1] if by_row else ())
        arguments = (stats, one, *saved_inputs(rest), *ctx.settings)
        grad = ctx.ops.grad(student.detach(), *arguments)
        return (grad * tangent).sum(-1 if by_row else None, dtype=stats.dtype), *check_jvp(stats), None


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """save_for_backward, but tensors made under inference_mode, which it refuses, go to ctx.unsaved."""
    ctx.unsaved = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    tensors = tuple(None if i in ctx.unsaved else t for i, t in enumerate(tensors))
    ctx.save_for_backward(*tensors)
    if ctx.transformed:
        ctx.save_for_forward(*tensors)


def saved(ctx: Any) -> list[Any]:
    return [ctx.unsaved.get(i, t) for i, t in enumerate(ctx.saved_tensors)]


def saved_inputs(tensors: list[Any]) -> Inputs:
    """Inputs from the saved tensors, of which the teachers come last."""
    count = len(Inputs._fields) - 1
    return Inputs(tensors[count:], *tensors[:count])


def _mark_overwritten(student: Tensor) -> None:
    """Makes a backward that saved the logits raise instead of reading the gradient in their place."""
    if not torch.compiler.is_compiling():  # a compiled graph has it from the operator's schema
        increment_version(student)
