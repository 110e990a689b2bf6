"""dkd, label smoothing, z-loss, softcaps and standardised logits, alone and together, by the rule of judge.py."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BF16,
    DIVERGENCES,
    DTYPE_PAIRS,
    DTYPES,
    ENSEMBLES,
    F16,
    F32,
    F64,
    KINDS,
    REDUCTIONS,
    SCALES,
    SMALL_VOCABS,
    TARGETS,
    THINNED,
    VOCABS,
    as_target,
    batch,
    combined,
    labels_for,
    name,
    takes,
    thinned_to,
)
from judge import judge, run
from torch import Tensor

import kdfast

ALL = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0, "teacher_softcap": 30.0, "standardize": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 20.0, "teacher_softcap": 30.0},  # each side's own
    "standardize": {"standardize": True},
    "all": ALL,
}
FEW = ("cross_entropy", "reverse_kl", "jsd", "dkd", "logit_mse")  # a kind of sums each, where the point is another


def few_for(backend: str, turn: int) -> Sequence[str]:
    """For Triton one of them: no option knows of divergences, which the first test has all."""
    return FEW if backend not in THINNED else (FEW[turn % len(FEW)],)


def by_row(student: Tensor, teacher: Any, labels: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    ones = torch.ones(student.shape[:-1], dtype=F64 if student.dtype == F64 else F32)
    return run(student, teacher, labels, ones, reduction="none", **settings)


# --- every option with all else ----------------------------------------------------------------------------------


@thinned_to(lambda option, divergence: option == "all" or divergence == "cross_entropy")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_with_every_divergence(backend: str, option: str, divergence: str) -> None:
    dtypes = [dtype for dtype in DTYPES if takes(backend, dtype)]
    grid = list(itertools.product((*SMALL_VOCABS, 100), dtypes))  # fp16: gradients made in backward
    turn = list(OPTIONS).index(option) + DIVERGENCES.index(divergence)
    way: dict[str, Any] = {}
    if backend in THINNED:  # one length and dtype each, and half of its kernels
        grid, way = [grid[turn % len(grid)]], ({"reduction": "none"}, {"by_row": False})[turn % 2]
    for vocab, dtype in grid:
        judge(*batch(3, vocab, dtype), backend=backend, divergence=divergence, temperature=2, **OPTIONS[option], **way)


# Triton's, but with the divergences above: what an option adds is the same code for each target
@thinned_to(
    lambda target, ensemble, reduction: (
        (TARGETS.index(target) + REDUCTIONS.index(reduction) + (None, *ENSEMBLES).index(ensemble)) % 6 == 1
    )
)
@pytest.mark.parametrize("ensemble", (None, *ENSEMBLES))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_option_with_every_target_and_reduction(
    backend: str, target: str, reduction: str, ensemble: str | None
) -> None:
    turn = TARGETS.index(target) + REDUCTIONS.index(reduction)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.3])
    options = tuple(OPTIONS) if backend not in THINNED else ("all",)
    for option, divergence in itertools.product(options, FEW[:-1] if backend not in THINNED else (FEW[turn % 4],)):
        student, teacher, labels = batch(5, 65, F32)
        labels[3] = -100
        settings = OPTIONS[option] | {"target": target, "reduction": reduction, "divergence": divergence}
        if target != "logits":
            settings = {k: v for k, v in settings.items() if k not in ("standardize", "teacher_softcap")}
        targets: Any = as_target(teacher, target, 2)
        if ensemble:
            targets = [targets, as_target(batch(5, 65, BF16, seed=1).teacher, target, 2)]
            settings |= {"ensemble": ensemble, "teacher_weights": [1, 3]}
        judge(
            student, targets, labels, backend=backend, weight=weight, temperature=2, by_row=backend == "cpu", **settings
        )


VALUES = (
    {"label_smoothing": 0.1},  # the usual one
    {"label_smoothing": 1.0},  # nothing is left of the label
    {"z_loss": 1e-4},  # PaLM's
    {"z_loss": 1.0},  # outweighs the other terms
    {"softcap": 30.0},  # Gemma 2's final logits
    {"softcap": 0.5},  # saturates: most gradients vanish
    {"softcap": 1e4},  # does nothing
    {"teacher_softcap": 30.0},
    {"softcap": 0.5, "teacher_softcap": 0.5},
    {"standardize": True},
    {"standardize": True, "softcap": 5.0, "teacher_softcap": 50.0},
    {"divergence": "dkd"},
    {"divergence": "dkd", "dkd_weights": (2.0, 1.0)},  # ImageNet's are all small
    {"divergence": "dkd", "dkd_weights": (1.0, 0.0)},  # the target class alone
    {"divergence": "dkd", "dkd_weights": (0.0, 8.0)},  # the others alone
    {"divergence": "logit_mse", "standardize": True},
)


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_every_value_at_logits_of_every_size(backend: str, value: dict[str, Any]) -> None:
    turn = VALUES.index(value)
    for vocab, dtype in combined(backend, SMALL_VOCABS, (F32, BF16, F64)) if backend not in THINNED else [(100, F32)]:
        for scale in (2.0, *SCALES):
            student, teacher, labels = batch(3, vocab, dtype, scale=scale)
            labels[0] = teacher[0].argmax()  # dkd's others are far below it
            for temperature in (2, 0.5) if backend not in THINNED else ((1, 2)[turn % 2],):
                by = {"by_row": backend not in THINNED, "temperature": temperature}
                judge(student, teacher, labels, backend=backend, **by, **value)


@pytest.mark.parametrize("option", ("label_smoothing", "z_loss", "standardize"))  # to a cap all would be alike
def test_an_offset_of_the_logits(backend: str, option: str) -> None:
    """Of each side another, far from 0: means, deviations and sums must not lose the digits."""
    for dtype, divergence in combined(backend, (F32, F64), ("cross_entropy", "dkd")):
        for vocab in SMALL_VOCABS if backend not in THINNED else (100,):
            student, _, labels = batch(3, vocab, dtype, offset=1000.0)
            teacher = batch(3, vocab, dtype, offset=-300.0).teacher
            settings = OPTIONS[option] | {"divergence": divergence, "temperature": 2}
            judge(student, teacher, labels, backend=backend, by_row=backend not in THINNED, **settings)


@pytest.mark.parametrize("offset", (-50.0, 300.0))
def test_smoothed_labels_alone_far_from_0(backend: str, offset: float) -> None:
    for vocab, dtype in combined(backend, (1, 2, 2500), (F32, F64)):
        student, _, labels = batch(4, vocab, dtype, scale=0.1, offset=offset)
        judge(student, None, labels, backend=backend, alpha=0, label_smoothing=0.7)


@pytest.mark.parametrize("option", ("standardize", "all"))
def test_rows_at_any_address(backend: str, option: str) -> None:
    """Of such rows Triton gives each thread one class at a time, and adds the threads' up: see `stats` in call.py."""
    student, teacher, labels = batch(4, 51, F32)
    student = torch.nn.functional.pad(student, (0, 2))
    settings = OPTIONS[option] | {"divergence": "symmetric_kl", "beta": 0.3, "temperature": 2, "vocab_size": 51}
    judge(student, teacher, labels, backend=backend, **settings)


# of Triton's lengths, which a row's options do not know of, one for each way that rows are read
@thinned_to(lambda vocab: vocab in (1, 2, 1000, 4097))
@pytest.mark.parametrize("vocab", [v for v in VOCABS if v < 10_000])
def test_every_length(backend: str, vocab: int) -> None:
    turn = VOCABS.index(vocab)
    for divergence, dtype in combined(backend, few_for(backend, turn), (F32, BF16, F64) if turn % 2 else (F32, F16)):
        for option in ("label_smoothing", "standardize", "all") if backend not in THINNED else ("all",):
            settings = OPTIONS[option] | {"divergence": divergence, "temperature": 2}
            judge(*batch(17, vocab, dtype), backend=backend, by_row=backend not in THINNED, **settings)
            if backend not in THINNED:  # rows by columns have a last group that is not full
                judge(*batch(1, vocab, dtype), backend=backend, by_row=False, **settings)


def test_long_rows(backend: str) -> None:
    shapes = ((1, 40_000), (2, 151_936)) if backend == "cpu" else ((1, 40_000),)  # split over threads, or programs
    for divergence, option in combined(backend, ("reverse_kl", "dkd", "logit_mse"), ("all", "standardize")):
        for (rows, vocab), dtype in itertools.product(shapes, (F32, BF16) if backend == "cpu" else (F32,)):
            settings = OPTIONS[option] | {"divergence": divergence, "temperature": 2}
            judge(*batch(rows, vocab, dtype), backend=backend, by_row=backend == "cpu", **settings)


@thinned_to(lambda pair: pair in ((F16, BF16), (F32, BF16)))
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=name)
def test_every_pair_of_dtypes(backend: str, pair: tuple[torch.dtype, torch.dtype]) -> None:
    for divergence, option in combined(backend, few_for(backend, DTYPE_PAIRS.index(pair)), ("all", "softcap")):
        settings = OPTIONS[option] | {"divergence": divergence, "temperature": 3, "by_row": backend not in THINNED}
        judge(*batch(5, 33, *pair), backend=backend, **settings)


def test_a_temperature_per_row(backend: str) -> None:
    T = torch.tensor([1.0, 2.0, 3.7, 0.5, 20.0])
    for option, divergence in combined(backend, ("standardize", "all"), ("cross_entropy", "dkd", "jsd")):
        for vocab in (33, 2500) if backend not in THINNED else (33,):
            settings = OPTIONS[option] | {"divergence": divergence, "by_row": backend not in THINNED}
            judge(*batch(5, vocab, F32), backend=backend, temperature=T, teacher_temperature=2, **settings)


@thinned_to(lambda option: option == "all")
@pytest.mark.parametrize("option", OPTIONS)
def test_padding_takes_no_part(backend: str, option: str) -> None:
    for divergence, inplace in combined(backend, FEW if backend not in THINNED else KINDS[:1], (False, True)):
        for vocab, dtype in ((17, F32), (2049, BF16)) if backend not in THINNED else ((100, F32),):
            student, teacher, labels = batch(4, vocab, dtype)
            student = F.pad(student, (0, 7), value=torch.nan)
            teacher = F.pad(teacher, (0, 3), value=torch.nan)
            settings = OPTIONS[option] | {"divergence": divergence, "vocab_size": vocab, "inplace": inplace}
            judge(student, teacher, labels, backend=backend, by_row=backend not in THINNED, **settings)


@thinned_to(lambda option: option == "all")
@pytest.mark.parametrize("option", OPTIONS)
def test_inplace_is_the_same_to_the_bit(backend: str, option: str) -> None:
    for divergence in few_for(backend, 3):
        for vocab, dtype in ((17, F32), (2049, BF16), (2049, F16)) if backend not in THINNED else ((100, F32),):
            student, teacher, labels = batch(3, vocab, dtype)
            settings = OPTIONS[option] | {"divergence": divergence, "temperature": 2, "backend": backend}
            fresh = run(student, teacher, labels, **settings)
            assert all(map(torch.equal, fresh, run(student, teacher, labels, inplace=True, **settings)))
            fresh = by_row(student, teacher, labels, **settings)
            assert all(map(torch.equal, fresh, by_row(student, teacher, labels, inplace=True, **settings)))


@thinned_to(lambda option: option == "all")
@pytest.mark.parametrize("option", OPTIONS)
def test_dropped_rows_may_hold_nan(backend: str, option: str) -> None:
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5])
    for divergence in few_for(backend, 4):
        for vocab in (17, 2500) if backend not in THINNED else (100,):
            student, teacher, labels = batch(5, vocab, F32)
            labels[1] = -100
            s, t = student.clone(), teacher.clone()
            s[1:3] = t[1:3] = torch.nan
            settings = OPTIONS[option] | {"divergence": divergence, "weight": weight, "backend": backend}
            for how in (run, by_row) if backend not in THINNED else (run,):
                want, got = how(student, teacher, labels, **settings), how(s, t, labels, **settings)
                assert all(map(torch.equal, got, want))
                assert got[1][1:3].eq(0).all()
                assert got[1].isfinite().all()


# --- what an option is ------------------------------------------------------------------------------------------


def close(got: Sequence[Tensor], want: Sequence[Tensor], ulps: float = 64) -> None:
    """Equal but for fp32's errors at the size of the row's largest numbers."""
    for a, b in zip(got, want, strict=True):
        bound = ulps * torch.finfo(F32).eps * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=bound)


def test_smoothing_is_that_of_pytorch(backend: str) -> None:
    for vocab, smoothing in itertools.product((7, 5000) if backend not in THINNED else (100,), (0.1, 0.5, 1.0)):
        student, _, labels = batch(5, vocab)
        labels[2] = -100
        leaf = student.clone().requires_grad_()
        want = F.cross_entropy(leaf, labels, label_smoothing=smoothing)
        want.backward()
        close(
            run(student, None, labels, alpha=0, label_smoothing=smoothing, backend=backend), (want.detach(), leaf.grad)
        )


@pytest.mark.parametrize("labelled", [False, True])
def test_z_loss_may_stand_alone(backend: str, labelled: bool) -> None:
    for vocab in (7, 5000) if backend not in THINNED else (100,):
        student, _, labels = batch(5, vocab)
        leaf = student.clone().requires_grad_()
        want = 0.3 * torch.logsumexp(leaf, -1).square().mean()
        want.backward()
        settings = {"alpha": 0, "hard_weight": 0, "z_loss": 0.3, "backend": backend}
        close(run(student, None, labels if labelled else None, **settings), (want.detach(), leaf.grad))


def test_a_large_cap_is_none(backend: str) -> None:
    for divergence, vocab in combined(backend, FEW[:2], (7, 2500)):
        inputs = batch(3, vocab)
        settings = {"divergence": divergence, "temperature": 2, "backend": backend}
        # tanh(x) is x but for x^3 / 3: at 10 / 1e8 nothing is left of that
        close(run(*inputs, softcap=1e8, teacher_softcap=1e8, **settings), run(*inputs, **settings))


def test_a_cap_is_that_of_logits_capped_before(backend: str) -> None:
    student, teacher, labels = batch(5, 100, scale=10.0)
    leaf = student.clone().requires_grad_()
    settings = {"divergence": "forward_kl", "temperature": 2, "z_loss": 0.1}
    capped = 7 * torch.tanh(leaf / 7)
    want = kdfast.kd_loss(capped, 5 * torch.tanh(teacher / 5), labels, backend="reference", **settings)
    want.backward()
    close(
        run(student, teacher, labels, softcap=7, teacher_softcap=5, backend=backend, **settings),
        (want.detach(), leaf.grad),
    )


@pytest.mark.parametrize("divergence", ("cross_entropy", "dkd", "logit_mse"))
def test_standardised_logits_have_no_scale_and_no_shift(backend: str, divergence: str) -> None:
    for vocab in (7, 5000) if backend not in THINNED else (100,):
        student, teacher, labels = batch(3, vocab)
        settings = {"divergence": divergence, "standardize": True, "hard_weight": 0, "backend": backend}
        loss, grad = run(student, teacher, labels_for(divergence, labels), alpha=1, **settings)
        for scale, shift in ((4.0, 0.0), (0.25, 0.0), (1.0, 8.0), (2.0, -3.0)):  # powers of two
            s, t = scale * student + shift, teacher / scale - 2 * shift
            got = run(s, t, labels_for(divergence, labels), alpha=1, **settings)
            close((got[0], scale * got[1]), (loss, grad), ulps=256)  # the shift's rounding, by deviations of 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_row_of_one_class_or_of_equal_logits_has_a_deviation_of_0(backend: str, dtype: torch.dtype) -> None:
    """z is 0 then, q is uniform, and the deviation has no gradient: (g - mean g) / 1e-7."""
    for vocab in (1, 2, 17, 100, 2500) if backend not in THINNED else (1, 100):
        for value in (0.0, 3.3, -7.1):  # no binary fractions: their mean is another number
            _, teacher, _ = batch(2, vocab, dtype)
            student = torch.full_like(teacher, value)
            settings = {"standardize": True, "temperature": 2, "reduction": "sum", "backend": backend}
            settings["t_squared"] = False
            # of 2 / 1e-7 fp16 has only infinities
            loss, grad = run(student.float() if dtype == F16 else student, teacher, **settings)
            t = teacher.double()
            deviation = t.std(-1, correction=min(1, vocab - 1), keepdim=True)
            p = torch.softmax((t - t.mean(-1, True)) / (1e-7 + deviation) / 2, -1)
            want = (1 / vocab - p) / 2 / 1e-7
            fine = 64 * torch.finfo(F64 if dtype == F64 else F32).eps
            coarse = torch.finfo(BF16).eps if dtype == BF16 else fine
            torch.testing.assert_close(grad.double(), want, rtol=coarse, atol=fine / 1e-7)
            close([loss], [torch.tensor(2 * math.log(vocab))])
            # and the teacher's
            loss, grad = run(teacher, student, **settings)
            assert loss.isfinite()
            assert grad.isfinite().all()
