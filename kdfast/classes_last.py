"""Logits whose classes are in another dimension, as operators take them: a view with the classes last."""

from typing import Any

import torch
from torch import Tensor


class _ClassesLast(torch.autograd.Function):
    """movedim(dim, -1), whose gradient is contiguous: the operators', moved back, would not be."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, dim: int) -> Tensor:  # (..., V)
        return logits.movedim(dim, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.dim = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.movedim(-1, ctx.dim).contiguous(), None


def classes_last(logits: Tensor, dim: int, inplace: bool) -> Tensor:
    """A view, (..., V), of logits with V in dimension `dim`; their gradient keeps their memory layout."""
    if dim in (-1, logits.dim() - 1):
        return logits
    # a gradient that is written over the logits lies as they do, and torch.compile chooses layouts itself
    if inplace or torch.compiler.is_compiling() or logits.stride(dim) == 1:
        return logits.movedim(dim, -1)
    return _ClassesLast.apply(logits, dim)
