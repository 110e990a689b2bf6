"""The CUDA kernels' bytes, accesses and launches; traffic.py says how they are counted."""

from functools import partial
from typing import Any

import emulated
import gpu
import pytest
import torch
from cases import BF16, F32, batch, name
from judge import judge
from traffic import ROWS, assert_the_same_bits_without_atomics, launches, per_pair, scaling, wide_share
from traffic import traffic as traffic_of

from kdfast.row_math import Coefficients

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
capabilities = pytest.mark.parametrize("capability", gpu.CAPABILITIES)

traffic = partial(traffic_of, "cuda")
VOCABS = (
    256,  # the shortest that is promised
    1000,  # by a warp; every second row begins off a sector
    1032,  # the shortest by a block
    4096,
    32000,  # Llama 2's
    32768,
    50257,  # GPT-2's: odd
    151665,  # Qwen 2.5's real tokens: odd
    151936,
    262144,  # Gemma's, the longest that is promised
)
KEPT_ON_80 = 32768  # the longest of which an A100's shared memory is promised to hold a pair


@capabilities
@pytest.mark.parametrize("vocab", VOCABS)
def test_each_logit_is_read_once_and_twice_where_sm_80_has_no_room_to_keep_it(capability: int, vocab: int) -> None:
    reports = traffic(capability, vocab)
    assert per_pair(reports, vocab) <= (6.06 if capability == 90 else 6.1 if vocab <= KEPT_ON_80 else 10.1)
    assert len(reports) <= 3
    wavefronts = [of_space for report in reports for of_space in report.shared.values()]
    assert sum(w for w, _ in wavefronts) <= 1.05 * sum(ideal for _, ideal in wavefronts), "bank conflicts"


@pytest.mark.parametrize("divergence", ("symmetric_kl", "jsd", "logit_mse"))
def test_so_it_is_for_every_kind_of_sums(divergence: str) -> None:
    for capability, vocab, most in ((90, 1024, 6.06), (90, 50257, 6.06), (80, 32000, 6.1)):
        assert per_pair(traffic(capability, vocab, divergence=divergence), vocab) <= most


@pytest.mark.parametrize(
    "settings", [{"temperature": 2.5}, {"label_smoothing": 0.1}, {"return_metrics": True}], ids=name
)
def test_options_read_each_logit_once_too(settings: dict[str, Any]) -> None:
    for vocab in (4096, 151936):
        assert per_pair(traffic(90, vocab, **settings), vocab) <= 6.06


@capabilities
@pytest.mark.parametrize("vocab", (1000, 50257))
def test_without_a_gradient_nothing_is_written(capability: int, vocab: int) -> None:
    reports = traffic(capability, vocab, grad=False)
    assert per_pair(reports, vocab) <= 4.06
    sectors = len(Coefficients._fields) * 4 // 32 + 2  # of a row of the table, which begins anywhere in one
    assert sum(report.store_sectors for report in reports) <= sectors * ROWS + 2


@capabilities
@pytest.mark.parametrize("vocab", (1000, 4096, 50257))
def test_by_row_logits_are_read_once_in_forward_and_once_in_backward(capability: int, vocab: int) -> None:
    forward, backward, _ = launches("cuda", capability, vocab, factor=1.0, reduction="none")
    assert per_pair(forward, vocab) <= 4.06
    assert per_pair(backward, vocab) <= 6.06


@capabilities
@pytest.mark.parametrize("dtype", (BF16, F32), ids=name)
def test_rows_are_accessed_in_16_byte_pieces(capability: int, dtype: torch.dtype) -> None:
    for vocab, least in ((4096, 0.99), (32000, 0.99), (151936, 0.99), (50257, 0.95), (151665, 0.95)):
        assert wide_share(traffic(capability, vocab, dtype)) >= least, vocab


@capabilities
@pytest.mark.parametrize("vocab", (1000, 50257))
def test_backward_with_a_gradient_of_1_moves_nothing_but_that_1(capability: int, vocab: int) -> None:
    scale = scaling("cuda", capability, vocab)
    assert scale.launched[0].startswith("scale<")
    assert scale.load_sectors * 32 <= scale.launched[1] * 8 * 32, "a factor for each warp"


def test_blocks_of_a_cluster_publish_their_stores_once_for_a_rows_sums() -> None:
    """Not when they start, when there is nothing to publish, nor after the gradient, which no other block reads."""
    (report,) = (each for each in traffic(90, 32000) if "rows" in each.launched.kernel)
    assert report.launched.cluster > 1
    for kind in ("release", "relaxed"):
        arrivals = report.opcodes[f"barrier.cluster.arrive.{kind}.aligned"]
        assert arrivals == report.launched.grid * report.launched.block // 32, kind  # one of each warp


def test_exps_at_temperature_1_are_computed_where_a_term_has_them() -> None:
    def exps(**settings: Any) -> int:
        (report,) = (each for each in traffic(80, 16384, **settings) if "rows" in each.launched.kernel)
        return report.opcodes["ex2.approx.ftz.f32"]

    with_hard_term = exps(temperature=3)  # at 2 they are squares
    assert max(exps(temperature=3, alpha=1), exps(temperature=2), exps(temperature=1)) < 0.75 * with_hard_term


@capabilities
def test_no_atomics_and_the_same_bits_every_time(capability: int) -> None:
    for vocab, settings in ((1000, {}), (50257, {"divergence": "jsd"}), (50257, {"reduction": "none"})):
        assert_the_same_bits_without_atomics("cuda", capability, vocab, **settings)


@pytest.mark.parametrize("divergence", ("cross_entropy", "symmetric_kl", "skew_reverse_kl", "logit_mse"))
@pytest.mark.parametrize("options", ({}, {"label_smoothing": 0.1, "z_loss": 0.1}), ids=name)
def test_sweeps_find_what_is_right(divergence: str, options: dict[str, Any]) -> None:
    """Rows that are kept nowhere, without clusters: by themselves and, of reduction "none", from their statistics."""
    with emulated.kernels(80):
        judge(*batch(3, 50257, F32), backend="cuda", divergence=divergence, temperature=2, **options)
