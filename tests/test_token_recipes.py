"""The recipes of docs/tokens.md run, and have the values and gradients that the page says."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import F64, batch
from torch import Tensor

import kdfast

PAGE = (Path(__file__).parents[1] / "docs" / "tokens.md").read_text()
RECIPES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
ROWS, VOCAB = 6, 9


def names(ids: Tensor | None = None) -> dict[str, Any]:
    """What the page's recipes use; its shared block has run."""
    student, teacher, some = batch(ROWS, VOCAB, F64)
    logits = student.requires_grad_()
    given = {
        "torch": torch,
        "kdfast": kdfast,
        "logits": logits,
        "teacher_logits": teacher,
        "ids": some if ids is None else ids,
        "hidden": torch.eye(ROWS, dtype=F64),
        "weight": logits.detach().t().contiguous(),
        "top": kdfast.topk_targets(teacher, 3),
        "T0": 1.0,
        "T": 2.0,
    }
    old = (logits + 0.3 * batch(ROWS, VOCAB, F64, seed=1).teacher).detach()
    given["log_old"] = kdfast.token_log_probs(old, given["ids"]).log_probs
    return run("with torch.no_grad()", given)


def run(words: str, given: dict[str, Any]) -> dict[str, Any]:
    """Runs the one recipe that has these words."""
    (recipe,) = (text for text in RECIPES if words in text)
    exec(recipe, given)
    return given


def gradient(value: Tensor, given: dict[str, Any]) -> Tensor:
    return torch.autograd.grad(value, given["logits"], retain_graph=True)[0]


def log_softmax(x: Tensor) -> Tensor:
    return torch.log_softmax(x, -1)


def test_every_recipe_runs() -> None:
    given = names() | {"loss": 0.0}
    for recipe in RECIPES:
        exec(recipe, given)
    assert len(RECIPES) == 15


@pytest.mark.parametrize("which", ["token_log_probs(logits, ids, t", "linear_token_log_probs"])
def test_the_table_of_results_is_right(which: str) -> None:
    given = run(which, names())
    q = torch.softmax(given["logits"].detach() / 2, -1)
    own = q.gather(-1, given["ids"][:, None]).squeeze(-1)
    torch.testing.assert_close(given["log_q"], own.log())
    torch.testing.assert_close(given["entropy"], -(q * q.log()).sum(-1))
    torch.testing.assert_close(given["log_rest"], (1 - own).log())
    if which.startswith("token"):
        is_id = torch.nn.functional.one_hot(given["ids"], VOCAB)
        rows = (is_id - q) / 2, -q * (q.log() + given["entropy"][:, None]) / 2
        rows = *rows, (q * (1 - is_id) / (1 - own)[:, None] - q) / 2
        for result, want in zip(("log_q", "entropy", "log_rest"), rows, strict=True):
            torch.testing.assert_close(gradient(given[result].sum(), given), want)


def expected(words: str, result: str) -> tuple[Tensor, Tensor]:
    """The mean of an estimator's value and gradient over all tokens, each as often as the student samples it."""
    value, grad = torch.zeros(ROWS, dtype=F64), torch.zeros(ROWS, VOCAB, dtype=F64)
    for token in range(VOCAB):
        given = run(words, names(torch.full((ROWS,), token)))
        q = given["log_q"].detach().exp()
        value += q * given[result].detach()
        grad += gradient((q * given[result]).sum(), given)
    return value, grad


def divergence(forward: bool) -> tuple[Tensor, Tensor]:
    given = names()
    log_q, log_p = log_softmax(given["logits"]), log_softmax(given["teacher_logits"])
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) if forward else (log_q.exp() * (log_q - log_p)).sum(-1)
    return kl.detach(), gradient(kl.sum(), given)


def test_each_estimator_has_the_expected_gradient_that_the_table_says() -> None:
    reverse, of_reverse = divergence(forward=False)
    _, of_forward = divergence(forward=True)
    for result, wanted in (("k1", torch.zeros(ROWS, VOCAB, dtype=F64)), ("k2", of_reverse), ("k3", of_forward)):
        value, grad = expected("k1, k2, k3 =", result)
        torch.testing.assert_close(grad, wanted)
        if result != "k2":
            torch.testing.assert_close(value, reverse)
    value, grad = expected("k3_plus", "k3_plus")
    torch.testing.assert_close(value, expected("k3 = (r.expm1()", "k3")[0])
    torch.testing.assert_close(grad, of_reverse)


def test_a_clamped_entry_has_no_gradient() -> None:
    given = names()
    log_q = torch.tensor([-1.0, -30.0, -1.0, -14.0, -2.0, -3.0], dtype=F64, requires_grad=True)
    log_p = torch.tensor([-30.0, -1.0, -1.5, -1.0, -2.0, -3.5], dtype=F64)
    local = run("k3 = (r.expm1()", given | {"log_q": log_q, "log_p": log_p})
    r = log_p - log_q.detach()
    clamped = (r.abs() > 20) | (r.clamp(-20, 20).expm1() - r.clamp(-20, 20) > 10)
    assert clamped.tolist() == [True, True, False, True, False, False]
    (grad,) = torch.autograd.grad(local["k3"].sum(), log_q)
    torch.testing.assert_close(grad, torch.where(clamped, 0, 1 - r.exp()))
    assert local["k3"].max() == 10


def test_advantages_have_policy_gradients() -> None:
    given = run("advantage = log_p - log_old", names())
    ratio = (given["log_q"] - given["log_old"]).exp().detach()
    of_log_q = gradient(given["log_q"].sum(), given)
    want = -(ratio * given["advantage"])[:, None] * of_log_q / ROWS
    torch.testing.assert_close(gradient(given["loss"], given), want)
    given = run("torch.maximum", given)
    inside = torch.where(given["advantage"] > 0, ratio < 1.2, ratio > 0.8)
    torch.testing.assert_close(gradient(given["loss"], given), torch.where(inside[:, None], want, 0))


def test_self_distillations_expected_gradient_is_reverse_kls() -> None:
    grad = torch.zeros(ROWS, VOCAB, dtype=F64)
    for token in range(VOCAB):
        given = names(torch.full((ROWS,), token))
        given["log_old"] = given["log_q"].detach()  # one step
        given = run("clamp(max=2)", given)
        each = given["weight"] * (given["log_q"] - given["log_p"]).detach() * given["log_q"]
        torch.testing.assert_close(given["loss"], each.mean())
        grad += gradient((given["log_q"].detach().exp() * each).sum(), given)
    torch.testing.assert_close(grad, divergence(forward=False)[1])


def test_verls_clamped_forward_kl_and_another_temperature_have_their_values() -> None:
    given = names()
    log_q, log_p = (log_softmax(x).gather(-1, given["top"].indices) for x in (given["logits"], given["teacher_logits"]))
    log_q, log_p = log_q.clamp(min=-10), log_p.clamp(min=-10)
    torch.testing.assert_close(run("log_q_k", given)["loss"], (log_p.exp() * (log_p - log_q)).sum(-1).mean())
    at_t = kdfast.topk_targets(given["teacher_logits"], 3, temperature=2.0)
    want = kdfast.kd_loss(given["logits"], at_t, temperature=2.0, missing="conditional")
    torch.testing.assert_close(run("T0 / T", given)["loss"], want)


def test_confidence_has_its_values() -> None:
    given = run("left =", names())
    q = torch.softmax(given["logits"], -1)
    torch.testing.assert_close(given["left"], 1 - q.gather(-1, given["top"].indices).sum(-1))
    given = run("log_q.exp().detach() * log_q", given)
    own = q.gather(-1, given["ids"][:, None]).squeeze(-1)
    torch.testing.assert_close(given["loss"], -(own * own.log()).mean())
    torch.testing.assert_close(
        gradient(given["loss"], given), -(own.detach()[:, None] * gradient(own.log().sum(), given)) / ROWS
    )


def test_an_ignored_token_has_terms_of_0_and_counts_in_no_mean() -> None:
    whole, ids = run("k1, k2, k3 =", names()), names()["ids"]
    ids[2] = -100
    given = run("advantage = log_p - log_old", run("k1, k2, k3 =", names(ids)))
    (mean,) = re.findall(r"`(x\.sum\(\) / .*?)`", PAGE)
    for result in ("k1", "k2", "k3", "log_q"):
        assert given[result][2] == 0
        got = eval(mean, {"x": given[result], "ids": ids})
        torch.testing.assert_close(got, whole[result][ids != -100].mean())
    assert given["advantage"][2] == 0
