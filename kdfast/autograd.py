"""The autograd Functions: when a gradient is computed, and what is kept until then."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from kdfast import reference
from kdfast.arguments import Inputs, Settings


def row_loss(student: Tensor, inputs: Inputs, settings: Settings, ops: Any, inplace: bool) -> tuple[Tensor, Tensor]:
    """The loss under settings.reduction, with a graph where the student wants a gradient, and the metrics."""
    if not (student.requires_grad and torch.is_grad_enabled()):
        loss, _, metrics = ops.stats(student, *inputs, *settings)
        return loss, metrics
    # fp16: a gradient made before the loss scaler's factor is known would round to 0, and no scaling brings it back
    late = settings.reduction == "none" or student.dtype == torch.float16
    return (GradInBackward if late else GradInForward).apply(student, inputs, settings, ops, inplace)


class GradInForward(torch.autograd.Function):
    """Scalar reductions: forward makes the loss and the finished gradient, backward at most scales it."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, inputs: Inputs, settings: Settings, ops: Any, inplace: bool
    ) -> tuple[Tensor, Tensor]:  # 0-dim, and the metrics
        if inplace:
            loss, metrics = ops.loss_grad_(student, *inputs, *settings)
            _overwritten(student)
            grad = student.detach()
        else:
            loss, grad, metrics = ops.loss_grad(student, *inputs, *settings)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(metrics)
        ctx.ops, ctx.inplace, ctx.spent = ops, inplace, False
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> Any:
        _no_double_backward()
        (grad,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return grad * grad_loss, None, None, None, None
        if ctx.inplace:
            if ctx.spent:
                raise RuntimeError(
                    "kd_loss(inplace=True) can be backpropagated through once: its gradient has been handed on in the "
                    "logits' own storage. Use inplace=False to backpropagate with retain_graph=True"
                )
            ctx.spent = True
        elif torch._C._autograd._get_current_graph_task_keep_graph():
            return grad * grad_loss, None, None, None, None  # this backward may run again
        ctx.ops.scale_(grad, grad_loss)
        return grad, None, None, None, None


class GradInBackward(torch.autograd.Function):
    """Reduction "none", and fp16: forward keeps a few statistics per row, backward makes the gradient from them."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, inputs: Inputs, settings: Settings, ops: Any, inplace: bool
    ) -> tuple[Tensor, Tensor]:  # (...) or 0-dim, and the metrics
        loss, stats, metrics = ops.stats(student, *inputs, *settings)
        tensors = (student, stats, *inputs[1:], *inputs.teachers)
        # save_for_backward refuses what was made under inference_mode
        ctx.unsaved = {} if torch.compiler.is_compiling() else _inference_tensors(tensors)
        ctx.save_for_backward(*(None if i in ctx.unsaved else t for i, t in enumerate(tensors)))
        ctx.mark_non_differentiable(metrics)
        ctx.settings, ctx.ops, ctx.inplace = settings, ops, inplace
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> Any:
        _no_double_backward()
        tensors = [ctx.unsaved.get(i, t) for i, t in enumerate(ctx.saved_tensors)]
        student, stats, *rest = tensors
        split = len(Inputs._fields) - 1
        inputs = Inputs(rest[split:], *rest[:split])
        if not ctx.inplace:
            return ctx.ops.grad(student, stats, grad_loss, *inputs, *ctx.settings), None, None, None, None
        student = student.detach()
        ctx.ops.grad_(student, stats, grad_loss, *inputs, *ctx.settings)
        _overwritten(student)  # a second backward finds the logits changed, and says so
        return student, None, None, None, None


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


def _inference_tensors(tensors: tuple[Tensor | None, ...]) -> dict[int, Tensor]:
    return {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}


def _overwritten(student: Tensor) -> None:
    """Tells autograd that the logits are gone, so that whoever saved them raises instead of using the gradient."""
    if not torch.compiler.is_compiling():  # there the operator's schema says it
        increment_version(student)


def _no_double_backward() -> None:
    """With create_graph=True a constant gradient would look like one that does not depend on the logits."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "kd_loss is differentiable once: its gradient comes finished from a fused kernel, so it cannot be "
            "backpropagated through with create_graph=True"
        )
