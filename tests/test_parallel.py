"""Vocabularies split over processes: every rank gets one process's loss, and its part of one process's gradient."""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import shard_checks
import shard_entry_checks
import shard_linear_checks
import shard_promises
import shard_torch_checks
import torch
from cases import batch, run_python
from ranks import results_of_ranks
from shards import failures

import kdfast

# Two ranks have all that does not depend on their number; of three and four shards some are empty, or of one class.
CHECKS = {
    2: [*shard_checks.CHECKS, *shard_promises.CHECKS, *shard_linear_checks.CHECKS, *shard_torch_checks.CHECKS],
    3: [
        *shard_checks.FEW, *shard_promises.CHECKS, *shard_linear_checks.CHECKS, *shard_torch_checks.DTENSORS,
        *shard_entry_checks.CHECKS,
    ],
    4: [*shard_checks.FEW, *shard_promises.FEW, *shard_linear_checks.FEW, *shard_torch_checks.ON_FOUR],
}  # fmt: skip


@lru_cache
def failures_of_ranks(ranks: int) -> list[dict[str, str | None]]:
    """What each check raised on each rank."""
    with TemporaryDirectory() as folder:
        return results_of_ranks(Path(folder), failures, ranks, CHECKS[ranks], ranks=ranks)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize(("ranks", "check"), [(n, check.__name__) for n, checks in CHECKS.items() for check in checks])
def test_on_every_rank(ranks: int, check: str) -> None:
    for rank, found in enumerate(failures_of_ranks(ranks)):
        if found[check]:
            pytest.fail(f"rank {rank} of {ranks}: {found[check]}", pytrace=False)


def test_a_group_needs_init_process_group() -> None:
    s, t, _ = batch(3, 7)
    for loss in (kdfast.kd_loss, kdfast.KDLoss(process_group=object())):
        options = {} if isinstance(loss, kdfast.KDLoss) else {"process_group": object()}
        with pytest.raises(RuntimeError, match=r"^process_group: given, but torch.distributed.init_process_group\(\)"):
            loss(s, t, **options)
    with pytest.raises(RuntimeError, match="^process_group: given, but"):
        kdfast.linear_kd_loss(s, t, s, t, process_group=object(), vocab_start=0)


def test_a_first_class_needs_a_group_and_is_a_whole_number_of_at_least_0() -> None:
    s, t, _ = batch(3, 7)
    for start, error, words in (
        (1, ValueError, "without process_group"),
        (-1, ValueError, "-1 must be at least 0"),
        (1.5, TypeError, ""),
    ):
        with pytest.raises(error, match=f"^vocab_start: .*{words}"):
            kdfast.kd_loss(s, t, vocab_start=start)
        with pytest.raises(error, match=f"^vocab_start: .*{words}"):
            kdfast.linear_kd_loss(s, t, s, t, vocab_start=start)
    with pytest.raises(TypeError, match="^reduce_hidden: "):
        kdfast.linear_kd_loss(s, t, s, t, reduce_hidden=1)


def test_calls_without_dtensors_import_none_of_it() -> None:
    """Importing it takes as long as importing torch."""
    code = (
        "import sys, torch, kdfast; s, t = torch.randn(2, 3, 7); kdfast.kd_loss(s, t); kdfast.KDLoss()(s, t);"
        "kdfast.linear_kd_loss(s, t, s, t); "
        "print('torch.distributed.tensor' in sys.modules, 'kdfast.parallel' in sys.modules)"
    )
    done = run_python("-c", code)
    assert done.stdout.split() == ["False", "False"], done.stdout + done.stderr
