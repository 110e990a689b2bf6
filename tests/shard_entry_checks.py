"""Checks of sparse teachers and of tokens over split vocabularies, each run on every rank of a group; see shards.py."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import F64, batch
from shard_promises import Counter
from shards import Group, same, sharded_results, whole_results
from torch import Tensor

import kdfast
from kdfast import TopKTargets, topk_targets

ROWS, VOCAB, K, HIDDEN = 7, 60, 9, 6


def data() -> tuple[Tensor, TopKTargets, Tensor]:
    """Logits, a sparse teacher with absent entries and a row without any, and labels."""
    student, teacher, labels = batch(ROWS, VOCAB, F64)
    labels[0], labels[2] = VOCAB - 1, -100
    indices, log_probs = topk_targets(teacher, K, 2.0)
    indices[1, 4:], log_probs[1, 4:], log_probs[3] = -1, -torch.inf, -torch.inf
    return student, TopKTargets(indices, log_probs), labels


OPTIONS: tuple[dict[str, Any], ...] = (
    {"reduction": "none", "row_weight": torch.linspace(0, 2, ROWS)},
    {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 20.0, "logit_scale": 1.4},
    {"return_metrics": True, "temperature": torch.linspace(1, 3, ROWS)},
)
CALLS = (
    ("forward_kl", "tail"), ("jsd", "tail"), ("reverse_kl", "conditional"), ("hellinger", "renormalize"),
    ("cross_entropy", "truncate"),
)  # fmt: skip


def sparse_teachers_of_any_shard_give_one_process_s_numbers(group: Group) -> None:
    s, teacher, y = data()
    for divergence, missing in CALLS:
        for more in OPTIONS:
            options = {"temperature": 2.0, "divergence": divergence, "missing": missing} | more
            want = whole_results(s, teacher, y, **options)
            got = sharded_results(group, s, teacher, y, whole=True, **options)
            same(f"{divergence}, {missing}, {list(more)}", got, want, group.own(VOCAB))


def heads_that_are_split_take_sparse_teachers(group: Group) -> None:
    torch.manual_seed(2)
    hidden, weight = torch.randn(ROWS, HIDDEN, dtype=F64), torch.randn(VOCAB, HIDDEN, dtype=F64)
    _, teacher, y = data()
    own = group.own(VOCAB)
    for divergence, missing in CALLS:
        found = []
        for part, options in ((slice(None), {}), (own, {"process_group": dist.group.WORLD, "vocab_start": own.start})):
            h, w = hidden.clone().requires_grad_(), weight[part].clone().requires_grad_()
            options |= {"divergence": divergence, "missing": missing, "temperature": 2.0, "chunk_rows": 3}
            loss = kdfast.linear_kd_loss(h, w, teacher, None, y, **options)
            loss.backward()
            found.append((loss.detach(), h.grad, w.grad if w.shape[0] < VOCAB else w.grad[own]))
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def value_of(results: kdfast.TokenLogProbs) -> Tensor:
    """Of all three, each row weighted otherwise."""
    there = torch.where(results.log_probs.isfinite(), results.log_probs, 0)
    by_row = torch.linspace(-1, 1, ROWS, dtype=F64)
    return 0.3 * there.sum() + (by_row * results.entropy).sum() + results.log_rest.sum()


def tokens_of_any_shard_give_one_process_s_numbers(group: Group) -> None:
    s, _, y = data()
    own = group.own(VOCAB)
    several = torch.cat([y.unsqueeze(-1).clamp(min=0)] * 2 + [torch.full((ROWS, 1), -1)], 1)  # a class twice, and none
    options: dict[str, Any] = {"temperature": torch.linspace(1, 3, ROWS, dtype=F64), "softcap": 9.0, "logit_scale": 1.3}
    torch.manual_seed(2)
    hidden, weight = torch.randn(ROWS, HIDDEN, dtype=F64), torch.randn(VOCAB, HIDDEN, dtype=F64)
    for ids in (y, several):
        found: list[Any] = []
        for part, more in ((slice(None), {}), (own, {"process_group": dist.group.WORLD, "vocab_start": own.start})):
            leaf = s[:, part].clone().requires_grad_()
            h, w = hidden.clone().requires_grad_(), weight[part].clone().requires_grad_()
            of_logits = kdfast.token_log_probs(leaf, ids, **options, **more)
            of_hidden = kdfast.linear_token_log_probs(h, w, ids, chunk_rows=3, **options, **more)
            value_of(of_logits).backward()
            value_of(of_hidden).backward()
            logits_grad, weight_grad = (leaf.grad, w.grad) if more else (leaf.grad[:, own], w.grad[own])
            found.append((*(x.detach() for x in (*of_logits, *of_hidden)), logits_grad, h.grad, weight_grad))
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def tokens_keep_their_digits(group: Group) -> None:
    """One shard's logits far above the others', and probabilities near 1 and 0: as exact as one process is."""
    s, _, y = data()
    own = group.own(VOCAB)
    for base in (0.0, 40.0, 1e4):
        logits = s.float() + base * (torch.arange(VOCAB) >= VOCAB - 4)
        ids = torch.stack([y.clamp(min=0), torch.full_like(y, VOCAB - 1), torch.full_like(y, 0)], -1)
        exact, whole, got = (
            differentiated(x, ids, part, more)
            for x, part, more in (
                (logits.double(), slice(None), {}), (logits, slice(None), {}),
                (logits, own, {"process_group": dist.group.WORLD, "vocab_start": own.start}),
            )
        )  # fmt: skip
        for i, (want, one, found) in enumerate(zip(exact, whole, got, strict=True)):
            worst = (one - want).abs().nan_to_num(0.0).max()
            want = want[:, own] if i == 3 else want  # the gradient
            error = (found - want).abs().nan_to_num(0.0)
            allowed = 2 * worst + 4e-7 * want.abs().nan_to_num(0.0, 0.0, 0.0) + 1e-9
            assert (error <= allowed).all(), (base, i, (error - allowed).max())


def differentiated(logits: Tensor, ids: Tensor, part: slice, more: dict[str, Any]) -> tuple[Tensor, ...]:
    leaf = logits[:, part].clone().requires_grad_()
    results = kdfast.token_log_probs(leaf, ids, temperature=1.5, **more)
    finite = torch.where(results.log_probs > -1e3, results.log_probs, 0)
    (finite.sum() + results.entropy.sum() + torch.where(results.log_rest > -1e3, results.log_rest, 0).sum()).backward()
    return *(x.detach() for x in results), leaf.grad


def entries_and_tokens_have_one_gather_and_none_in_backward(group: Group) -> None:
    s, teacher, y = data()
    own = group.own(VOCAB)
    options: dict[str, Any] = {"process_group": dist.group.WORLD, "vocab_start": own.start}
    for loss, counts in (
        (lambda leaf: kdfast.token_log_probs(leaf, teacher.indices, **options).log_rest.sum(), (1, 1, K + 4, 0)),
        (lambda leaf: kdfast.kd_loss(leaf, teacher, divergence="jsd", **options), (1, 1, K + 3, 0)),
        (lambda leaf: kdfast.kd_loss(leaf, teacher, y, **options), (1, 2, 14 + K + 3, 0)),
    ):
        leaf = s[:, own].clone().requires_grad_()
        with Counter() as forward:
            value = loss(leaf)
        with Counter() as backward:
            value.backward()
        assert forward.counts() == counts, forward.counts()
        assert backward.counts() == (0, 0, 0, 0), backward.counts()


def entries_and_tokens_compile_to_one_graph(group: Group) -> None:
    s, teacher, y = data()
    own = group.own(VOCAB)
    options: dict[str, Any] = {"process_group": dist.group.WORLD, "vocab_start": own.start}

    def step(leaf: Tensor) -> Tensor:
        loss = kdfast.kd_loss(leaf, teacher, y, temperature=2.0, **options)
        return loss + value_of(kdfast.token_log_probs(leaf, teacher.indices, **options))

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = s[:, own].clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def a_16_bit_gradient_is_rounded_once(group: Group) -> None:
    s, teacher, y = data()
    own = group.own(VOCAB)
    s = s.bfloat16()
    want = whole_results(s.double(), teacher, y, temperature=2.0)[1][:, own]
    got = sharded_results(group, s, teacher, y, whole=True, temperature=2.0)[1]
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= 1.01 * 2**-8 * want.abs() + 1e-7).all()


def a_class_that_nobody_has_is_an_error_everywhere(group: Group) -> None:
    s, teacher, _ = data()
    own = group.own(VOCAB)
    options: dict[str, Any] = {"process_group": dist.group.WORLD, "vocab_start": own.start}
    beyond = teacher.indices + VOCAB * (teacher.log_probs != -torch.inf)
    with pytest.raises(IndexError, match=r"^teacher\.indices: entry 0 of row 0 is out of range"):
        kdfast.kd_loss(s[:, own], TopKTargets(beyond, teacher.log_probs), **options)
    twice = TopKTargets(torch.full_like(beyond, 5), torch.zeros_like(teacher.log_probs))
    with pytest.raises(ValueError, match=r"^teacher\.indices: class 5 is twice in row 0"):
        kdfast.kd_loss(s[:, own], twice, **options)
    with pytest.raises(IndexError, match="^ids: entry 0 of row 0 is out of range"):
        kdfast.token_log_probs(s[:, own], torch.full((ROWS,), VOCAB), **options)


CHECKS = [
    sparse_teachers_of_any_shard_give_one_process_s_numbers,
    heads_that_are_split_take_sparse_teachers,
    tokens_of_any_shard_give_one_process_s_numbers,
    tokens_keep_their_digits,
    entries_and_tokens_have_one_gather_and_none_in_backward,
    entries_and_tokens_compile_to_one_graph,
    a_16_bit_gradient_is_rounded_once,
    a_class_that_nobody_has_is_an_error_everywhere,
]
