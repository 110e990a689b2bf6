"""What kdfast uses of PyTorch's private API, and what it does where a later torch lacks it."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def _missing(name: str, consequence: str) -> None:
    warnings.warn(f"kdfast: torch {torch.__version__} has no {name}: {consequence}", stacklevel=3)


def graph_is_kept() -> bool:
    """Whether the backward pass that runs now was called with retain_graph=True, so that it may run again."""
    try:
        return torch._C._autograd._get_current_graph_task_keep_graph()
    except AttributeError:
        _missing("torch._C._autograd._get_current_graph_task_keep_graph", "backward copies each gradient")
        return True


def enable_autograd() -> AbstractContextManager[Any]:
    """Enables autograd inside an operator: a compiled graph calls it below autograd."""
    try:
        return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    except AttributeError:
        _missing("torch._C._SetExcludeDispatchKeyGuard", "backend='reference' works outside of torch.compile only")
        return nullcontext()


def mark_constant_in_graphs(function: Callable[..., Any]) -> None:
    """Makes Dynamo call a function once and keep its result, as torch.compiler.assume_constant_result does.

    assume_constant_result would import all of Dynamo with kdfast. A torch without this mark traces the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
