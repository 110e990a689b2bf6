"""Numbers where digits cancel: near equality, in rows without a deviation, in scaled gradients."""

import itertools
import math

import pytest
import torch
from cases import BF16, DIVERGENCES, F16, F32, F64, ON_GPU, batch, dtypes_for, labels_for
from judge import judge, run

import kdfast

LINEAR = ("forward_kl", "reverse_kl", "symmetric_kl", "dkd")


@pytest.mark.parametrize("divergence", DIVERGENCES[1:-1])
def test_a_divergence_keeps_its_digits_near_equality(backend: str, divergence: str) -> None:
    """p within 1e-3 of q, and equal to it: the terms of the sums cancel."""
    _, teacher, labels = batch(8, 4097)
    labels = labels_for(divergence, labels)
    settings = {"backend": backend, "divergence": divergence, "temperature": 2, "alpha": 1}
    judge(teacher + 1e-3 * torch.randn_like(teacher), teacher, labels, by_row=False, **settings)
    settings |= {"t_squared": False, "reduction": "none"}
    loss, grad = run(teacher, teacher, labels, **settings)
    assert loss.abs().max() <= 1e-9
    q = torch.softmax(teacher.double() / 2, -1)
    if backend == "reference":
        return  # it has eager PyTorch's rounding
    # psi and its sum are rounded once each; in a KL the logarithms of p and q too: at most 5 ulp
    eps = torch.finfo(F32).eps
    if divergence == "dkd":  # q among the classes but the label's, weights 8 and 1
        q = 9 * q / (1 - q.gather(-1, labels.unsqueeze(-1)))
    assert (grad.abs() * 2 <= (5 * eps if divergence in LINEAR else eps) * q).all()
    if divergence not in LINEAR:  # judged above: eager's is a difference of logarithms too
        for distance in (1e-3, 1e-5):
            loss, _ = run(teacher + distance * torch.randn_like(teacher), teacher, labels, **settings)
            assert loss.min() >= -1e-9


@pytest.mark.beyond_cuda
def test_standardize_handles_rows_without_a_deviation(backend: str) -> None:
    """z is 0 then, q is uniform, and the deviation has no gradient: (g - mean g) / 1e-7."""
    for vocab, dtype in ((1, F32), (2, BF16), (17, F64), (100, F16), (2500, F32)):
        if dtype not in dtypes_for(backend):
            continue
        for value in (0.0, 3.3, -7.1):  # no binary fractions: their mean is rounded
            _, teacher, _ = batch(2, vocab, dtype)
            student = torch.full_like(teacher, value)
            settings = {"standardize": True, "temperature": 2, "reduction": "sum", "backend": backend}
            settings["t_squared"] = False
            # fp16 cannot hold 2 / 1e-7
            loss, grad = run(student.float() if dtype == F16 else student, teacher, **settings)
            t = teacher.double()
            deviation = t.std(-1, correction=min(1, vocab - 1), keepdim=True)
            p = torch.softmax((t - t.mean(-1, True)) / (1e-7 + deviation) / 2, -1)
            want = (1 / vocab - p) / 2 / 1e-7
            fine = 64 * torch.finfo(F64 if dtype == F64 else F32).eps
            coarse = torch.finfo(BF16).eps if dtype == BF16 else fine
            torch.testing.assert_close(grad.double(), want, rtol=coarse, atol=fine / 1e-7)
            assert loss.item() == pytest.approx(2 * math.log(vocab), rel=64 * torch.finfo(F32).eps, abs=1e-5)
            # the teacher's row
            loss, grad = run(teacher, student, **settings)
            assert loss.isfinite()
            assert grad.isfinite().all()


def test_grad_output_scales_the_gradient(backend: str) -> None:
    for dtype, factor in itertools.product(dtypes_for(backend), (1.0, -1.0, 0.0, 3.0, 1e-3)):
        leaf = batch(3, 100, dtype).student.requires_grad_()
        _, teacher, labels = batch(3, 100, dtype)
        (factor * kdfast.kd_loss(leaf, teacher, labels, temperature=2, backend=backend)).backward()
        _, grad = run(leaf.double(), teacher.double(), labels, temperature=2, backend="reference")
        # rounded, scaled, rounded: one ulp; and fp32's errors, in ulps of 1
        fine = 16 * torch.finfo(F64 if dtype == F64 else F32).eps * abs(factor)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # fp16's smallest number
        torch.testing.assert_close(leaf.grad.double(), factor * grad, rtol=torch.finfo(dtype).eps, atol=fine + smallest)


@pytest.mark.beyond_cuda
def test_standardize_keeps_its_digits_far_from_0(backend: str) -> None:
    """Each side has another offset, far from 0."""
    for vocab in (17, 2049) if backend not in ON_GPU else (100,):
        for dtype in (F32, F64) if backend not in ON_GPU else (F32,):
            student, _, labels = batch(3, vocab, dtype, offset=1000.0)
            teacher = batch(3, vocab, dtype, offset=-300.0).teacher
            for divergence in ("cross_entropy", "dkd"):
                settings = {"standardize": True, "divergence": divergence, "temperature": 2}
                judge(student, teacher, labels, backend=backend, **settings)
