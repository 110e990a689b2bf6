"""Row mathematics: merged sums of shards give the row's loss, and the gradient is a function of the coefficients."""

from typing import Any

import pytest
import torch
from cases import BACKENDS, BF16, F32, ON_GPU, batch, name
from judge import truth_of
from torch import Tensor

from kdfast import choice, row_math
from kdfast.arguments import OTHER_SHARD, Inputs, Settings
from kdfast.divergences import DIVERGENCES
from kdfast.losses import kd_loss
from kdfast.options import check_inputs, check_settings
from kdfast.row_math import Coefficients, Sums

ROWS = 6
CUTS = {"whole": [], "two": [0.37], "three, one of a single class": [0.5, -1]}


def checked(s: Tensor, t: Tensor, y: Tensor | None, **options: Any) -> tuple[Inputs, Settings]:
    every = kd_loss.__kwdefaults__ | {"reduction": "none"} | options
    return check_inputs(s, t, y, every, check_settings(every, y is not None))


def shards(s: Tensor, t: Tensor, inputs: Inputs, cuts: list[float]) -> list[tuple[Tensor, Inputs]]:
    """Each shard's logits and inputs: labels count from its first class."""
    vocab = s.shape[-1]
    edges = [0, *(int(c * vocab) if c >= 0 else vocab + int(c) for c in cuts), vocab]
    out = []
    for begin, end in zip(edges, edges[1:], strict=False):
        y = inputs.labels
        labels = torch.where((y >= begin) & (y < end), y - begin, torch.where(y == -100, -100, OTHER_SHARD))
        out.append((s[:, begin:end], inputs._replace(teachers=[t[:, begin:end]], labels=labels)))
    return out


def data(vocab: int, dtype: torch.dtype, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    s, t, y = batch(ROWS, vocab, dtype)
    y[0], y[1], y[2], y[3:] = 0, vocab - 1, -100, vocab // 2 + 2
    if masked:
        s[:, 3], t[:, 3] = -torch.inf, -torch.inf
    return s, t, y


# On a GPU each case compiles several kernels: long rows only in the full tier.
@pytest.mark.parametrize(
    ("backend", "vocab", "dtype"),
    [
        pytest.param(backend, *row, marks=pytest.mark.full if backend in ON_GPU and row[0] == 1000 else ())
        for backend in BACKENDS
        for row in ((50, F32), (1000, BF16))
    ],
    indirect=["backend"],
    ids=name,
)
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_shards_give_the_loss_and_gradient_of_the_whole_row(
    backend: str, divergence: str, vocab: int, dtype: torch.dtype, cuts: str
) -> None:
    masked = cuts == "two"  # without smoothing, whose loss would be infinite
    s, t, y = data(vocab, dtype, masked)
    temperature = torch.linspace(0.7, 3, ROWS)
    weight = torch.linspace(0, 2, ROWS).flip(0)
    options = {
        "divergence": divergence, "temperature": temperature, "teacher_temperature": 1.7, "row_weight": weight,
        "alpha": 0.6, "hard_weight": 0.8, "label_smoothing": 0.0 if masked else 0.1, "z_loss": 0.01,
        "logit_scale": 0.8, "teacher_logit_scale": 1.25,
    }  # fmt: skip
    judge_shards(backend, s, t, y, cuts, options)


def test_shards_have_the_digits_of_a_gradient_with_little_in_common(backend: str) -> None:
    """Which psi a row takes is known from the sums of all shards alone: the second one has all that is in common."""
    s, t, y = data(50, F32, False)
    s[:, :18:2] -= 40
    t[:, 1:18:2] -= 40
    s[:, 18:] -= torch.linspace(0, 20, ROWS).unsqueeze(-1)
    t[:, 18:] -= torch.linspace(0, 20, ROWS).unsqueeze(-1)
    judge_shards(backend, s, t, y, "two", {"divergence": "skew_forward_kl", "alpha": 1.0, "hard_weight": 0.0})


def judge_shards(backend: str, s: Tensor, t: Tensor, y: Tensor, cuts: str, options: dict[str, Any]) -> None:
    truth = truth_of(s, t, y, options)
    ops = choice.namespace(backend, s)
    inputs, settings = checked(s, t, y, **options)
    parts = shards(s, t, inputs, CUTS[cuts])
    merged = row_math.merge([ops.sums(x, *own, *settings) for x, own in parts], inputs, settings)
    if row_math.shares(settings) is None:
        each = [ops.pointwise_sums(x, merged, *own, *settings)[:, -3:] for x, own in parts]
        merged = torch.cat([merged[:, :-3], torch.stack(each).sum(0)], -1)
    x, own = parts[0]
    losses, table = ops.losses_and_coefficients(x, merged, *own, *settings)
    assert table.shape == (ROWS, len(Coefficients._fields)) and merged.shape == (ROWS, len(Sums._fields))
    truth.judge_rows("losses of shards", losses)
    factor = torch.linspace(-1, 2, ROWS)
    gradient = torch.cat([ops.grad(x, table, factor, *own, *settings) for x, own in parts], -1)
    truth.judge_gradient("gradient of shards", gradient, factor.double())


# Sums of a row, in base 2, and its weight: each is USUAL but for these.
TABLE = {
    "usual": {},
    "dropped by its weight": {"weight": 0.0},
    "a label on a masked class": {"label": -torch.inf},
    "a student that masks what the teacher has": {"over_teacher": torch.inf, "over_student": 0.0},
    "a teacher that masks what the student has": {"over_student": torch.inf},
    "every class masked": {
        "student_offset": -torch.inf, "student_total": 0.0, "hard_total": 0.0,
        "label": -torch.inf, "exponents": -torch.inf, "phi": torch.nan, "psi": torch.nan,
    },
    "little in common, where psi may have another form": {"over_student": 0.125, "psi": 0.75},
    "far from 0": {"student_offset": 1442.0, "teacher_offset": -1442.0},
    "one class": {"student_total": 1.0, "teacher_total": 1.0, "hard_total": 1.0, "over_teacher": 0.0,
                  "over_student": 0.0, "label": 0.0, "exponents": 0.0, "classes": 1.0},
}  # fmt: skip
USUAL = {
    "student_offset": 3.0, "student_total": 5.5, "teacher_offset": 2.0, "teacher_total": 4.25,
    "hard_total": 7.5, "over_teacher": 11.0, "over_student": 9.0, "label": -1.5, "exponents": -140.0, "classes": 50.0,
    "phi": 0.75, "psi": -0.25, "weight": 0.5,
}  # fmt: skip


OPTIONS: list[dict[str, Any]] = [{}, {"label_smoothing": 0.25, "z_loss": 0.125}, {"hard_weight": 0.0}]


def assert_losses_and_coefficients_of_the_table(ops: Any, rtols: dict[torch.dtype, float], **options: Any) -> None:
    rows = [USUAL | row for row in TABLE.values()]
    columns = {key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in USUAL}
    weight = columns.pop("weight")
    if options["divergence"] == "skew_forward_kl":  # a sum of numbers below 0, which are finite
        columns["over_student"] = -columns["over_student"].clamp(max=9)
    sums = torch.stack(Sums(**columns), -1)
    s = torch.zeros(len(rows), 50, dtype=torch.float64)
    labels = torch.zeros(len(rows), dtype=torch.int64)
    inputs, settings = checked(s, s, labels, temperature=2.0, row_weight=weight, **options)
    losses, coefficients = row_math.losses_and_coefficients(sums, inputs, settings)
    for dtype, rtol in rtols.items():
        x = s.to(dtype)
        own = inputs._replace(teachers=[x])
        found, table = ops.losses_and_coefficients(x, sums.to(dtype), *own, *settings)
        torch.testing.assert_close(found.double(), losses, rtol=rtol, atol=0, equal_nan=True)
        for column, one, other in zip(Coefficients._fields, table.unbind(-1), coefficients.unbind(-1), strict=True):
            if column.endswith("offset"):  # one of -inf is subtracted as 0, and Triton's tables have that
                one, other = (x.masked_fill(x == -torch.inf, 0) for x in (one, other))
            torch.testing.assert_close(one.double(), other, rtol=rtol, atol=0, equal_nan=True, msg=column)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_and_coefficients_are_the_same_in_every_language(
    cpu: str, divergence: str, options: dict[str, Any]
) -> None:
    rtols = {torch.float64: 1e-13, torch.float32: 1e-6}
    assert_losses_and_coefficients_of_the_table(torch.ops.kdfast, rtols, divergence=divergence, **options)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("divergence", ["cross_entropy", "symmetric_kl", "jsd", "skew_forward_kl"])  # of each kind
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_and_coefficients_are_the_same_in_triton(backend: str, divergence: str, options: dict[str, Any]) -> None:
    rtols = {torch.float64: 1e-13}
    assert_losses_and_coefficients_of_the_table(torch.ops.kdfast_triton, rtols, divergence=divergence, **options)


@pytest.mark.parametrize("divergence", ["cross_entropy", "symmetric_kl", "jsd"])  # one for each kind of sums
@pytest.mark.parametrize("vocab", [10, 1000, 40000])  # short, long and split rows
def test_the_gradient_is_linear_in_the_coefficients(backend: str, divergence: str, vocab: int) -> None:
    """No kernel computes them again: it reads whatever the table has."""
    s, t, y = batch(3, vocab)
    ops = choice.namespace(backend, s)
    inputs, settings = checked(s, t, y, divergence=divergence, temperature=2.0, z_loss=0.01)
    table = ops.stats(s, *inputs, *settings)[1]
    linear = ["level", "slope", "teacher", "soft", "hard", "label", "uniform"]
    columns = [Coefficients._fields.index(name) for name in linear]

    def gradient(change: Tensor) -> Tensor:
        changed = table.clone()
        changed[:, columns] = change
        return ops.grad(s, changed, torch.ones(3), *inputs, *settings)

    a, b = torch.randn(2, 3, len(columns))
    expected = 2 * gradient(a) - 0.5 * gradient(b)
    torch.testing.assert_close(gradient(2 * a - 0.5 * b), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradient(a), gradient(b), rtol=1e-2, atol=1e-4)
