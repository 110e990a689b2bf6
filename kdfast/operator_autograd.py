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
from kdfast.derivatives import NotDifferentiable, is_transformed
from kdfast.linear_autograd import LinearLossGrad, LinearStats
from kdfast.softmax import TemperedSoftmax
from kdfast.torch_private import (
    below_autograd,
    forward_ad_is_active,
    functorch_is_active,
    has_tangent,
    single_level_functions,
)


def autograd(namespace: str, name: str) -> Callable[..., Any]:
    """The kernel of an operator of a namespace for tensors that may require grad or have a tangent."""
    ops = getattr(torch.ops, namespace)
    operator = getattr(ops, name)
    differentiable = _differentiable(ops, name)

    def call(*args: Any) -> Any:
        if functorch_is_active():
            with single_level_functions():
                return differentiable(*args)
        if forward_ad_is_active() or any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return differentiable(*args)
        with below_autograd():
            return operator(*args)

    return call


def _differentiable(ops: Any, name: str) -> Callable[..., Any]:
    if name in ("loss_grad", "loss_grad_", "stats", "stats_for_inplace"):
        function = LossGrad if name.startswith("loss_grad") else Stats
        inplace = name in ("loss_grad_", "stats_for_inplace")

        def row_call(student: Tensor, inputs: Inputs, settings: Settings) -> Any:
            _check_constants(inputs)
            if inplace and is_transformed():
                raise RuntimeError("inplace: must be False under torch.compile of a transform of torch.func")
            return function.apply_here(student, inputs, settings, ops, inplace, False)

        return take_flat(row_call)
    if name in ("linear_loss_grad", "linear_stats"):
        linear_function = LinearStats if name == "linear_stats" else LinearLossGrad

        def linear_call(heads: Heads, inputs: Inputs, settings: Settings) -> Any:
            _check_constants(inputs)
            return linear_function.apply_here(*heads[:3], heads[3:], inputs, settings, ops, False)

        return take_flat_heads(linear_call)
    if name == "tempered_softmax":
        return lambda *args: reference.tempered_softmax(*args) if is_transformed() else TemperedSoftmax.apply(*args)
    if name == "tempered_softmax_backward":
        return reference.tempered_softmax_backward
    operator = getattr(ops, name)
    return _refuse(operator) if name.endswith("_") else lambda *args: NotDifferentiable.apply_here(operator, *args)


def _check_constants(inputs: Inputs) -> None:
    """Raises if a tensor that the loss treats as a constant asks for a derivative. Teachers may: they are detached."""
    for name, value in zip(Inputs._fields[1:], inputs[1:], strict=True):
        if value is not None and _asks_for_derivative(value):
            raise RuntimeError(f"{name}: requires grad or has a tangent, but the loss treats it as a constant; detach() it")


def _asks_for_derivative(x: Any) -> bool:
    return isinstance(x, Tensor) and ((x.requires_grad and torch.is_grad_enabled()) or has_tangent(x))


def _refuse(operator: Any) -> Callable[..., Any]:
    """An operator that returns nothing that backward could start from."""

    def call(*args: Any) -> Any:
        if any(map(_asks_for_derivative, args)):
            raise RuntimeError(f"{operator}: writes to its first argument, for which autograd has no formula")
        with below_autograd():
            return operator(*args)

    return call
