"""A term or a row of weight 0 is not computed: its values have no effect."""

import math
from typing import Any

import pytest
import torch
from calls import options_for
from cases import BF16, DIVERGENCES, ENSEMBLES, F16, F32, ON_GPU, REDUCTIONS, as_target, batch, dtypes_for
from judge import judge, run

NAN, INF = math.nan, math.inf
ROWS = 8
IGNORED, WEIGHTLESS = [1, 2, 3], [4, 5, 6]  # rows with NaN, inf and -inf
DROPPED = [*IGNORED, *WEIGHTLESS]


def is_equal(found: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(map(torch.equal, found, want))


def is_0(found: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return not any(x.count_nonzero() for x in found)  # counts NaN too


def check_dropped_rows(
    backend: str, divergence: str, vocab: int, dtype: torch.dtype, reduction: str, **settings: Any
) -> None:
    student, teacher, labels = batch(ROWS, vocab, dtype)
    labels[IGNORED] = -100
    weight = torch.full((ROWS,), 0.5)
    weight[WEIGHTLESS] = 0
    s, t = student.clone(), teacher.clone()
    for row, value in zip(DROPPED, (NAN, INF, -INF) * 2, strict=True):
        s[row] = t[row] = value
    settings |= {"divergence": divergence, "row_weight": weight, "reduction": reduction, "backend": backend}
    loss, grad = run(s, t, labels, **settings)
    assert loss.isfinite().all()
    assert is_equal((loss, grad), run(student, teacher, labels, **settings))
    assert grad[DROPPED].eq(0).all()
    if reduction == "none":
        assert loss[DROPPED].eq(0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_values_of_dropped_rows_have_no_effect(backend: str, divergence: str, full: bool) -> None:
    number = DIVERGENCES.index(divergence)
    for i, reduction in enumerate(REDUCTIONS):  # "none" computes its gradient in backward
        for vocab in (7, 5000) if full or backend == "cpu" else ((7, 5000)[(number + i) % 2],):
            check_dropped_rows(backend, divergence, vocab, F32, reduction, temperature=2)


def test_dropped_rows_have_no_effect_under_any_dtype_or_option(backend: str) -> None:
    for dtype in dtypes_for(backend):
        check_dropped_rows(backend, "cross_entropy", 100, dtype, "mean", temperature=2)
    for settings in (
        {"temperature": torch.arange(1.0, 9.0)},
        {"inplace": True, "temperature": 2},
        options_for(backend),
    ):
        for reduction in ("mean", "none"):
            check_dropped_rows(backend, "cross_entropy", 100, F32, reduction, **settings)
    # weights without labels
    student, teacher, _ = batch(3, 100)
    weight = torch.tensor([1.0, 0.0, 2.0])
    want = run(student, teacher, row_weight=weight, backend=backend)
    student[1] = teacher[1] = NAN
    assert is_equal(run(student, teacher, row_weight=weight, backend=backend), want)


def test_the_row_values_of_dropped_rows_have_no_effect(backend: str, full: bool) -> None:
    """Not even where they are not allowed: a temperature of 0, a negative weight, a label that no class has."""
    for vocab in (7, 100) if backend not in ON_GPU or full else (100,):
        student, teacher, labels = batch(ROWS, vocab)
        labels[IGNORED] = -100
        weight, temperature = torch.full((ROWS,), 0.5), torch.linspace(1, 2, ROWS)
        weight[WEIGHTLESS] = 0
        bad_labels, bad_weight, bad = labels.clone(), weight.clone(), temperature.clone()
        bad_labels[WEIGHTLESS] = torch.tensor([-1, vocab, 2**40])
        bad_weight[IGNORED] = torch.tensor([NAN, INF, -1.0])
        bad[DROPPED] = torch.tensor([0.0, NAN, -1.0, 0.0, INF, NAN])
        for settings in ({}, {"reduction": "none"}, {"return_metrics": True}, {"inplace": True}):
            want = {"row_weight": weight, "temperature": temperature, "teacher_temperature": temperature * 2}
            given = {"row_weight": bad_weight, "temperature": bad, "teacher_temperature": bad * 2}
            found = run(student, teacher, bad_labels, backend=backend, **given, **settings)
            assert is_equal(found, run(student, teacher, labels, backend=backend, **want, **settings))


def test_alpha_0_reads_no_teacher(backend: str) -> None:
    for dtype in dtypes_for(backend):
        student, teacher, labels = batch(5, 100, dtype)
        want = run(student, None, labels, alpha=0, backend=backend)
        for unread in (teacher, torch.full_like(teacher, NAN), [teacher, torch.full_like(teacher, NAN)]):
            assert is_equal(run(student, unread, labels, alpha=0, backend=backend), want)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_a_teacher_of_weight_0_is_not_read(backend: str, ensemble: str) -> None:
    student, teacher, labels = batch(5, 100)
    want = run(student, [teacher], labels, ensemble=ensemble, backend=backend)
    unread = torch.full_like(teacher, NAN)
    for teachers, weights in (([unread, teacher], [0, 2]), ([teacher, unread], [2, 0])):
        assert is_equal(
            run(student, teachers, labels, ensemble=ensemble, teacher_weights=weights, backend=backend), want
        )


def test_a_loss_without_any_term_is_0(backend: str) -> None:
    for dtype in (F32, F16):  # gradients computed in forward, and in backward
        student, teacher, labels = batch(5, 100, dtype)
        for given, y in ((None, None), (teacher, None), (None, labels), (teacher, labels)):
            for reduction in REDUCTIONS:
                settings = {"alpha": 0, "hard_weight": 0, "reduction": reduction, "backend": backend}
                assert is_0(run(student, given, y, **settings))


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_a_loss_without_kept_rows_is_0_with_a_graph(backend: str, reduction: str) -> None:
    for dtype in (F32, F16):
        student, teacher, labels = batch(5, 100, dtype)
        student[0] = NAN
        ignored, some_ignored = torch.full_like(labels, -100), labels.clone()
        some_ignored[:3] = -100
        for y, weight in (
            (ignored, None),
            (labels, torch.zeros(5)),
            (None, torch.zeros(5)),
            (ignored, torch.ones(5)),
            (some_ignored, torch.tensor([1.0, 1, 1, 0, 0])),  # rows of weight 0, and ignored ones
        ):
            assert is_0(run(student, teacher, y, row_weight=weight, reduction=reduction, backend=backend))


def test_a_normalizer_of_0_without_kept_rows_gives_loss_and_gradient_0(backend: str) -> None:
    """As of the tokens in all micro-batches, of which this one has none, and nor has any other."""
    for dtype in (F32, F16):
        student, teacher, labels = batch(5, 100, dtype)
        for zero in (torch.tensor(0.0), torch.tensor(0)):
            settings = {"normalizer": zero, "backend": backend}
            assert is_0(run(student, teacher, torch.full_like(labels, -100), **settings))
            assert is_0(run(student, teacher, row_weight=torch.zeros(5), **settings))
            assert is_0(run(student[:0], teacher[:0], labels[:0], **settings))


@pytest.mark.beyond_cuda
@pytest.mark.parametrize("target", ["probs", "log_probs"])
def test_soft_targets_need_not_sum_to_1(backend: str, target: str) -> None:
    for dtype in dtypes_for(backend) if backend not in ON_GPU else (F32, BF16):
        for mass in (0.9, 1.1, 0.0):  # too small, too large, 0
            student, teacher, labels = batch(5, 100, dtype)
            p = as_target(teacher.float(), "probs", 2) * mass
            p[1, 3] = 0  # a masked class
            given = (p if target == "probs" else p.log()).to(dtype)
            for divergence in ("cross_entropy", "forward_kl"):
                judge(student, given, labels, target=target, divergence=divergence, temperature=2, backend=backend)
