"""Checks of kd_loss over split vocabularies, each run on every rank of a group; see shards.py."""

from typing import Any

import torch
import torch.distributed as dist
from calls import all_calls
from cases import BF16, DIVERGENCES, F32, F64, as_target, batch
from judge import Truth, divisor
from shards import Group, grad_output, part, same, sharded_results, whole_results
from torch import Tensor

import kdfast

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
        if isinstance(t, kdfast.TopKTargets):
            continue  # which plain PyTorch computes: see shard_entry_checks.py
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


CHECKS = [
    every_divergence_and_option_gives_one_process_s_numbers,
    padded_vocabularies_have_their_classes_in_the_first_shards,
    gradients_in_bf16_and_fp32_are_no_further_off_than_pytorch_s,
    calls_of_the_one_list_are_no_further_off_than_pytorch_s,
    every_rank_has_the_same_bits,
    other_dimensions_and_shapes_work,
]
FEW = CHECKS[:5]
