"""Every call of the one list (calls.py) gives on every backend the numbers that judge.py's rule allows."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
from calls import SPECIAL, Call, all_calls, plain_calls
from judge import Truth, judge, truth_of
from judge_metrics import judge_metrics

# How many of the calls, from the first, a backend gets in `make test`, and the special ones; in `make test-full` it
# gets all. Triton compiles for nearly each of them. The reference in fp64 is the truth itself, which test_reference.py
# holds; here it shows on a few calls that it reads other dtypes, and in fp32 its arithmetic is that of eager PyTorch.
FAST = {"reference": 30, "cpu": 10_000, "triton": 60}
FULL = {"reference": 30, "cpu": 10_000, "triton": 10_000}


def grid() -> Iterator[Any]:
    for number, call in enumerate(all_calls()):
        for backend in FAST:
            if number < FULL[backend]:
                marks = () if number < FAST[backend] or call in SPECIAL else pytest.mark.full
                yield pytest.param(call, backend, marks=marks, id=f"{number}: {call.id}, {backend}")
    for number, call in enumerate(plain_calls()):
        yield pytest.param(call, "cuda", id=f"{number}: {call.id}, cuda")


@lru_cache(maxsize=2)
def prepared(call: Call) -> tuple[tuple[Any, ...], dict[str, Any], Truth]:
    """The truth of a call is the same for every backend."""
    arguments, settings = call.arguments()
    return arguments, settings, truth_of(*arguments, settings)


@pytest.mark.parametrize(("call", "backend"), list(grid()), indirect=["backend"])
def test_a_call_gives_the_right_loss_gradient_and_metrics(call: Call, backend: str) -> None:
    arguments, settings, truth = prepared(call)
    by_row = backend in ("cpu", "reference")  # the others have calls of reduction "none", and compile for it
    judge(*arguments, backend=backend, by_row=by_row, truth=truth, **settings)
    if settings.get("return_metrics"):
        settings = {k: v for k, v in settings.items() if k not in ("return_metrics", "inplace")}
        judge_metrics(*arguments, backend=backend, **settings)
