"""return_metrics: their limits, and the loss is the same without them. test_calls.py judges their values."""

import math
from typing import Any

import pytest
import torch
from cases import DIVERGENCES, F16, F32, KINDS, ON_GPU, REDUCTIONS, SMALL_VOCABS, batch, dtypes_for, name
from judge import run
from judge_metrics import FIELDS, compute_metrics
from torch import Tensor

import kdfast

NAN = math.nan


def vocabs(backend: str) -> tuple[int, ...]:
    return (9, 3000) if backend not in ON_GPU else (100,)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_metrics_without_their_inputs_or_kept_rows_are_nan(backend: str, reduction: str) -> None:
    student, teacher, labels = batch(4, 100)
    for given, options, absent in (
        ((teacher, None), {}, {"hard", "accuracy"}),
        ((None, labels), {"alpha": 0}, {"soft", "kl", "teacher_entropy", "agreement"}),
        ((teacher, torch.full_like(labels, -100)), {}, set(FIELDS)),
        ((teacher, labels), {"row_weight": torch.zeros(4)}, set(FIELDS)),
        ((teacher, labels), {"alpha": 0, "hard_weight": 0}, set()),
    ):
        got = compute_metrics(student, *given, reduction=reduction, backend=backend, **options)
        for field, value in got.items():
            assert value.isnan().eq(field in absent).all(), field


def test_metrics_of_an_empty_batch_are_nan(backend: str) -> None:
    student, teacher, labels = torch.empty(0, 33), torch.empty(0, 33), torch.empty(0, dtype=torch.int64)
    for reduction in REDUCTIONS:
        got = compute_metrics(student.requires_grad_(), teacher, labels, reduction=reduction, backend=backend)
        for value in got.values():
            assert value.shape == ((0,) if reduction == "none" else ())
            assert value.isnan().all()


def test_the_first_of_equal_maxima_is_the_argmax(backend: str) -> None:
    for vocab, dtype in ((7, F32), (100, F16), (5000, F32)):
        first, last = 1, vocab - 1
        student = torch.zeros(4, vocab, dtype=dtype)
        teacher = student.clone()
        student[0, [first, last]] = teacher[0, [first, last]] = 3  # both have two maxima: the first of each
        student[1, [first, last]] = teacher[1, last] = 3
        student[2, last] = teacher[2, [first, last]] = 3
        labels = torch.tensor([first, last, last, 0])  # in the last row all are equal
        got = compute_metrics(student, teacher, labels, reduction="none", backend=backend)
        assert got["agreement"].tolist() == [1, 0, 0, 1]
        assert got["accuracy"].tolist() == [1, 0, 1, 1]


def test_a_masked_class_changes_no_metric(backend: str) -> None:
    for vocab in vocabs(backend):
        student, teacher, labels = batch(4, vocab)
        s, t = (torch.nn.functional.pad(x, (0, 3), value=-math.inf) for x in (student, teacher))
        got, want = (
            compute_metrics(a, b, labels, temperature=2, backend=backend) for a, b in ((s, t), (student, teacher))
        )
        for field in FIELDS:
            torch.testing.assert_close(got[field], want[field], rtol=1e-5, atol=1e-6)


def test_an_infinite_metric_leaves_the_loss_finite(backend: str) -> None:
    """reverse_kl's at p = 0 < q, with alpha 0, and a masked label's, with hard_weight 0."""
    for vocab in vocabs(backend):
        student, teacher, labels = batch(4, vocab)
        s, t, of_teacher = student.clone(), teacher.clone(), teacher.clone()
        s[1, labels[1]] = t[1, labels[1]] = of_teacher[1, 2] = -math.inf
        for logits, given, settings, infinite in (
            (student, of_teacher, {"alpha": 0, "divergence": "reverse_kl"}, "soft"),
            (s, t, {"alpha": 1}, "hard"),
        ):
            settings |= {"backend": backend}
            assert all(x.isfinite().all() for x in run(logits, given, labels, return_metrics=True, **settings))
            found = compute_metrics(logits.clone().requires_grad_(), given, labels, **settings)
            assert [field for field, x in found.items() if not x.isfinite()] == [infinite]
            assert found[infinite] == math.inf


def check_loss_is_unchanged(student: Tensor, teacher: Tensor | None, labels: Tensor, **settings: Any) -> None:
    with_metrics = run(student, teacher, labels, return_metrics=True, **settings)
    for a, b in zip(with_metrics, run(student, teacher, labels, **settings), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_metrics_with_alpha_0_change_neither_loss_nor_gradient(backend: str, reduction: str) -> None:
    dtype = dtypes_for(backend)[-1]  # fp64: no Triton kernel keeps its rows
    student, teacher, labels = batch(4, 100, dtype)
    for given in (teacher, None):
        settings = {"alpha": 0, "temperature": 2, "reduction": reduction, "backend": backend}
        check_loss_is_unchanged(student, given, labels, **settings)


@pytest.mark.beyond_cuda
def test_nan_in_standardized_metrics_does_not_reach_the_loss(backend: str) -> None:
    student, teacher, labels = batch(4, 100)
    student[1, 2] = -math.inf
    labels[1] = 7
    for reduction in REDUCTIONS:
        settings = {"alpha": 0, "standardize": True, "reduction": reduction, "temperature": 2, "backend": backend}
        for given in (teacher, None):
            found = compute_metrics(student.clone().requires_grad_(), given, labels, **settings)
            assert found["student_entropy"].isnan().any()
            check_loss_is_unchanged(student, given, labels, **settings)


def test_nan_or_infinity_affects_the_metrics_of_its_row_alone(backend: str) -> None:
    for vocab in vocabs(backend):
        student, teacher, labels = batch(4, vocab)
        clean = compute_metrics(student, teacher, labels, reduction="none", backend=backend)
        student[1, 3], teacher[2] = NAN, -math.inf
        got = compute_metrics(student, teacher, labels, reduction="none", backend=backend)
        for field in ("soft", "hard", "kl", "student_entropy", "teacher_entropy"):
            assert torch.equal(got[field][[0, 3]], clean[field][[0, 3]])
            of_teacher, of_student = field in ("soft", "kl", "teacher_entropy"), field != "teacher_entropy"
            assert got[field][1].isnan() == of_student, field
            assert got[field][2].isnan() == of_teacher, field


# --- the loss with and without metrics ---------------------------------------------------------------------------


def _same_kernel(backend: str, reduction: str, dtype: torch.dtype, vocab: int) -> bool:
    """With metrics the CPU goes row by row, as for a gradient: not by columns, as for short rows, and not with several
    threads a row. Triton has a row in a program, as by reduction "none", and not several short ones."""
    in_forward = reduction == "mean" and dtype != F16
    if backend == "cpu":
        return in_forward and 64 < vocab < 32_768
    return backend != "triton" or not in_forward or vocab > 128


@pytest.mark.parametrize("dtype", (F32, F16), ids=name)  # gradients computed in forward, and in backward
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_metrics_change_neither_loss_nor_gradient(backend: str, reduction: str, dtype: torch.dtype) -> None:
    one = backend in ON_GPU and (dtype, reduction) != (F32, "mean")
    for divergence in KINDS[:1] if one else KINDS if backend in ON_GPU else DIVERGENCES:
        for vocab in (*SMALL_VOCABS, 33_000) if backend == "cpu" else SMALL_VOCABS[:1]:
            inputs = batch(3, vocab, dtype)
            found = []
            for options in ({}, {"return_metrics": True}, {"return_metrics": True, "inplace": True}):
                leaf = inputs.student.clone().requires_grad_()
                student = leaf.clone() if "inplace" in options else leaf
                settings = {"divergence": divergence, "reduction": reduction, "temperature": 2, "backend": backend}
                loss = kdfast.kd_loss(student, *inputs[1:], **settings, **options)
                loss, metrics = loss if options else (loss, None)
                loss.backward(torch.ones_like(loss))
                found.append((loss.detach(), leaf.grad, *(metrics or ())))
            without, with_metrics, inplace = found
            assert all(map(torch.equal, with_metrics, inplace))
            for a, b in zip(with_metrics[:2], without, strict=True):
                if _same_kernel(backend, reduction, dtype, vocab):
                    assert torch.equal(a, b)
                else:  # sums in another order: 16-bit numbers may be rounded differently
                    fine = 16 * torch.finfo(F32).eps * b.abs().max().item()
                    torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps, atol=fine)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_metrics_are_detached_and_need_no_gradient(backend: str, reduction: str) -> None:
    student, teacher, labels = batch(3, 100)
    alone = compute_metrics(student, teacher, labels, reduction=reduction, backend=backend)
    student.requires_grad_()
    for field, value in compute_metrics(student, teacher, labels, reduction=reduction, backend=backend).items():
        assert not value.requires_grad
        assert value.shape == ((3,) if reduction == "none" else ())
        torch.testing.assert_close(value, alone[field])
