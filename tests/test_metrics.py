"""return_metrics: seven numbers of the same pass, as exact as the loss, and the loss as it is without them."""

import math
from typing import Any

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
    labels_for,
    moved,
    name,
    takes,
    thinned_to,
)
from eager import DEFAULTS, eager, entropies, largest_z
from judge import one_thread
from torch import Tensor

import kdfast

ALONE = {"hard_weight": 0, "z_loss": 0.0}  # the soft term by itself
FIELDS = ("soft", "hard", "kl", "student_entropy", "teacher_entropy", "agreement", "accuracy")
NAN = math.nan


def measured(student: Tensor, teacher: Any, labels: Tensor | None = None, **settings: Any) -> dict[str, Tensor]:
    _, metrics = kdfast.kd_loss(student, teacher, labels, return_metrics=True, **settings)
    assert isinstance(metrics, kdfast.KDMetrics)
    assert metrics._fields == FIELDS
    return metrics._asdict()


def of_rows(
    student: Tensor, teachers: list[Tensor], labels: Tensor | None, settings: dict[str, Any], kind: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each row's metrics by the recipes of eager.py, and A of judge.py, in eps."""
    o = DEFAULTS | {k: v for k, v in settings.items() if k in DEFAULTS}
    if o["divergence"] == "logit_mse":
        o |= {"temperature": 1.0, "teacher_temperature": None, "t_squared": False}
    nan = torch.full_like(student[..., 0], NAN)
    nothing = (nan, nan)
    best, p = student.argmax(-1), None
    found = dict.fromkeys(FIELDS, nothing)
    of_q, of_q_off, of_p, of_p_off = entropies(student, teachers, o, kind)
    found["student_entropy"] = of_q, of_q_off
    if labels is not None:
        found["hard"] = eager(student, [], labels, o | {"alpha": 0, "hard_weight": 1, "z_loss": 0}, kind)[:2]
        found["accuracy"] = (best == labels).to(nan.dtype), 0 * nan
    if teachers:
        found["soft"] = eager(student, teachers, labels, o | ALONE | {"alpha": 1}, kind)[:2]
        kl = o | ALONE | {"alpha": 1, "divergence": "forward_kl", "beta": None, "t_squared": False}
        found["kl"] = eager(student, teachers, None, kl, kind)[:2]
        found["teacher_entropy"] = of_p, of_p_off
        p = teachers[0] if len(teachers) == 1 else mean_of(teachers, o)
        found["agreement"] = (best == p.argmax(-1)).to(nan.dtype), 0 * nan
    return {k: (value, off.nan_to_num(0)) for k, (value, off) in found.items()}


def mean_of(teachers: list[Tensor], o: dict[str, Any]) -> Tensor:
    weights = o["teacher_weights"] or [1] * len(teachers)
    if o["ensemble"] == "geometric":
        logs = [t.log() if o["target"] == "probs" else t for t in teachers]
        return sum(w * t for w, t in zip(weights, logs, strict=True))
    at = o["temperature"] if o["teacher_temperature"] is None else o["teacher_temperature"]
    if o["target"] == "logits":
        teachers = [torch.softmax(t / at, -1) for t in teachers]
    elif o["target"] == "log_probs":
        teachers = [t.exp() for t in teachers]
    return sum(w * t for w, t in zip(weights, teachers, strict=True))


def judge_metrics(
    student: Tensor, teacher: Any, labels: Tensor | None = None, *, backend: str, **settings: Any
) -> dict[str, Tensor]:
    """Every metric is no further from fp64 than A and eager PyTorch in fp32 allow; shares are exact."""
    got = measured(student, teacher, labels, backend=backend, **settings)
    kind = F64 if student.dtype == F64 else F32
    student, teacher, labels, settings = moved((student, teacher, labels, settings), "cpu")
    vocab = settings.get("vocab_size") or student.shape[-1]
    teachers = [] if teacher is None else [teacher] if isinstance(teacher, Tensor) else list(teacher)
    s, teachers = student.detach()[..., :vocab], [t[..., :vocab] for t in teachers]
    keep = torch.ones(s.shape[:-1], dtype=torch.bool)
    if labels is not None:
        keep = labels != settings.get("ignore_index", -100)
    weight = keep.double()
    if settings.get("weight") is not None:
        weight, keep = weight * settings["weight"].double(), keep & (settings["weight"] != 0)
    with one_thread():
        truth = of_rows(s.double(), [t.double() for t in teachers], labels, settings, kind)
        plain = of_rows(s.float(), [t.float() for t in teachers], labels, settings, kind)
        rounded = largest_z(s, teachers, DEFAULTS | {k: v for k, v in settings.items() if k in DEFAULTS}).squeeze(-1)
    for field, (want, off) in truth.items():
        assert got[field].dtype == kind, field
        assert not got[field].requires_grad, field
        allowed = off * torch.finfo(kind).eps
        # as judge.py has it: eager's error, or the truth's own; shares have none
        allowed = allowed * (1 + rounded) if kind == F64 else allowed + (plain[field][0] - want).abs().nan_to_num(0)
        allowed = 0 * off if field in ("agreement", "accuracy") else allowed
        want = torch.where(keep, want, NAN)
        if settings.get("reduction") != "none":
            total = weight.sum()
            want, allowed = (torch.where(keep, x * weight, 0).sum() / total for x in (want, allowed))
            allowed = allowed + 4 * torch.finfo(kind).eps * want.abs().nan_to_num(0)  # its sum, and its quotient
        assert got[field].shape == want.shape, field
        off_by = (got[field].cpu().double() - want).abs()
        right = (off_by <= allowed) | (want.isnan() & got[field].cpu().isnan())
        assert right.all(), f"{field}: {got[field]} instead of {want}, {allowed} allowed"
    return got


# --- the numbers -------------------------------------------------------------------------------------------------


# Triton: metrics know no dtype; two of the lengths' and dtypes' pairs each
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_metric_of_every_divergence(backend: str, divergence: str) -> None:
    grid = [(v, d) for v in (*SMALL_VOCABS, 100) for d in DTYPES if takes(backend, d)]
    turn = DIVERGENCES.index(divergence)
    for vocab, dtype in grid if backend not in THINNED else [grid[turn % len(grid)]]:
        student, teacher, labels = batch(5, vocab, dtype)
        labels[1] = -100
        labels[2] = student[2].argmax()
        teacher[3] = student[3]
        settings = {"backend": backend, "divergence": divergence, "temperature": 2}
        got = judge_metrics(student, teacher, labels, **settings)
        assert 0 < got["accuracy"] < 1
        assert 0 < got["agreement"] <= 1
        if backend not in THINNED:
            judge_metrics(student, teacher, labels, reduction="none", t_squared=False, **settings)


@thinned_to(lambda target, ensemble: (TARGETS.index(target) + (None, *ENSEMBLES).index(ensemble)) % 3 == 1)
@pytest.mark.parametrize("ensemble", (None, *ENSEMBLES))
@pytest.mark.parametrize("target", TARGETS)
def test_every_kind_of_teacher(backend: str, target: str, ensemble: str | None) -> None:
    for divergence in ("cross_entropy", "jsd", "dkd") if backend not in THINNED else ("reverse_kl",):
        for vocab, dtype in ((33, F32), (2049, BF16), (100, F64)) if backend not in THINNED else ((100, F32),):
            student, teacher, labels = batch(5, vocab, dtype)
            teachers: Any = as_target(teacher, target, 2)
            settings = {"backend": backend, "divergence": divergence, "target": target, "temperature": 2}
            if ensemble:
                teachers = [teachers, as_target(batch(5, vocab, F32, seed=1).teacher, target, 2)]
                settings |= {"ensemble": ensemble, "teacher_weights": [2, 1]}
            judge_metrics(student, teachers, labels, **settings)


OPTIONS = {
    "smoothed": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 1.0},
    "capped": {"softcap": 10.0, "teacher_softcap": 15.0},
    "standardised": {"standardize": True},
    "all": {"label_smoothing": 0.2, "z_loss": 1.0, "softcap": 10.0, "teacher_softcap": 15.0, "standardize": True},
    "the hard term alone": {"alpha": 0},
    "the soft term alone": {"alpha": 1},
    "no term": {"alpha": 0, "hard_weight": 0},
    "other weights": {"alpha": 3.0, "hard_weight": 0.5},
    "the teacher's temperature": {"teacher_temperature": 1.0},
    "a temperature per row": {"temperature": torch.tensor([1.0, 2.0, 0.5, 3.7, 20.0])},
    "padding": {"vocab_size": 30},
}


@thinned_to(lambda option: option in ("all", "the hard term alone", "the soft term alone", "a temperature per row"))
@pytest.mark.parametrize("option", OPTIONS)
def test_every_setting_counts_as_it_does_for_the_loss(backend: str, option: str) -> None:
    for divergence, vocab in combined(backend, ("forward_kl", "dkd", "logit_mse"), (33, 2500)):
        if backend in THINNED and divergence == "logit_mse":
            continue
        student, teacher, labels = batch(5, vocab)
        settings = {"temperature": 2, "divergence": divergence} | OPTIONS[option]
        settings = moved(settings, torch.get_default_device())
        judge_metrics(student, teacher, labels % 30, backend=backend, **settings)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_means_are_weighted_as_the_loss_and_rows_are_not(backend: str, reduction: str) -> None:
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.25, 1.0])
    for labelled in (True, False):
        student, teacher, labels = batch(6, 100)
        labels[3] = -100
        student[2] = teacher[3] = NAN  # of rows that drop out
        settings = {"backend": backend, "reduction": reduction, "weight": weight}
        got = judge_metrics(
            student, teacher.nan_to_num(0) if not labelled else teacher, labels_for("", labels, labelled), **settings
        )
        if reduction == "none":
            assert got["kl"].isnan().tolist() == [False, False, True, labelled, False, False]
    if reduction == "mean":
        normalised = measured(student, teacher.nan_to_num(0), backend=backend, weight=weight, normalizer=1000.0)
        assert normalised["kl"] == got["kl"], "which the normalizer is not for"


def test_means_of_many_rows(backend: str) -> None:
    for rows, vocab in ((257, 7), (65, 1000)):
        judge_metrics(*batch(rows, vocab), backend=backend, temperature=2)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_there_is_nothing_to_measure_of_is_nan(backend: str, reduction: str) -> None:
    student, teacher, labels = batch(4, 100)
    missing = {"hard", "accuracy"}, {"soft", "kl", "teacher_entropy", "agreement"}, set(FIELDS), set()
    ways = (
        ((teacher, None), {}),
        ((None, labels), {"alpha": 0}),
        ((teacher, torch.full_like(labels, -100)), {}),
        ((teacher, labels), {"alpha": 0, "hard_weight": 0}),
    )
    for (given, options), absent in zip(ways, missing, strict=True):
        got = measured(student, *given, reduction=reduction, backend=backend, **options)
        assert {field for field, value in got.items() if value.isnan().any()} == absent
        assert {field for field, value in got.items() if value.isnan().all()} == absent
    got = measured(student, teacher, labels, weight=torch.zeros(4), reduction=reduction, backend=backend)
    assert all(value.isnan().all() for value in got.values())


def test_no_rows_have_no_metrics(backend: str) -> None:
    student, teacher, labels = torch.empty(0, 33), torch.empty(0, 33), torch.empty(0, dtype=torch.int64)
    for reduction in REDUCTIONS:
        got = measured(student.requires_grad_(), teacher, labels, reduction=reduction, backend=backend)
        for value in got.values():
            assert value.shape == ((0,) if reduction == "none" else ())
            assert value.isnan().all()


def test_the_first_of_equal_maxima_is_the_argmax(backend: str) -> None:
    for vocab, dtype in combined(backend, (7, 100, 5000), (F32, BF16, F64)):
        first, last = 1, vocab - 1
        student = torch.zeros(4, vocab, dtype=dtype)
        teacher = student.clone()
        student[0, [first, last]] = teacher[0, [first, last]] = 3  # both have two: the first of both
        student[1, [first, last]] = teacher[1, last] = 3
        student[2, last] = teacher[2, [first, last]] = 3
        labels = torch.tensor([first, last, last, 0])  # and of the last all are equal
        got = measured(student, teacher, labels, reduction="none", backend=backend)
        assert got["agreement"].tolist() == [1, 0, 0, 1]
        assert got["accuracy"].tolist() == [1, 0, 1, 1]


def test_a_masked_class_changes_no_metric(backend: str) -> None:
    for vocab in (9, 3000) if backend not in THINNED else (100,):
        student, teacher, labels = batch(4, vocab)
        s, t = (torch.nn.functional.pad(x, (0, 3), value=-math.inf) for x in (student, teacher))
        got, want = (measured(a, b, labels, temperature=2, backend=backend) for a, b in ((s, t), (student, teacher)))
        for field in FIELDS:
            torch.testing.assert_close(got[field], want[field], rtol=1e-5, atol=1e-6)


def test_an_infinite_metric_is_no_reason_for_an_infinite_loss(backend: str) -> None:
    """reverse_kl's at p = 0 < q, where alpha is 0, and a masked label's, where h is 0."""
    for vocab in (9, 3000) if backend not in THINNED else (100,):
        student, teacher, labels = batch(4, vocab)
        t = teacher.clone()
        t[1, 2] = -math.inf
        leaf = student.clone().requires_grad_()
        settings = {"alpha": 0, "divergence": "reverse_kl", "return_metrics": True, "backend": backend}
        loss, metrics = kdfast.kd_loss(leaf, t, labels, **settings)
        loss.backward()
        assert loss.isfinite()
        assert leaf.grad.isfinite().all()
        assert metrics.soft == math.inf
        assert all(x.isfinite() for i, x in enumerate(metrics) if i)
        s = student.clone()
        s[1, labels[1]] = -math.inf
        t = teacher.clone()
        t[1, labels[1]] = -math.inf
        leaf = s.requires_grad_()
        loss, metrics = kdfast.kd_loss(leaf, t, labels, alpha=1, return_metrics=True, backend=backend)
        loss.backward()
        assert loss.isfinite()
        assert leaf.grad.isfinite().all()
        assert metrics.hard == math.inf
        assert all(x.isfinite() for i, x in enumerate(metrics) if i != 1)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_without_a_soft_term_they_have_a_temperature_that_the_gradient_has_not(backend: str, reduction: str) -> None:
    dtype = F64 if takes(backend, F64) else F32  # fp64: whose rows no Triton kernel keeps
    student, teacher, labels = batch(4, 100, dtype)
    settings = {"alpha": 0, "temperature": 2, "reduction": reduction, "backend": backend}
    for given in (teacher, None):
        leaves = [student.clone().requires_grad_() for _ in range(2)]
        kdfast.kd_loss(leaves[0], given, labels, return_metrics=True, **settings)[0].sum().backward()
        kdfast.kd_loss(leaves[1], given, labels, **settings).sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_a_masked_class_spoils_standardized_metrics_and_no_loss_without_a_soft_term(backend: str) -> None:
    student, teacher, labels = batch(4, 100)
    student[1, 2] = -math.inf
    labels[1] = 7
    for reduction in REDUCTIONS:
        settings = {"alpha": 0, "standardize": True, "reduction": reduction, "temperature": 2, "backend": backend}
        for given in (teacher, None):
            leaves = [student.clone().requires_grad_() for _ in range(2)]
            loss, metrics = kdfast.kd_loss(leaves[0], given, labels, return_metrics=True, **settings)
            want = kdfast.kd_loss(leaves[1], given, labels, **settings)
            assert metrics.student_entropy.isnan().any()
            for each in (loss, want):
                each.sum().backward()
            torch.testing.assert_close(loss, want)
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_a_bad_row_spoils_its_own_metrics_alone(backend: str) -> None:
    for vocab in (9, 3000) if backend not in THINNED else (100,):
        student, teacher, labels = batch(4, vocab)
        clean = measured(student, teacher, labels, reduction="none", backend=backend)
        student[1, 3], teacher[2] = NAN, -math.inf
        got = measured(student, teacher, labels, reduction="none", backend=backend)
        for field in ("soft", "hard", "kl", "student_entropy", "teacher_entropy"):
            assert torch.equal(got[field][[0, 3]], clean[field][[0, 3]])
            of_teacher, of_student = field in ("soft", "kl", "teacher_entropy"), field != "teacher_entropy"
            assert got[field][1].isnan() == of_student, field
            assert got[field][2].isnan() == of_teacher, field


# --- what they cost: nothing ------------------------------------------------------------------------------------


def _same_kernel(backend: str, reduction: str, dtype: torch.dtype, vocab: int) -> bool:
    """Metrics are summed along with the gradient's sums, row by row: not by columns, which short rows go by else, not
    by several threads, and where sums alone were wanted as if the gradient were too."""
    if backend == "cuda":
        return False  # metrics are the general kernel's
    return backend != "cpu" or (reduction == "mean" and dtype != F16 and 64 < vocab < 32_768)


@thinned_to(lambda dtype: dtype in (F32, F16))  # gradients made in forward, and in backward
@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=name)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_loss_and_gradient_are_those_without_metrics(backend: str, reduction: str, dtype: torch.dtype) -> None:
    one = backend in THINNED and (dtype, reduction) != (F32, "mean")
    for divergence in KINDS[:1] if one else divergences_for(backend):
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
                else:  # sums in another order; rounded to 16 bits, a number may fall to the other side
                    fine = 16 * torch.finfo(F64 if dtype == F64 else F32).eps * b.abs().max().item()
                    torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps, atol=fine)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_metrics_have_no_graph_and_need_none(backend: str, reduction: str) -> None:
    student, teacher, labels = batch(3, 100)
    settings = {"reduction": reduction, "return_metrics": True, "backend": backend}
    loss, metrics = kdfast.kd_loss(student.requires_grad_(), teacher, labels, **settings)
    assert loss.requires_grad
    assert not any(value.requires_grad for value in metrics)
    assert all(value.shape == loss.shape for value in metrics)
    (loss + metrics.kl).sum().backward()
    first, student.grad = student.grad, None
    kdfast.kd_loss(student, teacher, labels, reduction=reduction, backend=backend).sum().backward()
    torch.testing.assert_close(first, student.grad)  # a metric adds nothing
    with torch.no_grad():
        alone, same = kdfast.kd_loss(student, teacher, labels, **settings)
    # another kernel may add a mean's rows up in another order
    torch.testing.assert_close(alone, loss.detach())
    for a, b in zip(same, metrics, strict=True):
        torch.testing.assert_close(a, b)
