"""Trainers' own losses beside kdfast's. `make integration-test` runs these tests, in an environment of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))  # ranks.py: a function on the ranks of a process group


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """The same seed and number of threads for each test."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
