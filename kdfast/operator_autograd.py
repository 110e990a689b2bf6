"""Autograd of the operators: what a graph of torch.compile, torch.export or make_fx calls, and who calls them directly.

Each is differentiated once, in what the public call takes a gradient of. All else raises: in backward, or at once
where nothing is returned that backward could start from.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast import reference
from kdfast.arguments import Heads, Inputs, Settings, take_flat, take_flat_heads
from kdfast.autograd import LossGrad, Stats
from kdfast.derivatives import TWICE, NotDifferentiable, forbid_tangents_of_constants, is_transformed
from kdfast.linear_autograd import LinearLossGrad, LinearStats
from kdfast.softmax import TemperedSoftmax
from kdfast.torch_private import below_autograd, forward_ad_is_active


def autograd(namespace: str, name: str) -> Callable[..., Any]:
    """The kernel of an operator of a namespace for tensors that may require grad or have a tangent."""
    ops = getattr(torch.ops, namespace)
    operator = getattr(ops, name)
    differentiable = _differentiable(ops, name)

    def call(*args: Any) -> Any:
        requires_grad = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        if requires_grad or forward_ad_is_active():
            return differentiable(*args)
        with below_autograd():
            return operator(*args)

    return call


def _differentiable(ops: Any, name: str) -> Callable[..., Any]:
    if name in ("loss_grad", "loss_grad_", "stats"):
        function = Stats if name == "stats" else LossGrad

        def row_call(student: Tensor, inputs: Inputs, settings: Settings) -> Any:
            _forbid_gradients_of_constants(inputs)
            return function.apply(student, inputs, settings, ops, name == "loss_grad_", False)

        return take_flat(row_call)
    if name in ("linear_loss_grad", "linear_stats"):
        linear_function = LinearStats if name == "linear_stats" else LinearLossGrad

        def linear_call(heads: Heads, inputs: Inputs, settings: Settings) -> Any:
            _forbid_gradients_of_constants(inputs)
            return linear_function.apply(*heads[:3], heads[3:], inputs, settings, ops, False)

        return take_flat_heads(linear_call)
    if name == "tempered_softmax":
        return lambda *args: reference.tempered_softmax(*args) if is_transformed() else TemperedSoftmax.apply(*args)
    if name == "tempered_softmax_backward":
        return reference.tempered_softmax_backward
    return lambda *args: NotDifferentiable.apply(getattr(ops, name), *args)


def _forbid_gradients_of_constants(inputs: Inputs) -> None:
    for name, value in zip(Inputs._fields[1:], inputs[1:], strict=True):
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{name}: requires grad, but the loss treats it as a constant; detach() it")
    forbid_tangents_of_constants(inputs)
