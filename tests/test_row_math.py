"""Row mathematics: sums of shards are merged and finished, and the gradient is a function of the coefficients."""

from typing import Any

import pytest
import torch
from cases import BF16, F32, batch, name
from judge import truth_of
from torch import Tensor


from kdfast import choice, row_math
from kdfast.arguments import ELSEWHERE, Inputs, Settings
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
    """The logits of each shard, and its inputs: labels count from its first class."""
    vocab = s.shape[-1]
    edges = [0, *(int(c * vocab) if c >= 0 else vocab + int(c) for c in cuts), vocab]
    out = []
    for begin, end in zip(edges, edges[1:], strict=False):
        y = inputs.labels
        labels = torch.where((y >= begin) & (y < end), y - begin, torch.where(y == -100, -100, ELSEWHERE))
        out.append((s[:, begin:end], inputs._replace(teachers=[t[:, begin:end]], labels=labels)))
    return out


def data(vocab: int, dtype: torch.dtype, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    s, t, y = batch(ROWS, vocab, dtype)
    y[0], y[1], y[2], y[3:] = 0, vocab - 1, -100, vocab // 2 + 2
    if masked:
        s[:, 3], t[:, 3] = -torch.inf, -torch.inf
    return s, t, y


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("vocab", "dtype"), [(50, F32), (1000, BF16)], ids=name)
def test_shards_have_the_loss_and_gradient_of_the_whole(
    backend: str, divergence: str, vocab: int, dtype: torch.dtype, cuts: str
) -> None:
    masked = cuts == "two"  # smoothing would make its loss infinite
    s, t, y = data(vocab, dtype, masked)
    temperature = torch.linspace(0.7, 3, ROWS)
    weight = torch.linspace(0, 2, ROWS).flip(0)
    options = {
        "divergence": divergence, "temperature": temperature, "teacher_temperature": 1.7, "row_weight": weight,
        "alpha": 0.6, "hard_weight": 0.8, "label_smoothing": 0.0 if masked else 0.1, "z_loss": 0.01,
    }  # fmt: skip
    truth = truth_of(s, t, y, options)
    ops = choice.namespace(backend, s)
    inputs, settings = checked(s, t, y, **options)
    parts = shards(s, t, inputs, CUTS[cuts])
    merged = row_math.merge([ops.sums(x, *own, *settings) for x, own in parts], settings)
    if row_math.shares(settings) is None:
        each = [ops.pointwise_sums(x, merged, *own, *settings)[:, -2:] for x, own in parts]
        merged = torch.cat([merged[:, :-2], torch.stack(each).sum(0)], -1)
    x, own = parts[0]
    losses, table = ops.finish(x, merged, *own, *settings)
    assert table.shape == (ROWS, len(Coefficients._fields)) and merged.shape == (ROWS, len(Sums._fields))
    truth.judge_rows("losses of shards", losses)
    factor = torch.linspace(-1, 2, ROWS)
    gradient = torch.cat([ops.grad(x, table, factor, *own, *settings) for x, own in parts], -1)
    truth.judge_gradient("gradient of shards", gradient, factor.double())



