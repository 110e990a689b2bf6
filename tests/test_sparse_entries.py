"""The entries of sparse teachers: whose classes they are, which are absent, and what the other classes get."""

import pytest
import torch
from cases import F32, F64, ON_GPU, batch
from judge import run
from sparse_cases import (
    CLOSE,
    COMBINATIONS,
    FORMS,
    INF,
    NAN,
    OF_P_AND_Q,
    gradient,
    is_form,
    kd,
    options,
    plain_losses,
    skip_most,
    sparse_batch,
)

from kdfast import TopKTargets


@pytest.mark.parametrize("missing", FORMS)
def test_the_classes_may_be_anybodys(backend: str, missing: str) -> None:
    """The student's top k; a sampled token added to the teacher's, masked by -inf where it is there already; both."""
    student, logits, labels = batch(6, 12, F64)
    log_p = torch.log_softmax(logits, -1)
    of_teacher, of_student = log_p.topk(4, -1).indices, student.topk(4, -1).indices
    union = torch.cat([of_teacher, of_student], -1)
    for indices in (of_student, torch.cat([of_teacher, labels.unsqueeze(-1)], -1), union):
        before = torch.ones(indices.shape[-1], indices.shape[-1], dtype=torch.bool).tril(-1)
        twice = ((indices.unsqueeze(-1) == indices.unsqueeze(-2)) & before).any(-1)
        teacher = TopKTargets(indices, log_p.gather(-1, indices).masked_fill(twice, -INF))
        want = gradient(lambda s, t=teacher: plain_losses(s, t, missing, options(missing)["divergence"]), student)
        torch.testing.assert_close(
            kd(student, teacher, reduction="none", backend=backend, **options(missing)), want, **CLOSE
        )


@pytest.mark.parametrize("missing", FORMS)
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_an_absent_entry_may_have_any_index(backend: str, missing: str, dtype: torch.dtype) -> None:
    student, teacher, labels = sparse_batch(6, 12, 4, F32, gaps=True)
    settings = options(missing, backend=backend)
    want = kd(student, teacher, labels, **settings)
    absent = teacher.log_probs == -INF
    for index in (0, -1, 12, 17, torch.iinfo(dtype).min, torch.iinfo(dtype).max, int(teacher.indices[0, 0])):
        garbage = teacher.indices.to(dtype).masked_fill(absent, index)
        got = kd(student, TopKTargets(garbage, teacher.log_probs), labels, **settings)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("missing", FORMS)
def test_the_order_of_the_entries_does_not_matter(backend: str, missing: str) -> None:
    student, teacher, _ = sparse_batch(6, 12, 5, gaps=True)
    order = torch.rand(6, 5).argsort(-1)
    shuffled = TopKTargets(*(x.gather(-1, order) for x in teacher))
    settings = options(missing, backend=backend)
    torch.testing.assert_close(kd(student, shuffled, **settings), kd(student, teacher, **settings), **CLOSE)


@pytest.mark.parametrize("missing", FORMS)
def test_a_row_without_entries_costs_0_and_stays_in_the_count(backend: str, missing: str) -> None:
    student, teacher, labels = sparse_batch(4, 12, 3, F32)
    teacher.log_probs[1] = -INF
    settings = options(missing, backend=backend)
    losses, grads = kd(student, teacher, reduction="none", **settings)
    assert losses[1] == 0
    assert (grads[1] == 0).all()
    mean, grad = kd(student, teacher, **settings)
    torch.testing.assert_close(mean, losses.sum() / 4)
    torch.testing.assert_close(grad, grads / 4)
    # its hard term stays
    both, _ = kd(student, teacher, labels, alpha=0.5, reduction="none", **settings)
    torch.testing.assert_close(both[1], 0.5 * torch.nn.functional.cross_entropy(student[1], labels[1]))


@pytest.mark.parametrize("missing", FORMS)
def test_a_dropped_row_may_hold_anything(backend: str, missing: str) -> None:
    student, teacher, labels = sparse_batch(6, 12, 4, F32)
    labels[1] = -100
    weight = torch.tensor([1.0, 1.0, 2.0, 0.0, 1.0, 1.0])
    settings = options(missing, row_weight=weight, backend=backend)
    want = kd(student, teacher, labels, **settings)
    student, teacher = student.clone(), TopKTargets(*(x.clone() for x in teacher))
    for row, value in ((1, NAN), (3, INF)):
        student[row], teacher.log_probs[row] = NAN, value
    teacher.indices[1], teacher.indices[3] = 2**40, -7
    got = kd(student, teacher, labels, **settings)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("left", (1e-7, 1e-12))
@pytest.mark.parametrize("divergence", OF_P_AND_Q)
def test_the_rest_of_a_certain_student_keeps_its_gradient(
    backend: str, divergence: str, left: float, full: bool
) -> None:
    """1 - Q would have no digit: the entries take all but `left` of the student's probability."""
    skip_most(backend, full, divergence)
    vocab, k = 300, 3
    student = batch(4, vocab, F32).student / 2
    student = student + torch.tensor(left / vocab).log()
    student[:, :k] = torch.tensor([0.0, -1.0, -2.0])
    teacher = TopKTargets(torch.arange(k).expand(4, k), torch.tensor([0.6, 0.2, 0.1]).log().expand(4, k))
    for missing in ("tail", "renormalize"):
        if not is_form(missing, divergence):
            continue
        want = gradient(lambda s, m=missing: plain_losses(s, teacher, m, divergence), student.double())
        got = kd(student, teacher, reduction="none", backend=backend, **options(missing, divergence))
        torch.testing.assert_close(got[0].double(), want[0], rtol=2e-6, atol=3e-7)  # its terms cancel
        torch.testing.assert_close(got[1][:, k:].double(), want[1][:, k:], rtol=2e-5, atol=0)
        torch.testing.assert_close(got[1][:, :k].double(), want[1][:, :k], rtol=2e-5, atol=2e-7)  # q - p cancels


def test_a_teacher_that_is_the_student_costs_nothing_and_moves_nothing(backend: str) -> None:
    """p near q: every form is a divergence of distributions, and rounding alone never makes it negative."""
    student, _, _ = batch(6, 500, F32)
    log_q = torch.log_softmax(student.double(), -1)
    values, indices = log_q.topk(5, -1)
    teacher = TopKTargets(indices, values.float())
    for missing, divergence in COMBINATIONS:
        if divergence == "cross_entropy" or missing in ("renormalize", "truncate"):  # whose p is another
            continue
        if backend in ON_GPU and divergence not in ("jsd", "reverse_kl"):
            continue
        loss, grad = kd(student, teacher, reduction="none", backend=backend, **options(missing, divergence))
        assert (loss >= 0).all(), (missing, divergence)
        assert (loss < (1e-6 if divergence in ("tvd", "hellinger") else 3e-7)).all(), (missing, divergence, loss)
        if divergence != "tvd":  # whose gradient does not vanish
            assert grad.abs().max() < 1e-6, (missing, divergence)


@pytest.mark.parametrize("value", (NAN, INF))
def test_conditional_does_not_read_the_other_classes(backend: str, value: float) -> None:
    student, teacher, _ = sparse_batch(5, 300, 4, F32, gaps=True)
    settings = options("conditional", "jsd", temperature=2.0, backend=backend)
    want = kd(student, teacher, **settings)
    spoiled = torch.full_like(student, value)
    places = teacher.indices.clamp(min=0)
    spoiled.scatter_(-1, places, student.gather(-1, places))
    got = kd(spoiled, teacher, **settings)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    # with a hard term it does
    labels = teacher.indices[:, 0]
    assert kd(spoiled, teacher, labels, **settings)[0].isnan()


@pytest.mark.parametrize("missing", FORMS)
def test_a_bad_number_affects_its_row_alone(backend: str, missing: str) -> None:
    student, teacher, _ = sparse_batch(5, 12, 4, F32)
    settings = options(missing, reduction="none", backend=backend)
    clean = kd(student, teacher, **settings)
    student, log_probs = student.clone(), teacher.log_probs.clone()
    student[1, teacher.indices[1, 2]], log_probs[3, 1] = NAN, NAN
    got = kd(student, TopKTargets(teacher.indices, log_probs), **settings)
    for a, b in zip(got, clean, strict=True):
        assert torch.equal(a[[0, 2, 4]], b[[0, 2, 4]])
        assert a[1].isnan().any()
        assert a[3].isnan().any()


def test_infinities_are_those_of_a_dense_loss(backend: str) -> None:
    """An entry's class that the student masks costs an infinity; where the teacher has P = 1 so does the rest."""
    student, teacher, _ = sparse_batch(3, 12, 3, F32)
    student[0, teacher.indices[0, 0]] = -INF
    teacher.log_probs[1] = torch.tensor([0.0, -INF, -INF])
    for divergence, infinite in (("forward_kl", [True, False, False]), ("reverse_kl", [False, True, False])):
        loss, _ = kd(student, teacher, reduction="none", backend=backend, **options("tail", divergence))
        assert loss.isinf().tolist() == infinite, divergence
    for divergence in ("jsd", "tvd", "hellinger"):
        for value in kd(student, teacher, reduction="none", backend=backend, **options("tail", divergence)):
            assert value.isfinite().all(), divergence


def test_entries_that_rounding_made_more_than_1_leave_nothing_to_the_rest(backend: str) -> None:
    """P = 1.004 in bfloat16: the rest has probability 0."""
    student, _, _ = sparse_batch(2, 12, 2, F32)
    probs = torch.tensor([0.7, 0.304]).expand(2, 2)
    teacher = TopKTargets(torch.tensor([[0, 1], [5, 3]]), probs.log())
    loss, grad = kd(student, teacher, reduction="none", backend=backend, **options("tail", "forward_kl"))
    log_q = torch.log_softmax(student, -1).gather(-1, teacher.indices)
    torch.testing.assert_close(loss, (probs * (probs.log() - log_q)).sum(-1))
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ("triton",), indirect=True)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_more_entries_than_a_program_holds_are_the_references(backend: str, reduction: str) -> None:
    student, teacher, labels = batch(2, 2200, F32)
    log_probs, indices = teacher.log_softmax(-1).topk(2100, -1)
    factor = torch.ones(2 if reduction == "none" else ())
    found = [
        run(student, TopKTargets(indices, log_probs), labels, factor, backend=name, reduction=reduction)
        for name in (backend, "reference")
    ]
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
