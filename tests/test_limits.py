"""Infinities, NaN and empty sums: each row gets exactly its limit, and no row gets another's."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import BF16, DIVERGENCES, F16, F32, F64, ON_GPU, arithmetics, batch
from judge import judge, run
from torch import Tensor

INF, NAN = math.inf, math.nan
ROWS = 4
VOCABS = (7, 5000)  # all in a tail; a row of more than one block, of which the rest is clean
WITH_INFINITY = DIVERGENCES[:-1]  # logit_mse has no limit at -inf: NaN
OVER_P = ("reverse_kl", "symmetric_kl")  # those that divide by p
OVER_Q = ("cross_entropy", "forward_kl", "symmetric_kl", "dkd")
CLEAN, BOTH, OF_TEACHER, OF_STUDENT = range(ROWS)  # rows, by who masks classes in them


def shapes(backend: str, full: bool) -> Iterator[tuple[int, torch.dtype]]:
    """(vocab, dtype): infinities meet the arithmetic, fp32's or fp64's; those of 16 bits are loaded like any number."""
    for dtype in arithmetics(backend) if full or backend not in ON_GPU else (F32,):
        for vocab in VOCABS if dtype == F32 or backend == "cpu" or full else VOCABS[:1]:
            yield vocab, dtype
    if backend == "cpu" or full:
        yield VOCABS[0], BF16
        yield VOCABS[1], F16


def by_row(student: Tensor, teacher: Any, labels: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """Row losses and each row's own gradient."""
    ones = torch.ones(student.shape[:-1], dtype=F64 if student.dtype == F64 else F32)
    return run(student, teacher, labels, ones, reduction="none", **settings)


def truth_by_row(student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    return by_row(student.double(), teacher.double(), labels, **settings | {"backend": "reference"})


def spoiled(x: Tensor, row: int, classes: Any, value: float) -> Tensor:
    x = x.clone()
    x[row, classes] = value
    return x


def both_ways(student: Tensor, teacher: Any, labels: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """The same from the statistics, and from the kernel that makes loss and gradient in one."""
    loss, grad = by_row(student, teacher, labels, **settings)
    total, whole = run(student, teacher, labels, reduction="sum", **settings)
    assert torch.equal(whole.isnan(), grad.isnan())
    assert total.isnan() == loss.sum().isnan()
    assert total.isinf() == loss.sum().isinf()
    return loss, grad


def fine(dtype: torch.dtype) -> float:
    """T^2 * (8 + log V + a few logs) roundings of the arithmetic, as judge.py has it."""
    return 200 * torch.finfo(F64 if dtype == F64 else F32).eps


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """But for the arithmetic's error and the dtype's rounding, fp16's to multiples of its smallest number."""
    rounding = {"rtol": torch.finfo(dtype).eps, "atol": fine(dtype) + (6e-8 if dtype == F16 else 0)}
    torch.testing.assert_close(got.double(), want, **rounding)


@pytest.mark.parametrize("divergence", WITH_INFINITY)
def test_a_masked_class_has_its_limit(backend: str, divergence: str, full: bool) -> None:
    settings: dict[str, Any] = {"backend": backend, "divergence": divergence, "temperature": 2}
    for vocab, dtype in shapes(backend, full):
        student, teacher, labels = batch(ROWS, vocab, dtype)
        # a whole block, or some classes; and the last one
        masked = [*range(2048), vocab - 1] if vocab > 2048 else [1, 2, vocab - 1]
        labels = torch.where(torch.isin(labels, torch.tensor(masked)), 3 if vocab < 2048 else 2050, labels)
        labels[OF_STUDENT] = 0
        s, t = student.clone(), teacher.clone()
        s[BOTH, masked] = t[BOTH, masked] = -INF
        t[OF_TEACHER, 2] = s[OF_STUDENT, 2] = -INF
        loss, grad = both_ways(s, t, labels, **settings)
        judge(*(x[[CLEAN, BOTH]] for x in (s, t, labels)), **settings)

        # masked by both it is no class: what is left is the loss over the classes left
        assert grad[BOTH, masked].eq(0).all()
        left = [i for i in range(vocab) if i not in masked]
        row, rest = slice(BOTH, BOTH + 1), (x[BOTH : BOTH + 1, left] for x in (student, teacher))
        want, want_grad = truth_by_row(*rest, torch.tensor([left.index(int(labels[BOTH]))]), **settings)
        torch.testing.assert_close(loss[row].double(), want, rtol=fine(dtype), atol=fine(dtype))
        got = grad[row, left].double()
        if divergence == "tvd":  # whose gradient jumps where p is q
            p, q = (torch.softmax(x[row, left].double() / 2, -1) for x in (teacher, student))
            got = torch.where((p - q).abs() <= fine(dtype) * q, want_grad, got)
        assert_close(got, want_grad, dtype)

        if divergence in OVER_P:  # p = 0 < q: +inf, and nothing finite in that row's gradient
            assert loss[OF_TEACHER] == INF
            assert not grad[OF_TEACHER].isfinite().any()
        else:  # p = 0 adds 0
            judge(*(x[[CLEAN, OF_TEACHER]] for x in (s, t, labels)), **settings)
            assert grad[OF_TEACHER].isfinite().all()

        assert grad[OF_STUDENT].isfinite().all()
        if divergence in OVER_Q:  # q = 0 < p: +inf, and the gradient is alpha * T * (q - p)
            assert loss[OF_STUDENT] == INF
            p = torch.softmax(teacher[OF_STUDENT].double() / 2, -1)
            p = p / (1 - p[0]) if divergence == "dkd" else p  # among those that are not the label's
            share = {"symmetric_kl": 0.5, "dkd": 8}.get(divergence, 1)  # forward_kl's
            coarse = torch.finfo(dtype).eps + fine(dtype) / 10
            close = {"rtol": coarse, "atol": 6e-8 if dtype == F16 else 0}
            torch.testing.assert_close(grad[OF_STUDENT, 2].double(), -0.9 * 2 * share * p[2], **close)
            assert_close(grad[OF_STUDENT], truth_by_row(s, t, labels, **settings)[1][OF_STUDENT], dtype)
        else:  # q = 0 adds no infinity
            judge(*(x[[CLEAN, OF_STUDENT]] for x in (s, t, labels)), **settings)
            assert grad[OF_STUDENT, 2] == 0


@pytest.mark.parametrize(
    ("divergence", "target", "vocab"),
    [("reverse_kl", "probs", 7), ("reverse_kl", "log_probs", 5000), ("forward_kl", "probs", 7), ("jsd", "probs", 5000)],
)
def test_a_given_probability_of_0_is_a_masked_class(backend: str, divergence: str, target: str, vocab: int) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    labels[:] = 0
    p = torch.softmax(teacher / 2, -1)
    p[1, 2] = p[2, vocab - 1] = 0
    given = p if target == "probs" else p.log()
    settings = {"backend": backend, "divergence": divergence, "temperature": 2, "target": target}
    if divergence in OVER_P:
        loss, grad = both_ways(student, given, labels, **settings)
        assert loss.isinf().tolist() == [False, True, True, False]
        assert grad[[0, 3]].isfinite().all()
    else:
        judge(student, given, labels, **settings)


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
    "student NaN at the end": (NAN, None, -1),  # in the last block
    "teacher NaN at the end": (None, NAN, -1),
}
SPOILED = range(1, 2 * len(SPOILERS), 2)  # every second row of a batch; those between and around are clean


def batch_with_spoilers(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A clean student, a clean teacher, labels, and both with a bad row each in which SPOILERS say so."""
    student, teacher, labels = batch(2 * len(SPOILERS) + 1, vocab, dtype)
    s, t = student.clone(), teacher.clone()
    for row, (of_student, of_teacher, where) in zip(SPOILED, SPOILERS.values(), strict=True):
        if of_student is not None:
            s[row, where] = of_student
        if of_teacher is not None:
            t[row, where] = of_teacher
    return student, teacher, labels, s, t


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_bad_row_spoils_itself_alone(backend: str, divergence: str, full: bool) -> None:
    settings: dict[str, Any] = {"backend": backend, "divergence": divergence, "temperature": 2}
    for vocab, dtype in shapes(backend, full):
        student, teacher, labels, s, t = batch_with_spoilers(vocab, dtype)
        clean = [by_row(student, teacher, labels, **settings), run(student, teacher, labels, **settings)]
        found = [by_row(s, t, labels, **settings), run(s, t, labels, **settings)]
        assert found[0][0][1::2].isnan().all()
        assert torch.equal(found[0][0][::2], clean[0][0][::2])
        assert found[1][0].isnan()  # the mean
        for (_, grad), (_, want) in zip(found, clean, strict=True):
            assert grad[1::2].isnan().all()
            assert torch.equal(grad[::2], want[::2])


OPTIONS = {
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 10.0, "teacher_softcap": 10.0},
    "standardize": {"standardize": True},
    "all": {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 10.0, "teacher_softcap": 10.0, "standardize": True},
}


def test_a_bad_row_spoils_itself_alone_under_every_option(backend: str, full: bool) -> None:
    # each option compiles kernels of its own, and all together have the code of each
    for option in OPTIONS if full or backend not in ON_GPU else ("all",):
        spoil_rows(backend, option, full)


def spoil_rows(backend: str, option: str, full: bool) -> None:
    for divergence in ("cross_entropy", "jsd", "dkd", "logit_mse") if full or backend == "cpu" else ("dkd",):
        for vocab in VOCABS:
            student, teacher, labels, s, t = batch_with_spoilers(vocab, F32)
            settings = {"backend": backend, "divergence": divergence, "temperature": 2} | OPTIONS[option]
            clean, found = by_row(student, teacher, labels, **settings), both_ways(s, t, labels, **settings)
            for row, (spoiler, (of_student, _, _)) in zip(SPOILED, SPOILERS.items(), strict=True):
                if "softcap" in settings and "+inf" in spoiler:
                    continue  # capped, it is the cap
                assert found[0][row].isnan(), spoiler
                # a cap gives a masked class a gradient of 0, and in such a row all are masked
                capped = "softcap" in settings and of_student == -INF
                assert (found[1][row].isnan() | (found[1][row].eq(0) if capped else False)).all(), spoiler
            for got, want in zip(found, clean, strict=True):
                assert torch.equal(got[::2], want[::2])


@pytest.mark.parametrize("value", (-INF, NAN, INF))
def test_logit_mse_has_no_limit(backend: str, value: float) -> None:
    for vocab in VOCABS:
        student, teacher, labels = batch(7, vocab)
        labels[:] = 0
        s, t = student.clone(), teacher.clone()
        s[1, 2] = t[3, 2] = s[5, 2] = t[5, 2] = value
        for y in (None, labels):
            loss, grad = both_ways(s, t, y, backend=backend, divergence="logit_mse")
            assert loss[1::2].isnan().all()
            assert grad[1::2].isnan().all()
            assert loss[::2].isfinite().all()
            assert grad[::2].isfinite().all()


def test_a_label_that_the_student_masks(backend: str) -> None:
    for vocab in VOCABS:
        student, teacher, labels = batch(ROWS, vocab)
        student, teacher = spoiled(student, 1, int(labels[1]), -INF), spoiled(teacher, 1, int(labels[1]), -INF)
        for divergence in ("cross_entropy", "reverse_kl", "jsd", "dkd"):
            loss, grad = both_ways(student, teacher, labels, backend=backend, divergence=divergence, temperature=2)
            assert loss[1] == INF
            assert loss[[0, 2, 3]].isfinite().all()
            assert grad.isfinite().all()
        loss, grad = both_ways(student, None, labels, backend=backend, alpha=0)
        assert loss[1] == INF
        assert grad[1, labels[1]] == -1  # q1 - 1, of q1 = 0
        # h = 0 never meets 0 * inf
        loss, grad = both_ways(student, teacher, labels, backend=backend, alpha=1, temperature=2)
        assert loss.isfinite().all()
        assert grad.isfinite().all()


def test_dkd_of_a_label_that_is_masked(backend: str) -> None:
    for vocab in VOCABS:
        student, teacher, labels = batch(ROWS, vocab)
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
        torch.testing.assert_close(grad[1, label].double(), -2 * p, rtol=fine(F32) / 10, atol=fine(F32) / 10)
        loss, grad = both_ways(masked[0], teacher, labels, dkd_weights=(0.0, 1.0), **settings)
        assert loss.isfinite().all()  # a weight of 0 meets no infinity
        assert grad[1, label] == 0


def test_dkd_where_no_class_is_left_beside_the_label(backend: str) -> None:
    for vocab in VOCABS:
        student, teacher, labels = batch(ROWS, vocab)
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
        assert_close(loss, want, F32)
        assert_close(grad, want_grad, F32)
        # the student's: q of the others is 0 < p
        loss, grad = both_ways(alone[0], teacher, labels, **settings)
        assert loss.eq(INF).all()
        assert grad.isfinite().all()
    student, teacher, labels = batch(ROWS, 1)
    loss, grad = both_ways(student, teacher, labels, backend=backend, divergence="dkd")
    assert loss.eq(0).all()
    assert grad.eq(0).all()


def test_dkds_others_do_not_underflow_with_their_label(backend: str) -> None:
    """Where the label's logit is far above all others their share is 0 in fp32, and their distribution is none the less
    what it is."""
    for vocab in VOCABS:
        student, teacher, labels = batch(ROWS, vocab)
        index = labels.unsqueeze(-1)
        settings = {"backend": backend, "divergence": "dkd", "dkd_weights": (0.0, 1.0), "alpha": 1}
        for s, t in ((500, 500), (-500, 500), (500, -500), (0, 500), (-500, 0)):  # of the label, to both sides
            s = student.scatter(-1, index, s)
            t = teacher.scatter(-1, index, t)
            judge(s, t, labels, **settings)
            if vocab == 7:
                _, grad = by_row(s, t, labels, **settings)
                assert grad.abs().amax(-1).min() > 0.01


def test_a_softcap_keeps_a_mask(backend: str) -> None:
    for vocab, divergence in ((7, "jsd"), (5000, "dkd")):
        student, teacher, labels = batch(ROWS, vocab)
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
        torch.testing.assert_close(loss.double(), want, rtol=fine(F32), atol=fine(F32))
        assert_close(grad[:, left], want_grad, F32)


def test_smoothing_gives_a_masked_class_its_share(backend: str) -> None:
    for vocab in VOCABS:
        student, _, labels = batch(ROWS, vocab)
        labels[1] = 0
        s = spoiled(student, 1, 2, -INF)
        settings = {"backend": backend, "alpha": 0, "label_smoothing": 0.1}
        loss, grad = both_ways(s, None, labels, **settings)
        want = torch.nn.functional.cross_entropy(s.double(), labels, label_smoothing=0.1, reduction="none")
        assert loss[1] == want[1] == INF
        assert loss[[0, 2, 3]].isfinite().all()
        # q1 = 0, and the class's share of the label
        torch.testing.assert_close(grad[1, 2].double(), torch.tensor(-0.1 / vocab, dtype=F64), rtol=1e-7, atol=1e-12)
        assert grad.isfinite().all()


def test_z_loss_of_nothing_is_nan_in_its_row(backend: str) -> None:
    for vocab in VOCABS:
        student, _, _ = batch(ROWS, vocab)
        s = spoiled(spoiled(student, 1, slice(None), -INF), 2, 3, -INF)
        settings = {"backend": backend, "alpha": 0, "hard_weight": 0, "z_loss": 1.0}
        loss, grad = both_ways(s, None, **settings)
        assert loss.isnan().tolist() == [False, True, False, False]
        assert grad[1].isnan().all()
        assert grad[[0, 2, 3]].isfinite().all()
        assert grad[2, 3] == 0  # one masked class is none


def test_standardised_rows_have_no_limit(backend: str) -> None:
    for vocab in VOCABS:
        student, teacher, labels = batch(ROWS, vocab)
        labels[1] = 0
        settings = {"backend": backend, "standardize": True}
        for s, t in ((spoiled(student, 1, 2, -INF), teacher), (student, spoiled(teacher, 1, 2, -INF))):
            loss, grad = both_ways(s, t, labels, **settings)
            assert loss.isnan().tolist() == [False, True, False, False]
            assert grad[1].isnan().all()
            assert grad[[0, 2, 3]].isfinite().all()
