"""TRL's functions by name, logits to call them with, and the comparison of a replaced one with the original."""

import importlib
import os
from collections.abc import Callable
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from torch import Tensor

BATCH, LENGTH, VOCAB = 2, 6, 15
BETAS = (0.0, 0.3, 0.5, 1.0)
NAMES = {"gkd": "GKDTrainer", "gold": "GOLDTrainer", "iw_opd": "IWOPDTrainer"}
LABELS = torch.tensor([[-100, -100, 3, 4, 14, -100], [-100, 0, 1, 2, 3, 4]])


def found(path: str) -> Any:
    """An attribute of an experimental trainer's module: "gkd.GKDTrainer.generalized_jsd_loss"."""
    name, *path = path.split(".")
    owner = importlib.import_module(f"trl.experimental.{name}.{name}_trainer")
    for part in path:
        owner = getattr(owner, part)
    return owner


def logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(BATCH, LENGTH, VOCAB, dtype=torch.float64, generator=draw) for _ in range(2))


def value_and_gradients(function: Callable[..., Any], leaves: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    """The loss, what else is returned, and the gradients of leaves, with weights where the loss is no scalar."""
    results = function(*args, **kwargs)
    results = results if isinstance(results, tuple) else (results,)
    weights = torch.linspace(1, 2, results[0].numel(), dtype=results[0].dtype).view_as(results[0])
    grads = torch.autograd.grad((results[0] * weights).sum(), leaves)
    assert not any(x.requires_grad for x in results[1:])
    return [*results, *grads]


def check(function: Callable[..., Any], leaves: list[Tensor], *args: Any, rtol: float = 1e-10, **kwargs: Any) -> None:
    """As the original, of the same dtypes."""
    ours = value_and_gradients(function, leaves, *args, **kwargs)
    theirs = value_and_gradients(function.kdfast_original, leaves, *args, **kwargs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol, check_dtype=rtol < 1e-9)
