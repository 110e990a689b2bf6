"""How a function of TRL is replaced: the same arguments, and the original where kdfast computes something else."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kdfast.integrations.patching import warn_fallback

Function = Callable[..., Any]


def in_place_of(ours: Function, cannot: Callable[[Mapping[str, Any]], str]) -> Callable[[Function], Function]:
    """A replacement for `Patch.replace`: a function with the original's signature, which calls `ours`.

    Args:
        ours: takes all arguments of the original by name, so that an argument that a later version adds is an error
            and not ignored.
        cannot: says of these arguments what kdfast does not compute, "" where it computes all. The original runs then.
    """

    def replacement(original: Function) -> Function:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            reason = cannot(call.arguments)
            if reason:
                warn_fallback(f"trl's {original.__qualname__}", reason)
                return original(*args, **kwargs)
            return ours(**call.arguments)

        return replaced

    return replacement


def teacher_gradient(teacher: torch.Tensor) -> str:
    """What kdfast does not compute for a teacher that requires grad."""
    return "a gradient of the teacher" if teacher.requires_grad and torch.is_grad_enabled() else ""
