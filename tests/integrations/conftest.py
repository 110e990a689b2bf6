"""Trainers' own losses beside kdfast's. `make integration-test` runs these tests, in an environment of its own."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """The same seed and number of threads for each test."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
