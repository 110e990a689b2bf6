"""Trainers' own losses beside kdfast's. `make integration-test` runs these tests, in an environment of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))  # for ranks.py: a function on the ranks of a process group

from ranks import results_of_ranks  # noqa: E402


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """The same seed and number of threads for each test."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def of_two_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the module's run_checks(rank) returns on each of two ranks."""
    return results_of_ranks(tmp_path_factory.mktemp("ranks"), request.module.run_checks, start_method="fork")
