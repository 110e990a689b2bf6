"""Infinities, NaN and empty sums: each row gets exactly its limit, and no row gets another's."""

import math
from typing import Any

import pytest
import torch
from cases import BF16, DIVERGENCES, F16, F32, F64, KINDS, THINNED, batch, combined, name, thinned_to
from judge import judge, run
from torch import Tensor

INF, NAN = math.inf, math.nan
ROWS = 4
DTYPES = (F32, BF16, F16, F64)
WITH_INFINITY = DIVERGENCES[:-1]  # logit_mse has no limit at -inf: NaN
OVER_P = ("reverse_kl", "symmetric_kl")  # those that divide by p
OVER_Q = ("cross_entropy", "forward_kl", "symmetric_kl", "dkd")
VOCABS = (7, 5000)  # all in a tail; a row of more than one block, of which the rest is clean
pytestmark = [
    pytest.mark.parametrize("dtype", DTYPES, ids=name),
    # infinities meet the arithmetic, fp32's or fp64's: of 16 bits they are loaded like any other number
    thinned_to(
        lambda dtype, divergence="cross_entropy": (
            divergence == "cross_entropy" or dtype == F32 or (dtype == F64 and divergence in KINDS)
        )
    ),
]


of_one_dtype = thinned_to(lambda dtype: dtype == F32)  # where what is compiled for each is the same arithmetic


def by_row(student: Tensor, teacher: Any, labels: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """Row losses and each row's own gradient."""
    ones = torch.ones(student.shape[:-1], dtype=F64 if student.dtype == F64 else F32)
    return run(student, teacher, labels, ones, reduction="none", **settings)


def spoiled(x: Tensor, row: int, classes: Any, value: float) -> Tensor:
    x = x.clone()
    x[row, classes] = value
    return x


def both_ways(student: Tensor, teacher: Any, labels: Tensor | None = None, **settings: Any):
    """The same from the statistics, and from the kernel that makes loss and gradient in one."""
    loss, grad = by_row(student, teacher, labels, **settings)
    total, whole = run(student, teacher, labels, reduction="sum", **settings)
    assert torch.equal(whole.isnan(), grad.isnan())
    assert total.isnan() == loss.sum().isnan()
    assert total.isinf() == loss.sum().isinf()
    return loss, grad


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("divergence", WITH_INFINITY)
def test_a_class_that_both_mask_is_no_class(backend: str, dtype: torch.dtype, vocab: int, divergence: str) -> None:
    student, teacher, labels = batch(ROWS, vocab, dtype)
    masked = [1, 2, vocab - 1]
    labels = torch.where(torch.isin(labels, torch.tensor(masked)), 0, labels)
    left = [i for i in range(vocab) if i not in masked]
    settings = {"backend": backend, "divergence": divergence, "temperature": 2}
    s, t = student.clone(), teacher.clone()
    s[:, masked] = t[:, masked] = -INF
    loss, grad = both_ways(s, t, labels, **settings)
    assert grad[:, masked].eq(0).all()
    # what is left is the loss over the classes left: as close as two sums of other orders are in the judge's truth
    where = torch.tensor([left.index(int(y)) for y in labels])
    want, want_grad = by_row(
        student[:, left].double(), teacher[:, left].double(), where, **settings | {"backend": "reference"}
    )
    fine = 200 * torch.finfo(F64 if dtype == F64 else F32).eps  # T^2 * (8 + log V + a few logs), as judge.py has it
    torch.testing.assert_close(loss.double(), want, rtol=fine, atol=fine)
    coarse = torch.finfo(dtype).eps
    got = grad[:, left].double()
    if divergence == "tvd":  # whose gradient jumps where p is q
        p, q = (torch.softmax(x[:, left].double() / 2, -1) for x in (teacher, student))
        got = torch.where((p - q).abs() <= fine * q, want_grad, got)
    torch.testing.assert_close(got, want_grad, rtol=coarse, atol=fine + (6e-8 if dtype == F16 else 0))


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("divergence", WITH_INFINITY)
def test_a_class_that_the_teacher_masks(backend: str, dtype: torch.dtype, vocab: int, divergence: str) -> None:
    student, teacher, labels = batch(ROWS, vocab, dtype)
    teacher = spoiled(teacher, 1, 2, -INF)
    settings = {"backend": backend, "divergence": divergence, "temperature": 2}
    loss, grad = both_ways(student, teacher, labels, **settings)
    others = [0, 2, 3]
    assert loss[others].isfinite().all()
    assert grad[others].isfinite().all()
    if divergence in OVER_P:  # p = 0 < q: +inf, and nothing finite in that row's gradient
        assert loss[1] == INF
        assert not grad[1].isfinite().any()
    else:
        judge(student, teacher, labels, **settings)  # p = 0 adds 0
        assert grad[1].isfinite().all()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("divergence", WITH_INFINITY)
def test_a_class_that_the_student_masks(backend: str, dtype: torch.dtype, vocab: int, divergence: str) -> None:
    student, teacher, labels = batch(ROWS, vocab, dtype)
    student = spoiled(student, 1, 2, -INF)
    labels[1] = 0
    settings = {"backend": backend, "divergence": divergence, "temperature": 2}
    loss, grad = both_ways(student, teacher, labels, **settings)
    assert grad.isfinite().all()
    assert loss[[0, 2, 3]].isfinite().all()
    if divergence not in OVER_Q:  # q = 0 adds no infinity
        judge(student, teacher, labels, **settings)
        assert loss[1].isfinite()
        assert grad[1, 2] == 0
    else:  # q = 0 < p
        assert loss[1] == INF
        # alpha * T * (q - p), as judge.py has it: a rounding of the dtype, and of the arithmetic (8 + log V) eps
        p = torch.softmax(teacher[1].double() / 2, -1)
        p = p / (1 - p[0]) if divergence == "dkd" else p  # among those that are not the label's
        fine = 20 * torch.finfo(F64 if dtype == F64 else F32).eps
        close = {"rtol": torch.finfo(dtype).eps + fine, "atol": 6e-8 if dtype == F16 else 0}  # fp16's smallest number
        share = {"symmetric_kl": 0.5, "dkd": 8}.get(divergence, 1)  # forward_kl's
        torch.testing.assert_close(grad[1, 2].double(), -0.9 * 2 * share * p[2], **close)
        _, want = by_row(student.double(), teacher.double(), labels, **settings | {"backend": "reference"})
        torch.testing.assert_close(grad[1].double(), want[1], **close | {"atol": fine + close["atol"]})


@of_one_dtype
def test_a_label_that_the_student_masks(backend: str, dtype: torch.dtype) -> None:
    for vocab, divergence in combined(backend, VOCABS, WITH_INFINITY):
        student, teacher, labels = batch(ROWS, vocab, dtype)
        student, teacher = spoiled(student, 1, int(labels[1]), -INF), spoiled(teacher, 1, int(labels[1]), -INF)
        loss, grad = both_ways(student, teacher, labels, backend=backend, divergence=divergence)
        assert loss[1] == INF
        assert loss[[0, 2, 3]].isfinite().all()
        assert grad.isfinite().all()
    for vocab in VOCABS:
        student, teacher, labels = batch(ROWS, vocab, dtype)
        student, teacher = spoiled(student, 1, int(labels[1]), -INF), spoiled(teacher, 1, int(labels[1]), -INF)
        loss, grad = both_ways(student, None, labels, backend=backend, alpha=0)
        assert loss[1] == INF
        assert grad[1, labels[1]] == -1  # q1 - 1, of q1 = 0
        # h = 0 never meets 0 * inf
        loss, grad = both_ways(student, teacher, labels, backend=backend, alpha=1)
        assert loss.isfinite().all()
        assert grad.isfinite().all()


@of_one_dtype
def test_dkd_of_a_label_that_is_masked(backend: str, dtype: torch.dtype) -> None:
    for vocab in VOCABS:
        student, teacher, labels = batch(ROWS, vocab, dtype)
        label = int(labels[1])
        settings = {"backend": backend, "divergence": "dkd", "temperature": 2, "alpha": 1}
        masked = spoiled(student, 1, label, -INF), spoiled(teacher, 1, label, -INF)
        # in both it is no class: the others are all there is
        loss, grad = both_ways(*masked, labels, **settings)
        judge(*masked, labels, **settings)
        assert loss.isfinite().all()
        assert grad[1, label] == 0
        # by the teacher: p_y = 0 adds nothing
        loss, grad = both_ways(student, masked[1], labels, **settings)
        judge(student, masked[1], labels, **settings)
        assert loss.isfinite().all()
        # by the student: q_y = 0 < p_y
        loss, grad = both_ways(masked[0], teacher, labels, **settings)
        assert loss[1] == INF
        assert grad.isfinite().all()
        assert grad[1, label] < 0
        # of the target class alone T * (q_y - p_y), of the others nothing
        _, grad = both_ways(masked[0], teacher, labels, dkd_weights=(1.0, 0.0), **settings)
        p = torch.softmax(teacher[1].double() / 2, -1)[label]
        coarse = {"rtol": torch.finfo(dtype).eps, "atol": 20 * torch.finfo(F64 if dtype == F64 else F32).eps}
        torch.testing.assert_close(grad[1, label].double(), -2 * p, **coarse)
        loss, grad = both_ways(masked[0], teacher, labels, dkd_weights=(0.0, 1.0), **settings)
        assert loss.isfinite().all()  # a weight of 0 meets no infinity
        assert grad[1, label] == 0


@of_one_dtype
def test_dkd_where_no_class_is_left_beside_the_label(backend: str, dtype: torch.dtype) -> None:
    for vocab in VOCABS:
        student, teacher, labels = batch(ROWS, vocab, dtype)
        settings = {"backend": backend, "divergence": "dkd", "temperature": 2, "alpha": 1}
        alone = [torch.full_like(x, -INF) for x in (student, teacher)]
        for x, y in zip(alone, (student, teacher), strict=True):
            x.scatter_(-1, labels.unsqueeze(-1), y.gather(-1, labels.unsqueeze(-1)))
        loss, grad = both_ways(*alone, labels, **settings)
        assert loss.eq(0).all()
        assert grad.eq(0).all()
        # the teacher's alone: log(1 / q_y), and no others to divide among; p_y is 1, so gradients are T * (q - p)
        loss, grad = both_ways(student, alone[1], labels, **settings)
        truth = settings | {"divergence": "forward_kl", "backend": "reference"}
        want, want_grad = by_row(student.double(), alone[1].double(), labels, **truth)
        coarse = torch.finfo(dtype).eps
        fine = 200 * torch.finfo(F64 if dtype == F64 else F32).eps
        torch.testing.assert_close(loss.double(), want, rtol=fine, atol=fine)
        torch.testing.assert_close(grad.double(), want_grad, rtol=coarse, atol=fine + (6e-8 if dtype == F16 else 0))
        # the student's: q of the others is 0 < p
        loss, grad = both_ways(alone[0], teacher, labels, **settings)
        assert loss.eq(INF).all()
        assert grad.isfinite().all()
    student, teacher, labels = batch(ROWS, 1, dtype)
    loss, grad = both_ways(student, teacher, labels, backend=backend, divergence="dkd")
    assert loss.eq(0).all()
    assert grad.eq(0).all()


@of_one_dtype
def test_dkds_others_do_not_underflow_with_their_label(backend: str, dtype: torch.dtype) -> None:
    """Where the label's logit is far above all others their share is 0 in fp32, and their distribution is none the less
    what it is."""
    for vocab in VOCABS:
        student, teacher, labels = batch(ROWS, vocab, dtype)
        index = labels.unsqueeze(-1)
        settings = {"backend": backend, "divergence": "dkd", "dkd_weights": (0.0, 1.0), "alpha": 1}
        for s, t in ((500, 500), (-500, 500), (500, -500), (0, 500), (-500, 0)):  # of the label, to both sides
            s = student.scatter(-1, index, s)
            t = teacher.scatter(-1, index, t)
            judge(s, t, labels, **settings)
            if vocab == 7:
                _, grad = by_row(s, t, labels, **settings)
                assert grad.abs().amax(-1).min() > 0.01


@of_one_dtype
def test_a_softcap_keeps_a_mask(backend: str, dtype: torch.dtype) -> None:
    divergences = ("cross_entropy", "jsd", "dkd") if backend not in THINNED else ("jsd", "dkd")
    for vocab, divergence in combined(backend, VOCABS, divergences):
        student, teacher, labels = batch(ROWS, vocab, dtype)
        labels = labels % 2  # not of the masked
        left = [i for i in range(vocab) if i not in (2, vocab - 1)]
        s, t = student.clone(), teacher.clone()
        s[:, [2, vocab - 1]] = t[:, [2, vocab - 1]] = -INF
        settings = {"backend": backend, "divergence": divergence, "softcap": 8.0, "teacher_softcap": 5.0, "z_loss": 0.1}
        loss, grad = both_ways(s, t, labels, **settings)
        assert grad[:, [2, vocab - 1]].eq(0).all()
        judge(s, t, labels, **settings)
        rest = student[:, left].double(), teacher[:, left].double()
        want, want_grad = by_row(*rest, labels, **settings | {"backend": "reference"})
        fine = 200 * torch.finfo(F64 if dtype == F64 else F32).eps
        torch.testing.assert_close(loss.double(), want, rtol=fine, atol=fine)
        coarse = {"rtol": torch.finfo(dtype).eps, "atol": fine + (6e-8 if dtype == F16 else 0)}
        torch.testing.assert_close(grad[:, left].double(), want_grad, **coarse)


@of_one_dtype
def test_smoothing_gives_a_masked_class_its_share(backend: str, dtype: torch.dtype) -> None:
    for vocab in VOCABS:
        student, _, labels = batch(ROWS, vocab, dtype)
        labels[1] = 0
        s = spoiled(student, 1, 2, -INF)
        settings = {"backend": backend, "alpha": 0, "label_smoothing": 0.1}
        loss, grad = both_ways(s, None, labels, **settings)
        want = torch.nn.functional.cross_entropy(s.double(), labels, label_smoothing=0.1, reduction="none")
        assert loss[1] == want[1] == INF
        assert loss[[0, 2, 3]].isfinite().all()
        # q1 = 0, and the class's share of the label
        fine = {"rtol": torch.finfo(dtype).eps, "atol": 6e-8 if dtype == F16 else 1e-12}
        torch.testing.assert_close(grad[1, 2].double(), torch.tensor(-0.1 / vocab, dtype=F64), **fine)
        assert grad.isfinite().all()


@of_one_dtype
def test_z_loss_of_nothing_is_nan_in_its_row(backend: str, dtype: torch.dtype) -> None:
    for vocab in VOCABS:
        student, _, _ = batch(ROWS, vocab, dtype)
        s = spoiled(spoiled(student, 1, slice(None), -INF), 2, 3, -INF)
        settings = {"backend": backend, "alpha": 0, "hard_weight": 0, "z_loss": 1.0}
        loss, grad = both_ways(s, None, **settings)
        assert loss.isnan().tolist() == [False, True, False, False]
        assert grad[1].isnan().all()
        assert grad[[0, 2, 3]].isfinite().all()
        assert grad[2, 3] == 0  # one masked class is none


OPTIONS = {
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 10.0, "teacher_softcap": 10.0},
    "standardize": {"standardize": True},
    "all": {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 10.0, "teacher_softcap": 10.0, "standardize": True},
}


@thinned_to(lambda dtype, option: dtype == F32 and option == "all")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("spoiler", ("student NaN", "student all -inf", "teacher NaN", "both +inf"))
def test_a_bad_row_spoils_itself_alone_under_every_option(
    backend: str, dtype: torch.dtype, spoiler: str, option: str
) -> None:
    of_student, of_teacher, where = SPOILERS[spoiler]
    divergences = ("cross_entropy", "jsd", "dkd", "logit_mse") if backend not in THINNED else ("cross_entropy", "dkd")
    for vocab, divergence in combined(backend, VOCABS, divergences):
        student, teacher, labels = batch(ROWS, vocab, dtype)
        settings = {"backend": backend, "divergence": divergence, "temperature": 2} | OPTIONS[option]
        clean = by_row(student, teacher, labels, **settings)
        s = student if of_student is None else spoiled(student, 1, where, of_student)
        t = teacher if of_teacher is None else spoiled(teacher, 1, where, of_teacher)
        if "softcap" in OPTIONS[option] and spoiler == "both +inf":
            continue  # capped, it is the cap
        found = both_ways(s, t, labels, **settings)
        others = [0, 2, 3]
        assert found[0][1].isnan()
        # a cap gives a masked class a gradient of 0, and here all are
        capped = "softcap" in settings and of_student == -INF
        assert (found[1][1].isnan() | (found[1][1].eq(0) if capped else False)).all()
        for got, want in zip(found, clean, strict=True):
            assert torch.equal(got[others], want[others])


@of_one_dtype
def test_standardised_rows_have_no_limit(backend: str, dtype: torch.dtype) -> None:
    for vocab in VOCABS:
        student, teacher, labels = batch(ROWS, vocab, dtype)
        labels[1] = 0
        settings = {"backend": backend, "standardize": True}
        for s, t in ((spoiled(student, 1, 2, -INF), teacher), (student, spoiled(teacher, 1, 2, -INF))):
            loss, grad = both_ways(s, t, labels, **settings)
            assert loss.isnan().tolist() == [False, True, False, False]
            assert grad[1].isnan().all()
            assert grad[[0, 2, 3]].isfinite().all()


SPOILERS = {
    "student NaN": (NAN, None, 3),
    "student +inf": (INF, None, 3),
    "student all -inf": (-INF, None, slice(None)),
    "teacher NaN": (None, NAN, 3),
    "teacher +inf": (None, INF, 3),
    "teacher all -inf": (None, -INF, slice(None)),
    "both NaN": (NAN, NAN, 3),
    "both +inf": (INF, INF, 3),
    "both all -inf": (-INF, -INF, slice(None)),
}


@thinned_to(lambda dtype, spoiler: dtype == F32 or spoiler == "both NaN")
@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bad_row_spoils_itself_alone(backend: str, dtype: torch.dtype, spoiler: str, divergence: str) -> None:
    of_student, of_teacher, where = SPOILERS[spoiler]
    spots = (where, -1) if isinstance(where, int) else (where,)  # in the first block, and in the last
    for vocab, spot in combined(backend, VOCABS, spots, turn=divergence in DIVERGENCES[:2]):
        student, teacher, labels = batch(ROWS, vocab, dtype)
        # Triton compiles for each whole temperature, and has 2 already
        settings = {"backend": backend, "divergence": divergence, "temperature": 2 if backend in THINNED else 3}
        clean = [by_row(student, teacher, labels, **settings), run(student, teacher, labels, **settings)]
        s = student if of_student is None else spoiled(student, 1, spot, of_student)
        t = teacher if of_teacher is None else spoiled(teacher, 1, spot, of_teacher)
        found = [by_row(s, t, labels, **settings), run(s, t, labels, **settings)]
        others = [0, 2, 3]
        assert found[0][0][1].isnan()
        assert torch.equal(found[0][0][others], clean[0][0][others])
        assert found[1][0].isnan()  # the mean
        for (_, grad), (_, want) in zip(found, clean, strict=True):
            assert grad[1].isnan().all()
            assert torch.equal(grad[others], want[others])


@pytest.mark.parametrize("value", (-INF, NAN, INF))
def test_logit_mse_has_no_limit(backend: str, dtype: torch.dtype, value: float) -> None:
    for vocab in VOCABS:
        student, teacher, labels = batch(ROWS, vocab, dtype)
        labels[1] = 0
        for s, t in (
            (spoiled(student, 1, 2, value), teacher),
            (student, spoiled(teacher, 1, 2, value)),
            (spoiled(student, 1, 2, value), spoiled(teacher, 1, 2, value)),
        ):
            for y in (None, labels):
                loss, grad = both_ways(s, t, y, backend=backend, divergence="logit_mse")
                assert loss[1].isnan()
                assert grad[1].isnan().all()
                assert loss[[0, 2, 3]].isfinite().all()
                assert grad[[0, 2, 3]].isfinite().all()
