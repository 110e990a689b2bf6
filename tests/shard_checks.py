"""Checks of kd_loss over split vocabularies, each run on every rank of a group; see shards.py."""

import time
from typing import Any

import torch
import torch.distributed as dist
from calls import all_calls
from cases import BF16, DIVERGENCES, F32, F64, as_target, batch, leaf_batch
from judge import Truth, divisor
from shards import Group, grad_output, part, same, sharded_results, whole_results
from torch import Tensor

import kdfast
from kdfast import processes

ROWS, VOCAB = 6, 50
WORLD = dist.group
ALL_OPTIONS: dict[str, Any] = {
    "temperature": 2.5, "teacher_temperature": 1.7, "alpha": 0.4, "hard_weight": 1.5, "label_smoothing": 0.2,
    "z_loss": 0.02, "logit_scale": 1.3, "teacher_logit_scale": 0.8, "softcap": 20.0, "teacher_softcap": 25.0,
}  # fmt: skip


def data(dtype: torch.dtype = F64, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and labels in the first and the last class, ignored, and in between."""
    student, teacher, labels = batch(ROWS, vocab, dtype)
    labels[0], labels[1], labels[2] = 0, vocab - 1, -100
    return student, teacher, labels


def every_divergence_and_option_gives_one_process_s_numbers(group: Group) -> None:
    s, t, y = data()
    own = group.own(VOCAB)
    other = batch(ROWS, VOCAB, F64, seed=1).teacher
    weight = torch.linspace(0, 2, ROWS)
    for name in DIVERGENCES:
        mse = name == "logit_mse"
        calls: list[tuple[Any, dict[str, Any]]] = [
            (
                t,
                {
                    "row_weight": weight,
                    "reduction": "none",
                    **({} if mse else {"temperature": torch.linspace(1, 3, ROWS)}),
                },
            ),
            (t, {k: v for k, v in ALL_OPTIONS.items() if not (mse and "temperature" in k)} | {"normalizer": 7}),
            ([t, other], {"ensemble": "geometric", "teacher_weights": [3, 1], "return_metrics": True}),
            (t, {"standardize": True, "reduction": "batchmean", "inplace": True}),
        ]
        if not mse:
            calls += [
                ([t, other], {"temperature": 2.0, "reduction": "sum"}),
                (as_target(t, "probs", 2.0), {"target": "probs", "temperature": 2.0, "vocab_size": VOCAB}),
                (t, {"alpha": 0, "return_metrics": True} if name != "dkd" else {"return_metrics": True}),
            ]
        for teacher, options in calls:
            options = options | {"divergence": name}
            want = whole_results(s, teacher, y, **options | {"inplace": False})
            what = f"{name} {sorted(options)}"
            same(what, sharded_results(group, s, teacher, y, **options), want, own)
            whole = sharded_results(group, s, teacher, y, whole=True, vocab_start=None, **options)
            same(f"{what}, a whole teacher", whole, want, own)


def padded_vocabularies_have_their_classes_in_the_first_shards(group: Group) -> None:
    s, t, y = data()
    y = y.clamp(max=30)
    for options in ({}, {"divergence": "jsd"}, {"divergence": "dkd"}, {"return_metrics": True}):
        want = whole_results(s, t, y, vocab_size=31, **options)
        same(str(options), sharded_results(group, s, t, y, vocab_size=31, **options), want, group.own(VOCAB))
        same(
            str(options),
            sharded_results(group, s, t[:, :40], y, whole=True, vocab_size=31, **options),
            want,
            group.own(VOCAB),
        )


def other_dimensions_and_shapes_work(group: Group) -> None:
    s, t, y = (x.view(2, 3, *x.shape[1:]) for x in data())
    own = group.own(VOCAB)
    want = whole_results(s, t, y, divergence="reverse_kl", reduction="none")
    leaf = s[..., own].movedim(-1, 1).contiguous().requires_grad_()
    options = {"process_group": WORLD.WORLD, "vocab_start": own.start, "dim": 1}
    loss = kdfast.kd_loss(leaf, t[..., own].movedim(-1, 1), y, divergence="reverse_kl", reduction="none", **options)
    loss.backward(grad_output(loss))
    same("dim 1", (loss.detach(), leaf.grad.movedim(1, -1), ()), want, own)
    empty = torch.empty(0, own.stop - own.start, requires_grad=True)
    loss = kdfast.kd_loss(empty, empty.detach(), process_group=WORLD.WORLD, vocab_start=own.start)
    loss.backward()
    assert loss == 0 and empty.grad.shape == empty.shape


def gradients_in_bf16_and_fp32_are_no_further_off_than_pytorch_s(group: Group) -> None:
    for dtype in (BF16, F32):
        for name in DIVERGENCES:
            s, t, y = batch(ROWS, 300, dtype)
            judge_on_rank_0(group, s, t, y, divergence=name, temperature=1.0 if name == "logit_mse" else 2.0)


def calls_of_the_one_list_are_no_further_off_than_pytorch_s(group: Group) -> None:
    small = [c for c in all_calls() if 1 < int(c.named("shape").split("x")[1]) <= 2100]
    for call in small[group.ranks :: 4]:
        (s, t, y), settings = call.arguments()
        try:
            judge_on_rank_0(group, s, t, y, **settings)
        except AssertionError as error:
            raise AssertionError(f"{call.id}: {error}") from None


def judge_on_rank_0(group: Group, s: Tensor, t: Any, y: Any, **settings: Any) -> None:
    settings = {k: v for k, v in settings.items() if k not in ("return_metrics", "inplace")}
    own = group.own(s.shape[-1])
    leaf = s[..., own].detach().requires_grad_()
    options = settings | {"process_group": WORLD.WORLD, "vocab_start": own.start}
    widths = {x.shape[-1] for x in (t if isinstance(t, list) else [t]) if x is not None}
    if any(group.all(bool(own.start and own.stop - own.start in widths))):
        return  # a whole teacher with as many classes as a shard is an error
    alike = all(x.shape == s.shape for x in (t if isinstance(t, list) else [t]) if x is not None)
    loss = kdfast.kd_loss(leaf, part(t, own) if alike else t, y, **options)
    factor = torch.ones_like(loss) if loss.dim() == 0 else torch.linspace(-1, 2, loss.numel()).view(loss.shape).to(loss)
    loss.backward(factor)
    grad = torch.cat([g for g in group.all(leaf.grad)], -1)
    if group.rank:
        return
    truth = Truth(s, t, y, settings | {"reduction": "none", "normalizer": None})
    scale = divisor(s, y, settings)
    if loss.dim():
        truth.judge_rows("row losses", loss)
    else:
        truth.judge_sum("loss", loss, scale)
    truth.judge_gradient("gradient", grad, factor.double() if loss.dim() else torch.full_like(truth.loss, scale))


def every_rank_has_the_same_bits(group: Group) -> None:
    for dtype in (F32, BF16):
        s, t, y = batch(40, 333, dtype)
        own = group.own(333)
        for name in DIVERGENCES:
            rows = [sharded_results(group, s, t, y, divergence=name, reduction=r)[0] for r in ("none", "mean")]
            for one, other in zip(group.all(rows), group.all(rows)[1:], strict=False):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), f"{name}: ranks differ"
    assert own.stop - own.start in (0, 7) or group.ranks < 3 or group.rank != 1, "one shard is empty, or of few classes"


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
            loss = kdfast.kd_loss(leaf, t[:, own], y, divergence=name, process_group=WORLD.WORLD, vocab_start=own.start)
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
            loss = kdfast.kd_loss(leaf, t[:, own], y, divergence=name, process_group=WORLD.WORLD, vocab_start=own.start)
        with Counter() as backward:
            loss.backward()
        # the message of 48 bytes before is a CPU's alone
        assert forward.counts() == ((1, 1, 14, 0) if linear else (1, 2, 16, 0)), name
        assert backward.counts() == (0, 0, 0, 0), name
    with Counter() as forward:
        kdfast.kd_loss(leaf, t[:, own], y, process_group=WORLD.WORLD)
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
        options = {"process_group": WORLD.WORLD, "vocab_start": own.start} | options
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
    sparse = kdfast.TopKTargets(torch.zeros(ROWS, 1, dtype=torch.int64), torch.zeros(ROWS, 1))
    raises(group, ValueError, "TopKTargets with process_group are not supported", call(teacher=sparse))
    raises(group, RuntimeError, "transforms of torch.func", lambda: torch.func.grad(lambda x: call(x)())(here.detach()))
    same("after them", sharded_results(group, s.double(), t.double(), y), whole_results(s.double(), t.double(), y), own)


def a_leaf_that_is_overwritten_and_a_second_derivative_are_errors(group: Group) -> None:
    own = group.own(VOCAB)
    s, t, y = leaf_batch(ROWS, VOCAB)
    mine = s.detach()[:, own].clone().requires_grad_()
    options = {"process_group": WORLD.WORLD, "vocab_start": own.start}
    raises(group, RuntimeError, "is a leaf", lambda: kdfast.kd_loss(mine, t[:, own], y, inplace=True, **options))
    loss = kdfast.kd_loss(mine, t[:, own], y, **options)
    raises(group, RuntimeError, "differentiable once", lambda: torch.autograd.grad(loss, mine, create_graph=True))


CHECKS = [
    every_divergence_and_option_gives_one_process_s_numbers,
    padded_vocabularies_have_their_classes_in_the_first_shards,
    gradients_in_bf16_and_fp32_are_no_further_off_than_pytorch_s,
    calls_of_the_one_list_are_no_further_off_than_pytorch_s,
    every_rank_has_the_same_bits,
    the_gradient_is_not_multiplied_by_the_number_of_ranks,
    an_error_on_one_rank_is_an_error_on_every_rank,
    other_dimensions_and_shapes_work,
    the_part_of_q_that_other_shards_cause_is_not_lost,
    grad_output_is_neither_summed_nor_divided,
    the_maximum_is_not_in_the_graph,
    one_gather_of_14_floats_a_row_and_none_in_backward,
    a_leaf_that_is_overwritten_and_a_second_derivative_are_errors,
]
FEW = CHECKS[:7]
