"""How the CUDA kernels are launched: by how many threads and blocks, and by whom."""

from typing import Any

import emulated
import pytest
import torch
from cases import BF16, F32
from linear_cases import Case, check

import kdfast

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

SETTINGS: dict[str, Any] = {"temperature": 2, "backend": "cuda"}


def launched(capability: int, rows: int, vocab: int, dtype: torch.dtype = BF16) -> tuple[int, int, int]:
    """(threads, blocks of a cluster, bytes of shared memory) of the row kernel."""
    with emulated.kernels(capability, run=False) as plans:
        logits = torch.empty(rows, vocab, dtype=dtype)
        kdfast.kd_loss(logits, logits, **SETTINGS)
    (row,) = (plan.launched for plan in plans if "rows" in plan.launched[0])
    return row[2:]


def test_rows_are_divided_among_the_blocks_of_a_cluster_by_their_length() -> None:
    for blocks in (1, 2, 4, 8, 16):
        assert launched(90, 132, 16384 * blocks)[1:] == (blocks, 64 << 10)
        assert launched(90, 132, 8192 * blocks, F32)[1:] == (blocks, 64 << 10)
    assert launched(90, 132, 262144, F32)[1:] == (16, 128 << 10)
    assert launched(80, 132, 32768)[1:] == (1, 128 << 10)
    assert launched(80, 132, 50257)[1:] == (1, 0), "in sweeps"


def test_where_clusters_find_no_room_they_are_smaller_and_rows_are_read_twice_at_last() -> None:
    for most, expected in ((16, (16, 64 << 10)), (8, (8, 128 << 10)), (4, (1, 0))):
        with emulated.clusters_of(most):
            assert launched(90, 132, 262144)[1:] == expected


def test_few_and_long_rows_have_more_blocks_where_there_are_clusters() -> None:
    assert [launched(90, rows, 32768)[1] for rows in (1, 8, 16, 33, 66, 67)] == [8, 8, 8, 4, 2, 2]
    assert launched(80, 1, 32768)[1] == 1


def test_the_linear_losses_take_the_cuda_kernels_for_their_chunks() -> None:
    case = Case(rows=7, vocab=1100)  # one is ignored: chunks of 3 and 3
    with emulated.kernels() as reports:
        check(case, case.labels, chunk_rows=4, **SETTINGS)
    assert sum("rows" in report.launched[0] for report in reports) == 2
