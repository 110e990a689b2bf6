"""linear_kd_loss is kd_loss of the heads' products, with every product done once and no logits beyond a chunk's.

How they are judged: linear_cases.py.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, DIVERGENCES, DTYPES, F32, F64, ON_GPU, REDUCTIONS, as_target, here
from linear_cases import (
    HIDDEN,
    ROWS,
    VOCAB,
    Case,
    check,
    fused,
    plain,
)

import kdfast

CHUNKS = (
    1,  # every row by itself
    4,  # chunks of 4, but the last: of 3 and 4 where rows are dropped
    ROWS,  # one
)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_is_kd_losses(backend: str, divergence: str) -> None:
    grid = [(d, r) for d in DTYPES for r in ("mean", "none")]
    rows = 7 if backend in ON_GPU else ROWS  # the interpreter's time goes by rows
    for dtype, reduction in grid if backend not in ON_GPU else [grid[DIVERGENCES.index(divergence) % len(grid)]]:
        case = Case(dtype, rows)
        grad = None if reduction == "mean" else torch.linspace(-1, 2, rows)
        for labels in (case.labels, None) if divergence != "dkd" else (case.labels,):  # which has nothing without
            settings = {"temperature": 2.0, "divergence": divergence, "reduction": reduction, "grad": grad}
            check(case, labels, backend=backend, chunk_rows=4, return_metrics=True, **settings)


def test_metrics_of_a_loss_without_a_soft_term_change_no_gradient(backend: str) -> None:
    case = Case(F64)
    for teacher in (None, case.teacher_logits()) if backend not in ON_GPU else (None,):
        for reduction, grad in (("none", torch.linspace(-1, 2, ROWS)), ("mean", None)):
            settings = {"alpha": 0, "temperature": 2.0, "reduction": reduction, "return_metrics": True, "grad": grad}
            check(case, case.labels, teacher, chunk_rows=4, backend=backend, **settings)


def test_alpha_0_needs_no_teacher_whatever_else_is_given(cpu: str) -> None:
    case = Case()
    want = kdfast.kd_loss(F.linear(case.hidden, case.weight), None, case.labels, alpha=0)
    for weight in (None, case.teacher_weight):
        loss = kdfast.linear_kd_loss(case.hidden, case.weight, None, weight, case.labels, alpha=0)
        torch.testing.assert_close(loss, want)


OPTIONS: dict[str, dict[str, Any]] = {
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.1},
    "softcaps": {"softcap": 5.0, "teacher_softcap": 7.0},
    "standardize": {"standardize": True},
    "a temperature per row": {
        "temperature": torch.linspace(1, 3, ROWS),
        "teacher_temperature": torch.linspace(3, 1, ROWS),
    },
    "weights": {"weight": torch.arange(ROWS) % 3},  # some are 0
    "a normalizer": {"normalizer": 7},
    "a normalizer tensor": {"normalizer": torch.tensor(7)},
    "the hard term alone": {"alpha": 0},
    "other weights": {"alpha": 3.0, "hard_weight": 0.5},
    "another ignore_index": {"ignore_index": 3},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_kd_losses(backend: str, option: str) -> None:
    case = Case()
    case.labels[case.labels < 0] = 3
    for i, reduction in enumerate(REDUCTIONS if "normalizer" not in option else ("mean",)):
        if backend in ON_GPU and i:
            continue
        settings = {"temperature": 2.0, "reduction": reduction, "return_metrics": True} | here(OPTIONS[option])
        grad = torch.linspace(-1, 2, ROWS) if reduction == "none" else None
        check(case, case.labels, grad=grad, chunk_rows=5, backend=backend, **settings)


@pytest.mark.parametrize("chunk_rows", (*CHUNKS, None))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_number_depends_on_the_chunks(cpu: str, reduction: str, chunk_rows: int | None) -> None:
    weight = torch.linspace(0.5, 2, ROWS)
    for dtype in (F32, F64):
        grad = torch.linspace(-1, 2, ROWS) if reduction == "none" else None
        case = Case(dtype)
        settings = {"reduction": reduction, "weight": weight, "return_metrics": True, "grad": grad}
        check(case, case.labels, chunk_rows=chunk_rows, backend=cpu, **settings)
    assert torch.equal(weight, torch.linspace(0.5, 2, ROWS))


def test_leading_dimensions_are_rows_and_batchmean_divides_by_the_first(backend: str) -> None:
    case = Case(rows=12)
    shaped = copy.copy(case)
    shaped.hidden, shaped.teacher_hidden = case.hidden.view(3, 4, -1), case.teacher_hidden.view(3, 4, -1)
    shaped.labels = case.labels.view(3, 4)
    for reduction in ("batchmean", "none") if backend not in ON_GPU else ("batchmean",):
        grad = torch.linspace(-1, 2, 12).view(3, 4) if reduction == "none" else None
        loss, grads, metrics = check(
            shaped, shaped.labels, grad=grad, reduction=reduction, chunk_rows=5, return_metrics=True, backend=backend
        )
        assert grads[0].shape == (3, 4, HIDDEN)
        assert metrics.kl.shape == loss.shape == ((3, 4) if reduction == "none" else ())


def test_one_row_without_dimensions_and_no_rows(cpu: str) -> None:
    case = Case(rows=1)
    leaf = case.hidden[0].clone().requires_grad_()
    loss = kdfast.linear_kd_loss(
        leaf, case.weight, case.teacher_hidden[0], case.teacher_weight, case.labels.abs()[0] % 9
    )
    loss.backward()
    assert loss.shape == ()
    assert leaf.grad.shape == (HIDDEN,)
    none = Case(rows=1)
    none.hidden, none.teacher_hidden, none.labels = none.hidden[:0], none.teacher_hidden[:0], none.labels[:0]
    for reduction in REDUCTIONS:
        loss, grads, metrics = fused(
            none,
            none.labels,
            reduction=reduction,
            return_metrics=True,
            grad=None if reduction != "none" else torch.empty(0),
        )
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert not loss.any()
        assert not any(g.any() for g in grads)
        assert metrics.kl.isnan().all()


def test_a_batch_of_ignored_rows_has_loss_and_gradient_0(backend: str) -> None:
    case = Case()
    loss, grads, metrics = fused(case, torch.full_like(case.labels, -100), return_metrics=True, backend=backend)
    assert loss == 0
    assert not any(g.any() for g in grads)
    assert all(m.isnan() for m in metrics)


def test_ignored_rows_may_hold_anything(backend: str) -> None:
    case = Case()
    want = fused(case, case.labels, chunk_rows=4, return_metrics=True, backend=backend)
    case.hidden[case.labels < 0] = float("nan")
    case.teacher_hidden[case.labels < 0] = float("inf")
    got = fused(case, case.labels, chunk_rows=4, return_metrics=True, backend=backend)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [(50, 50, 47), (64, 50, 47), (50, 64, 50), (48, 64, 48)])
def test_padded_heads_are_cut_to_vocab_size_and_their_gradient_is_0(backend: str, sizes: tuple[int, int, int]) -> None:
    ours, theirs, real = sizes
    case, other = Case(vocab=ours), Case(vocab=theirs)
    case.teacher_weight, labels = other.teacher_weight, case.labels.clamp_max(real - 1)
    for teacher in (None, case.teacher_logits()):
        _, grads, _ = check(case, labels, teacher, vocab_size=real, chunk_rows=4, backend=backend)
        assert not grads[1][real:].any()
        assert not grads[2][real:].any()
        assert grads[1][real - 1].any()


# --- teachers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["logits", "probs", "log_probs"])
@pytest.mark.parametrize("several", [False, True])
def test_without_a_teachers_head_the_teacher_is_whatever_kd_loss_takes(
    backend: str, target: str, several: bool
) -> None:
    for dtype in (F32, BF16) if backend not in ON_GPU else (F32,):
        case = Case(dtype)
        teacher: Any = as_target(case.teacher_logits(F32), target, 2.0)
        if several:
            teacher = [teacher, as_target(case.teacher_logits(F32).flip(0), target, 2.0)]
        check(case, case.labels, teacher, target=target, temperature=2.0, chunk_rows=4, backend=backend)


def test_a_teacher_that_is_a_view_of_a_longer_sequence_is_not_copied_whole(cpu: str) -> None:
    case = Case(rows=12)
    case.hidden = case.hidden.view(3, 4, -1)
    sequence = torch.randn(3, 5, VOCAB)
    labels = case.labels.view(3, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        got = fused(case, labels, sequence[:, :-1], chunk_rows=2)
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten::empty"))
    assert largest == VOCAB * HIDDEN * 4 < 12 * VOCAB * 4, "the weight's gradient"
    torch.testing.assert_close(got, plain(case, labels, F32, sequence[:, :-1]))


def test_a_teachers_head_has_a_bias_a_dtype_and_a_width_of_its_own(backend: str) -> None:
    case = Case()
    bias, hidden, weight = torch.randn(VOCAB), case.teacher_hidden.to(BF16), case.teacher_weight.to(BF16)
    leaf = case.hidden.clone().requires_grad_()
    loss = kdfast.linear_kd_loss(
        leaf, case.weight, hidden, weight, case.labels, teacher_bias=bias.to(BF16), chunk_rows=4, backend=backend
    )
    loss.backward()
    wide = case.hidden.double().requires_grad_()
    teacher = F.linear(hidden.double(), weight.double(), bias.to(BF16).double())
    truth = kdfast.kd_loss(wide @ case.weight.double().T, teacher, case.labels, backend="reference")
    truth.backward()
    torch.testing.assert_close(loss.detach().double(), truth.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)


def test_a_teacher_made_under_inference_mode_is_taken(cpu: str) -> None:
    case = Case()
    with torch.inference_mode():
        hidden, weight, logits = case.teacher_hidden * 1, case.teacher_weight * 1, case.teacher_logits()
    for reduction in ("mean", "none"):
        leaf = case.hidden.clone().requires_grad_()
        settings = {"labels": case.labels, "reduction": reduction}
        kdfast.linear_kd_loss(leaf, case.weight, hidden, weight, **settings).sum().backward()
        other = case.hidden.clone().requires_grad_()
        kdfast.linear_kd_loss(other, case.weight, logits, None, **settings).sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad)


def test_ligers_fused_jsd_is_the_call_that_the_readme_names(backend: str) -> None:
    """Its loss as it defines it: means over the kept rows, no T^2, beta the teacher's weight in the mixture."""
    case, beta, temperature, hard_weight, soft_weight = Case(F64, bias=False), 0.3, 2.0, 0.4, 0.6
    hidden, weight = case.leaves()
    student, teacher, kept = hidden @ weight.T, case.teacher_logits(), case.labels != -100
    log_q, log_p = (F.log_softmax(z / temperature, -1)[kept] for z in (student, teacher))
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    kl_p, kl_q = (F.kl_div(log_m, x, reduction="sum", log_target=True) for x in (log_p, log_q))
    soft = (beta * kl_p + (1 - beta) * kl_q) / kept.sum()
    want = hard_weight * F.cross_entropy(student, case.labels) + soft_weight * soft
    want.backward()
    loss, grads, _ = fused(
        case,
        case.labels,
        divergence="jsd",
        beta=beta,
        alpha=soft_weight,
        hard_weight=hard_weight,
        temperature=temperature,
        t_squared=False,
        backend=backend,
    )
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(grads, [hidden.grad, weight.grad])
