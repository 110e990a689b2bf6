"""Checks of linear_kd_loss over split heads, each run on every rank of a group; see shards.py."""

import copy
import pickle
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import BF16, F32, F64
from linear_cases import Case, plain_results, results_of
from linear_cases import judge as judge_linear
from shard_promises import FAILED, Counter, raises
from shards import Group
from torch import Tensor

import kdfast

VOCAB = 50


def sharded(case: Case, group: Group, labels: Any, teacher: str = "own", grad: Any = None, **options: Any) -> Any:
    """Loss, gradients in hidden states and this rank's weight and bias, and metrics. teacher: own, whole or logits."""
    own = group.own(len(case.weight))
    hidden, *head = case.leaves()
    head = [x.detach()[own].clone().requires_grad_() for x in head]
    rows: Any = case.teacher_hidden
    weight: Tensor | None = case.teacher_weight
    if teacher == "own":
        weight = case.teacher_weight[own]
    elif teacher == "logits":
        rows, weight = case.teacher_logits()[..., own], None
    options = {"process_group": dist.group.WORLD, "vocab_start": own.start} | options
    bias = head[1] if len(head) > 1 else None
    loss = kdfast.linear_kd_loss(hidden, head[0], rows, weight, labels, student_bias=bias, **options)
    return results_of(loss, [hidden, *head], grad)


def same_linear(case: Case, group: Group, what: str, got: Any, want: Any, reduced: bool = True) -> None:
    own = group.own(len(case.weight))
    grads = [want[1][0], *(x[own] for x in want[1][1:])]
    for name, x, y in zip(("loss", "hidden", "weight", "bias"), (got[0], *got[1]), (want[0], *grads), strict=False):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13, msg=lambda m, n=name: f"{what}: {n}: {m}")
    for x, y in zip(got[2], want[2], strict=True):
        assert (x is None and y is None) or torch.allclose(x, y, rtol=1e-11, atol=1e-13, equal_nan=True), what


def heads_give_one_process_s_loss_and_gradients(group: Group) -> None:
    case = Case(F64)
    calls: list[dict[str, Any]] = [
        *({"divergence": name} for name in ("cross_entropy", "symmetric_kl", "jsd", "logit_mse", "dkd")),
        {"reduction": "none", "divergence": "skew_reverse_kl"},
        {"reduction": "none", "divergence": "dkd"},
        {"return_metrics": True, "reduction": "none"},
        {"return_metrics": True, "divergence": "tvd"},
        {"vocab_size": 31, "reduction": "sum"},
        {"row_weight": torch.linspace(0, 2, 13), "standardize": True},
    ]
    labels = case.labels.clamp(max=30)
    for options in calls:
        if options.get("divergence") != "logit_mse":
            options = options | {"temperature": 2.0}
        want = plain_results(case, labels, F64, **options)
        for teacher, rows in (("own", 4), ("whole", None), ("logits", 5)):
            got = sharded(case, group, labels, teacher, chunk_rows=rows, **options)
            same_linear(case, group, f"{options}, {teacher}", got, want)
    want = plain_results(case, labels, F64)
    same_linear(case, group, "vocab_start", sharded(case, group, labels, "whole", vocab_start=None), want)


def sixteen_bit_heads_are_no_further_off_than_pytorch_s(group: Group) -> None:
    for dtype in (BF16, torch.float16, F32):
        case = Case(dtype, bias=False)
        for options in ({"temperature": 2.0}, {"divergence": "jsd", "reduction": "none"}):
            got = sharded(case, group, case.labels, chunk_rows=6, **options)
            truth, eager = (plain_results(case, case.labels, kind, **options) for kind in (F64, F32))
            own = group.own(VOCAB)
            judge_linear("loss", got[0], truth[0], eager[0], F32)
            judge_linear("hidden", got[1][0], truth[1][0], eager[1][0], F32)
            if own.stop > own.start:
                judge_linear("weight", got[1][1], truth[1][1][own], eager[1][1][own], F32)
            hidden = group.all(got[1][0])
            assert all(torch.equal(x, hidden[0]) for x in hidden), "grad_hidden has the same bits on every rank"


def grad_hidden_is_summed_once_or_where_asked_not_at_all(group: Group) -> None:
    case = Case(F64)
    for reduction in ("mean", "none"):
        want = plain_results(case, case.labels, F64, reduction=reduction)
        summed = sharded(case, group, case.labels, reduction=reduction)[1][0]
        own = sharded(case, group, case.labels, reduction=reduction, reduce_hidden=False)[1][0]
        torch.testing.assert_close(summed, want[1][0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(sum(group.all(own)), want[1][0], rtol=1e-12, atol=1e-14)
        assert not torch.allclose(own, summed)


def a_chunk_is_one_gather_and_a_call_one_all_reduce(group: Group) -> None:
    case = Case(F32)  # of 13 rows one is ignored
    own = group.own(VOCAB)
    hidden, weight, bias = case.leaves()
    weight, bias = (x.detach()[own].clone().requires_grad_() for x in (weight, bias))
    for options, gathers, floats in (
        ({}, 1, 14),
        ({"chunk_rows": 4}, 3, 42),
        ({"chunk_rows": 4, "divergence": "jsd"}, 6, 48),
    ):
        with Counter() as counter:
            loss = kdfast.linear_kd_loss(
                hidden, weight, case.teacher_hidden, case.teacher_weight[own], case.labels, student_bias=bias,
                process_group=dist.group.WORLD, vocab_start=own.start, **options,
            )  # fmt: skip
        assert counter.counts() == (1, gathers, floats, 1), (options, counter.counts())
        with Counter() as counter:
            loss.backward()
        assert counter.counts() == (0, 0, 0, 0)
    with Counter() as counter:
        kdfast.linear_kd_loss(
            hidden.detach(), weight, None, None, case.labels, alpha=0, process_group=dist.group.WORLD,
            vocab_start=own.start,
        )  # fmt: skip
    assert counter.counts() == (1, 1, 14, 0), "frozen hidden states are not summed"


def chunks_are_those_of_the_largest_shard(group: Group) -> None:
    from kdfast import chunks

    limit, chunks.LOGITS = chunks.LOGITS, 40 * 300  # where the default depends on the vocabulary
    try:
        case = Case(F64, rows=700)
        same_linear(case, group, "700 rows", sharded(case, group, case.labels), plain_results(case, case.labels, F64))
        got = sharded(case, group, case.labels, reduction="none")
        same_linear(case, group, "none", got, plain_results(case, case.labels, F64, reduction="none"))
    finally:
        chunks.LOGITS = limit


def an_error_of_one_rank_is_an_error_of_every_rank(group: Group) -> None:
    case = Case(F32, bias=False)
    own, last = group.own(VOCAB), group.rank == group.ranks - 1
    hidden, weight = case.leaves()
    weight = weight.detach()[own].requires_grad_()

    def call(x: Any = hidden, w: Any = weight, labels: Any = case.labels, **options: Any) -> Any:
        options = {"process_group": dist.group.WORLD, "vocab_start": own.start} | options
        return lambda: kdfast.linear_kd_loss(
            x, w, case.teacher_hidden[: len(x)], case.teacher_weight[own], labels, **options
        )

    for start in (own.start, None):
        narrow = weight[:, :-1] if last else weight
        raises(group, ValueError, "student_weight: has shape", call(w=narrow, vocab_start=start), FAILED)
        few = slice(0, 9 if last else 13)
        raises(
            group, ValueError, "must have the same rows", call(hidden[few], labels=case.labels[few], vocab_start=start)
        )
        wrong = case.labels.where(torch.arange(13) != 7, VOCAB)
        raises(group, IndexError, f"label {VOCAB} in row 7", call(labels=wrong, vocab_start=start))
        weights = torch.ones(13)
        weights[3] = 0 if last else 1  # chunks of other sizes
        raises(group, ValueError, "must keep the same rows", call(row_weight=weights, vocab_start=start))
        weights[3] = -1 if last else 1
        raises(group, ValueError, "row_weight: -1", call(row_weight=weights, vocab_start=start), FAILED)


def modules_take_a_group_and_are_copied_with_it(group: Group) -> None:
    case = Case(F64, bias=False)
    own = group.own(VOCAB)
    hidden, weight = case.hidden, case.weight[own]
    s, t = (F.linear(x, w) for x, w in ((hidden, weight), (case.teacher_hidden, case.teacher_weight[own])))
    options = {"process_group": dist.group.WORLD, "vocab_start": own.start, "temperature": 2.0}
    want = kdfast.kd_loss(s, t, case.labels, **options)
    for module in (kdfast.KDLoss(**options), copy.deepcopy(kdfast.KDLoss(**options))):
        assert torch.equal(module(s, t, case.labels), want)
    linear = kdfast.LinearKDLoss(**options, reduce_hidden=False)
    for module in (linear, copy.deepcopy(linear)):
        assert module.process_group is dist.group.WORLD and not module.reduce_hidden
        got = module(hidden, weight, case.teacher_hidden, case.teacher_weight[own], case.labels)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    try:
        pickle.dumps(linear)
        raise AssertionError("pickled")
    except TypeError as error:
        assert "process_group: must be None for a LinearKDLoss to be pickled" in str(error), error


CHECKS = [
    heads_give_one_process_s_loss_and_gradients,
    sixteen_bit_heads_are_no_further_off_than_pytorch_s,
    grad_hidden_is_summed_once_or_where_asked_not_at_all,
    a_chunk_is_one_gather_and_a_call_one_all_reduce,
    chunks_are_those_of_the_largest_shard,
    an_error_of_one_rank_is_an_error_of_every_rank,
    modules_take_a_group_and_are_copied_with_it,
]
FEW = CHECKS[:3]
