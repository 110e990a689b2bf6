"""The products of a linear loss: each is done once, none that nobody wants, in chunks of the rule's size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F32, ON_GPU, name
from linear_cases import HIDDEN, VOCAB, Case, fused, square
from torch import Tensor

import kdfast
from kdfast import chunks, products


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
    for dtype in (F32, BF16) if backend not in ON_GPU else (F32,):
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
