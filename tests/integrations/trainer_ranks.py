"""Checks in the processes of a gloo group, and what makes such a process a rank of transformers.Trainer."""

import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState


def become_rank(rank: int, ranks: int = 2) -> None:
    """For a process that was forked: what accelerate has found out about the first process is forgotten."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # of no meaning, as the group exists
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def failures(checks: Sequence[Callable[..., None]], *arguments: Any) -> dict[str, str | None]:
    """What each check raised, by its name; None: nothing."""
    found: dict[str, str | None] = {}
    for check in checks:
        try:
            check(*arguments)
            found[check.__name__] = None
        except Exception:
            found[check.__name__] = traceback.format_exc()
    return found
