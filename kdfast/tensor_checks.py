"""Checks of tensors: an error names the argument, what it was, and what it may be."""

import sys
from typing import Any

import torch
from torch import Tensor

from kdfast.checks import check_positive
from kdfast.torch_private import has_tangent

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def without(shape: torch.Size, dim: int) -> torch.Size:
    """The shape without a dimension, counted from the first."""
    return shape[:-1] if dim == len(shape) - 1 else shape[:dim] + shape[dim + 1 :]


def check_logits(name: str, logits: Any, dim: int = -1, least: int = 1) -> int:
    """Returns the dimension of the classes, counted from the first. least: the number of classes."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: must be a tensor, not {kind(logits)}")
    check_dense(name, logits)
    check_floating(name, logits)
    dims = logits.dim()
    if dims and not -dims <= dim < dims:
        raise IndexError(f"dim: {dim} must lie in [{-dims}, {dims - 1}], the dimensions of {name}")
    if dims == 0 or logits.shape[dim] < least:
        where = "(..., V)" if dim in (-1, dims - 1) else f"V in dimension {dim}"
        raise ValueError(f"{name}: has shape {tuple(logits.shape)}, but it must be {where} with V >= 1")
    return dim % dims


def check_rows(
    name: str, value: Any, shape: torch.Size, logits: Tensor, integer: bool = False, of: str = "student_logits"
) -> None:
    """A tensor with one value per row of the logits, which the caller knows under the name `of`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: must be a tensor, not {kind(value)}")
    if integer and value.is_floating_point() and value.shape == logits.shape and value.dim() > len(shape):
        raise RuntimeError(
            f"{name}: has dtype {value.dtype} and the shape of {of}, but it must be torch.int64 class indices; "
            'probabilities, as mixup and cutmix make them, are a teacher: kd_loss(s, labels, target="probs"), with '
            "alpha=1 - a and added to kd_loss(s, teacher, alpha=a, hard_weight=0) where there is another teacher"
        )
    if integer and value.dtype != torch.int64:
        raise RuntimeError(f"{name}: has dtype {value.dtype}, but it must be torch.int64 class indices")
    if value.is_complex():
        raise RuntimeError(f"{name}: has dtype {value.dtype}, but it must be real")
    if value.shape != shape:
        fits = logits.dim() > 2 and value.shape == without(logits.shape, 1)
        hint = f"; {name} of shape {tuple(value.shape)} fit classes in dimension 1: pass dim=1"
        raise ValueError(
            f"{name}: has shape {tuple(value.shape)}, but with {of} of shape {tuple(logits.shape)} it must "
            f"be {tuple(shape)}{hint if fits and integer else ''}"
        )
    if value.device != logits.device:
        raise RuntimeError(f"{name}: is on {value.device}, but {of} is on {logits.device}")


def check_temperature(name: str, value: Any) -> float:
    """A temperature that is a number; 1 where a tensor is used as one per row."""
    if is_readable(value):
        value = as_scalar(name, value)
    return 1.0 if isinstance(value, Tensor) else check_positive(name, value)


def check_temperatures(
    name: str, value: Any, shape: torch.Size, logits: Tensor, of: str = "student_logits"
) -> Tensor | None:
    """One temperature per row; None where it is a number."""
    if not isinstance(value, Tensor) or is_readable(value):
        return None
    value = value.expand(shape) if value.dim() == 0 else value
    check_rows(name, value, shape, logits, of=of)
    check_constant(name, value)
    return value.detach()


def check_normalizer(value: Any, reduction: str, student: Tensor) -> tuple[float, Tensor | None]:
    """The normalizer as a number (0: none) or as a tensor."""
    if value is None:
        return 0.0, None
    if reduction != "mean":
        raise ValueError(
            f"normalizer: given with reduction={reduction!r}; it takes the place of the mean's denominator"
        )
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dim() > 1 or value.is_complex():
            raise ValueError(
                f"normalizer: must be a number or a real tensor of one, not {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.device != student.device:
            raise RuntimeError(f"normalizer: is on {value.device}, but student_logits is on {student.device}")
        check_constant("normalizer", value)
        return 0.0, value.reshape(())
    return check_positive("normalizer", value), None


def is_readable(value: Any) -> bool:
    """Whether it is a 0-dim tensor that can be read without a sync and without a break of the graph."""
    is_scalar = isinstance(value, Tensor) and value.dim() == 0
    return is_scalar and value.device.type == "cpu" and not torch.compiler.is_compiling()


def as_scalar(name: str, value: Any) -> Any:
    """The number that a 0-dim tensor holds; anything else unchanged. A GPU's tensor is an error, not a sync."""
    if not isinstance(value, Tensor) or value.dim():
        return value
    check_constant(name, value)
    if value.device.type != "cpu":
        raise RuntimeError(
            f"{name}: is on {value.device}, where reading its value would wait for the device; keep it on the CPU, or "
            f"pass {name}.item(), which waits"
        )
    return value.item()


def check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name}: requires grad, but kdfast has no derivative for it; detach() it")
    if not torch.compiler.is_compiling() and has_tangent(tensor):
        raise RuntimeError(f"{name}: has a tangent, but kdfast has no derivative for it; detach() it")


def check_dense(name: str, tensor: Tensor, parts: str = "pass to_local() of logits that are split by rows") -> None:
    """Not a DTensor, nor nested. parts: what to do with a DTensor."""
    if type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_nested:
        return
    if tensor.is_nested:
        raise TypeError(f"{name}: is a nested tensor; pass its values(), and labels and teacher of the same rows")
    if is_dtensor(tensor):
        raise TypeError(f"{name}: is a DTensor, of which each process holds a part; {parts}")


def is_dtensor(x: Any) -> bool:
    """Does not import torch.distributed.tensor: nobody has a DTensor who has not."""
    if type(x) in (Tensor, torch.nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise RuntimeError(f"{name}: has dtype {tensor.dtype}, but it must be one of {', '.join(map(str, FLOATS))}")


def kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
