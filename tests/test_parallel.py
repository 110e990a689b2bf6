"""Vocabularies split over processes give every rank one process's loss and its part of the gradient."""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import shard_checks
from ranks import results_of_ranks
from shards import failures

CHECKS = [*shard_checks.CHECKS]


@lru_cache
def failures_of_ranks(ranks: int) -> list[dict[str, str | None]]:
    """What each check raised on each rank."""
    with TemporaryDirectory() as folder:
        return results_of_ranks(Path(folder), failures, ranks, CHECKS, ranks=ranks)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_on_every_rank(ranks: int, check: str) -> None:
    for rank, found in enumerate(failures_of_ranks(ranks)):
        if found[check]:
            pytest.fail(f"rank {rank} of {ranks}: {found[check]}", pytrace=False)
