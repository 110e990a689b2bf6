"""The operators' kernels for autograd, which graphs of torch.compile and torch.export run, and transforms.

The loss that an operator returns can be differentiated once, in the student. All else that it returns, or writes to,
raises in backward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast import reference
from kdfast.arguments import Heads, Inputs, Settings, take_flat, take_flat_heads
from kdfast.autograd import LossGrad, Stats
from kdfast.derivatives import NotDifferentiable, OverwritesFirst, is_transformed
from kdfast.linear_autograd import LinearLossGrad, LinearStats
from kdfast.softmax import TemperedSoftmax
from kdfast.tensor_checks import check_constant
from kdfast.token_autograd import LinearTokenStats, Numbers, TokenStats
from kdfast.torch_private import (
    apply_function,
    below_autograd,
    functorch_is_active,
    has_tangent,
    single_level_functions,
)


def autograd(namespace: str, name: str) -> Callable[..., Any]:
    """The kernel of an operator of a namespace for tensors that may require grad or have a tangent."""
    ops = getattr(torch.ops, namespace)
    operator = getattr(ops, name)
    with_gradient = differentiable(ops, name)

    def call(*args: Any) -> Any:
        if functorch_is_active():
            with single_level_functions():
                return with_gradient(*args)
        if any(map(_asks_for_derivative, args)):
            return with_gradient(*args)
        with below_autograd():
            return operator(*args)

    return call


def differentiable(ops: Any, name: str) -> Callable[..., Any]:
    """The operator of this name in `ops` with its derivative, or one that raises where it has none."""
    if name in ("loss_grad", "loss_grad_", "stats", "stats_for_inplace"):
        function = LossGrad if name.startswith("loss_grad") else Stats
        inplace = name in ("loss_grad_", "stats_for_inplace")

        def row_call(student: Tensor, inputs: Inputs, settings: Settings) -> Any:
            _check_constants(inputs)
            if inplace and is_transformed():
                raise RuntimeError("inplace: must be False under a transform of torch.func and in forward-mode AD")
            return apply_function(function, student, inputs, settings, ops, inplace, False)

        return take_flat(row_call)
    if name in ("linear_loss_grad", "linear_stats"):
        linear_function = LinearStats if name == "linear_stats" else LinearLossGrad

        def linear_call(heads: Heads, inputs: Inputs, settings: Settings) -> Any:
            _check_constants(inputs)
            return apply_function(linear_function, *heads[:3], heads[3:], inputs, settings, ops, False)

        return take_flat_heads(linear_call)
    if name in ("token_stats", "linear_token_stats"):
        return _token_call(ops, is_linear=name != "token_stats")
    if name == "tempered_softmax":
        return lambda *args: reference.tempered_softmax(*args) if is_transformed() else TemperedSoftmax.apply(*args)
    if name == "tempered_softmax_backward":
        return reference.tempered_softmax_backward
    operator = getattr(ops, name)
    if not name.endswith("_"):
        return lambda *args: apply_function(NotDifferentiable, operator, *args)

    def overwrite(*args: Any) -> None:
        apply_function(OverwritesFirst, operator, *args)

    return overwrite


def _token_call(ops: Any, is_linear: bool) -> Callable[..., Any]:
    function, tensors = (LinearTokenStats, 5) if is_linear else (TokenStats, 3)  # the last of them are temperatures

    def call(*args: Any) -> Any:
        *given, temperatures = args[:tensors]
        if temperatures is not None:
            check_constant("temperatures", temperatures)
        numbers, others = Numbers(*args[tensors : tensors + 5]), args[tensors + 5 :]
        return apply_function(function, *given, temperatures, numbers, *(others if is_linear else ()), ops, False)

    return call


def _check_constants(inputs: Inputs) -> None:
    """Raises if a tensor that the loss treats as a constant asks for a derivative. Teachers may: they are detached."""
    for name, value in zip(Inputs._fields[1:], inputs[1:], strict=True):
        if isinstance(value, Tensor):
            check_constant(name, value)


def _asks_for_derivative(x: Any) -> bool:
    return isinstance(x, Tensor) and ((x.requires_grad and torch.is_grad_enabled()) or has_tangent(x))
