"""Digits where logits are huge, rows are confident or mixtures are nearly one of their parts.

The truth is the reference in fp64, whose numbers have room for all of these.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from cases import BF16, DIVERGENCES, F32, F64, KINDS, ON_GPU, batch, divergences_for, dtypes_for, labels_for
from judge import judge, run
from torch import Tensor

PADS = (-1e10, -1e30, "least")  # a mask's usual ones, and the least number of the dtype
# Who has the pad, and in which classes: of a whole row nothing is left but equal logits.
PADDED = (("student", "all"), ("teacher", "all"), ("both", "all"), ("both", "a third"), ("both", "all but the label"))
BETAS = (1e-9, 1e-6, 1e-5, 0.3, 1 - 1e-5, 1 - 1e-7)
MIXTURES = ("jsd", "skew_forward_kl", "skew_reverse_kl")


def padded(vocab: int, dtype: torch.dtype, divergence: str) -> tuple[Tensor, Tensor, Tensor]:
    """A row for each pad and each of PADDED, and a clean one."""
    rows = [(pad, *where) for pad in PADS for where in PADDED]
    if divergence == "logit_mse":  # the difference of a pad and a logit is the pad, in fp64 too
        rows = [row for row in rows if row[1] == "both"]
    student, teacher, labels = batch(len(rows) + 1, vocab, dtype)
    labels = labels.clamp_min(vocab // 3)
    for i, (pad, who, which) in enumerate(rows):
        classes = torch.arange(vocab) < (vocab // 3 if which == "a third" else vocab)
        classes[labels[i]] &= which != "all but the label"
        for x in {"student": [student], "teacher": [teacher], "both": [student, teacher]}[who]:
            x[i, classes] = torch.finfo(dtype).min if pad == "least" else pad
    return student, teacher, labels


# On a GPU each temperature and dtype is another compilation.
@pytest.mark.parametrize(
    ("temperature", "dtype"),
    [(0.3, F32), pytest.param(1.0, BF16, marks=pytest.mark.full), pytest.param(4.0, F32, marks=pytest.mark.full)],
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_row_padded_by_any_finite_number_is_finite_and_right(
    backend: str, divergence: str, temperature: float, dtype: torch.dtype, full: bool
) -> None:
    if backend == "reference":
        return  # its logits / T overflow, as eager PyTorch's do
    settings = {"backend": backend, "divergence": divergence, "temperature": temperature}
    for vocab in (10, 300) if full or backend not in ON_GPU else (10,):
        judge(*padded(vocab, dtype, divergence), by_row=full or backend not in ON_GPU, **settings)


@pytest.mark.parametrize("vocab", [300, pytest.param(33000, marks=pytest.mark.full)])
def test_so_is_a_padded_row_that_is_merged_from_many_parts(backend: str, vocab: int, full: bool) -> None:
    if backend == "reference" and vocab > 300:
        return  # it has no parts
    kinds = [d for d in ("symmetric_kl", "jsd", "dkd") if d in divergences_for(backend)]
    for divergence in kinds if full or backend not in ON_GPU else kinds[:1]:
        settings = {"temperature": 1.3, "divergence": divergence, "backend": backend}
        judge(*padded(vocab, F32, divergence), **settings)


def test_the_cross_entropy_of_far_logits_has_their_distance(backend: str) -> None:
    student = torch.tensor([[5e9, 0.0, -5e9], [-5e9, 5e9, 0.0], [0.0, -1e30, -1e30]])
    labels = torch.tensor([1, 1, 1])
    for temperature in (1.0, 4.0):  # it is at temperature 1, from the exps at T or by itself
        settings = {"alpha": 0, "temperature": temperature, "backend": backend, "reduction": "none"}
        loss, grad = run(student, None, labels, **settings)
        torch.testing.assert_close(loss, torch.tensor([5e9, 0.0, 1e30]), rtol=1e-6, atol=0)
        want = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [1.0, -1.0, 0.0]])
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-7)


@pytest.mark.beyond_cuda
@pytest.mark.parametrize(("divergence", "want"), [("forward_kl", 0.0), ("jsd", 0.5 * math.log(2))])
def test_log_probabilities_that_are_padded_throughout_are_no_probability(
    backend: str, divergence: str, want: float
) -> None:
    student, _, _ = batch(3, 7)
    for value in (-1e10, -1e30):
        given = torch.full_like(student, value)
        settings = {"target": "log_probs", "divergence": divergence, "reduction": "none", "backend": backend}
        loss, grad = run(student, given, **settings)
        torch.testing.assert_close(loss, torch.full((3,), want), rtol=0, atol=1e-6)
        assert grad.isfinite().all()


def confident(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Students that give their label nearly everything, from logits near 0 and far from it, and the labels."""
    rows = list(itertools.product((3.0, 8.0, 14.0, 17.0, 25.0, 60.0), (-20.0, 0.0, 33.3)))
    student, _, labels = batch(len(rows), vocab, dtype)
    for i, (gap, top) in enumerate(rows):
        student[i] += top - gap - math.log(vocab) - student[i].amax()
        student[i, labels[i]] = top
    return student, labels


def assert_no_further_off(loss: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The worst of the rows: of a single one, eager may have the last digit by luck."""
    missed, allowed = ((x - truth).abs().max() for x in (loss, eager))
    assert missed <= 2 * allowed + 1e-8


@pytest.mark.parametrize("vocab", [17, 1000, pytest.param(40001, marks=pytest.mark.full)])
def test_the_cross_entropy_of_a_confident_row_is_no_further_off_than_eager(backend: str, vocab: int) -> None:
    for dtype in (F32,) if backend in ON_GPU else dtypes_for(backend):
        student, labels = confident(vocab, dtype)
        truth = torch.nn.functional.cross_entropy(student.double(), labels, reduction="none")
        wide = student if dtype == F64 else student.float()
        eager = torch.nn.functional.cross_entropy(wide, labels, reduction="none")
        for temperature in (2.0, 3.7):
            settings = {"alpha": 0, "temperature": temperature, "reduction": "none", "backend": backend}
            loss, _ = run(student, None, labels, **settings)
            assert (loss >= 0).all()
            assert_no_further_off(loss, eager, truth)


@pytest.mark.parametrize("divergence", KINDS[:-1])
def test_the_divergence_of_confident_rows_is_no_further_off_than_eager(backend: str, divergence: str) -> None:
    student, labels = confident(1000, F32)
    teacher = student + 0.5 * batch(len(student), 1000, seed=1).teacher
    settings = {"divergence": divergence, "alpha": 1, "reduction": "none"}
    truth, _ = run(student.double(), teacher.double(), None, backend="reference", **settings)
    eager, _ = run(student, teacher, None, backend="reference", **settings)  # its arithmetic is PyTorch's
    loss, _ = run(student, teacher, None, backend=backend, **settings)
    assert (loss >= 0).all()
    assert_no_further_off(loss, eager, truth)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_divergence_of_distributions_is_negative(backend: str, divergence: str) -> None:
    """Near equality its sums cancel: some of these rows would be below 0."""
    if backend == "reference":
        return  # it has eager PyTorch's rounding
    _, teacher, labels = batch(64, 100)
    labels = labels_for(divergence, labels)
    for distance in (1e-4, 1e-6, 0.0):
        student = teacher + distance * torch.randn_like(teacher)
        settings: dict[str, Any] = {"divergence": divergence, "temperature": 2, "alpha": 1, "reduction": "none"}
        loss, _ = run(student, teacher, labels, backend=backend, **settings)
        assert (loss >= 0).all()


def test_a_single_class_has_loss_0(backend: str) -> None:
    student, teacher, labels = batch(5, 1)
    for divergence in KINDS if backend not in ON_GPU else KINDS[:1]:
        loss, grad = run(100 * student, teacher, labels, divergence=divergence, reduction="none", backend=backend)
        assert not loss.any()
        assert grad.abs().max() <= 1e-12


@pytest.mark.parametrize("divergence", MIXTURES)
def test_a_mixture_has_its_digits_at_every_beta(backend: str, divergence: str) -> None:
    """Also where its parts are disjoint, equal or nearly one class."""
    student, teacher, _ = batch(6, 50)
    student[1, :25], teacher[1, 25:] = -math.inf, -math.inf
    student[2] = teacher[2]
    student[3, 4], teacher[3, 5] = 40.0, 40.0
    student[4, 4], teacher[4, 4] = 40.0, 41.0
    student[5, :25], teacher[5, :10] = -1e30, -1e30
    for beta in BETAS:
        settings: dict[str, Any] = {"divergence": divergence, "beta": beta, "reduction": "none"}
        loss, grad = run(student, teacher, backend=backend, **settings)
        truth, of_truth = run(student.double(), teacher.double(), backend="reference", **settings)
        atol = 1e-5 if backend == "reference" else 1e-11  # it has eager PyTorch's logarithms of sums
        torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=atol)
        assert ((grad - of_truth).abs() <= 1e-5 * of_truth.abs().max() + atol).all()


@pytest.mark.parametrize("divergence", KINDS)
def test_a_row_far_from_0_has_its_digits_in_a_gradient_of_its_own(backend: str, divergence: str) -> None:
    """It takes the sums' offset from a table of fp32, which rounds it."""
    student, teacher, labels = batch(16, 3000, offset=300.0)
    settings: dict[str, Any] = {"alpha": 0.01, "hard_weight": 1.0, "logit_scale": 2.0, "reduction": "none"}
    judge(student, teacher, labels, divergence=divergence, backend=backend, **settings)
    if backend != "cuda":  # with a scale of each row
        judge(student, teacher, labels, divergence=divergence, backend=backend, standardize=True, **settings)


@pytest.mark.parametrize("vocab", [50, 3000])
@pytest.mark.parametrize("divergence", [*MIXTURES, "tvd", "hellinger"])
def test_the_gradient_has_its_digits_where_little_is_in_common(backend: str, divergence: str, vocab: int) -> None:
    """There D is near its largest value, and the gradient small."""
    student, teacher, _ = batch(12, vocab)
    apart = torch.linspace(0, 44, 12).unsqueeze(-1)
    student[:, ::2] -= apart
    teacher[:, 1::2] -= apart
    for beta in (0.1, 0.9) if divergence in MIXTURES else (None,):
        judge(student, teacher, divergence=divergence, beta=beta, backend=backend)


def test_the_gradient_of_a_divided_row_has_its_digits_where_little_is_in_common(backend: str) -> None:
    """Its parts have each a sum of the other psi, and these are added up."""
    student, teacher, _ = batch(1, 33_000)
    student[:, ::2] -= 44
    teacher[:, 1::2] -= 44
    judge(student, teacher, divergence="skew_forward_kl", beta=0.1, backend=backend)


@pytest.mark.beyond_cuda
def test_a_standardized_row_has_its_digits_where_little_is_in_common(backend: str) -> None:
    """Its gradient has another sum, of the soft term's times the logits."""
    student, teacher, _ = batch(4, 50)
    student[:, ::2] -= 44
    teacher[:, 1::2] -= 44
    settings: dict[str, Any] = {"standardize": True, "temperature": torch.tensor([1.0, 0.2, 0.1, 0.05])}
    judge(student, teacher, divergence="skew_forward_kl", backend=backend, **settings)


@pytest.mark.parametrize("divergence", MIXTURES)
def test_a_mixture_that_underflows_is_no_class(backend: str, divergence: str) -> None:
    """The probability of one side is denormal, the other's 0: their mixture is 0, and not a divisor."""
    one, other = torch.zeros(1, 2000), torch.zeros(1, 2000)
    one[0, 5], other[0, 5] = -87.0, -math.inf
    for beta, (student, teacher) in itertools.product((BETAS[0], BETAS[-1]), ((one, other), (other, one))):
        settings: dict[str, Any] = {"divergence": divergence, "beta": beta, "reduction": "none", "backend": backend}
        loss, grad = run(student, teacher, **settings)
        assert loss.abs().max() <= 1e-6
        assert grad.abs().max() <= 1e-6
