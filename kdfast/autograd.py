"""The autograd Functions: when a gradient is computed, and what is saved until then."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from kdfast import reference
from kdfast.arguments import Heads, Inputs, Settings, drop_unused, metrics_of_unweighted_terms
from kdfast.torch_private import graph_is_kept


def row_loss(student: Tensor, inputs: Inputs, settings: Settings, ops: Any, inplace: bool) -> tuple[Tensor, Tensor]:
    """The loss under settings.reduction, with a graph where the student wants a gradient, and the metrics."""
    inputs, settings, own_metrics = metrics_of_unweighted_terms(ops, student, inputs, settings)
    if not (student.requires_grad and torch.is_grad_enabled()):
        loss, _, metrics = ops.stats(student, *inputs, *settings)
    else:
        # fp16: a gradient computed before the loss scaler's factor is known would underflow to 0
        in_backward = settings.reduction == "none" or student.dtype == torch.float16
        function = GradInBackward if in_backward else GradInForward
        loss, metrics = function.apply(student, inputs, settings, ops, inplace)
    return loss, metrics if own_metrics is None else own_metrics


def linear_loss(heads: Heads, inputs: Inputs, settings: Settings, ops: Any) -> tuple[Tensor, Tensor]:
    """The same for hidden states and heads."""
    if not (heads.grad_hidden or heads.grad_weight or heads.grad_bias):
        loss, _, metrics = ops.linear_stats(*heads, *inputs, *settings)
        return loss, metrics
    function = LinearGradInBackward if settings.reduction == "none" else LinearGradInForward
    return function.apply(*heads[:3], heads, inputs, settings, ops)


class GradInForward(torch.autograd.Function):
    """Scalar reductions: forward computes the loss and its gradient, and backward at most scales that."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, inputs: Inputs, settings: Settings, ops: Any, inplace: bool
    ) -> tuple[Tensor, Tensor]:  # 0-dim, and the metrics
        if inplace:
            loss, metrics = ops.loss_grad_(student, *inputs, *settings)
            _mark_overwritten(student)
            grad = student.detach()
        else:
            loss, grad, metrics = ops.loss_grad(student, *inputs, *settings)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)  # of the metrics: zeros that nobody reads
        ctx.ops, ctx.inplace, ctx.has_run = ops, inplace, False
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> Any:
        _forbid_double_backward()
        if grad_loss is None:  # autograd's undefined gradient, which is 0
            return None, None, None, None, None
        (grad,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return grad * grad_loss, None, None, None, None
        if ctx.inplace:
            if ctx.has_run:
                raise RuntimeError(
                    "kd_loss(inplace=True) can be backpropagated through once, because its gradient is in the logits' "
                    "own storage. Use inplace=False to backpropagate with retain_graph=True"
                )
            ctx.has_run = True
        elif graph_is_kept():
            return grad * grad_loss, None, None, None, None  # this backward may run again
        ctx.ops.scale_(grad, grad_loss)
        return grad, None, None, None, None


class GradInBackward(torch.autograd.Function):
    """Reduction "none", and fp16: forward saves a few numbers per row, and backward computes the gradient from them."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, inputs: Inputs, settings: Settings, ops: Any, inplace: bool
    ) -> tuple[Tensor, Tensor]:  # (...) or 0-dim, and the metrics
        loss, stats, metrics = ops.stats(student, *inputs, *settings)
        _save(ctx, student, stats, *inputs[1:], *inputs.teachers)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.ops, ctx.inplace = settings._replace(metrics=False), ops, inplace
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: Any) -> Any:
        _forbid_double_backward()
        if grad_loss is None:
            return None, None, None, None, None
        student, stats, *rest = _saved(ctx)
        inputs = _inputs(rest)
        if not ctx.inplace:
            return ctx.ops.grad(student, stats, grad_loss, *inputs, *ctx.settings), None, None, None, None
        student = student.detach()
        ctx.ops.grad_(student, stats, grad_loss, *inputs, *ctx.settings)
        _mark_overwritten(student)  # so that a second backward raises
        return student, None, None, None, None


class LinearGradInForward(torch.autograd.Function):
    """Scalar reductions of a linear loss: forward computes the loss and its gradients, and backward scales them.

    float16 gradients stay fp32 until then, so that a loss scaler's factor is applied before they are rounded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        heads: Heads,
        inputs: Inputs,
        settings: Settings,
        ops: Any,
    ) -> tuple[Tensor, Tensor]:  # 0-dim, and the metrics
        loss, *grads, metrics = ops.linear_loss_grad(hidden, weight, bias, *heads[3:], *inputs, *settings)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(metrics)
        ctx.ops, ctx.wanted, ctx.dtype = ops, heads[-3:], hidden.dtype
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> Any:
        _forbid_double_backward()
        grads = [grad if want else None for grad, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)]
        keep_saved = torch.compiler.is_compiling() or graph_is_kept()
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            if keep_saved or ctx.dtype == torch.float16:
                grads[i] = (grad * grad_loss).to(ctx.dtype)
            else:
                ctx.ops.scale_(grad, grad_loss)
        return *grads, None, None, None, None


class LinearGradInBackward(torch.autograd.Function):
    """Reduction "none" of a linear loss: grad_loss is known in backward only, which computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        heads: Heads,
        inputs: Inputs,
        settings: Settings,
        ops: Any,
    ) -> tuple[Tensor, Tensor]:  # (...), and the metrics
        loss, stats, metrics = ops.linear_stats(hidden, weight, bias, *heads[3:], *inputs, *settings)
        inputs, settings = drop_unused(inputs, settings._replace(metrics=False))
        _save(ctx, hidden, weight, bias, stats, *heads[3:6], *inputs[1:], *inputs.teachers)
        ctx.mark_non_differentiable(metrics)
        ctx.numbers, ctx.settings, ctx.ops = heads[6:], settings, ops
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> Any:
        _forbid_double_backward()
        hidden, weight, bias, stats, *rest = _saved(ctx)
        heads = (hidden, weight, bias, *rest[:3], *ctx.numbers)
        grads = ctx.ops.linear_grad(*heads, stats, grad_loss, *_inputs(rest[3:]), *ctx.settings)
        wanted = zip(grads, ctx.numbers[-3:], strict=True)
        return *(grad.to(hidden.dtype) if want else None for grad, want in wanted), None, None, None, None


class TemperedSoftmax(torch.autograd.Function):
    """softmax(logits / T) and its logarithm; twice differentiable, as torch.softmax is."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype
    ) -> Tensor:  # (..., V)
        output = torch.ops.kdfast.tempered_softmax(logits, temperatures, temperature, log, dtype)
        ctx.save_for_backward(output, temperatures)
        ctx.temperature, ctx.log, ctx.dtype = temperature, log, logits.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        output, temperatures = ctx.saved_tensors
        args = (temperatures, ctx.temperature, ctx.log, ctx.dtype)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return reference.tempered_softmax_backward(grad, output, *args), None, None, None, None
        return torch.ops.kdfast.tempered_softmax_backward(grad, output, *args), None, None, None, None


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """save_for_backward, but tensors made under inference_mode, which it refuses, go to ctx.unsaved."""
    ctx.unsaved = {}
    if not torch.compiler.is_compiling():
        ctx.unsaved = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.unsaved else t for i, t in enumerate(tensors)))


def _saved(ctx: Any) -> list[Any]:
    return [ctx.unsaved.get(i, t) for i, t in enumerate(ctx.saved_tensors)]


def _inputs(saved: list[Any]) -> Inputs:
    """Inputs from the saved tensors, of which the teachers come last."""
    count = len(Inputs._fields) - 1
    return Inputs(saved[count:], *saved[:count])


def _mark_overwritten(student: Tensor) -> None:
    """Makes a backward that saved the logits raise instead of reading the gradient in their place."""
    if not torch.compiler.is_compiling():  # a compiled graph has it from the operator's schema
        increment_version(student)


def _forbid_double_backward() -> None:
    """create_graph=True would treat the gradient as a constant, and so give a wrong second derivative."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "kd_loss is differentiable once: a fused kernel computes its gradient, which has no derivative of its "
            "own, so create_graph=True is not supported"
        )
