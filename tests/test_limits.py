"""Infinities, NaN and empty sums: each row gets exactly its limit, and affects no other row.

Where the reference is infinite or NaN, each kernel must be the same: judge.py's `limits`.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calls import options_for
from cases import BF16, DIVERGENCES, F16, F32, ON_GPU, arithmetics, batch, divergences_for
from judge import Truth, judge, run
from torch import Tensor

INF, NAN = math.inf, math.nan
ROWS = 4
VOCABS = (7, 5000)  # a tail; a row of several blocks
each_vocab = pytest.mark.parametrize("vocab", VOCABS)
WITH_INFINITY = DIVERGENCES[:-1]  # logit_mse is NaN at -inf
OVER_P = ("reverse_kl", "symmetric_kl")  # these divide by p
OVER_Q = ("cross_entropy", "forward_kl", "symmetric_kl", "dkd")
CLEAN, BOTH, OF_TEACHER, OF_STUDENT = range(ROWS)  # rows, by who masks classes
LEAST = {"rtol": 0, "atol": 1e-13}  # for the reference in fp64


def shapes(backend: str, full: bool) -> Iterator[tuple[int, torch.dtype]]:
    """(vocab, dtype): kernels compute in fp32 or fp64, and load infinities of 16 bits like any number."""
    for dtype in arithmetics(backend) if full or backend not in ON_GPU else (F32,):
        for vocab in VOCABS if dtype == F32 or backend == "cpu" or full else VOCABS[:1]:
            yield vocab, dtype
    if backend == "cpu" or full:
        yield VOCABS[0], BF16
        yield VOCABS[1], F16


def with_value(x: Tensor, row: int, classes: Any, value: float = -INF) -> Tensor:
    x = x.clone()
    x[row, classes] = value
    return x


def judge_limits(student: Tensor, teacher: Any, labels: Tensor | None = None, **settings: Any) -> Truth:
    return judge(student, teacher, labels, limits=True, **settings)


def run_by_row(student: Tensor, teacher: Any, labels: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    return run(student, teacher, labels, reduction="none", **settings)


def run_both_ways(student: Tensor, teacher: Any, labels: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """By row; the sum, whose loss and gradient come from one kernel, must be the same."""
    loss, grad = run_by_row(student, teacher, labels, **settings)
    total, whole = run(student, teacher, labels, reduction="sum", **settings)
    torch.testing.assert_close(total, loss.sum(), equal_nan=True)
    torch.testing.assert_close(whole, grad, equal_nan=True)
    return loss, grad


@pytest.mark.parametrize("divergence", WITH_INFINITY)
def test_a_masked_class_gives_the_loss_its_limit(backend: str, divergence: str, full: bool) -> None:
    settings: dict[str, Any] = {"backend": backend, "divergence": divergence, "temperature": 2}
    for vocab, dtype in shapes(backend, full):
        student, teacher, labels = batch(ROWS, vocab, dtype)
        # a whole block, or some classes; and the last one
        masked = [*range(2048), vocab - 1] if vocab > 2048 else [1, 2, vocab - 1]
        labels = torch.where(torch.isin(labels, torch.tensor(masked)), 3 if vocab < 2048 else 2050, labels)
        labels[OF_STUDENT] = 0
        s, t = with_value(student, BOTH, masked), with_value(teacher, BOTH, masked)
        t[OF_TEACHER, 2] = s[OF_STUDENT, 2] = -INF
        truth = judge_limits(s, t, labels, **settings)
        judge(*(x[[CLEAN, BOTH]] for x in (s, t, labels)), by_row=False, **settings)
        _, grad = run_by_row(s, t, labels, **settings)

        # masked by both it is no class: the loss is that of the other classes
        assert grad[BOTH, masked].eq(0).all()
        left = [i for i in range(vocab) if i not in masked]
        rest = (x[BOTH : BOTH + 1, left].double() for x in (student, teacher))
        label = torch.tensor([left.index(int(labels[BOTH]))])
        want, want_grad = run_by_row(*rest, label, **settings | {"backend": "reference"})
        torch.testing.assert_close(truth.loss[BOTH], want[0], **LEAST)
        torch.testing.assert_close(truth.grad[BOTH, left], want_grad[0], **LEAST)

        # p = 0 < q or q = 0 < p gives +inf; at p = 0 the gradient is not finite
        infinite = [False, False, divergence in OVER_P, divergence in OVER_Q]
        assert truth.loss.isposinf().tolist() == infinite
        assert grad[OF_TEACHER].isfinite().tolist() == [divergence not in OVER_P] * vocab
        assert truth.grad[OF_STUDENT].isfinite().all()
        want = 0.0
        if divergence in OVER_Q:  # alpha * T * (q - p)
            p = torch.softmax(teacher[OF_STUDENT].double() / 2, -1)
            p = p / (1 - p[0]) if divergence == "dkd" else p  # among the classes but the label's
            want = -0.9 * 2 * {"symmetric_kl": 0.5, "dkd": 8}.get(divergence, 1) * p[2].item()  # forward_kl's share
        assert truth.grad[OF_STUDENT, 2].item() == pytest.approx(want, rel=1e-12, abs=0)


@pytest.mark.beyond_cuda
@pytest.mark.parametrize(
    ("divergence", "target", "vocab"),
    [("reverse_kl", "probs", 7), ("reverse_kl", "log_probs", 5000), ("forward_kl", "probs", 7), ("jsd", "probs", 5000)],
)
def test_a_given_probability_of_0_masks_its_class(backend: str, divergence: str, target: str, vocab: int) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    labels[:] = 0
    p = torch.softmax(teacher / 2, -1)
    p[1, 2] = p[2, vocab - 1] = 0
    given = p if target == "probs" else p.log()
    settings = {"backend": backend, "divergence": divergence, "temperature": 2, "target": target}
    truth = judge_limits(student, given, labels, **settings)
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
SPOILED = range(1, 2 * len(SPOILERS), 2)  # every second row of a batch; the others are clean


def batch_with_spoilers(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A clean student and teacher, labels, and the same student and teacher with SPOILERS."""
    student, teacher, labels = batch(2 * len(SPOILERS) + 1, vocab, dtype)
    s, t = student.clone(), teacher.clone()
    for row, (of_student, of_teacher, where) in zip(SPOILED, SPOILERS.values(), strict=True):
        if of_student is not None:
            s[row, where] = of_student
        if of_teacher is not None:
            t[row, where] = of_teacher
    return student, teacher, labels, s, t


def check_batch_with_spoilers(vocab: int, dtype: torch.dtype, **settings: Any) -> None:
    """Bad rows are NaN; the others are as they are in a clean batch."""
    student, teacher, labels, s, t = batch_with_spoilers(vocab, dtype)
    # a cap makes +inf finite; and a masked class has gradient 0, also in a row of masked classes
    has_cap = "softcap" in settings
    bad = [row for row, name in zip(SPOILED, SPOILERS, strict=True) if not (has_cap and "+inf" in name)]
    masked = (s[bad] == -INF).all(-1, True) & has_cap
    for reduction in ("none", "mean"):
        loss, grad = run(s, t, labels, reduction=reduction, **settings)
        want_loss, want_grad = run(student, teacher, labels, reduction=reduction, **settings)
        assert (grad[bad].isnan() | (masked & grad[bad].eq(0))).all()
        assert torch.equal(grad[::2], want_grad[::2])
        assert loss[bad].isnan().all() if reduction == "none" else loss.isnan()
        assert reduction == "mean" or torch.equal(loss[::2], want_loss[::2])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_or_infinity_affects_its_row_alone(backend: str, divergence: str, full: bool) -> None:
    for vocab, dtype in shapes(backend, full):
        check_batch_with_spoilers(vocab, dtype, backend=backend, divergence=divergence, temperature=2)


def test_nan_or_infinity_affects_its_row_alone_under_every_option(backend: str, full: bool) -> None:
    # each option compiles kernels of its own, and all together have the code of each
    names = ("", "label_smoothing", "z_loss", "softcap", "standardize") if full or backend not in ON_GPU else ("",)
    kinds = [d for d in ("dkd", "cross_entropy", "jsd", "logit_mse") if d in divergences_for(backend)]
    pairs = list(itertools.product(names, kinds if full or backend in ("cpu", "cuda") else kinds[:1]))
    if backend == "triton":  # it compiles for each: all together with each divergence, and each with one
        pairs = [(name, kind) for name, kind in pairs if name == "" or kind == kinds[0]]
    for name, divergence in pairs:
        options = {k: v for k, v in options_for(backend).items() if name in k}
        for vocab in VOCABS:
            check_batch_with_spoilers(vocab, F32, backend=backend, divergence=divergence, temperature=2, **options)


@each_vocab
@pytest.mark.parametrize("value", (-INF, NAN, INF))
def test_logit_mse_is_nan_where_a_logit_is_not_finite(backend: str, value: float, vocab: int) -> None:
    student, teacher, labels = batch(7, vocab)
    labels[:] = 0
    student[1, 2] = teacher[3, 2] = student[5, 2] = teacher[5, 2] = value
    for y in (None, labels):
        truth = judge_limits(student, teacher, y, backend=backend, divergence="logit_mse")
        assert truth.loss.isnan().tolist() == [False, True] * 3 + [False]
        assert truth.grad[1::2].isnan().all()


@each_vocab
def test_a_label_that_the_student_masks_has_an_infinite_loss(backend: str, vocab: int) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    masked = with_value(student, 1, labels[1]), with_value(teacher, 1, labels[1]), labels
    settings = {"backend": backend, "temperature": 2}
    for divergence in {"cross_entropy", "reverse_kl", "jsd", "dkd"}.intersection(divergences_for(backend)):
        truth = judge_limits(*masked, divergence=divergence, **settings)
        assert truth.loss.isposinf().tolist() == [False, True, False, False]
        assert truth.grad.isfinite().all()
    truth = judge_limits(masked[0], None, labels, alpha=0, backend=backend)
    assert truth.loss[1] == INF
    assert truth.grad[1, labels[1]] == -1  # q1 - 1, of q1 = 0
    judge(*masked, alpha=1, **settings)  # h = 0: no 0 * inf


@pytest.mark.beyond_cuda
@each_vocab
def test_dkd_has_its_limit_where_the_label_is_masked(backend: str, vocab: int) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    label = labels[1]
    settings = {"backend": backend, "divergence": "dkd", "temperature": 2, "alpha": 1}
    s, t = with_value(student, 1, label), with_value(teacher, 1, label)
    assert run_by_row(s, t, labels, **settings)[1][1, label] == 0
    judge(s, t, labels, **settings)  # masked by both it is no class
    judge(student, t, labels, **settings)  # by the teacher: p_y = 0 adds 0
    truth = judge_limits(s, teacher, labels, **settings)  # by the student: q_y = 0 < p_y
    assert truth.loss[1] == INF
    assert truth.grad.isfinite().all()
    # the label's part alone: T * (q_y - p_y)
    truth = judge_limits(s, teacher, labels, dkd_weights=(1.0, 0.0), **settings)
    p = torch.softmax(teacher[1].double() / 2, -1)[label]
    torch.testing.assert_close(truth.grad[1, label], -2 * p, **LEAST)
    truth = judge(s, teacher, labels, dkd_weights=(0.0, 1.0), **settings)  # a weight of 0: no 0 * inf
    assert truth.grad[1, label] == 0


@pytest.mark.beyond_cuda
@each_vocab
def test_dkd_has_its_limit_where_only_the_label_is_left(backend: str, vocab: int) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    settings = {"backend": backend, "divergence": "dkd", "temperature": 2, "alpha": 1}
    is_label = torch.nn.functional.one_hot(labels, vocab).bool()
    s, t = student.masked_fill(~is_label, -INF), teacher.masked_fill(~is_label, -INF)
    for given in ((s, t, labels), (*batch(ROWS, 1)[:2], torch.zeros_like(labels))):
        assert not any(x.count_nonzero() for x in run_both_ways(*given, **settings))
    # masked by the teacher alone: log(1 / q_y) without a part of the others; p_y is 1: the gradient is T * (q - p)
    kl = settings | {"divergence": "forward_kl", "backend": "reference"}
    for got, want in zip(
        run_both_ways(student, t, labels, **settings),
        run_by_row(student.double(), t.double(), labels, **kl),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), want, rtol=torch.finfo(F32).eps, atol=200 * torch.finfo(F32).eps)
    # by the student alone: q of the others is 0 < p
    loss, grad = run_both_ways(s, teacher, labels, **settings)
    assert loss.eq(INF).all()
    assert grad.isfinite().all()


@pytest.mark.beyond_cuda
@each_vocab
def test_dkd_keeps_its_other_classes_where_the_label_dominates(backend: str, vocab: int) -> None:
    """Where the label's logit is far above the others, their sum is 0 in fp32, but their distribution is not."""
    student, teacher, labels = batch(ROWS, vocab)
    index = labels.unsqueeze(-1)
    settings = {"backend": backend, "divergence": "dkd", "dkd_weights": (0.0, 1.0), "alpha": 1}
    for s, t in ((500, 500), (-500, 500), (500, -500), (0, 500), (-500, 0)):  # the label's logits
        truth = judge(student.scatter(-1, index, s), teacher.scatter(-1, index, t), labels, **settings)
        assert vocab > 7 or truth.grad.abs().amax(-1).min() > 0.01
    student, teacher, labels = batch(ROWS, vocab, scale=30.0)
    labels[0] = teacher[0].argmax()
    judge(student, teacher, labels, backend=backend, divergence="dkd", temperature=2)


@pytest.mark.beyond_cuda
@pytest.mark.parametrize(("vocab", "divergence"), [(7, "jsd"), (5000, "dkd")])
def test_softcaps_keep_masked_classes_masked(backend: str, vocab: int, divergence: str) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    labels = labels % 2  # not masked
    masked = [2, vocab - 1]
    left = [i for i in range(vocab) if i not in masked]
    s, t = (with_value(x, slice(None), masked) for x in (student, teacher))
    settings = {"backend": backend, "divergence": divergence, "softcap": 8.0, "teacher_softcap": 5.0, "z_loss": 0.1}
    assert run_by_row(s, t, labels, **settings)[1][:, masked].eq(0).all()
    truth = judge(s, t, labels, **settings)
    rest = student[:, left].double(), teacher[:, left].double()
    want, want_grad = run_by_row(*rest, labels, **settings | {"backend": "reference"})
    torch.testing.assert_close(truth.loss, want, **LEAST)
    torch.testing.assert_close(truth.grad[:, left], want_grad, **LEAST)


@each_vocab
def test_label_smoothing_with_a_masked_class_has_an_infinite_loss(backend: str, vocab: int) -> None:
    student, _, labels = batch(ROWS, vocab)
    labels[1] = 0
    truth = judge_limits(with_value(student, 1, 2), None, labels, backend=backend, alpha=0, label_smoothing=0.1)
    assert truth.loss.isposinf().tolist() == [False, True, False, False]  # as F.cross_entropy's
    assert truth.grad[1, 2].item() == pytest.approx(-0.1 / vocab, rel=1e-12)  # q1 = 0: its part of the label alone
    assert truth.grad.isfinite().all()


@each_vocab
def test_z_loss_is_nan_in_a_row_of_masked_classes(backend: str, vocab: int) -> None:
    student = with_value(with_value(batch(ROWS, vocab).student, 1, slice(None)), 2, 3)
    settings = {"backend": backend, "alpha": 0, "hard_weight": 0, "z_loss": 1.0}
    truth = judge_limits(student, None, **settings)
    assert truth.loss.isnan().tolist() == truth.grad.isnan().all(-1).tolist() == [False, True, False, False]
    assert run_by_row(student, None, **settings)[1][2, 3] == 0  # one masked class has gradient 0


@pytest.mark.beyond_cuda
@each_vocab
def test_standardize_is_nan_in_a_row_with_a_masked_class(backend: str, vocab: int) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    labels[1] = 0
    for s, t in ((with_value(student, 1, 2), teacher), (student, with_value(teacher, 1, 2))):
        truth = judge_limits(s, t, labels, backend=backend, standardize=True)
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


@pytest.mark.parametrize("divergence", ["jsd", "tvd"])  # bounded ones, whose loss is finite at any T
def test_a_temperature_whose_inverse_fp32_does_not_hold_is_that_of_the_argmax(cpu: str, divergence: str) -> None:
    s, t, y = batch(5, 300)
    options = {"temperature": 1e-39, "t_squared": False, "divergence": divergence, "hard_weight": 0.5}
    loss, gradient = run(s, t, y, backend="cpu", **options)
    want, want_gradient = run(s.double(), t.double(), y, backend="reference", **options)
    torch.testing.assert_close(loss.double(), want)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=1e-5, atol=1e-8)


@each_vocab
def test_weights_of_rows_may_be_beyond_fp32(cpu: str, vocab: int) -> None:
    student, teacher, labels = batch(ROWS, vocab)
    weight = torch.arange(1.0, ROWS + 1, dtype=torch.float64)
    want = run(student, teacher, labels, row_weight=weight, backend=cpu)
    for size in (1e-50, 1e300):
        found = run(student, teacher, labels, row_weight=weight * size, backend=cpu)
        torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
