"""Every setting does on every backend what it does in the reference, by the rule of judge.py."""

import pytest
import torch
from cases import (
    BF16,
    DIVERGENCES,
    DTYPES,
    ENSEMBLES,
    F16,
    F32,
    F64,
    KINDS,
    REDUCTIONS,
    SMALL_VOCABS,
    TARGETS,
    THINNED,
    as_target,
    batch,
    combined,
    divergences_for,
    here,
    labels_for,
    name,
    takes,
    thinned_to,
)
from judge import judge, run

import kdfast

WITH_TEMPERATURE = DIVERGENCES[:-1]


@thinned_to(lambda dtype: dtype in (F16, F64))  # of the others test_every_divergence_of_every_teacher has all
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_every_kind_of_target(backend: str, target: str, dtype: torch.dtype) -> None:
    kinds = tuple(dict.fromkeys((dtype, F32, BF16)))  # bf16 probabilities do not sum to 1
    turn = TARGETS.index(target) + 1
    for divergence, vocab, teacher_dtype in combined(
        backend, divergences_for(backend)[:-1], SMALL_VOCABS, kinds, turn=turn
    ):
        student, teacher, labels = batch(3, vocab, dtype, teacher_dtype)
        targets = as_target(teacher, target, 3)
        settings = {"target": target, "divergence": divergence, "temperature": 3}
        judge(student, targets, labels, backend=backend, by_row=backend not in THINNED, **settings)


# likewise: here each dtype for one of the targets, by which its teachers are read
@thinned_to(lambda dtype, target: {F32: "logits", BF16: "probs", F64: "log_probs"}[dtype] == target)
@pytest.mark.parametrize("ensemble", ENSEMBLES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=name)
def test_every_ensemble(backend: str, target: str, ensemble: str, dtype: torch.dtype) -> None:
    others = (F32, BF16, F16, dtype)  # each teacher may have a dtype of its own
    sizes = ((1, None), (2, None), (2, [3, 1]), (4, [0.1, 0.2, 0.3, 0.4]), (3, [1, 0, 2]))
    turn = TARGETS.index(target) + 1
    for (count, weights), divergence, vocab in combined(
        backend, sizes, divergences_for(backend)[:-1], SMALL_VOCABS, turn=turn
    ):
        student, _, labels = batch(3, vocab, dtype)
        teachers = [batch(3, vocab, others[i], seed=i).teacher for i in range(count)]
        settings = {"target": target, "ensemble": ensemble, "teacher_weights": weights, "temperature": 2}
        teachers = tuple(as_target(t, target, 2) for t in teachers)
        judge(
            student, teachers, labels, backend=backend, by_row=backend not in THINNED, divergence=divergence, **settings
        )


def _quarter(divergence: str, target: str, ensemble: str | None, dtype: torch.dtype, vocab: int) -> bool:
    indices = WITH_TEMPERATURE.index(divergence), TARGETS.index(target), (None, *ENSEMBLES).index(ensemble)
    return (sum(indices) + 2 * (dtype == F32) + (vocab == 100)) % 4 == 0


# Triton's whole product, which the other backends have above: each of it at one length and in one dtype or the other
@thinned_to(_quarter)
@pytest.mark.parametrize("dtype", (F32, BF16), ids=name)
@pytest.mark.parametrize("ensemble", (None, *ENSEMBLES))
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("divergence", WITH_TEMPERATURE)
@pytest.mark.parametrize("vocab", (100, 40_000))  # short; so long that it is split over programs
@pytest.mark.parametrize("backend", ("triton",), indirect=True)
def test_every_divergence_of_every_teacher(
    backend: str, vocab: int, divergence: str, target: str, ensemble: str | None, dtype: torch.dtype
) -> None:
    student, teacher, labels = batch(3, vocab, dtype)
    teacher = as_target(teacher, target, 2)
    settings = {"target": target, "divergence": divergence, "temperature": 2}
    if ensemble:
        teacher = [teacher, as_target(batch(3, vocab, dtype, seed=1).teacher, target, 2)]
        settings |= {"ensemble": ensemble}
    one = WITH_TEMPERATURE.index(divergence) + TARGETS.index(target) + (vocab == 100)
    way = ({"reduction": "none"}, {"by_row": False})[one % 2]
    judge(student, teacher, labels, backend=backend, **settings, **way)


def test_logit_mse_of_a_geometric_ensemble(backend: str) -> None:
    for dtype, vocab in combined(backend, DTYPES, (100, 40_000)):  # short; so long that Triton splits it
        student, teacher, labels = batch(3, vocab, dtype)
        teachers = [teacher, batch(3, vocab, F32, seed=1).teacher]
        settings = {"divergence": "logit_mse", "ensemble": "geometric"}
        for weights in (None, [1, 3]):
            judge(student, teachers, labels, backend=backend, teacher_weights=weights, **settings)


@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=name)
def test_every_mix_of_soft_and_hard(backend: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(5, 100, dtype)
    divergences = divergences_for(backend)
    if backend in THINNED and dtype != F32:  # what a term weighs is fp32's or fp64's business
        divergences = (KINDS[DTYPES.index(dtype)],)
    for divergence in divergences:
        # Triton: a gradient by row weighs its terms with the same code, which it would compile again
        settings = {"backend": backend, "divergence": divergence, "temperature": 4, "by_row": backend not in THINNED}
        for alpha in (None, 0, 0.25, 1):
            judge(student, teacher, labels, alpha=alpha, **settings)
        # timm's and DKD's 1 + 1; the soft term alone, beside labels and without; the hard alone; a large one
        for alpha, hard in ((1, 1), (0.7, 0), (0, 2.5), (100, 0.5)):
            judge(student, teacher, labels, alpha=alpha, hard_weight=hard, **settings)
        judge(student, teacher, labels_for(divergence, labels), alpha=0.3, hard_weight=0, **settings)
        judge(student, None, labels, alpha=0, **settings)


@thinned_to(lambda dtype, reduction: dtype == F32 or reduction == "mean")  # sums are fp32's or fp64's
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=name)
def test_every_reduction_with_weights_and_ignored_rows(backend: str, reduction: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(9, 100, dtype)
    labels[[1, 4]] = -100
    labels[2] = 7
    weights = {
        "none": None,
        "fractions": torch.tensor([0.5, 1, 0, 2, 0.25, 1, 0, 0.3, 1]),
        "bf16": torch.tensor([0.5, 1, 0, 2, 0.3, 1, 0, 1, 1], dtype=BF16),
        "fp64": torch.rand(9, dtype=F64),
        "whole": torch.arange(9),
        "a mask": torch.arange(9) % 3 > 0,
    }
    three = ("cross_entropy", "reverse_kl", "logit_mse")
    ways = ((labels, {}), (None, {}), (labels.clamp_min(0), {"ignore_index": 7, "alpha": 1}))
    for weight, divergence, (given, options) in combined(backend, tuple(weights.values()), three, ways, turn=1):
        settings = {"backend": backend, "divergence": divergence, "reduction": reduction, "weight": weight}
        judge(student, teacher, given, by_row=backend not in THINNED, **settings, **options)  # which "none" is


@pytest.mark.parametrize("normalizer", (17, 0.5, torch.tensor(17.0), torch.tensor(3), torch.tensor(0.3, dtype=F64)))
def test_every_normalizer(backend: str, normalizer: float | torch.Tensor) -> None:
    normalizer = here(normalizer)
    for dtype in DTYPES if backend not in THINNED else (F32, F64 if takes(backend, F64) else BF16):
        student, teacher, labels = batch(5, 33, dtype)
        labels[3] = -100
        settings = {"backend": backend, "normalizer": normalizer, "by_row": backend not in THINNED}  # has none
        judge(student, teacher, labels, **settings)
        judge(student, teacher, **settings, weight=torch.arange(5) * 0.5)


def test_a_temperature_per_row_is_each_row_by_itself(backend: str) -> None:
    T = torch.tensor([1.0, 2.0, 3.7, 0.5, 20.0])
    at = torch.tensor([2.0, 1.0, 3.0, 0.5, 1.5], dtype=F64)  # of any real dtype
    for dtype, divergence in combined(backend, DTYPES, divergences_for(backend)[:-1]):
        student, teacher, labels = batch(5, 100, dtype)
        settings = {"backend": backend, "divergence": divergence}
        by_row = backend not in THINNED  # which the run below is
        judge(student, teacher, labels, by_row=by_row, temperature=T, **settings)
        judge(student, teacher, labels, by_row=by_row, temperature=T, teacher_temperature=at, **settings)
        judge(student, teacher, labels, by_row=by_row, temperature=2.5, teacher_temperature=at, **settings)
        loss, grad = run(student, teacher, labels, torch.ones(5), temperature=T, reduction="none", **settings)
        for i in range(5):
            row = slice(i, i + 1)
            one = (student[row], teacher[row], labels[row], torch.ones(1))
            alone = run(*one, temperature=T[i].item(), reduction="none", **settings)
            # the same row: only how T came in differs, so a kernel's choice of a power for exp may
            tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 20 * 8 * torch.finfo(dtype).eps}
            torch.testing.assert_close((loss[row], grad[row]), alone, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_grad_output_scales_the_gradient(backend: str, dtype: torch.dtype) -> None:
    for factor in (1.0, -1.0, 0.0, 3.0, 1e-3):
        leaf = batch(3, 100, dtype).student.requires_grad_()
        _, teacher, labels = batch(3, 100, dtype)
        (factor * kdfast.kd_loss(leaf, teacher, labels, backend=backend)).backward()
        _, grad = run(leaf.double(), teacher.double(), labels, backend="reference")
        # made, rounded, scaled, rounded: one ulp where one rounding would be half; and fp32's errors, in ulps of 1
        fine = 16 * torch.finfo(F64 if dtype == F64 else F32).eps * abs(factor)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # fp16's: its numbers end there
        torch.testing.assert_close(leaf.grad.double(), factor * grad, rtol=torch.finfo(dtype).eps, atol=fine + smallest)
