"""Which derivatives there are: the first, by backward or forward-mode AD, of a whole call. All others raise here."""

from typing import Any

import torch
from torch import Tensor

from kdfast.torch_private import (
    below_autograd,
    calls_are_recorded,
    forward_ad_is_active,
    functorch_is_active,
    is_batched,
    jvp_depth,
    next_level,
)

TWICE = (
    "kdfast's losses are differentiable once: a fused kernel computes their gradient, which has no derivative of its "
    "own. So create_graph=True, the gradient or the tangent of a gradient, and torch.func.hessian are not supported"
)
VMAP = (
    "kdfast's losses do not support torch.vmap, nor what is built on it, such as torch.func.jacrev and "
    "is_grads_batched=True. Pass all rows in one call; reduction='none' returns the loss of each row"
)


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active."""
    return functorch_is_active() or forward_ad_is_active()


def check_backward(ctx: Any, grad_loss: Tensor | None, others: tuple[Tensor | None, ...]) -> Tensor | None:
    """grad_loss, if this backward is a first derivative of a whole call; others: of the Function's other outputs."""
    if torch.compiler.is_compiling():  # compiled autograd, whose graph has first derivatives alone
        return grad_loss
    if others.count(None) < len(others) or forward_ad_is_active():
        raise RuntimeError(TWICE)
    if grad_loss is None:  # autograd's undefined gradient, which is 0
        return None
    if is_batched(grad_loss):
        raise RuntimeError(VMAP)
    if torch.is_grad_enabled() and not ctx.transformed:
        raise RuntimeError(TWICE)  # under a transform, if the gradient is differentiated: grad is always create_graph
    return grad_loss


def scale(ops: Any, grad: Tensor, factor: Tensor) -> None:
    """Multiplies a gradient in-place by grad_loss. The 1 of loss.backward() on a CPU takes no call of an operator."""
    is_plain = ops is torch.ops.kdfast and type(factor) is Tensor and factor.is_cpu  # and no emulated GPU's
    if is_plain and not calls_are_recorded() and factor.item() == 1:
        return
    with below_autograd():
        ops.scale_(grad, factor)


def check_jvp(*results: Tensor) -> list[Tensor]:
    """The tangents of a Function's differentiable results beside the loss: NaN, for whoever uses them is wrong."""
    if jvp_depth() > 1:
        raise RuntimeError(TWICE)
    return [result.new_full((), torch.nan).expand_as(result) for result in results]


def refuse_vmap(*args: Any) -> Any:
    """An operator's kernel for tensors that torch.vmap has given one more dimension."""
    raise RuntimeError(VMAP)


class NotDifferentiable(torch.autograd.Function):
    """An operator whose results raise when they are differentiated."""

    @staticmethod
    def forward(operator: Any, *args: Any) -> Any:
        with next_level():
            return operator(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(TWICE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(TWICE)


class OverwritesFirst(NotDifferentiable):
    """An operator that overwrites its first tensor, which raises from then on, and returns nothing."""

    @staticmethod
    def forward(operator: Any, *args: Any) -> Tensor:
        NotDifferentiable.forward(operator, *args)
        return args[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_dirty(output)
