"""docs/sparse.md: its table of trainers gives the loss and gradient of their formulas, and its recipes run."""

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import F64
from sparse_cases import INF
from sparse_trainers import (
    COUNT,
    FORMULAS,
    LOGITS,
    MASK,
    SAMPLED,
    TEACHERS,
    B,
    K,
    N,
    S,
    T,
    V,
    Y,
    conditional,
    entries_of,
    jsd,
    kl,
    log_p,
    log_q,
    normalized,
    of,
    top,
    with_tail,
)
from torch import Tensor

import kdfast
from kdfast import TopKTargets

PAGE = Path(__file__).parents[1] / "docs" / "sparse.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="there is no checkout around the tests")

kd_loss = functools.partial(kdfast.kd_loss, backend="reference")
NAMES = {"kd_loss": kd_loss, "TopKTargets": TopKTargets, "math": math, "T": T, "b": B, "n": COUNT, "mask": MASK}


@functools.cache
def table() -> dict[str, str]:
    section = PAGE.read_text().split("## Which trainer uses which")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \| `(kd_loss.*)` \|$", section, flags=re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| ", section, flags=re.MULTILINE)) - 1
    return dict(rows)


def test_every_row_of_the_table_has_its_formula_here() -> None:
    assert table().keys() == FORMULAS.keys()


@pytest.mark.parametrize("trainer", FORMULAS)
def test_kd_loss_gives_a_trainers_loss_and_gradient(trainer: str) -> None:
    theirs, ours = S.clone().requires_grad_(), S.clone().requires_grad_()
    a = FORMULAS[trainer](theirs)
    b = eval(table()[trainer], NAMES | TEACHERS | {"s": ours, "y": Y})
    for loss in (a, b):
        loss.backward(torch.linspace(-1, 2, loss.numel(), dtype=F64).view(loss.shape))
    torch.testing.assert_close(b.detach(), a.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-13)
    assert a.detach().abs().max() > 1e-3


def test_trls_clamp_ends_the_gradient_of_a_small_rest_and_kdfast_does_not() -> None:
    """A student that is certain of the entries to 1e-9, and a teacher that is not."""
    s = torch.full((1, V), math.log(1e-9 / (V - 1)), dtype=F64)
    s[0, 0] = 0
    leaf, mine = s.clone().requires_grad_(), s.clone().requires_grad_()
    p = torch.tensor([[0.7]], dtype=F64).log()
    kl(with_tail(p), with_tail(log_q(leaf, 1)[:, :1])).sum().backward()
    kd_loss(mine, TopKTargets(torch.tensor([[0]]), p), divergence="forward_kl").backward()
    assert leaf.grad[0, 1:].abs().max() < 0.06  # all that is left is 0.7 q, from the entry's log q
    torch.testing.assert_close(mine.grad[0, 1:].sum(), torch.tensor(-0.3, dtype=F64), rtol=1e-6, atol=1e-6)


# --- recipes -----------------------------------------------------------------------------------------------------


class OnReference:
    """kdfast, whose losses run on the reference."""

    kd_loss, linear_kd_loss = kd_loss, functools.partial(kdfast.linear_kd_loss, backend="reference")
    TopKTargets, topk_targets = TopKTargets, kdfast.topk_targets
    token_log_probs = getattr(kdfast, "token_log_probs", None)


def names() -> dict[str, Any]:
    t2d = torch.arange(V) % 3 != 1
    chosen = t2d.nonzero().squeeze(-1)
    s = S.clone().requires_grad_()
    served = [None, *({int(i): float(x) for i, x in zip(*row, strict=True)} for row in zip(*top(1), strict=True))]
    return {
        "kdfast": OnReference, "torch": torch, "math": math, "k": K, "T": T, "T0": 1.0, "logits": s,
        "teacher_logits": LOGITS, "labels": Y, "top": top(1), "prompt_logprobs": served[:N],
        "sampled": SAMPLED, "sampled_log_prob": log_p(1).gather(-1, SAMPLED.unsqueeze(-1)).squeeze(-1),
        "t2d": t2d, "d2t": chosen - torch.arange(len(chosen)),
        "draft_logits": S[:, : len(chosen)].clone().requires_grad_(),
        "draft_weight": torch.randn(len(chosen), 5), "teacher_weight": torch.randn(V, 6), "weight": torch.randn(V, 5),
        "hidden": torch.randn(N, 5, requires_grad=True), "teacher_hidden": torch.randn(N, 6),
        "teachers": [LOGITS, LOGITS.flip(0)], "teacher_id": torch.arange(N) % 2,
    }  # fmt: skip


def recipes() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def run(words: str) -> dict[str, Any]:
    """Runs the one recipe that has these words."""
    (recipe,) = (text for text in recipes() if words in text)
    if "token_log_probs" in recipe and OnReference.token_log_probs is None:
        pytest.skip("there is no token_log_probs")
    given = names()
    exec(recipe, given)
    return given


def check(got: Tensor, want: Callable[[Tensor], Tensor], given: dict[str, Any], of: str = "logits") -> None:
    """Values, and gradients in the logits."""
    leaf = given[of].detach().clone().requires_grad_()
    truth = want(leaf)
    torch.testing.assert_close(got.detach(), truth.detach(), rtol=1e-6, atol=1e-7)
    grads = [torch.autograd.grad(x.sum(), y, retain_graph=True)[0] for x, y in ((got, given[of]), (truth, leaf))]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-7)


def test_every_recipe_is_tested_here() -> None:
    assert len(recipes()) == 10


def test_the_first_call_runs() -> None:
    given = run("topk_targets(teacher_logits, k, temperature=T)")
    assert given["loss"].isfinite()
    assert given["teacher"].indices.shape == (N, K)


def test_another_temperature_is_a_factor() -> None:
    given = run("(T0 / T)")
    check(given["loss"], lambda s: T * T * _mean_ce(*conditional(s)), given)


def _mean_ce(p: Tensor, q: Tensor) -> Tensor:
    return -(p.exp() * q).sum(-1).mean()


def test_a_servers_rows_belong_to_all_logits_but_the_last() -> None:
    given = run("from_vllm")
    check(given["loss"], lambda s: _mean_ce(*(x[:-1] for x in conditional(s, tau=1))), given)


def test_the_students_top_k_is_sdfts() -> None:
    given = run("logits.topk(k)")
    check(given["loss"], lambda s: jsd(*map(normalized, entries_of(s, "of_student", 1)), beta=0.5).mean(), given)


def test_a_sampled_token_is_there_once() -> None:
    served = run("is_there")["served"]
    want = of(torch.cat([top(1).indices, SAMPLED.unsqueeze(-1)], -1), 1)
    assert all(map(torch.equal, served, want))
    assert (served.log_probs[:, -1] == -INF).any()
    assert (served.log_probs[:, -1] > -INF).any()


def test_verls_clamps() -> None:
    given = run("teacher_rows")
    plain = FORMULAS["verl `compute_forward_kl_topk`"]
    check(given["rows"], plain, given)
    check(given["clamped"], plain, given)
    assert (given["rows"] == 0).any() == (plain(S) == 0).any()


def test_speculators_nla_and_lk_hybrid() -> None:
    given = run("lk_hybrid")
    p = log_p(1)

    def accepted(s: Tensor) -> Tensor:
        return torch.minimum(F.softmax(s, -1), p.exp()).sum(-1)

    def hybrid(s: Tensor) -> Tensor:
        w = torch.exp(-3 * accepted(s).detach())
        return w * kl(p, log_q(s, 1)) + (1 - w) * 0.5 * (F.softmax(s, -1) - p.exp()).abs().sum(-1)

    check(given["nla"], lambda s: -accepted(s).clamp(min=1e-5).log(), given)
    check(given["lk_hybrid"], hybrid, given)


def test_a_draft_vocabulary_maps_the_teachers_classes() -> None:
    given = run("draft_id")
    kept = given["t2d"].nonzero().squeeze(-1)
    assert torch.equal(torch.arange(len(kept)) + given["d2t"], kept)
    teacher = given["teacher"]
    for row in range(N):
        found = {int(kept[i]): float(x) for i, x in zip(*(x[row] for x in teacher), strict=True) if x > -INF}
        whole = zip(*(x[row] for x in top(1)), strict=True)
        assert found == {int(i): float(x) for i, x in whole if given["t2d"][i]}

    def plain(s: Tensor) -> Tensor:
        p = torch.where(teacher.log_probs == -INF, 0, teacher.log_probs.exp())
        p = p / p.sum(-1, True).clamp(min=1e-30)
        return -(p * F.log_softmax(s, -1).gather(-1, teacher.indices.clamp(min=0))).sum(-1).mean()

    check(given["loss"], plain, given, of="draft_logits")


def test_each_row_may_have_a_teacher_of_its_own() -> None:
    given = run("teacher_id == i")
    merged = torch.where((given["teacher_id"] == 0).unsqueeze(-1), *given["teachers"])
    check(given["loss"], lambda s: kd_loss(s, merged, Y), given)


def test_hidden_states_need_no_logits() -> None:
    given = run("linear_kd_loss(hidden, weight, top, None")
    teacher = TopKTargets(top(1).indices, top(1).log_probs)
    check(given["loss"], lambda h: kd_loss(h @ given["weight"].t(), teacher, missing="conditional"), given, of="hidden")


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 384), (torch.float32, 512)])
def test_a_token_takes_as_many_bytes_as_the_page_says(dtype: torch.dtype, size: int) -> None:
    teacher = kdfast.topk_targets(torch.randn(10, 100), 64).to(dtype)
    assert teacher.indices.int().nbytes + teacher.log_probs.nbytes == 10 * size
    assert str(size) in PAGE.read_text()
