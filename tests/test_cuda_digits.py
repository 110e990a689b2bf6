"""Digits that the CUDA kernels alone could lose: maxima of packs, offsets of threads, tables of coefficients."""

from typing import Any

import emulated
import gpu
import pytest
import torch
from cases import BF16, F16, F32, batch, divergences_for, name
from judge import run
from torch import Tensor

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=name)
each_divergence = pytest.mark.parametrize("divergence", divergences_for("cuda"))
SETTINGS: dict[str, Any] = {"backend": "cuda", "reduction": "none"}


def cuda(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor]:
    with emulated.kernels(settings.pop("capability", 90)):
        return run(student, teacher, labels, **SETTINGS | settings)


@each_dtype
@pytest.mark.parametrize("capability", gpu.CAPABILITIES)
def test_a_new_largest_logit_is_seen_at_every_place_of_a_pack(capability: int, dtype: torch.dtype) -> None:
    """It is so large that its exp is infinite at the offset before it; a NaN beside it is not the largest."""
    places = 8
    student, _, _ = batch(places + 1, 1024, dtype)  # a thread of the warp has four packs of 16 bits
    labels = torch.arange(512, 512 + places + 1)
    student[torch.arange(places + 1), labels] = 3e4
    student[places, labels[-1] + 1] = torch.nan
    loss, grad = cuda(student, None, labels, alpha=0.0, capability=capability)
    assert loss[:places].eq(0).all() and grad[:places].eq(0).all()
    assert loss[places].isnan() and grad[places].isnan().all()


@pytest.mark.parametrize("divergence", divergences_for("cuda")[:-1])  # logit_mse has no softmax
@pytest.mark.parametrize("temperature", [0.3, 1, 4])  # whose exps at temperature 1 are computed, or those at T
def test_padding_before_the_other_classes_adds_nothing(divergence: str, temperature: float) -> None:
    """Each thread has summed up exps of it when the first other class comes by, at an offset that is far away."""
    least = torch.finfo(F32).min
    student, teacher, labels = batch(4, 1200)
    labels = labels % 200 + 1000
    for row, pads in enumerate(((least, least), (-1e30, -1e30), (-torch.inf, least), (-1e10, -1e10))):
        student[row, :1000], teacher[row, :1000] = pads
    settings = {"divergence": divergence, "temperature": temperature}
    loss, grad = cuda(student, teacher, labels, **settings)
    want, want_grad = cuda(student[:, 1000:], teacher[:, 1000:], labels - 1000, **settings)
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(grad[:, 1000:], want_grad, rtol=1e-4, atol=1e-6)
    assert grad[:, :1000].eq(0).all()


@each_dtype
@each_divergence
def test_a_row_of_padding_is_one_of_equal_logits(divergence: str, dtype: torch.dtype) -> None:
    """The student's, the teacher's, and both; by a warp and by a block."""
    for vocab in (18, 1032):
        student, teacher, labels = batch(9, vocab, dtype)
        pads = [torch.finfo(dtype).min, *((-1e30, -1e10) if dtype != F16 else (-6e4, -3e4))]
        s, t = student.clone(), teacher.clone()
        for row, pad in enumerate(pads):
            s[[row, row + 6]] = t[[row + 3, row + 6]] = pad
            student[[row, row + 6]] = teacher[[row + 3, row + 6]] = 0
        for temperature in (0.3, 1, 4):
            settings: dict[str, Any] = {"divergence": divergence}
            if divergence != "logit_mse":
                settings["temperature"] = temperature
            loss, grad = cuda(s, t, labels, **settings)
            want, want_grad = cuda(student, teacher, labels, **settings)
            assert torch.equal(loss, want) and torch.equal(grad, want_grad)


@each_dtype
def test_a_confident_row_has_eager_pytorchs_digits(dtype: torch.dtype) -> None:
    """The label's exp is 1, with no rounding, wherever the row is divided, and its share of the sum exact."""
    for vocab in (1, 18, 32000):
        for above in (16.7, 30.0) if dtype != BF16 else (16.75, 30.0):
            student, teacher, labels = batch(2, vocab, dtype, scale=0.5)
            for x in (student, teacher):
                x[torch.arange(2), labels] = x.amax(-1) + above
            loss, _ = cuda(student, None, labels, alpha=0.0)
            want = torch.nn.functional.cross_entropy(student.double(), labels, reduction="none")
            eager = torch.nn.functional.cross_entropy(student.float(), labels, reduction="none")
            assert loss.min() >= 0 and (vocab > 1 or loss.eq(0).all())
            assert ((loss - want).abs() <= 2 * (eager - want).abs() + 1e-8).all()


@pytest.mark.parametrize("beta", [1e-9, 1e-6, 1e-5, 0.3, 1 - 1e-5, 1 - 1e-7])
@pytest.mark.parametrize("divergence", ["jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_a_mixture_has_its_digits_at_every_beta(divergence: str, beta: float) -> None:
    student, teacher, _ = batch(3, 1100)
    student[1], teacher[1] = 10 * student[1], -10 * teacher[1]  # which underflow where the other is large
    student[2, 7] = teacher[2, 9] = 80
    settings: dict[str, Any] = {"divergence": divergence, "beta": beta}
    loss, grad = cuda(student, teacher, **settings)
    want, want_grad = run(student.double(), teacher.double(), **SETTINGS | settings | {"backend": "reference"})
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-3, atol=1e-6)


def test_a_large_logit_of_another_class_is_the_loss() -> None:
    for dtype, large in ((F32, 5e9), (BF16, 2.0**32)):
        loss, grad = cuda(torch.tensor([[large, 0, -large]], dtype=dtype), None, torch.tensor([1]), alpha=0.0)
        torch.testing.assert_close(loss, torch.tensor([large], dtype=F32), rtol=3e-7, atol=0)
        assert grad.tolist() == [[1, -1, 0]]


def test_a_normalizer_of_0_gives_0_where_no_row_is_kept() -> None:
    student, teacher, labels = batch(3, 100)
    settings: dict[str, Any] = {"normalizer": torch.tensor(0.0), "reduction": "mean"}
    for ignored, weight in ((labels * 0 - 100, None), (labels, torch.zeros(3))):
        loss, grad = cuda(student, teacher, ignored, row_weight=weight, **settings)
        assert loss == 0
        assert grad.eq(0).all()
