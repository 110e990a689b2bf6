"""kdfast.integrations.liger beside Liger's own classes, whose Triton kernels run in Triton's interpreter here."""

import sys
from collections.abc import Iterator
from typing import Any

import liger_cases
import liger_kernel.chunked_loss
import liger_kernel.functional
import liger_kernel.transformers
import liger_kernel.transformers.functional as functional
import pytest
import torch
from liger_cases import BF16, CASES, F32, IGNORED, Case, chunked, inputs, run
from liger_interpreted import interpreted
from liger_kernel import ops
from torch import Tensor

from kdfast.integrations import liger

CHUNKED_FUNCTION = liger_kernel.chunked_loss.jsd_loss.LigerFusedLinearJSDFunction


@pytest.fixture
def patched() -> Iterator[None]:
    with liger.patch():
        yield


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype is F32], ids=str)
def test_a_class_gives_ligers_outputs_and_gradients(case: Case) -> None:
    ours, theirs = run(case, liger), interpreted()["theirs"][case.name]
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():  # both in fp32: sums of some dozen numbers up to 20
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype is BF16], ids=str)
def test_in_bfloat16_a_class_is_as_close_to_fp64_as_ligers(case: Case) -> None:
    ours, theirs, truth = run(case, liger), interpreted()["theirs"][case.name], run(case, liger, torch.float64)
    for name, exact in truth.items():
        error, allowed = ((x[name].double() - exact).abs().max() for x in (ours, theirs))
        allowed += 2**-8 * exact.abs().max()  # an ulp
        if name.startswith("output") and case.name.startswith(("LigerJSD", "LigerKLDIVLoss")):
            # log_softmax rounded each log-probability, of a size up to 16, by up to 2^-5
            allowed += 2**-5 * (1 if "mean" not in case.name or "batchmean" in case.name else 1 / liger_cases.V)
        assert error <= allowed, name
        if name.startswith("output"):  # a loss is not rounded to bfloat16
            assert ours[name].dtype == F32


@pytest.mark.parametrize("case", CASES, ids=str)
def test_under_a_patch_ligers_own_class_gives_what_kdfasts_gives(case: Case, patched: None) -> None:
    theirs, ours = run(case, liger_kernel.transformers), run(case, liger)
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name


def test_a_patch_serves_modules_that_exist_already_and_ends_with_its_block() -> None:
    x = inputs(F32, F32)
    module = liger_kernel.transformers.LigerFusedLinearJSD(0.3)
    with liger.patch(), liger.patch():
        assert isinstance(module(x.h, x.w, x.ht, x.wt, None), Tensor)
    with pytest.raises(RuntimeError, match="active drivers"):  # Triton's: a CPU is no device to it
        module(x.h, x.w, x.ht, x.wt, None)
    for name, (module_name, _) in liger.places.FUNCTIONS.items():
        assert getattr(sys.modules[f"liger_kernel.transformers.{module_name}"], name) is getattr(ops, name)
    assert liger_kernel.chunked_loss.jsd_loss.LigerFusedLinearJSDFunction is CHUNKED_FUNCTION


def test_functional_forms_give_what_the_classes_give(patched: None) -> None:
    x = inputs(F32, F32)
    log_q, log_p, q, p = x.s.log_softmax(-1), x.t.log_softmax(-1), x.s.softmax(-1), x.t.softmax(-1)
    heads = x.h, x.w, x.ht, x.wt
    jsd = liger.LigerJSD(0.3, IGNORED)(log_q, log_p, x.y)
    linear_jsd = liger.LigerFusedLinearJSD(0.3, IGNORED, 2.0)(*heads, x.y)
    chunked = liger.LigerFusedLinearJSDLoss(0.7, 0.2, 0.3, IGNORED)(*heads, x.y)
    kl_div, ce = liger.LigerKLDIVLoss()(log_q, p), liger.LigerCrossEntropyLoss(ignore_index=IGNORED)(x.s, x.y)
    linear_ce = liger.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, softcap=3.0)(x.w, x.h, x.y, x.b)
    linear_kl = liger.LigerFusedLinearKLDivLoss("sum", IGNORED)(x.h, x.w, p, x.y)
    dispatched, chunks = liger_kernel.functional, liger_kernel.chunked_loss.functional
    pairs = [
        (functional.liger_jsd(log_q, log_p, x.y, beta=0.3, ignore_index=IGNORED), jsd),
        (dispatched.jsd(log_q, log_p, x.y, 0.3, IGNORED), jsd),
        (functional.liger_kl_div(log_q, p), kl_div),
        (dispatched.kl_div(log_q, p, "mean"), kl_div),
        (functional.liger_tvd(q, p, x.y, ignore_index=IGNORED), liger.LigerTVDLoss("mean", IGNORED)(q, p, x.y)),
        (functional.liger_fused_linear_jsd(*heads, x.y, 0.3, IGNORED, 2.0), linear_jsd),
        (dispatched.fused_linear_jsd(*heads, x.y, 0.3, IGNORED, 2.0), linear_jsd),
        (functional.liger_fused_linear_kl_div(x.h, x.w, p, x.y, "sum", IGNORED), linear_kl),
        (functional.liger_cross_entropy(x.s, x.y, ignore_index=IGNORED), ce),
        (dispatched.cross_entropy(x.s, x.y, ignore_index=IGNORED)[0], ce),
        (
            functional.liger_fused_linear_cross_entropy(x.h, x.w, x.y, x.b, ignore_index=IGNORED, softcap=3.0),
            linear_ce,
        ),
        (dispatched.fused_linear_cross_entropy(x.h, x.w, x.y, x.b, None, IGNORED, softcap=3.0)[0], linear_ce),
        (chunks.liger_fused_linear_jsd(*heads, x.y, None, None, 0.7, 0.2, 0.3, IGNORED), chunked),
    ]
    for i, (theirs, ours) in enumerate(pairs):
        assert torch.equal(theirs, ours), i


CHUNKED = [  # weight_hard_loss, weight_soft_loss, beta, ignore_index, temperature
    *((0.5, 0.5, beta, IGNORED, 1.0) for beta in (0.0, 0.3, 0.5, 1.0)),
    (0.0, 1.0, 0.3, IGNORED, 2.0),  # ms-swift's weights
    (0.7, 1.5, 0.3, IGNORED, 2.0),  # which need not sum to 1
    (1.0, 0.0, 0.3, IGNORED, 2.0),
]


@pytest.mark.parametrize("options", CHUNKED)
def test_the_chunked_loss_is_ligers(options: tuple[Any, ...]) -> None:
    for others in ({}, {"return_soft_hard_loss": True}, {"chunk_size": 1}):
        ours, theirs = (chunked(library, F32, options, **others) for library in (liger, liger_kernel.chunked_loss))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", CHUNKED)
def test_the_chunked_loss_in_bfloat16_is_closer_to_fp64_than_ligers(options: tuple[Any, ...]) -> None:
    truth = chunked(liger, torch.float64, options)
    ours, theirs = (chunked(library, BF16, options) for library in (liger, liger_kernel.chunked_loss))
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        error, allowed = ((x.double() - exact).abs().max() for x in (a, b))
        assert error <= allowed + 2**-8 * exact.abs().max()
