"""The products of a linear loss: only those that are needed, each once, in chunks of the rule's size."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F32, ON_GPU, name
from linear_cases import HIDDEN, VOCAB, Case, fused_results, square_case
from torch import Tensor

import kdfast
from kdfast import chunks, products


def count_products(function: Callable[[], Any], rows: int, vocab: int) -> float:
    """How many products of (rows, H) by (H, vocab), H = HIDDEN, a function computes."""
    with torch.profiler.profile(record_shapes=True) as profile:
        function()
    done = 0
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key in ("aten::mm", "aten::addmm", "aten::addmm_", "kdfast::matmul_"):
            first = event.key != "aten::mm"  # the summand comes before the factors
            (m, k), (_, n) = event.input_shapes[first : first + 2]
            done += event.count * m * k * n
    return done / (rows * HIDDEN * vocab)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=name)
def test_each_needed_product_is_computed_exactly_once(cpu: str, dtype: torch.dtype, reduction: str) -> None:
    case = square_case(dtype)
    for teacher, *wanted in itertools.product((None, case.teacher_logits()), *[(True, False)] * 2):
        leaves = [leaf.requires_grad_(want) for leaf, want in zip(case.leaves(), wanted, strict=True)]

        def step(leaves=leaves, teacher=teacher) -> None:
            loss = case.loss(leaves, case.labels, teacher, chunk_rows=4, reduction=reduction)
            if loss.requires_grad:
                loss.sum().backward()

        forward, backward = 1 + (teacher is None), sum(wanted)
        repeated = forward if reduction == "none" and backward else 0  # backward makes the logits once more
        assert count_products(step, 12, VOCAB) == forward + backward + repeated
        assert [leaf.grad is not None for leaf in leaves] == wanted


def test_training_the_bias_alone_needs_no_product_in_backward(cpu: str) -> None:
    case = square_case()
    bias = torch.zeros(VOCAB, requires_grad=True)
    leaves = [case.hidden, case.weight, bias]
    assert count_products(lambda: case.loss(leaves, case.labels).backward(), 12, VOCAB) == 2
    logits = (case.hidden @ case.weight.T).requires_grad_()
    kdfast.kd_loss(logits, case.teacher_logits(), case.labels).backward()
    torch.testing.assert_close(bias.grad, logits.grad.sum(0))


def test_dropped_rows_and_padded_classes_are_not_multiplied(cpu: str) -> None:
    case = square_case()
    case.labels[3:7] = -100
    weight = torch.ones(12)
    weight[0] = 0
    labels, leaves = torch.where(case.labels < 0, -100, case.labels % 40), case.leaves()
    assert count_products(lambda: case.loss(leaves, labels, vocab_size=40, row_weight=weight).backward(), 7, 40) == 4


def test_no_grad_needs_two_products_or_one_without_a_teacher(cpu: str) -> None:
    case = square_case()
    with torch.no_grad():
        assert count_products(lambda: case.loss(case.leaves(), case.labels), 12, VOCAB) == 2
        assert count_products(lambda: case.loss(case.leaves(), case.labels, alpha=0), 12, VOCAB) == 1


def test_backward_only_scales_the_gradients_that_forward_made(backend: str) -> None:
    for dtype in (F32, BF16) if backend not in ON_GPU else (F32,):
        case = square_case(dtype)
        _, want, _ = fused_results(case, case.labels, backend=backend)
        leaves = case.leaves()
        assert count_products((3 * case.loss(leaves, case.labels, backend=backend)).backward, 12, VOCAB) == 0
        torch.testing.assert_close([x.grad for x in leaves], [3 * g for g in want])


def test_losses_of_several_heads_add_up_and_backward_may_repeat(cpu: str) -> None:
    case = square_case()
    leaves = [*case.leaves(), Case(rows=12).leaves()[1]]
    hidden, first, second = leaves

    def combined_loss(loss_of: Callable[..., Tensor]) -> Tensor:
        return 0.3 * loss_of([hidden, first], case.labels) + 2 * loss_of([hidden, second], case.labels)

    loss = combined_loss(case.loss)
    got = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    plain_loss = combined_loss(lambda head, y: kdfast.kd_loss(F.linear(*head), case.teacher_logits(), y))
    want = torch.autograd.grad(plain_loss, leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(again, want)


def test_a_tied_weight_gets_the_sum_of_both_gradients(backend: str) -> None:
    case = square_case()
    tokens = torch.randint(VOCAB, (12,))
    weight = case.weight.clone().requires_grad_()
    tied = [torch.tanh(F.embedding(tokens, weight)), weight]
    plain_loss = kdfast.kd_loss(F.linear(*tied), case.teacher_logits(), case.labels, backend="reference")
    (got,) = torch.autograd.grad(case.loss(tied, case.labels, backend=backend), weight, retain_graph=True)
    (want,) = torch.autograd.grad(plain_loss, weight)
    torch.testing.assert_close(got, want)


def test_chunks_have_equal_sizes_by_the_rule_for_chunk_rows(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunks.default_rows(32_000, "cpu") == 512
    assert chunks.default_rows(128_000, "cpu") == 262
    assert chunks.default_rows(262_144, "cpu") == 256
    assert chunks.default_rows(32_000, "cuda") == 4096
    assert chunks.default_rows(128_256, "cuda") == 2092
    seen = []
    case = Case(rows=130)
    kind = type(products.head_for(case.weight, None, 130))
    logits = kind.logits
    monkeypatch.setattr(kind, "logits", lambda self, h, out: (seen.append(len(h)), logits(self, h, out))[1])
    kdfast.linear_kd_loss(case.hidden, case.weight, None, None, case.labels.abs() % VOCAB, alpha=0, chunk_rows=100)
    assert seen == [65, 65]
