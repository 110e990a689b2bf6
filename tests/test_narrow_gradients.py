"""The gradient of float32 logits in 16 bits, which the products of the fused linear losses take on a GPU."""

from typing import Any

import emulated
import gpu
import pytest
import torch
from cases import BF16, F16, F32, batch, name
from torch import Tensor
from traffic import ROWS, per_pair

import kdfast
from kdfast import TopKTargets
from kdfast.arguments import IGNORED
from kdfast.options import check_inputs, check_settings

WIDTHS = {
    37: 40,  # a row by a warp, and padding behind it
    1501: 1501,  # of which most rows begin off a vector
    33001: 33002,  # split over Triton's programs; for CUDA a cluster's
}


def gradients(backend: str, student: Tensor, inputs: Any, settings: Any, *dtype: torch.dtype) -> list[Tensor]:
    """The gradient in forward, and from the rows' coefficients; in a dtype where it is given."""
    ops, args = getattr(torch.ops, f"kdfast_{backend}"), (*inputs, *settings)
    end = "_as" if dtype else ""
    in_forward = getattr(ops, f"loss_grad{end}")(student, *dtype, *args)[1]
    table = ops.stats(student, *args)[1]
    factor = torch.tensor(0.7)
    return [in_forward, getattr(ops, f"grad{end}")(student, *dtype, table, factor, *args)]


def arguments(vocab: int, rows: int = 3, ignored: int | None = 1, **options: Any) -> tuple[Tensor, Any, Any]:
    width = WIDTHS.get(vocab, vocab)
    student, teacher, labels = batch(rows, width, F32)
    labels = labels % vocab
    if ignored is not None:
        labels[ignored], student[ignored] = -100, float("nan")
    options = kdfast.kd_loss.__kwdefaults__ | {"temperature": 2.0, "vocab_size": vocab} | options
    return student, *check_inputs(student, teacher, labels, options, check_settings(options, True))


@pytest.mark.parametrize("backend", ("reference", "triton", "cuda"), indirect=True)
@pytest.mark.parametrize("vocab", WIDTHS)
@pytest.mark.parametrize("dtype", (BF16, F16), ids=name)
def test_a_gradient_in_16_bits_is_the_float32_one_rounded_once(backend: str, vocab: int, dtype: torch.dtype) -> None:
    call = arguments(vocab)
    for got, want in zip(gradients(backend, *call, dtype), gradients(backend, *call), strict=True):
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype))
        assert want[0].any()
        assert not got[1].any(), "the ignored row"
        assert not got[:, vocab:].any(), "padding"


@pytest.mark.parametrize("backend", ("triton",), indirect=True)
@pytest.mark.parametrize("missing", ("tail", "conditional"))  # of which the second reads the entries alone
def test_so_it_is_with_a_sparse_teacher(backend: str, missing: str) -> None:
    student, teacher, labels = batch(3, 1501, F32)
    log_probs, indices = teacher.log_softmax(-1).topk(20, -1)
    options = kdfast.kd_loss.__kwdefaults__ | {"temperature": 2.0, "missing": missing}
    settings = check_settings(options, True)
    call = student, *check_inputs(student, TopKTargets(indices, log_probs), labels, options, settings)
    for got, want in zip(gradients(backend, *call, BF16), gradients(backend, *call), strict=True):
        assert torch.equal(got, want.to(BF16))
        assert want.any()


def token_call(vocab: int, entries: int) -> tuple[Any, ...]:
    """token_grad's arguments; the second row is ignored."""
    logits, teacher, _ = batch(3, WIDTHS.get(vocab, vocab), F32)
    ids = teacher[:, :vocab].topk(entries).indices
    ids[:, 0] = vocab - 1
    ids[1], logits[1] = IGNORED, float("nan")
    numbers = 2.0, 1.0, 0.0, vocab
    *values, table = torch.ops.kdfast_reference.token_stats(logits, ids, None, *numbers, True)
    return logits, ids, table, *(0.7 * x for x in values), None, None, *numbers


@pytest.mark.parametrize("backend", ("reference", "triton"), indirect=True)  # no others have it
@pytest.mark.parametrize(("vocab", "entries"), [*((vocab, 3) for vocab in WIDTHS), (2200, 2100)])  # too many for Triton
@pytest.mark.parametrize("dtype", (BF16, F16), ids=name)
def test_the_gradient_of_tokens_in_16_bits_is_the_rounded_one(
    backend: str, vocab: int, entries: int, dtype: torch.dtype
) -> None:
    ops, (logits, *args) = getattr(torch.ops, f"kdfast_{backend}"), token_call(vocab, entries)
    want, got = ops.token_grad(logits, *args), ops.token_grad_as(logits, dtype, *args)
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))
    assert want[0].any()
    assert not got[1].any(), "the ignored row"
    assert not got[:, vocab:].any(), "padding"


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
def test_so_it_is_where_rows_are_kept_nowhere() -> None:
    with emulated.kernels(80), emulated.clusters_of(1):
        call = arguments(50257, divergence="symmetric_kl")
        for got, want in zip(gradients("cuda", *call, BF16), gradients("cuda", *call), strict=True):
            assert torch.equal(got, want.to(BF16))


@pytest.mark.skipif(not gpu.EMULATED, reason=gpu.NEEDS_EMULATOR)
@pytest.mark.parametrize("backend", ("triton", "cuda"))
def test_a_pair_of_float32_logits_moves_10_bytes(backend: str) -> None:
    """12 with a float32 gradient, which another kernel would then convert: 6 more."""
    if backend == "cuda" and emulated.why_not() is not None:
        pytest.skip(str(emulated.why_not()))
    vocab = 8192
    student, inputs, settings = arguments(vocab, ROWS, ignored=None)
    with (emulated if backend == "cuda" else gpu).kernels(90) as reports:
        getattr(torch.ops, f"kdfast_{backend}").loss_grad_as(student, BF16, *inputs, *settings)
    assert per_pair(reports, vocab) <= 10.1
