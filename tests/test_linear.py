"""linear_kd_loss is kd_loss of the heads' products, with every product done once and no logits beyond a chunk's.

The truth is F.linear and the reference in fp64. Ours may be off by twice what the same in plain PyTorch in fp32 is off,
plus a few ulp at the size of the largest number; 16-bit gradients by half an ulp more, for they are rounded once.
"""

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu  # before anything that imports Triton
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import BF16, DIVERGENCES, DTYPES, F16, F32, F64, REDUCTIONS, as_target, here, labels_for, name
from judge import half_ulp, one_thread
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import kdfast
from kdfast import chunks, products

ROWS, HIDDEN, TEACHER_HIDDEN, VOCAB = 13, 8, 12, 50
CHUNKS = (
    1,  # every row by itself
    4,  # chunks of 4, but the last: of 3 and 4 where rows are dropped
    ROWS,  # one
)


class Case:
    """Hidden states, heads and labels, of which one is ignored; the teacher's side of another width."""

    def __init__(self, dtype: torch.dtype = F32, rows: int = ROWS, vocab: int = VOCAB, bias: bool = True) -> None:
        made = {"generator": torch.Generator("cpu").manual_seed(rows * 1000 + vocab), "dtype": F64, "device": "cpu"}
        self.hidden = torch.randn(rows, HIDDEN, **made)
        self.weight = 0.7 * torch.randn(vocab, HIDDEN, **made)  # logits of standard deviation 2
        self.bias = torch.randn(vocab, **made) if bias else None
        self.teacher_hidden = torch.randn(rows, TEACHER_HIDDEN, **made)
        self.teacher_weight = 0.6 * torch.randn(vocab, TEACHER_HIDDEN, **made)
        for field, value in vars(self).items():
            setattr(self, field, here(value if value is None else value.to(dtype)))
        labels = torch.randint(vocab, (rows,), generator=made["generator"], device="cpu")
        labels[rows // 3] = -100
        self.labels = here(labels)

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        student = (self.hidden, self.weight, self.bias)
        return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in student if x is not None]

    def teacher_logits(self, dtype: torch.dtype | None = None) -> Tensor:
        hidden, weight = (x.to(dtype or x.dtype) for x in (self.teacher_hidden, self.teacher_weight))
        return hidden @ weight.T


Results = tuple[Tensor, list[Tensor], Any]


def fused(
    case: Case, labels: Tensor | None, teacher: Any = None, grad: Tensor | None = None, **settings: Any
) -> Results:
    """Loss, gradients in hidden states, weight and bias, and metrics."""
    leaves = case.leaves()
    teacher = (case.teacher_hidden, case.teacher_weight) if teacher is None else (teacher, None)
    bias = leaves[2] if len(leaves) > 2 else None
    loss = kdfast.linear_kd_loss(*leaves[:2], *teacher, labels, student_bias=bias, **settings)
    return finished(loss, leaves, grad)


def plain(
    case: Case,
    labels: Tensor | None,
    dtype: torch.dtype,
    teacher: Any = None,
    grad: Tensor | None = None,
    **settings: Any,
) -> Results:
    """The same by F.linear and the reference, in that dtype."""
    leaves = case.leaves(dtype)
    settings = {k: v for k, v in settings.items() if k not in ("chunk_rows", "accumulate_dtype")}
    settings["backend"] = "reference"
    teacher = case.teacher_logits(dtype) if teacher is None else teacher
    loss = kdfast.kd_loss(F.linear(*leaves), teacher, labels, **settings)
    return finished(loss, leaves, grad)


def finished(loss: Any, leaves: list[Tensor], grad: Tensor | None) -> Results:
    loss, metrics = loss if isinstance(loss, tuple) else (loss, ())
    loss.backward(grad if grad is None else grad.to(loss.dtype))
    return loss.detach(), [x.grad for x in leaves], metrics


def check(case: Case, labels: Tensor | None, teacher: Any = None, **settings: Any) -> Results:
    """Runs it and judges it."""
    got = fused(case, labels, teacher, **settings)
    kind = F64 if case.hidden.dtype == F64 else F32
    with one_thread():
        truth = plain(case, labels, F64, teacher, **settings)
        eager = truth if kind == F64 else plain(case, labels, kind, teacher, **settings)
    assert got[0].dtype == kind
    judge("loss", got[0], truth[0], eager[0], kind)
    for i, what in enumerate(("hidden", "weight", "bias")[: len(got[1])]):
        assert got[1][i].dtype == case.hidden.dtype
        judge(f"gradient in {what}", got[1][i], truth[1][i], eager[1][i], kind)
    for i, metric in enumerate(got[2]):
        judge(f"metric {i}", metric, truth[2][i], eager[2][i], kind)
    return got


def judge(what: str, got: Tensor, truth: Tensor, eager: Tensor, kind: torch.dtype) -> None:
    size = truth.abs().nan_to_num(0).max() if truth.numel() else 0.0
    allowed = 2 * (eager.double() - truth).abs().nan_to_num(0).amax() if truth.numel() else 0.0
    allowed = allowed + 16 * torch.finfo(kind).eps * size + torch.zeros_like(truth)
    if got.dtype in (BF16, F16):
        allowed = allowed + half_ulp(truth, got.dtype)
    missed = (got.double() - truth).abs()
    assert got.shape == truth.shape, what
    assert ((missed <= allowed) | (got.isnan() & truth.isnan())).all(), f"{what}: off by {missed.max():.3g}"


# --- the same numbers as kd_loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_is_kd_losses(backend: str, divergence: str) -> None:
    grid = [(d, r) for d in DTYPES for r in ("mean", "none")]
    for dtype, reduction in grid if backend != "triton" else [grid[DIVERGENCES.index(divergence) % len(grid)]]:
        case = Case(dtype)
        grad = None if reduction == "mean" else torch.linspace(-1, 2, ROWS)
        for labels in (case.labels, labels_for(divergence, case.labels)):
            settings = {"temperature": 2.0, "divergence": divergence, "reduction": reduction, "grad": grad}
            check(case, labels, backend=backend, chunk_rows=4, return_metrics=True, **settings)


def test_metrics_of_a_loss_without_a_soft_term_change_no_gradient(backend: str) -> None:
    case = Case(F64)
    for teacher in (None, case.teacher_logits()) if backend != "triton" else (None,):
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
        if backend == "triton" and i:
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
    for reduction in ("batchmean", "none") if backend != "triton" else ("batchmean",):
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


# --- teachers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["logits", "probs", "log_probs"])
@pytest.mark.parametrize("several", [False, True])
def test_without_a_teachers_head_the_teacher_is_whatever_kd_loss_takes(
    backend: str, target: str, several: bool
) -> None:
    for dtype in (F32, BF16) if backend != "triton" else (F32,):
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


# --- products -----------------------------------------------------------------------------------------------------


def multiplied(function: Callable[[], Any], rows: int, vocab: int) -> float:
    """How many products of (rows, H) by (H, vocab), H = HIDDEN, a function does."""
    with torch.profiler.profile(record_shapes=True) as profile:
        function()
    done = 0
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key in ("aten::mm", "aten::addmm", "aten::addmm_"):
            first = event.key != "aten::mm"  # what is added comes before the factors
            (m, k), (_, n) = event.input_shapes[first : first + 2]
            done += event.count * m * k * n
    return done / (rows * HIDDEN * vocab)


def square(dtype: torch.dtype = F32) -> Case:
    """A case whose teacher is as wide as its student, so that all products are of one size."""
    case = Case(dtype, rows=12, bias=False)
    case.teacher_hidden, case.teacher_weight = case.hidden.flip(0), case.weight.flip(0)
    case.labels = case.labels % VOCAB  # none ignored
    return case


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=name)
def test_each_product_is_done_once_and_none_that_nobody_wants(cpu: str, dtype: torch.dtype, reduction: str) -> None:
    case = square(dtype)
    teachers = {"its head": (case.teacher_hidden, case.teacher_weight), "logits": (case.teacher_logits(), None)}
    for kind, teacher in teachers.items():
        for hidden_frozen in (False, True):
            for weight_frozen in (False, True):
                hidden, weight = case.hidden.clone(), case.weight.clone()
                hidden.requires_grad_(not hidden_frozen)
                weight.requires_grad_(not weight_frozen)

                def step(h=hidden, w=weight, t=teacher) -> None:
                    loss = kdfast.linear_kd_loss(h, w, *t, case.labels, chunk_rows=4, reduction=reduction)
                    if loss.requires_grad:
                        loss.sum().backward()

                forward, backward = 1 + (kind == "its head"), 2 - hidden_frozen - weight_frozen
                again = forward if reduction == "none" and backward else 0  # its coefficients come too late
                assert multiplied(step, 12, VOCAB) == forward + backward + again
                assert (hidden.grad is None) == hidden_frozen
                assert (weight.grad is None) == weight_frozen


def test_a_bias_alone_in_training_costs_no_product(cpu: str) -> None:
    case = square()
    bias = torch.zeros(VOCAB, requires_grad=True)

    def step() -> None:
        teacher = case.teacher_hidden, case.teacher_weight
        kdfast.linear_kd_loss(case.hidden, case.weight, *teacher, case.labels, student_bias=bias).backward()

    assert multiplied(step, 12, VOCAB) == 2
    logits = (case.hidden @ case.weight.T).requires_grad_()
    kdfast.kd_loss(logits, case.teacher_logits(), case.labels).backward()
    torch.testing.assert_close(bias.grad, logits.grad.sum(0))


def test_dropped_rows_and_padded_classes_are_not_multiplied(cpu: str) -> None:
    case = square()
    case.labels[3:7] = -100
    weight = torch.ones(12)
    weight[0] = 0
    case.labels = torch.where(case.labels < 0, -100, case.labels % 40)
    leaves = case.leaves()

    def step() -> None:
        teacher = case.teacher_hidden, case.teacher_weight
        kdfast.linear_kd_loss(*leaves, *teacher, case.labels, vocab_size=40, weight=weight).backward()

    assert multiplied(step, 7, 40) == 4


def test_under_no_grad_there_are_two_products_and_a_teacher_that_is_not_read_has_none(cpu: str) -> None:
    case = square()
    leaves, teacher = case.leaves(), (case.teacher_hidden, case.teacher_weight)

    @torch.no_grad()
    def value(**settings: Any) -> Tensor:
        return kdfast.linear_kd_loss(*leaves, *teacher, case.labels, **settings)

    assert multiplied(value, 12, VOCAB) == 2
    assert multiplied(lambda: value(alpha=0), 12, VOCAB) == 1


def test_backward_multiplies_nothing_and_scales_what_forward_made(backend: str) -> None:
    for dtype in (F32, BF16) if backend != "triton" else (F32,):
        case = square(dtype)
        _, want, _ = fused(case, case.labels, backend=backend)
        leaves = case.leaves()
        loss = kdfast.linear_kd_loss(*leaves, case.teacher_hidden, case.teacher_weight, case.labels, backend=backend)
        assert multiplied((3 * loss).backward, 12, VOCAB) == 0
        torch.testing.assert_close([x.grad for x in leaves], [3 * g for g in want])


def test_losses_of_several_heads_are_combined_and_backpropagated_again(cpu: str) -> None:
    first, second = square(), Case(rows=12, bias=False)
    hidden, *_ = first.leaves()
    heads = [first.weight.clone().requires_grad_(), second.weight.clone().requires_grad_()]
    teacher = first.teacher_hidden, first.teacher_weight

    def combined_loss(loss_of: Callable[..., Tensor]) -> Tensor:
        return 0.3 * loss_of(hidden, heads[0], *teacher, first.labels) + 2 * loss_of(
            hidden, heads[1], *teacher, first.labels
        )

    loss = combined_loss(kdfast.linear_kd_loss)
    leaves = [hidden, *heads]
    got = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    want = torch.autograd.grad(combined_loss(lambda h, w, th, tw, y: kdfast.kd_loss(h @ w.T, th @ tw.T, y)), leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(again, want)


def test_a_tied_weight_gets_the_sum_of_both_gradients(backend: str) -> None:
    case = square()
    tokens = torch.randint(VOCAB, (12,))
    grads = []
    for fused_one in (True, False):
        weight = case.weight.clone().requires_grad_()
        hidden = torch.tanh(F.embedding(tokens, weight))
        if fused_one:
            loss = kdfast.linear_kd_loss(
                hidden, weight, case.teacher_hidden, case.teacher_weight, case.labels, backend=backend
            )
        else:
            loss = kdfast.kd_loss(hidden @ weight.T, case.teacher_logits(), case.labels, backend="reference")
        loss.backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


# --- 16 bits ------------------------------------------------------------------------------------------------------


def many(dtype: torch.dtype) -> Case:
    return Case(dtype, rows=600, bias=False)


def off(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def test_a_16_bit_heads_gradient_is_added_up_in_fp32_unless_asked_otherwise(cpu: str) -> None:
    case = many(BF16)
    _, (_, truth), _ = plain(case, case.labels, F64)
    errors = {}
    for accumulate in (F32, BF16, F64):
        _, (_, grad), _ = fused(case, case.labels, chunk_rows=4, accumulate_dtype=accumulate)
        assert grad.dtype == BF16
        errors[accumulate] = off(grad, truth)
    assert errors[F32] < 2.0**-9  # rounded once
    assert errors[F64] < 2.0**-9
    assert errors[BF16] > 4 * errors[F32]  # rounded 150 times


@pytest.fixture
def with_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that has instructions for 16-bit matrices."""
    monkeypatch.setattr(products, "_instructions_for", lambda dtype: True)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=name)
def test_with_instructions_for_16_bits_products_round_to_them(
    cpu: str, dtype: torch.dtype, with_instructions: None
) -> None:
    case = many(dtype)
    case.bias = torch.linspace(-1, 1, VOCAB).to(dtype)
    assert products.head(case.weight, None).logits_dtype == dtype
    loss, grads, _ = fused(case, case.labels, chunk_rows=7, temperature=2.0)
    truth = plain(case, case.labels, F64, temperature=2.0)
    assert loss == pytest.approx(float(truth[0]), rel=torch.finfo(dtype).eps)
    for got, want in zip(grads, truth[1], strict=True):
        assert got.dtype == dtype
        assert off(got, want) < 2 * torch.finfo(dtype).eps


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU: its products with fp32 results, which PyTorch has no CPU kernels for, and no look at values."""

    def mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype
        return a.to(dtype) @ b.to(dtype)

    def mm_out(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return out.copy_(mm(a, b, dtype))

    def addmm_out(c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta=1, alpha=1, out: Tensor) -> Tensor:
        return out.copy_(c + mm(a, b, dtype))

    with torch.library._scoped_library("aten", "IMPL") as library:
        for overload, function in (("mm.dtype", mm), ("mm.dtype_out", mm_out), ("addmm.dtype_out", addmm_out)):
            library.impl(overload, function, "CPU")
        monkeypatch.setattr(products, "WidenedHead", products.TensorCoreHead)
        monkeypatch.setattr(products, "_instructions_for", lambda dtype: False)
        monkeypatch.setattr(chunks, "_may_look", lambda x: False)
        yield


@pytest.mark.skipif(gpu.ON_DEVICE, reason="here all tests of this file run on a GPU's own products")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=name)
def test_tensor_cores_round_no_logits_and_dropped_rows_are_zeros_there(
    cpu: str, dtype: torch.dtype, reduction: str, tensor_cores: None
) -> None:
    case = many(dtype)
    case.bias = torch.linspace(-1, 1, VOCAB).to(dtype)
    case.labels[100:200] = -100
    grad = torch.linspace(-1, 2, 600) if reduction == "none" else None
    settings = {"temperature": 2.0, "reduction": reduction, "return_metrics": True, "grad": grad}
    truth = plain(case, case.labels, F64, **settings)
    case.hidden[150] = float("nan")  # of a row that is ignored
    loss, grads, metrics = fused(case, case.labels, chunk_rows=7, **settings)
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([m.double() for m in metrics], list(truth[2]), rtol=1e-5, atol=1e-6, equal_nan=True)
    for got, want in zip(grads, truth[1], strict=True):
        assert got.dtype == dtype
        assert off(got, want) < torch.finfo(dtype).eps  # once the gradient of the logits, once the result


def test_a_loss_scaler_in_float16_loses_no_gradient(backend: str) -> None:
    case = Case(F16, bias=False)
    scaler = torch.amp.GradScaler(case.hidden.device.type)  # its first factor is 65536
    total = 2**20
    leaves = case.leaves()
    teacher = case.teacher_hidden, case.teacher_weight
    loss = kdfast.linear_kd_loss(*leaves, *teacher, case.labels, normalizer=total, chunk_rows=4, backend=backend)
    scaler.scale(loss).backward()
    _, truth, _ = plain(case, case.labels, F64, normalizer=total)
    for leaf, want in zip(leaves, truth, strict=True):
        torch.testing.assert_close(leaf.grad.double(), want * 65536, rtol=2.0**-10, atol=2.0**-24)
        rounded = want.half().double() * 65536
        assert off(leaf.grad, want * 65536) < 0.1 * off(rounded, want * 65536), "rounded before it was scaled"


def test_float16_loses_nothing_to_rows_weights_or_a_narrow_accumulator(cpu: str, with_instructions: None) -> None:
    """Where its matrices are multiplied by instructions, gradients of logits are float16 factors."""
    case = many(F16)
    for power in (-24, 17):  # which alone would underflow, overflow
        weight = torch.linspace(0.5, 1, 600) * 2.0**power
        for settings in ({"reduction": "sum"}, {"normalizer": 2.0**20}):
            settings |= {"weight": weight, "accumulate_dtype": F16}
            scale = torch.tensor(2.0**-power if "reduction" in settings else 2.0 ** (20 - power))
            _, grads, _ = fused(case, case.labels, chunk_rows=70, grad=scale, **settings)
            _, truth, _ = plain(case, case.labels, F64, grad=scale, **settings)
            for got, want in zip(grads, truth, strict=True):
                assert off(got, want) < 4 * torch.finfo(F16).eps


@pytest.mark.parametrize("dtype", [BF16, F16], ids=name)
def test_autocast_casts_what_f_linear_casts(backend: str, dtype: torch.dtype) -> None:
    case = Case()
    with torch.autocast(case.hidden.device.type, dtype):
        loss, grads, _ = fused(case, case.labels, chunk_rows=4, backend=backend)
    narrow = Case()
    for field in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight"):
        setattr(narrow, field, getattr(case, field).to(dtype))
    same, same_grads, _ = fused(narrow, case.labels, chunk_rows=4, backend=backend)
    assert torch.equal(loss, same)
    for got, want in zip(grads, same_grads, strict=True):
        assert got.dtype == F32
        assert torch.equal(got, want.float())


# --- a citizen of PyTorch -----------------------------------------------------------------------------------------


class Model(nn.Module):
    """A trunk, a head, and the loss at its end."""

    def __init__(self, checkpointed: bool = False, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(HIDDEN, 16), nn.Tanh(), nn.Linear(16, HIDDEN))
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.loss, self.checkpointed = kdfast.LinearKDLoss(temperature=2.0, chunk_rows=4, **settings), checkpointed

    def forward(self, x: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor, **more: Any) -> Tensor:
        hidden = checkpoint(self.trunk, x, use_reentrant=False) if self.checkpointed else self.trunk(x)
        head = self.head
        return self.loss(hidden, head.weight, teacher_hidden, teacher_weight, labels, student_bias=head.bias, **more)

    def unfused(self, x: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.trunk(x))
        return kdfast.kd_loss(logits, teacher_hidden @ teacher_weight.T, labels, temperature=2.0, backend="reference")


def batch(case: Case) -> tuple[Tensor, ...]:
    return case.hidden, case.teacher_hidden, case.teacher_weight, case.labels


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def unfused_gradients(case: Case) -> list[Tensor]:
    model = Model()
    model.unfused(*batch(case)).backward()
    return gradients(model)


@pytest.mark.parametrize(
    ("compiler", "settings"),
    [
        ("aot_eager", {}),
        ("aot_eager", {"reduction": "none"}),
        ("aot_eager", {"return_metrics": True}),
        ("inductor", {}),  # once: what else differs is inside of the operator
    ],
    ids=["mean", "none", "metrics", "inductor"],
)
def test_a_model_that_ends_in_the_loss_compiles_to_one_graph(settings: dict[str, Any], compiler: str) -> None:
    torch._dynamo.reset()
    case, model = Case(), Model(**settings)

    def step(*args: Tensor) -> Tensor:
        loss = model(*args)
        return (loss[0] if isinstance(loss, tuple) else loss).mean()

    with torch._inductor.utils.fresh_cache():
        compiled = torch.compile(step, fullgraph=True, backend=compiler)
        loss = compiled(*batch(case))
        loss.backward()
    got = gradients(model)
    model.zero_grad()
    want = step(*batch(case))
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(got, gradients(model))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*batch(case)), want)


def test_marked_dynamic_rows_compile_once(cpu: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (5, 13, 9):
        case = Case(rows=rows)
        inputs = batch(case)
        for i in (0, 1, 3):
            torch._dynamo.mark_dynamic(inputs[i], 0)
        model.zero_grad()
        compiled(*inputs).backward()
        torch.testing.assert_close(gradients(model), unfused_gradients(case))
    assert counter.frame_count == 1


def test_checkpointing_the_trunk_changes_no_gradient(backend: str) -> None:
    case = Case()
    model = Model(checkpointed=True, backend=backend)
    model(*batch(case)).backward()
    torch.testing.assert_close(gradients(model), unfused_gradients(case))


def _rank(rank: int, folder: str, kind: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    case = Case()
    x, hidden, weight, labels = batch(case)
    mine = slice(0, 6) if rank == 0 else slice(6, None)  # 5 tokens that count on one, 7 on the other
    model: Any = Model()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.trunk, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with pytest.raises(TypeError, match="^student_weight: is a DTensor"):
            kdfast.linear_kd_loss(x, model.head.weight, hidden, weight)
    tokens = (labels != -100).sum()
    # both average over the ranks, hence the tokens of all of them by their number
    model(x[mine], hidden[mine], weight, labels[mine], normalizer=tokens / 2).backward()
    grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients(model)]
    torch.save(grads, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_get_the_gradients_of_one(tmp_path: Path, kind: str) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path), kind), nprocs=2)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), unfused_gradients(Case()))


def test_a_teacher_in_training_gets_no_graph(cpu: str) -> None:
    case = Case()
    teacher = [x.clone().requires_grad_() for x in (case.teacher_hidden, case.teacher_weight, torch.zeros(VOCAB))]
    loss, metrics = kdfast.linear_kd_loss(
        case.hidden, case.weight, *teacher[:2], case.labels, teacher_bias=teacher[2], return_metrics=True
    )
    assert not loss.requires_grad
    assert not metrics.kl.requires_grad


def test_double_backward_is_an_error(cpu: str) -> None:
    case = Case()
    for reduction in ("mean", "none"):
        leaves = case.leaves()
        teacher = case.teacher_hidden, case.teacher_weight
        loss = kdfast.linear_kd_loss(*leaves[:2], *teacher, case.labels, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss, leaves[:2], create_graph=True)


def test_the_module_is_linear_kd_loss_with_its_settings_and_can_be_copied(cpu: str) -> None:
    case = Case()
    settings = {"temperature": 3.0, "divergence": "jsd", "beta": 0.3, "chunk_rows": 5, "accumulate_dtype": F64}
    loss = kdfast.LinearKDLoss(**settings)
    tensors = case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.labels
    want = kdfast.linear_kd_loss(*tensors, student_bias=case.bias, normalizer=9, **settings)
    for module in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(module(*tensors, student_bias=case.bias, normalizer=9), want)
    with pytest.raises(TypeError, match=r"LinearKDLoss\(\) got an unexpected keyword argument 'T'"):
        kdfast.LinearKDLoss(T=2.0)
    assert not loss.state_dict()
    assert repr(loss) == (
        "LinearKDLoss(temperature=3.0, alpha=None, divergence='jsd', beta=0.3, chunk_rows=5, "
        "accumulate_dtype=torch.float64)"
    )


# --- errors, before any product -----------------------------------------------------------------------------------

H, W, TH, TW = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 6), torch.randn(5, 6)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_hidden": [1.0]}, TypeError, "^student_hidden: must be a tensor, not list"),
    ({"student_hidden": H.long()}, RuntimeError, "^student_hidden: has dtype torch.int64, but it must be one of"),
    ({"student_hidden": torch.tensor(1.0)}, ValueError, r"^student_hidden: has shape \(\), but it must be \(..., H\)"),
    ({"student_weight": None}, TypeError, "^student_weight: must be a tensor, not None"),
    (
        {"student_weight": W.T},
        ValueError,
        r"^student_weight: has shape \(4, 5\), but with student_hidden of shape \(3, 4\) it must be \(V, 4\)",
    ),
    ({"student_weight": W[0]}, ValueError, r"^student_weight: has shape \(4,\), .* must be \(V, 4\) with V >= 1"),
    ({"student_hidden": H[:, :0]}, ValueError, r"^student_hidden: has shape \(3, 0\), but it must be .* with H >= 1"),
    ({"student_weight": W[:0]}, ValueError, r"^student_weight: has shape \(0, 4\), .* with V >= 1"),
    ({"student_weight": W.double()}, RuntimeError, "^student_weight: has dtype torch.float64, but student_hidden has"),
    ({"student_weight": W.to("meta")}, RuntimeError, "^student_weight: is on meta, but student_hidden is on cpu"),
    ({"student_bias": torch.zeros(4)}, ValueError, r"^student_bias: has shape \(4,\), .* it must be \(5,\)"),
    ({"student_bias": torch.zeros(5).half()}, RuntimeError, "^student_bias: has dtype torch.float16, but"),
    ({"teacher_hidden": None}, TypeError, "^teacher_hidden: must be a tensor, not None"),
    ({"teacher_hidden": [TH]}, TypeError, "^teacher_hidden: must be a tensor, not list"),
    ({"teacher_hidden": TH[:2]}, ValueError, r"^teacher: has shape \(2, 5\), .* must be \(3, V\)"),
    ({"teacher_weight": W}, ValueError, r"^teacher_weight: has shape \(5, 4\), .* must be \(V, 6\)"),
    ({"teacher_weight": TW[:4]}, ValueError, "^teacher: has 4 classes, but student_logits has 5; .*vocab_size"),
    ({"teacher_weight": TW[:4], "vocab_size": 5}, ValueError, "^vocab_size: 5 is more than the 4 classes of teacher"),
    ({"teacher_bias": torch.zeros(4)}, ValueError, r"^teacher_bias: has shape \(4,\), .* it must be \(5,\)"),
    ({"teacher_weight": None}, ValueError, r"^teacher: has 6 classes, but student_logits has 5"),
    (
        {"teacher_weight": None, "teacher_bias": torch.zeros(5)},
        ValueError,
        "^teacher_bias: given without teacher_weight",
    ),
    ({"target": "probs"}, ValueError, "^target: 'probs' with a teacher_weight, whose product gives 'logits'"),
    ({"target": "probability"}, ValueError, "^target: 'probability' is not one of 'logits', 'probs', 'log_probs'"),
    ({"labels": torch.tensor([0, 5, 1])}, IndexError, "^labels: label 5 in row 1 is out of range"),
    ({"labels": torch.tensor([0, 1, 7]), "chunk_rows": 1}, IndexError, "^labels: label 7 in row 2 is out of range"),
    ({"labels": torch.tensor([0, 1])}, ValueError, r"^labels: has shape \(2,\)"),
    ({"weight": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "^weight: -1 in row 1"),
    ({"chunk_rows": 0}, ValueError, "^chunk_rows: 0 must be at least 1"),
    ({"chunk_rows": 2.0}, TypeError, "^chunk_rows: must be an int, not 2.0"),
    ({"accumulate_dtype": torch.int64}, ValueError, "^accumulate_dtype: torch.int64 is not one of torch.float32"),
    ({"accumulate_dtype": None}, ValueError, "^accumulate_dtype: None is not one of"),
    ({"inplace": True}, ValueError, "^inplace: leave it out"),
    ({"temperature": 0}, ValueError, "^temperature: 0 must be finite and > 0"),
    ({"T": 2.0}, TypeError, r"linear_kd_loss\(\) got an unexpected keyword argument 'T'"),
    ({"backend": "gpu"}, ValueError, "^backend: 'gpu' is not one of"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: ", ".join(case[0]))
def test_a_wrong_argument_is_a_named_error_before_any_product(
    cpu: str, case: tuple[dict[str, Any], type[Exception], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, error, words = case
    monkeypatch.setattr(products.Head, "logits", lambda *_: pytest.fail("a product was done"))
    arguments = {"student_hidden": H, "student_weight": W, "teacher_hidden": TH, "teacher_weight": TW}
    with pytest.raises(error, match=rf"(?s){words}") as caught:
        kdfast.linear_kd_loss(**arguments | given)
    assert type(caught.value) is error


# --- chunks -------------------------------------------------------------------------------------------------------


def test_chunks_are_of_one_size_and_as_large_as_the_rule_says(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunks.default_rows(32_000, "cpu") == 512
    assert chunks.default_rows(128_000, "cpu") == 393
    assert chunks.default_rows(262_144, "cpu") == 256
    assert chunks.default_rows(32_000, "cuda") == 4096
    assert chunks.default_rows(128_256, "cuda") == 2092
    seen = []
    logits = products.Head.logits
    monkeypatch.setattr(products.Head, "logits", lambda self, h, out: (seen.append(len(h)), logits(self, h, out))[1])
    case = Case(rows=130)
    kdfast.linear_kd_loss(case.hidden, case.weight, None, None, case.labels.abs() % VOCAB, alpha=0, chunk_rows=100)
    assert seen == [65, 65]
