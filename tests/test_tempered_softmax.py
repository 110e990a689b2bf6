"""tempered_softmax is softmax(logits / T) in every dtype, and is twice differentiable."""

import gpu  # before anything that imports Triton
import pytest
import torch
from cases import BF16, DTYPES, F32, F64, batch, name
from conftest import why_not
from judge import _within, half_ulp
from torch import Tensor

from kdfast import tempered_softmax

# Around vectors of each instruction set, around a block of 2048 classes, two blocks and one class, an odd long one.
VOCABS = (1, 2, 7, 16, 17, 33, 100, 2047, 2049, 4097, 50257)


def _check(logits: Tensor, temperature: float | Tensor, log: bool, out_dtype: torch.dtype | None) -> None:
    """Judges forward and backward, the reference's forward, and its backward, which create_graph uses."""
    leaf = logits.detach().requires_grad_()
    out = tempered_softmax(leaf, temperature, log=log, out_dtype=out_dtype)
    assert out.dtype == (out_dtype or logits.dtype)
    factor = torch.linspace(-1, 1, logits.shape[-1], dtype=out.dtype).expand_as(logits)
    (grad,) = torch.autograd.grad(out, leaf, factor, retain_graph=True)
    (differentiable,) = torch.autograd.grad(out, leaf, factor, create_graph=True)  # by the reference
    _judge(logits, temperature, log, out.detach(), factor, grad, differentiable.detach())
    rows, number = (temperature, 1.0) if isinstance(temperature, Tensor) else (None, temperature)
    by_reference = torch.ops.kdfast_reference.tempered_softmax(logits, rows, number, log, out.dtype)
    assert by_reference.dtype == out.dtype
    _judge(logits, temperature, log, by_reference, factor)


def _judge(logits: Tensor, temperature: float | Tensor, log: bool, out: Tensor, factor: Tensor, *grads: Tensor) -> None:
    """Judges forward by the rule of judge.py, and gradients by their formula over the stored output."""
    T = temperature.double().unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    z = logits.double() / T
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    # fp64 is converted to 16 bits through fp32, as PyTorch does
    kind = F64 if logits.dtype == F64 and out.dtype.itemsize > 2 else F32
    eps, floor = torch.finfo(kind).eps, 128 * torch.finfo(kind).tiny
    # z is rounded, in eager PyTorch before the maximum is subtracted: |z| ulp where p > 0
    size = 8 + log_p.abs() + torch.where(p > 0, z.abs(), 0).amax(-1, True)
    want, allowed = (log_p, size * eps) if log else (p, p * size * eps + floor)
    _within("forward", out, want, allowed + half_ulp(want, out.dtype))

    y, g = out.double(), factor.double()
    terms = (g.abs() + y.exp() * g.abs().sum(-1, True)) if log else y * (g.abs() + (y * g.abs()).sum(-1, True))
    want = (g - y.exp() * g.sum(-1, True)) / T if log else y * (g - (y * g).sum(-1, True)) / T
    wide = F64 if F64 in (logits.dtype, out.dtype) and logits.dtype.itemsize > 2 else F32
    # each term has exp's 8 eps and the sum's rounding; log p as an argument of exp is off by |log p| eps
    allowed = terms / T * (8 + log_p.abs()) * torch.finfo(wide).eps + floor
    allowed = allowed + half_ulp(want, logits.dtype)
    for grad in grads:
        assert grad.dtype == logits.dtype
        _within("backward", grad, want, allowed)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("vocab", VOCABS)
def test_softmax_is_right_for_every_length_and_dtype(vocab: int, dtype: torch.dtype, log: bool) -> None:
    for out_dtype in (None, *DTYPES):
        _check(batch(2, vocab, dtype).student, 2, log, out_dtype)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_softmax_is_right_for_every_temperature_and_offset(dtype: torch.dtype, log: bool) -> None:
    for vocab in (17, 2049):  # a tail; a second block
        for temperature in (1, 3, 0.1, 100, torch.tensor([1.0, 3.7])):
            _check(batch(2, vocab, dtype).student, temperature, log, None)
            for offset in (1000.0, -1e4):  # exp overflows in every dtype; underflows
                _check(batch(2, vocab, dtype, offset=offset).student, temperature, log, F32)


@pytest.mark.skipif(why_not("triton") is not None, reason=str(why_not("triton")))
@pytest.mark.parametrize(("vocab", "dtype", "log"), [(100, F32, True), (2049, BF16, False), (40_001, F32, False)])
def test_tritons_kernels_give_the_right_softmax(vocab: int, dtype: torch.dtype, log: bool) -> None:
    ops = torch.ops.kdfast_triton
    with gpu.kernels():
        logits = batch(2, vocab, dtype).student
        for temperature, rows in ((2.0, None), (1.0, torch.tensor([1.0, 3.7]))):
            out = ops.tempered_softmax(logits, rows, temperature, log, dtype)
            factor = torch.linspace(-1, 1, vocab, dtype=dtype).expand_as(logits).contiguous()
            grad = ops.tempered_softmax_backward(factor, out, rows, temperature, log, dtype)
            assert out.dtype == dtype
            _judge(logits, temperature if rows is None else rows, log, out, factor, grad)


def test_softmax_accepts_any_shape_and_strides() -> None:
    logits = batch(12, 33).student
    want = torch.softmax(logits / 2, -1)
    wide = torch.nn.functional.pad(logits, (0, 3), value=torch.nan)
    for given, expected in (
        (logits.view(2, 3, 2, 33), want.view(2, 3, 2, 33)),
        (logits[0], want[0]),
        (logits[:0], want[:0]),
        (wide[:, :33], want),
        (logits.t().contiguous().t(), want),
        (logits[:1].expand(12, 33), want[:1].expand(12, 33)),
    ):
        torch.testing.assert_close(tempered_softmax(given, 2), expected, rtol=2e-6, atol=0)  # 8 eps on both sides


def test_nan_or_infinity_affects_its_row_alone_and_a_mask_gives_0() -> None:
    logits = batch(5, 100).student
    clean = tempered_softmax(logits, 3)
    logits[0, 3] = -torch.inf
    logits[1, 3] = torch.inf
    logits[2, 3] = torch.nan
    logits[3] = -torch.inf
    found = tempered_softmax(logits, 3)
    assert found[0, 3] == 0
    assert tempered_softmax(logits, 3, log=True)[0, 3] == -torch.inf
    assert found[0].isfinite().all()
    assert found[1:4].isnan().all()
    assert torch.equal(found[4], clean[4])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.7, torch.tensor([0.5, 2.0])], ids=str)
def test_softmax_is_twice_differentiable(temperature: float | Tensor, log: bool) -> None:
    logits = batch(2, 5, F64).student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tempered_softmax(x, temperature, log=log), logits)
    assert torch.autograd.gradgradcheck(lambda x: tempered_softmax(x, temperature, log=log), logits)
