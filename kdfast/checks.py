"""What the public calls check of their arguments: an error names the argument, what it was, and what it may be."""

import math
from typing import Any

import torch
from torch import Tensor

from kdfast.divergences import DIVERGENCES, names, resolve_beta
from kdfast.torch_private import has_tangent

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

CHOICES = {
    "target": ("logits", "probs", "log_probs"),
    "reduction": ("mean", "sum", "batchmean", "none"),
    "ensemble": ("arithmetic", "geometric"),
    "backend": (None, "reference", "cpu", "triton", "cuda"),
}


def check_choice(name: str, value: Any) -> None:
    choices = names() if name == "divergence" else CHOICES[name]
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, choices))}")


def as_number(name: str, value: Any) -> float:
    """A Python or numpy number as a float."""
    if isinstance(value, (float, torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1000 else math.inf
    if not isinstance(value, (bool, str, Tensor)) and hasattr(value, "__float__"):
        try:
            return float(value)
        except TypeError:  # an array
            pass
    raise TypeError(f"{name}: must be a number, not {value!r}")


def as_integer(name: str, value: Any) -> int:
    """A Python or numpy integer as an int."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if not isinstance(value, (bool, Tensor)) and hasattr(value, "__index__"):
        return int(value)
    raise TypeError(f"{name}: must be an int, not {value!r}")


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: must be a bool, not {value!r}")
    return value


def check_positive(name: str, value: Any) -> float:
    number = as_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: {value!r} must be finite and > 0")
    return number


def check_size(name: str, value: Any) -> float:
    number = as_number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: {value!r} must be a finite number >= 0")
    return number


def check_mix(alpha: Any, hard_weight: Any, labelled: bool) -> tuple[float, float]:
    """alpha and hard_weight with their defaults."""
    given = alpha
    alpha = (0.9 if labelled else 1.0) if alpha is None else check_size("alpha", alpha)
    if hard_weight is None:
        if alpha > 1:
            raise ValueError(f"alpha: {given!r} must lie in [0, 1] where no hard_weight is given")
        if not labelled and alpha != 1:
            raise ValueError(
                f"alpha: {given!r} without labels leaves a part of the loss out; give labels, alpha=1, or hard_weight=0"
            )
        return alpha, 1.0 - alpha
    number = check_size("hard_weight", hard_weight)
    if number and not labelled:
        raise ValueError(f"hard_weight: {hard_weight!r} without labels; give labels or hard_weight=0")
    return alpha, number


def check_beta(divergence: str, beta: Any) -> tuple[str, float]:
    """What `beta` makes of the divergence: at its ends another one."""
    if beta is None:
        return resolve_beta(divergence, None)
    entry = DIVERGENCES.get(divergence)
    if entry is None or entry.beta is None:
        having = ", ".join(repr(name) for name, each in DIVERGENCES.items() if each.beta is not None)
        raise ValueError(f"beta: given with divergence={divergence!r}, which has none; it is for {having}")
    number = as_number("beta", beta)
    if not 0 <= number <= 1:
        raise ValueError(f"beta: {beta!r} must lie in [0, 1]")
    return resolve_beta(divergence, number)


def check_smoothing(label_smoothing: Any, labelled: bool) -> float:
    number = as_number("label_smoothing", label_smoothing)
    if not 0 <= number <= 1:
        raise ValueError(f"label_smoothing: {label_smoothing!r} must lie in [0, 1]")
    if number and not labelled:
        raise ValueError(f"label_smoothing: {label_smoothing!r} without labels; it is for the hard term")
    return number


def check_cap(name: str, value: Any) -> float:
    """A softcap; 0 where there is none."""
    return 0.0 if value is None else check_positive(name, value)


def check_dkd(divergence: str, dkd_weights: Any, default: tuple[float, float], labelled: bool) -> list[float]:
    try:
        weights = [check_size("dkd_weights", w) for w in dkd_weights]
    except TypeError:
        weights = []
    if len(weights) != 2 or isinstance(dkd_weights, (str, Tensor)):
        raise TypeError(
            f"dkd_weights: must be two numbers, of the target and of the other classes, not {dkd_weights!r}"
        )
    if divergence != "dkd":
        if weights != list(default):
            raise ValueError(f"dkd_weights: given with divergence={divergence!r}; they are for 'dkd'")
    elif not labelled:
        raise ValueError("divergence: 'dkd' needs labels, which say what its target class is")
    return weights


def check_vocab(vocab_size: Any) -> int:
    """How many of the first classes are real; -1: all."""
    if vocab_size is None:
        return -1
    number = as_integer("vocab_size", vocab_size)
    if number < 1:
        raise ValueError(f"vocab_size: {number} must be at least 1")
    return number


def check_logits(name: str, logits: Any) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name}: must be a tensor, not {kind(logits)}")
    check_dense(name, logits)
    check_floating(name, logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name}: has shape {tuple(logits.shape)}, but it must be (..., V) with V >= 1")


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
        raise ValueError(
            f"{name}: has shape {tuple(value.shape)}, but with {of} of shape {tuple(logits.shape)} it must "
            f"be {tuple(shape)}"
        )
    if value.device != logits.device:
        raise RuntimeError(f"{name}: is on {value.device}, but {of} is on {logits.device}")


def check_temperature(name: str, value: Any) -> float:
    """A temperature that is a number; 1 where a tensor holds one per row."""
    return 1.0 if isinstance(value, Tensor) else check_positive(name, value)


def check_temperatures(
    name: str, value: Any, shape: torch.Size, logits: Tensor, of: str = "student_logits"
) -> Tensor | None:
    """One temperature per row; None where it is a number."""
    if not isinstance(value, Tensor):
        return None
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


def check_inplace(student: Tensor) -> None:
    """The errors of PyTorch's own in-place operations."""
    if not (student.requires_grad and torch.is_grad_enabled()):
        return
    base = student
    if not torch.compiler.is_compiling() and student._base is not None:
        base = student._base
    if base.is_leaf and base.requires_grad:
        raise RuntimeError("inplace: student_logits is a leaf (or a view of one) that requires grad")
    if any(size > 1 and stride == 0 for size, stride in zip(student.shape, student.stride(), strict=True)):
        raise RuntimeError(
            "inplace: student_logits is expanded, so more than one of its elements refers to a single memory location; "
            "clone() it first"
        )


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
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        if isinstance(tensor, DTensor):
            raise TypeError(f"{name}: is a DTensor, of which each process holds a part; {parts}")


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise RuntimeError(f"{name}: has dtype {tensor.dtype}, but it must be one of {', '.join(map(str, FLOATS))}")


def kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
