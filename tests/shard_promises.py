"""What is sent over a group and how often, which errors every rank raises, and the traps of other libraries."""

import time
from typing import Any

import torch
import torch.distributed as dist
from cases import DIVERGENCES, F32, leaf_batch
from shard_checks import ROWS, VOCAB, data
from shards import Group, same, sharded_results, whole_results
from torch import Tensor

import kdfast
from kdfast import processes


def world(own: slice) -> dict[str, Any]:
    return {"process_group": dist.group.WORLD, "vocab_start": own.start}


# ---- traps that other libraries fell into ----


def the_gradient_is_not_multiplied_by_the_number_of_ranks(group: Group) -> None:
    s, t, y = data()
    for name in DIVERGENCES:
        want = whole_results(s, t, y, divergence=name)
        grad = torch.cat(group.all(sharded_results(group, s, t, y, divergence=name)[1]), -1)
        ratio = ((grad * want[1]).sum() / want[1].square().sum()).item()
        assert abs(ratio - 1) < 1e-12, f"{name}: {ratio}"


def the_part_of_q_that_other_shards_cause_is_not_lost(group: Group) -> None:
    s, t, y = data()
    for name in ("cross_entropy", "reverse_kl", "jsd", "tvd", "dkd"):  # their gradients sum to 0 over all classes
        grad = sharded_results(group, s, t, y, divergence=name)[1]
        total = sum(group.all(grad.sum(-1)))
        assert total.abs().max() < 1e-14, name


def grad_output_is_neither_summed_nor_divided(group: Group) -> None:
    s, t, y = data()
    own = group.own(VOCAB)
    for name in ("cross_entropy", "jsd", "dkd"):
        grads = []
        for factor in (1.0, 3.0):
            leaf = s[:, own].clone().requires_grad_()
            loss = kdfast.kd_loss(
                leaf, t[:, own], y, divergence=name, process_group=dist.group.WORLD, vocab_start=own.start
            )
            (factor * loss).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[1], 3 * grads[0], rtol=1e-9, atol=1e-16)


def the_maximum_is_not_in_the_graph(group: Group) -> None:
    s, t, y = data()
    s, t = s + 1000, t - 1000
    for name in ("cross_entropy", "symmetric_kl", "hellinger", "dkd"):
        same(
            name,
            sharded_results(group, s, t, y, divergence=name),
            whole_results(s, t, y, divergence=name),
            group.own(VOCAB),
            1e-9,
        )


# ---- what is sent ----


class Counter:
    """Counts the collectives and the largest number of floats a row in one."""

    def __enter__(self) -> "Counter":
        self.gathers, self.agreements, self.reduces, self.floats = 0, 0, 0, 0
        self.kept = processes._all_gather, processes.dist.all_reduce

        def gather(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.dtype == torch.int64 and x.numel() == 6:
                self.agreements += 1
            else:
                self.gathers, self.floats = self.gathers + 1, self.floats + x.numel() // max(1, len(x))
            return self.kept[0](out, x, *args, **kwargs)

        def reduce(*args: Any, **kwargs: Any) -> Any:
            self.reduces += 1
            return self.kept[1](*args, **kwargs)

        processes._all_gather, processes.dist.all_reduce = gather, reduce
        return self

    def __exit__(self, *_: Any) -> None:
        processes._all_gather, processes.dist.all_reduce = self.kept

    def counts(self) -> tuple[int, int, int, int]:
        return self.agreements, self.gathers, self.floats, self.reduces


def one_gather_of_14_floats_a_row_and_none_in_backward(group: Group) -> None:
    s, t, y = data()
    own = group.own(VOCAB)
    for name in kdfast.divergences.DIVERGENCES:
        linear = name in ("cross_entropy", "forward_kl", "reverse_kl", "symmetric_kl")
        leaf = s[:, own].clone().requires_grad_()
        with Counter() as forward:
            loss = kdfast.kd_loss(
                leaf, t[:, own], y, divergence=name, process_group=dist.group.WORLD, vocab_start=own.start
            )
        with Counter() as backward:
            loss.backward()
        # the message of 48 bytes before is a CPU's alone
        own_sums = 3 if name == "skew_forward_kl" else 2
        assert forward.counts() == ((1, 1, 14, 0) if linear else (1, 2, 14 + own_sums, 0)), name
        assert backward.counts() == (0, 0, 0, 0), name
    with Counter() as forward:
        kdfast.kd_loss(leaf, t[:, own], y, process_group=dist.group.WORLD)
    assert forward.counts() == (2, 1, 14, 0), "the first class is another such message"


# ---- errors ----


def raises(group: Group, kind: type[Exception], words: str, call: Any, others: str | None = None) -> None:
    """Every rank raises: this error, or, where `others` is given, all but the last rank those words."""
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        found = error
    else:
        raise AssertionError(f"no error with {words!r}")
    if others is not None and group.rank < group.ranks - 1:
        kind, words = RuntimeError, others
    assert isinstance(found, kind), repr(found)
    assert words in str(found), str(found)
    assert time.monotonic() - start < 20, "the others waited"


FAILED = "failed; its own error says why"


def an_error_on_one_rank_is_an_error_on_every_rank(group: Group) -> None:
    s, t, y = data(F32)
    own = group.own(VOCAB)
    last = group.rank == group.ranks - 1
    here, mine = s[:, own].clone().requires_grad_(), t[:, own]

    def call(student: Any = here, teacher: Any = mine, labels: Any = y, **options: Any) -> Any:
        options = {"process_group": dist.group.WORLD, "vocab_start": own.start} | options
        return lambda: kdfast.kd_loss(student, teacher, labels, **options)

    for start in (own.start, None):
        fewer = slice(0, ROWS - 2 if last else ROWS)
        raises(
            group,
            ValueError,
            "must have the same rows in all processes",
            call(here[fewer], mine[fewer], y[fewer], vocab_start=start),
        )
        raises(
            group,
            ValueError,
            "teacher: has shape",
            call(teacher=mine[: -1 if last else ROWS], vocab_start=start),
            FAILED,
        )
        raises(
            group,
            TypeError,
            "student_logits: must be a tensor",
            call("logits" if last else here, vocab_start=start),
            FAILED,
        )
        raises(
            group,
            RuntimeError,
            "must have one dtype in all processes",
            call(here.bfloat16() if last else here, vocab_start=start),
        )
        raises(
            group,
            IndexError,
            f"label {VOCAB} in row 4 is out of range",
            call(labels=y.where(torch.arange(ROWS) != 4, VOCAB), vocab_start=start),
        )
        width = own.stop - own.start if last else VOCAB  # a whole teacher, which the last rank takes for its part
        raises(group, ValueError, "teacher: must be split", call(teacher=t[:, :width], vocab_start=start))
        weight = torch.ones(ROWS)
        weight[3] = -1 if last else 1  # a value, which kernels find
        raises(group, ValueError, "row_weight: -1 in row 3", call(row_weight=weight, vocab_start=start), FAILED)
    raises(group, RuntimeError, "transforms of torch.func", lambda: torch.func.grad(lambda x: call(x)())(here.detach()))
    same("after them", sharded_results(group, s.double(), t.double(), y), whole_results(s.double(), t.double(), y), own)


def a_leaf_that_is_overwritten_and_a_second_derivative_are_errors(group: Group) -> None:
    own = group.own(VOCAB)
    s, t, y = leaf_batch(ROWS, VOCAB)
    mine = s.detach()[:, own].clone().requires_grad_()
    options = {"process_group": dist.group.WORLD, "vocab_start": own.start}
    raises(group, RuntimeError, "is a leaf", lambda: kdfast.kd_loss(mine, t[:, own], y, inplace=True, **options))
    loss = kdfast.kd_loss(mine, t[:, own], y, **options)
    raises(group, RuntimeError, "differentiable once", lambda: torch.autograd.grad(loss, mine, create_graph=True))


CHECKS = [
    the_gradient_is_not_multiplied_by_the_number_of_ranks,
    an_error_on_one_rank_is_an_error_on_every_rank,
    the_part_of_q_that_other_shards_cause_is_not_lost,
    grad_output_is_neither_summed_nor_divided,
    the_maximum_is_not_in_the_graph,
    one_gather_of_14_floats_a_row_and_none_in_backward,
    a_leaf_that_is_overwritten_and_a_second_derivative_are_errors,
]
FEW = CHECKS[:2]
