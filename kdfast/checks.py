"""Checks of numbers and names: an error names the argument, what it was, and what it may be."""

import math
from typing import Any

import torch
from torch import Tensor

from kdfast.divergences import DIVERGENCES, names, resolve_beta

CHOICES = {
    "target": ("logits", "probs", "log_probs"),
    "reduction": ("mean", "sum", "batchmean", "none"),
    "missing": ("tail", "conditional", "renormalize", "truncate"),
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
    if type(value) is int:
        return value
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


def check_ignore_index(ignore_index: Any) -> int:
    number = as_integer("ignore_index", ignore_index)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"ignore_index: {number} must fit into 64 bits, as labels do")
    return number
