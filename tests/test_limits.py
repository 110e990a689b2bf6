"""Infinities, NaN and empty sums: each row gets exactly its limit, and no row gets another's.

What is no finite number in the reference is none, and the same, in each kernel: judge.py's `limits`.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import BF16, DIVERGENCES, F16, F32, ON_GPU, arithmetics, batch, divergences_for
from judge import Truth, judge, run
from torch import Tensor

INF, NAN = math.inf, math.nan
ROWS = 4
VOCABS = (7, 5000)  # all in a tail; a row of more than one block, of which the rest is clean
each_vocab = pytest.mark.parametrize("vocab", VOCABS)
WITH_INFINITY = DIVERGENCES[:-1]  # logit_mse has no limit at -inf: NaN
OVER_P = ("reverse_kl", "symmetric_kl")  # those that divide by p
OVER_Q = ("cross_entropy", "forward_kl", "symmetric_kl", "dkd")
CLEAN, BOTH, OF_TEACHER, OF_STUDENT = range(ROWS)  # rows, by who masks classes in them
LEAST = {"rtol": 0, "atol": 1e-13}  # of the reference in fp64


def shapes(backend: str, full: bool) -> Iterator[tuple[int, torch.dtype]]:
    """(vocab, dtype): infinities meet the arithmetic, fp32's or fp64's; those of 16 bits are loaded like any number."""
    for dtype in arithmetics(backend) if full or backend not in ON_GPU else (F32,):
        for vocab in VOCABS if dtype == F32 or backend == "cpu" or full else VOCABS[:1]:
            yield vocab, dtype
    if backend == "cpu" or full:
        yield VOCABS[0], BF16
        yield VOCABS[1], F16


def spoiled(x: Tensor, row: int, classes: Any, value: float = -INF) -> Tensor:
    x = x.clone()
    x[row, classes] = value
    return x


def limits_of(student: Tensor, teacher: Any, labels: Tensor | None = None, **settings: Any) -> Truth:
    """The truth, which each kernel has been held to."""
    return judge(student, teacher, labels, limits=True, **settings)


def rows_of(student: Tensor, teacher: Any, labels: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    return run(student, teacher, labels, reduction="none", **settings)


def both_ways(student: Tensor, teacher: Any, labels: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """The same from the statistics, and from the kernel that makes loss and gradient in one."""
    loss, grad = rows_of(student, teacher, labels, **settings)
    total, whole = run(student, teacher, labels, reduction="sum", **settings)
    torch.testing.assert_close(total, loss.sum(), equal_nan=True)
    torch.testing.assert_close(whole, grad, equal_nan=True)
    return loss, grad


@pytest.mark.parametrize("divergence", WITH_INFINITY)
def test_a_masked_class_has_its_limit(backend: str, divergence: str, full: bool) -> None:
    settings: dict[str, Any] = {"backend": backend, "divergence": divergence, "temperature": 2}
    for vocab, dtype in shapes(backend, full):
        student, teacher, labels = batch(ROWS, vocab, dtype)
        # a whole block, or some classes; and the last one
        masked = [*range(2048), vocab - 1] if vocab > 2048 else [1, 2, vocab - 1]
        labels = torch.where(torch.isin(labels, torch.tensor(masked)), 3 if vocab < 2048 else 2050, labels)
        labels[OF_STUDENT] = 0
        s, t = spoiled(student, BOTH, masked), spoiled(teacher, BOTH, masked)
        t[OF_TEACHER, 2] = s[OF_STUDENT, 2] = -INF
        truth = limits_of(s, t, labels, **settings)
        judge(*(x[[CLEAN, BOTH]] for x in (s, t, labels)), by_row=False, **settings)
        _, grad = rows_of(s, t, labels, **settings)

        # masked by both it is no class: what is left is the loss over the classes left
        assert grad[BOTH, masked].eq(0).all()
        left = [i for i in range(vocab) if i not in masked]
        rest = (x[BOTH : BOTH + 1, left].double() for x in (student, teacher))
        label = torch.tensor([left.index(int(labels[BOTH]))])
        want, want_grad = rows_of(*rest, label, **settings | {"backend": "reference"})
        torch.testing.assert_close(truth.loss[BOTH], want[0], **LEAST)
        torch.testing.assert_close(truth.grad[BOTH, left], want_grad[0], **LEAST)

        # p = 0 < q or q = 0 < p is +inf; nothing is finite in the gradient of the first
        infinite = [False, False, divergence in OVER_P, divergence in OVER_Q]
        assert truth.loss.isposinf().tolist() == infinite
        assert grad[OF_TEACHER].isfinite().tolist() == [divergence not in OVER_P] * vocab
        assert truth.grad[OF_STUDENT].isfinite().all()
        want = 0.0
        if divergence in OVER_Q:  # alpha * T * (q - p)
            p = torch.softmax(teacher[OF_STUDENT].double() / 2, -1)
            p = p / (1 - p[0]) if divergence == "dkd" else p  # among those that are not the label's
            want = -0.9 * 2 * {"symmetric_kl": 0.5, "dkd": 8}.get(divergence, 1) * p[2].item()  # forward_kl's share
        assert truth.grad[OF_STUDENT, 2].item() == pytest.approx(want, rel=1e-12, abs=0)


@pytest.mark.beyond_cuda
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
    truth = limits_of(student, given, labels, **settings)
    assert truth.loss.isinf().tolist() == [False, divergence in OVER_P, divergence in OVER_P, False]
    assert truth.grad[[0, 3]].isfinite().all()


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
        clean = [rows_of(student, teacher, labels, **settings), run(student, teacher, labels, **settings)]
        found = [rows_of(s, t, labels, **settings), run(s, t, labels, **settings)]
        assert found[0][0][1::2].isnan().all()
        assert torch.equal(found[0][0][::2], clean[0][0][::2])
        assert found[1][0].isnan()  # the mean
        for (_, grad), (_, want) in zip(found, clean, strict=True):
            assert grad[1::2].isnan().all()
            assert torch.equal(grad[::2], want[::2])


ALL = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 10.0, "teacher_softcap": 10.0, "standardize": True}


def test_a_bad_row_spoils_itself_alone_under_every_option(backend: str, full: bool) -> None:
    # each option compiles kernels of its own, and all together have the code of each
    options = ALL if backend != "cuda" else {k: ALL[k] for k in ("label_smoothing", "z_loss")}
    for name in ("", "label_smoothing", "z_loss", "softcap", "standardize") if full or backend not in ON_GPU else ("",):
        spoil_rows(backend, full, {k: v for k, v in options.items() if name in k})


def spoil_rows(backend: str, full: bool, options: dict[str, Any]) -> None:
    kinds = ("cross_entropy", "jsd", "dkd", "logit_mse") if full or backend == "cpu" else ("dkd",)
    for divergence in kinds if backend != "cuda" else ("cross_entropy", "jsd", "logit_mse"):
        for vocab in VOCABS:
            student, teacher, labels, s, t = batch_with_spoilers(vocab, F32)
            settings = {"backend": backend, "divergence": divergence, "temperature": 2} | options
            clean, (loss, grad) = rows_of(student, teacher, labels, **settings), both_ways(s, t, labels, **settings)
            # capped, +inf is the cap; and a masked class has a gradient of 0, in a row of which all are masked
            capped = [
                row for row, name in zip(SPOILED, SPOILERS, strict=True) if "softcap" in options and "+inf" in name
            ]
            bad = [row for row in SPOILED if row not in capped]
            nothing = (s[bad] == -INF).all(-1, True) & ("softcap" in options)
            assert loss[bad].isnan().all()
            assert (grad[bad].isnan() | (nothing & grad[bad].eq(0))).all()
            assert torch.equal(loss[::2], clean[0][::2])
            assert torch.equal(grad[::2], clean[1][::2])


@each_vocab
@pytest.mark.parametrize("value", (-INF, NAN, INF))
def test_logit_mse_has_no_limit(backend: str, value: float, vocab: int) -> None:
    student, teacher, labels = batch(7, vocab)
    labels[:] = 0
    student[1, 2] = teacher[3, 2] = student[5, 2] = teacher[5, 2] = value
    for y in (None, labels):
        truth = limits_of(student, teacher, y, backend=backend, divergence="logit_mse")
        assert truth.loss.isnan().tolist() == [False, True] * 3 + [False]
        assert truth.grad[1::2].isnan().all()


@each_vocab
def test_a_label_that_the_student_masks(backend: str, vocab: int) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    masked = spoiled(student, 1, labels[1]), spoiled(teacher, 1, labels[1]), labels
    settings = {"backend": backend, "temperature": 2}
    for divergence in {"cross_entropy", "reverse_kl", "jsd", "dkd"}.intersection(divergences_for(backend)):
        truth = limits_of(*masked, divergence=divergence, **settings)
        assert truth.loss.isposinf().tolist() == [False, True, False, False]
        assert truth.grad.isfinite().all()
    truth = limits_of(masked[0], None, labels, alpha=0, backend=backend)
    assert truth.loss[1] == INF
    assert truth.grad[1, labels[1]] == -1  # q1 - 1, of q1 = 0
    judge(*masked, alpha=1, **settings)  # h = 0 never meets 0 * inf


@pytest.mark.beyond_cuda
@each_vocab
def test_dkd_of_a_label_that_is_masked(backend: str, vocab: int) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    label = labels[1]
    settings = {"backend": backend, "divergence": "dkd", "temperature": 2, "alpha": 1}
    s, t = spoiled(student, 1, label), spoiled(teacher, 1, label)
    assert rows_of(s, t, labels, **settings)[1][1, label] == 0
    judge(s, t, labels, **settings)  # in both it is no class: the others are all there is
    judge(student, t, labels, **settings)  # by the teacher: p_y = 0 adds nothing
    truth = limits_of(s, teacher, labels, **settings)  # by the student: q_y = 0 < p_y
    assert truth.loss[1] == INF
    assert truth.grad.isfinite().all()
    # of the target class alone T * (q_y - p_y), of the others nothing
    truth = limits_of(s, teacher, labels, dkd_weights=(1.0, 0.0), **settings)
    p = torch.softmax(teacher[1].double() / 2, -1)[label]
    torch.testing.assert_close(truth.grad[1, label], -2 * p, **LEAST)
    truth = judge(s, teacher, labels, dkd_weights=(0.0, 1.0), **settings)  # a weight of 0 meets no infinity
    assert truth.grad[1, label] == 0


@pytest.mark.beyond_cuda
@each_vocab
def test_dkd_where_no_class_is_left_beside_the_label(backend: str, vocab: int) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    settings = {"backend": backend, "divergence": "dkd", "temperature": 2, "alpha": 1}
    is_label = torch.nn.functional.one_hot(labels, vocab).bool()
    s, t = student.masked_fill(~is_label, -INF), teacher.masked_fill(~is_label, -INF)
    for given in ((s, t, labels), (*batch(ROWS, 1)[:2], torch.zeros_like(labels))):
        assert not any(x.count_nonzero() for x in both_ways(*given, **settings))
    # the teacher's alone: log(1 / q_y), and no others to divide among; p_y is 1, so gradients are T * (q - p)
    kl = settings | {"divergence": "forward_kl", "backend": "reference"}
    for got, want in zip(
        both_ways(student, t, labels, **settings), rows_of(student.double(), t.double(), labels, **kl), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(F32).eps, atol=200 * torch.finfo(F32).eps)
    # the student's: q of the others is 0 < p
    loss, grad = both_ways(s, teacher, labels, **settings)
    assert loss.eq(INF).all()
    assert grad.isfinite().all()


@pytest.mark.beyond_cuda
@each_vocab
def test_dkds_others_do_not_underflow_with_their_label(backend: str, vocab: int) -> None:
    """Where the label's logit is far above all others their share is 0 in fp32, and their distribution is none the less
    what it is."""
    student, teacher, labels = batch(ROWS, vocab)
    index = labels.unsqueeze(-1)
    settings = {"backend": backend, "divergence": "dkd", "dkd_weights": (0.0, 1.0), "alpha": 1}
    for s, t in ((500, 500), (-500, 500), (500, -500), (0, 500), (-500, 0)):  # of the label, to both sides
        truth = judge(student.scatter(-1, index, s), teacher.scatter(-1, index, t), labels, **settings)
        assert vocab > 7 or truth.grad.abs().amax(-1).min() > 0.01


@pytest.mark.beyond_cuda
@pytest.mark.parametrize(("vocab", "divergence"), [(7, "jsd"), (5000, "dkd")])
def test_a_softcap_keeps_a_mask(backend: str, vocab: int, divergence: str) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    labels = labels % 2  # not of the masked
    masked = [2, vocab - 1]
    left = [i for i in range(vocab) if i not in masked]
    s, t = (spoiled(x, slice(None), masked) for x in (student, teacher))
    settings = {"backend": backend, "divergence": divergence, "softcap": 8.0, "teacher_softcap": 5.0, "z_loss": 0.1}
    assert rows_of(s, t, labels, **settings)[1][:, masked].eq(0).all()
    truth = judge(s, t, labels, **settings)
    rest = student[:, left].double(), teacher[:, left].double()
    want, want_grad = rows_of(*rest, labels, **settings | {"backend": "reference"})
    torch.testing.assert_close(truth.loss, want, **LEAST)
    torch.testing.assert_close(truth.grad[:, left], want_grad, **LEAST)


@each_vocab
def test_smoothing_gives_a_masked_class_its_share(backend: str, vocab: int) -> None:
    student, _, labels = batch(ROWS, vocab)
    labels[1] = 0
    truth = limits_of(spoiled(student, 1, 2), None, labels, backend=backend, alpha=0, label_smoothing=0.1)
    assert truth.loss.isposinf().tolist() == [False, True, False, False]  # as F.cross_entropy's
    assert truth.grad[1, 2].item() == pytest.approx(-0.1 / vocab, rel=1e-12)  # q1 = 0, and its share of the label
    assert truth.grad.isfinite().all()


@each_vocab
def test_z_loss_of_nothing_is_nan_in_its_row(backend: str, vocab: int) -> None:
    student = spoiled(spoiled(batch(ROWS, vocab).student, 1, slice(None)), 2, 3)
    settings = {"backend": backend, "alpha": 0, "hard_weight": 0, "z_loss": 1.0}
    truth = limits_of(student, None, **settings)
    assert truth.loss.isnan().tolist() == truth.grad.isnan().all(-1).tolist() == [False, True, False, False]
    assert rows_of(student, None, **settings)[1][2, 3] == 0  # one masked class is none


@pytest.mark.beyond_cuda
@each_vocab
def test_standardised_rows_have_no_limit(backend: str, vocab: int) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    labels[1] = 0
    for s, t in ((spoiled(student, 1, 2), teacher), (student, spoiled(teacher, 1, 2))):
        truth = limits_of(s, t, labels, backend=backend, standardize=True)
        assert truth.loss.isnan().tolist() == truth.grad.isnan().all(-1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("reduction", ["mean", "none"])  # the gradient in one with the loss; from the table
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_soft_gradient_of_a_single_class_is_exactly_0(cpu: str, divergence: str, reduction: str) -> None:
    """Its probability is 1 whatever its logit."""
    labels = torch.zeros(50, dtype=torch.int64)
    settings: dict[str, Any] = {"backend": cpu, "divergence": divergence, "reduction": reduction, "hard_weight": 0.0}
    calls: list[tuple[torch.dtype, dict[str, Any]]] = [(F32, {}), (BF16, {}), (F32, {"standardize": True})]
    if divergence != "logit_mse":
        calls += [(dtype, {"target": "probs", "temperature": 1.7}) for dtype in (F32, BF16)]
    for dtype, options in calls:
        student, teacher, _ = batch(50, 1, dtype, scale=30)
        given = teacher.sigmoid() if "target" in options else teacher  # whose sum is not 1
        _, grad = run(student, given, labels, **settings, **options)
        assert not grad.any()
