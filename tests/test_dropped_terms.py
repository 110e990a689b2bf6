"""A term or a row of factor 0 is not computed: whatever it holds, it leaves no trace."""

import math
from typing import Any

import pytest
import torch
from cases import (
    BF16,
    F16,
    F32,
    F64,
    REDUCTIONS,
    as_target,
    batch,
    combined,
    divergences_for,
    labels_for,
    name,
    thinned_to,
)
from judge import judge, run

NAN = math.nan
pytestmark = pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=name)


def ones(reduction: str, dtype: torch.dtype, rows: int) -> torch.Tensor | None:
    return torch.ones(rows, dtype=F64 if dtype == F64 else F32) if reduction == "none" else None


@thinned_to(lambda dtype, reduction: dtype == F32 or reduction == "mean")  # rows drop out in the arithmetic
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_dropped_rows_may_hold_anything(backend: str, dtype: torch.dtype, reduction: str, value: float) -> None:
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5])
    temperatures = (2, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    ways = ((True, None), (False, weight), (None, weight), (True, weight))  # are rows ignored, are there labels at all
    turn = REDUCTIONS.index(reduction)
    for vocab, divergence, (ignoring, w), temperature in combined(
        backend, (7, 5000), divergences_for(backend), ways, temperatures, turn=turn
    ):
        student, teacher, labels = batch(5, vocab, dtype)
        s, t = student.clone(), teacher.clone()
        s[[1, 3]] = t[[1, 3]] = value
        if ignoring:
            labels[[1, 3]] = -100
        y = labels_for(divergence, labels, ignoring is not None)
        options: dict[str, Any] = {"weight": w, "temperature": temperature, "divergence": divergence}
        options |= {"backend": backend, "reduction": reduction}
        want = run(student, teacher, y, ones(reduction, dtype, 5), **options)
        loss, grad = run(s, t, y, ones(reduction, dtype, 5), **options)
        assert loss.isfinite().all()
        assert torch.equal(loss, want[0])
        assert torch.equal(grad, want[1])
        assert grad[[1, 3]].eq(0).all()
        if reduction == "none":
            assert loss[[1, 3]].eq(0).all()


def test_alpha_0_reads_no_teacher(backend: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(5, 100, dtype)
    want = run(student, None, labels, alpha=0, backend=backend)
    for unread in (teacher, torch.full_like(teacher, NAN), [teacher, torch.full_like(teacher, NAN)]):
        found = run(student, unread, labels, alpha=0, backend=backend)
        assert all(map(torch.equal, found, want))


def test_a_teacher_of_weight_0_is_not_read(backend: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(5, 100, dtype)
    for ensemble in ("arithmetic", "geometric"):
        want = run(student, [teacher], labels, ensemble=ensemble, backend=backend)
        teachers = [torch.full_like(teacher, NAN), teacher]
        found = run(student, teachers, labels, ensemble=ensemble, teacher_weights=[0, 2], backend=backend)
        assert all(map(torch.equal, found, want))


def test_a_loss_without_any_term_is_0(backend: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(5, 100, dtype)
    for given, y in ((None, None), (teacher, None), (None, labels), (teacher, labels)):
        for reduction in REDUCTIONS:
            settings = {"alpha": 0, "hard_weight": 0, "reduction": reduction, "backend": backend}
            loss, grad = run(student, given, y, ones(reduction, dtype, 5), **settings)
            assert loss.eq(0).all()
            assert grad.eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_a_mean_over_nothing_is_0_with_a_graph(backend: str, dtype: torch.dtype, reduction: str) -> None:
    student, teacher, labels = batch(5, 100, dtype)
    student[0] = NAN
    nothing = torch.full_like(labels, -100)
    for y, weight in ((nothing, None), (labels, torch.zeros(5)), (None, torch.zeros(5)), (nothing, torch.ones(5))):
        loss, grad = run(student, teacher, y, weight=weight, reduction=reduction, backend=backend)
        assert loss == 0
        assert grad.eq(0).all()
    # rows of weight 0 beside ignored ones
    labels[:3] = -100
    loss, grad = run(student, teacher, labels, weight=torch.tensor([1.0, 1, 1, 0, 0]), backend=backend)
    assert loss == 0
    assert grad.eq(0).all()


def test_a_label_of_a_dropped_row_is_checked_only_by_its_index(backend: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(5, 100, dtype)
    judge(student, teacher, torch.where(torch.arange(5) == 2, 3, labels), ignore_index=3, backend=backend)
    large = labels.clone()
    large[1] = 10**6  # an ignore_index far outside of the classes
    judge(student, teacher, large, ignore_index=10**6, backend=backend)


@thinned_to(lambda dtype, target: dtype in (F32, F64) or target == "probs")  # 16 bits are loaded alike
@pytest.mark.parametrize("mass", [0.9, 1.1, 0.0])  # too little, too much, none at all
@pytest.mark.parametrize("target", ["probs", "log_probs"])
def test_soft_targets_need_not_sum_to_1(backend: str, dtype: torch.dtype, target: str, mass: float) -> None:
    student, teacher, labels = batch(5, 100, dtype)
    p = as_target(teacher.float(), "probs", 2) * mass
    p[1, 3] = 0  # and a class without probability
    given = (p if target == "probs" else p.log()).to(dtype)
    for divergence in ("cross_entropy", "forward_kl"):
        judge(student, given, labels, target=target, divergence=divergence, temperature=2, backend=backend)
    if target == "probs":
        grad = run(student, given, backend=backend, target="probs", reduction="sum", temperature=2)[1]
        q = torch.softmax(student.double() / 2, -1)
        P = given.double()
        # T * (q * sum p - p): fp32's errors, 16 ulp of terms of size 2, and the gradient's rounding
        bound = {"rtol": torch.finfo(dtype).eps, "atol": 32 * torch.finfo(F64 if dtype == F64 else F32).eps}
        torch.testing.assert_close(grad.double(), 2 * (q * P.sum(-1, True) - P), **bound)
