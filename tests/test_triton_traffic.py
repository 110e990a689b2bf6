"""The Triton kernels' bytes and accesses; traffic.py says how they are counted."""

from functools import partial
from typing import Any

import gpu
import pytest
import torch
from cases import BF16, F32, batch, name
from traffic import ROWS, asked, assert_the_same_bits_without_atomics, per_pair, scaling, wide_share
from traffic import traffic as traffic_of

import kdfast
from kdfast import gpu_choice

pytestmark = [
    pytest.mark.skipif(not gpu.EMULATED, reason=gpu.NEEDS_EMULATOR),
    # the code of both differs in how it is compiled alone
    pytest.mark.parametrize("capability", [80, pytest.param(90, marks=pytest.mark.full)]),
]

SHORT = (
    256,  # the shortest that is promised
    1000,  # rows of which every second begins off a sector
    4096,
    16384,  # the longest with 4 tiles a thread
    32000,  # Llama 2's
    32768,  # the longest that stays in registers
)
LONG = (
    50257,  # GPT-2's: odd
    128256,  # Llama 3's
    151665,  # Qwen 2.5's real tokens: odd
    151936,
    262144,  # Gemma's, the longest that is promised
)
LEAST_WIDE = {4096: 0.99, 32000: 0.99, 151936: 0.99, 50257: 0.95, 151665: 0.95}  # odd ones have ends
traffic = partial(traffic_of, "triton")


@pytest.fixture(params=["split", "whole"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Few and long rows are split over programs; here also as if they were many."""
    if request.param == "whole":
        monkeypatch.setattr(gpu_choice, "SPLIT_CLASSES", 1 << 30)
    return request.param


def first(report: Any) -> int:
    """What DRAM must move: of the logits, once; of the rest of the launches all."""
    return report.first_read_bytes + report.first_written_bytes


def once(reports: Any) -> list[Any]:
    """Of kernels that read the same rows one after the other, the one that reads most."""
    return [max(reports, key=first)]


@pytest.mark.parametrize("vocab", SHORT)
def test_a_short_row_is_read_once(capability: int, vocab: int) -> None:
    assert per_pair(traffic(capability, vocab), vocab) <= 6.06


@pytest.mark.parametrize("vocab, programs", [(10, 8), (100, 16)])
def test_tiny_rows_share_a_program(capability: int, vocab: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("traffic.ROWS", 64)
    (report,) = traffic(capability, vocab)
    assert report.grid == (programs, 1, 1)
    assert first(report) <= 64 * (6 * vocab + 8 + 4) + 32  # labels, losses and the divisor
    assert report.warp_instructions <= 64 * 800  # a row in a program of its own takes 850


@pytest.mark.parametrize("vocab", LONG)
def test_a_long_row_is_read_twice_and_comes_from_dram_once(capability: int, vocab: int, rows: str) -> None:
    reports = traffic(capability, vocab)
    assert per_pair(reports, vocab) <= 10.1
    assert per_pair(once(reports), vocab, first) <= 6.06


@pytest.mark.parametrize(
    "divergence, vocab, most",
    [
        ("symmetric_kl", 8192, 6.06),  # the longest that stays in registers with their sums
        ("jsd", 8192, 6.06),
        ("symmetric_kl", 50257, 10.1),
        ("jsd", 50257, 14.2),  # one more sweep for its own sums
    ],
)
def test_every_kind_of_sums_has_its_sweeps(capability: int, divergence: str, vocab: int, most: float) -> None:
    assert per_pair(traffic(capability, vocab, divergence=divergence), vocab) <= most


@pytest.mark.parametrize("vocab", SHORT + LONG)
def test_without_a_gradient_nothing_is_written(capability: int, vocab: int) -> None:
    assert per_pair(traffic(capability, vocab, grad=False), vocab) <= 4.04


@pytest.mark.parametrize("dtype", (BF16, F32), ids=name)
@pytest.mark.parametrize("vocab", LEAST_WIDE)
def test_rows_are_accessed_in_16_byte_pieces(capability: int, vocab: int, dtype: torch.dtype) -> None:
    assert wide_share(traffic(capability, vocab, dtype)) >= LEAST_WIDE[vocab]


@pytest.mark.parametrize("vocab", (4096, 50257))
def test_backward_with_a_gradient_of_1_moves_nothing_but_that_1(capability: int, vocab: int) -> None:
    arrays = scaling("triton", capability, vocab).arrays
    assert "factor" in arrays
    assert sum(a.load_sectors for key, a in arrays.items() if key != "factor") == 0


@pytest.mark.parametrize("settings", [{}, {"reduction": "none"}, {"divergence": "reverse_kl"}], ids=name)
def test_no_atomics_and_the_same_bits_every_time(capability: int, settings: dict[str, Any]) -> None:
    for vocab in (1000, 50257):
        assert_the_same_bits_without_atomics("triton", capability, vocab, **settings)


@pytest.mark.parametrize("vocab", (1000, 50257))
def test_in_place_nothing_of_the_logits_size_is_allocated(
    capability: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, labels = batch(ROWS, vocab, BF16)
    made: list[torch.Tensor] = []
    for owner, name_ in ((torch.Tensor, "new_empty"), (torch, "empty")):
        make = getattr(owner, name_)
        monkeypatch.setattr(owner, name_, lambda *a, make=make, **k: made.append(make(*a, **k)) or made[-1])
    largest = []
    for inplace in (True, False):
        made.clear()
        with gpu.kernels(capability):
            logits = student.requires_grad_() * 1
            kdfast.kd_loss(logits, teacher, labels, inplace=inplace, backend="triton").backward()
        largest.append(max(x.numel() for x in made))
    assert 0 < largest[0] < vocab
    assert largest[1] == ROWS * vocab, "the watch sees the gradient where one is made"


@pytest.mark.parametrize("vocab", (8192, 50257))  # the longest that stays in registers with metrics; one in two sweeps
def test_metrics_add_bytes_per_row_alone(capability: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_choice, "SPLIT_CLASSES", 1 << 30)  # rows of which metrics are wanted stay whole
    without, measured = traffic(capability, vocab), traffic(capability, vocab, return_metrics=True)
    added = sum(map(asked, measured)) - sum(map(asked, without))
    assert 0 < added <= 1024 * ROWS
