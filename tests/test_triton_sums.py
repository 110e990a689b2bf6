"""Sums of a row's shards, merged, are the sums of the whole row: the operators over which a vocabulary can be split."""

from typing import Any

import gpu
import pytest
import torch
from cases import BF16, F32, F64, batch, name
from torch import Tensor

import kdfast
from kdfast import divergences
from kdfast.arguments import Inputs, Settings
from kdfast.options import check_inputs, check_settings
from kdfast.row_math import Sums

pytest.importorskip("triton")
from kdfast.triton import ops  # noqa: E402

ROWS, VOCAB = 3, 4099
CUTS = ((), (1000,), (17, 2500))  # one, two and three uneven shards; the label of the first row is in the last
LINEAR = {"cross_entropy": (1, 0, 0, -1), "forward_kl": (1, 0, 1, -1), "reverse_kl": (0, 1, -1, 1)}
POINTWISE = [name for name in divergences.DIVERGENCES if name not in LINEAR and name != "symmetric_kl"]


def merged(shards: list[Tensor], divergence: str, beta: float) -> Tensor:
    """To a common offset, then added: each running sum is linear in the exponents, whose offsets move with it."""
    parts = [Sums(*shard.double().unbind(1)) for shard in shards]
    new = {f: torch.stack([getattr(p, f) for p in parts]).amax(0) for f in Sums._fields if f.endswith("offset")}
    total = {f: torch.zeros(ROWS, dtype=F64) for f in Sums._fields if f not in new}
    total["label"] -= torch.inf
    if divergence == "symmetric_kl":  # beta of the one and 1 - beta of the other
        over = [(beta, 1, -1), (1 - beta, -1, 1)]
    else:
        of_teacher, of_student, dt, ds = LINEAR.get(divergence, (0, 0, 0, 0))
        over = [(of_teacher, dt, ds), (of_student, dt, ds)]
    for p in parts:
        q, t, hard = (getattr(p, f"{side}_offset") - new[f"{side}_offset"] for side in ("student", "teacher", "hard"))
        total["student_total"] += p.student_total * q.exp2()
        total["teacher_total"] += p.teacher_total * t.exp2()
        total["hard_total"] += p.hard_total * hard.exp2()
        for which, mass, d, (share, of_t, of_q) in (
            ("over_teacher", p.teacher_total, t, over[0]), ("over_student", p.student_total, q, over[1]),
        ):  # fmt: skip
            total[which] += (getattr(p, which) + share * (of_t * t + of_q * q) * mass) * d.exp2()
        total["exponents"] += p.exponents + p.classes * hard
        total["label"] = torch.maximum(total["label"], p.label + hard)
        total["classes"] += p.classes
    return torch.stack([(new | total)[f] for f in Sums._fields], 1)


def arguments(dtype: torch.dtype, **more: Any) -> tuple[Tensor, Inputs, Settings]:
    student, teacher, labels = batch(ROWS, VOCAB, dtype)
    labels[0] = VOCAB - 1
    options = kdfast.kd_loss.__kwdefaults__ | {"label_smoothing": 0.1, "z_loss": 1e-3} | more
    return student, *check_inputs(student, teacher, labels, options, check_settings(options, has_labels=True))


def shards_of(student: Tensor, inputs: Inputs, cuts: tuple[int, ...]) -> list[tuple[Tensor, Inputs]]:
    """The classes in order, and labels as they are there: outside of [0, V) where they are another shard's."""
    edges = [0, *cuts, VOCAB]
    return [
        (student[:, a:b], inputs._replace(teachers=[inputs.teachers[0][:, a:b]], labels=inputs.labels - a))
        for a, b in zip(edges, edges[1:], strict=False)
    ]


@pytest.mark.parametrize(
    ("divergence", "dtype", "more"),
    [
        *((d, F64, {"temperature": 3.7}) for d in divergences.DIVERGENCES),
        ("symmetric_kl", BF16, {"temperature": 2.0, "beta": 0.3, "softcap": 30.0}),
        ("jsd", F32, {"temperature": torch.tensor([0.5, 1.0, 7.0])}),
    ],
    ids=name,
)
@pytest.mark.parametrize("cuts", CUTS, ids=len)
def test_sums_of_shards_merged_are_those_of_the_whole(cuts: Any, divergence: str, dtype: Any, more: Any) -> None:
    student, inputs, settings = arguments(dtype, divergence=divergence, **more)
    close = {"rtol": 1e-11, "atol": 1e-11} if dtype == F64 else {"rtol": 2e-6, "atol": 1e-4}
    settings = settings._replace(ignore_index=10**6)  # a label less its shard's first class may be -100
    with gpu.kernels():
        whole = ops.sums(student, inputs, settings)
        shards = shards_of(student, inputs, cuts)
        found = merged([ops.sums(s, i, settings) for s, i in shards], divergence, settings.beta)
        torch.testing.assert_close(found, whole.double(), **close)
        assert found[:, Sums._fields.index("classes")].eq(VOCAB).all()
        if divergence not in POINTWISE:
            with pytest.raises(ValueError, match="has no sums of its own"):
                ops.pointwise_sums(student, whole, inputs, settings)
            return
        pointwise = ops.pointwise_sums(student, whole, inputs, settings)
        found = sum(ops.pointwise_sums(s, whole, i, settings).double() for s, i in shards)
        torch.testing.assert_close(found, pointwise.double(), **close)


@pytest.mark.parametrize("divergence", divergences.DIVERGENCES)
def test_they_are_what_they_are_called(divergence: str) -> None:
    student, inputs, settings = arguments(F64, divergence=divergence, temperature=2.0)
    with gpu.kernels():
        whole = ops.sums(student, inputs, settings)
        s = Sums(*whole.unbind(1))
        pointwise = ops.pointwise_sums(student, whole, inputs, settings) if divergence in POINTWISE else None
    lse = [
        (offset + total.log2()) / torch.tensor(torch.e, dtype=F64).log2() for offset, total in (s[:2], s[2:4], s[4:6])
    ]
    for found, logits in zip(lse, (student / 2, inputs.teachers[0] / 2, student), strict=True):
        torch.testing.assert_close(found, logits.logsumexp(1))
    log2_q1 = student.log_softmax(1) / torch.tensor(2.0, dtype=F64).log()
    of_label = log2_q1.gather(1, inputs.labels[:, None]).squeeze(1)
    torch.testing.assert_close(s.label - s.hard_total.log2(), of_label)
    torch.testing.assert_close(s.exponents - VOCAB * s.hard_total.log2(), log2_q1.sum(1))
    if pointwise is not None:  # p and q have the same sum, so that phi lacks no constant
        d = kdfast.kd_loss(
            student, inputs.teachers[0], divergence=divergence, temperature=2.0, t_squared=False, reduction="none",
            backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(pointwise[:, 0], d)
