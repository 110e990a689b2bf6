"""Which derivatives there are: the first, by backward and by forward-mode AD, of whole calls. Others raise here."""

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from kdfast.arguments import Inputs
from kdfast.torch_private import (
    below_autograd,
    forward_ad_is_active,
    functorch_is_active,
    has_tangent,
    in_backward,
    is_batched,
    jvp_depth,
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


def forbid_tangents_of_constants(inputs: Inputs) -> None:
    """Raises if a tensor that the loss treats as a constant has a tangent. Teachers may: they are detached."""
    for name, value in zip(Inputs._fields[1:], inputs[1:], strict=True):
        if isinstance(value, Tensor) and has_tangent(value):
            raise RuntimeError(f"{name}: has a tangent of forward-mode AD, but the loss treats it as a constant")


def check_backward(ctx: Any, grad_loss: Tensor | None, others: tuple[Tensor | None, ...]) -> Tensor | None:
    """grad_loss, if this backward is a first derivative of a whole call; others: of the Function's other outputs."""
    if any(other is not None for other in others) or forward_ad_is_active():
        raise RuntimeError(TWICE)
    if grad_loss is None:  # autograd's undefined gradient, which is 0
        return None
    if is_batched(grad_loss):
        raise RuntimeError(VMAP)
    if ctx.fast:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(TWICE)
    elif not ctx.transformed:
        return torch.ops.kdfast.first_derivative(grad_loss)
    return grad_loss


def check_jvp(*results: Tensor) -> list[Tensor]:
    """The tangents of a Function's differentiable results beside the loss: NaN, for whoever uses them is wrong."""
    if jvp_depth() > 1:
        raise RuntimeError(TWICE)
    return [result.new_full((), torch.nan).expand_as(result) for result in results]


def first_derivative(grad_loss: Tensor) -> Tensor:
    """The operator of that name: a copy. Backward of a compiled graph raises by it under create_graph=True."""
    if torch.is_grad_enabled() and in_backward():
        raise RuntimeError(TWICE)
    with below_autograd():
        return grad_loss.clone()


class FusedFunction(torch.autograd.Function):
    """A Function that torch.vmap refuses to map."""

    @classmethod
    def apply_eager(cls, *args: Any) -> Any:
        """apply() outside of transforms, without its inspect.signature, which takes as long as a kernel."""
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(VMAP)


class NotDifferentiable(FusedFunction):
    """An operator whose results raise when they are differentiated."""

    @staticmethod
    def forward(operator: Any, *args: Any) -> Any:
        with below_autograd():
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
