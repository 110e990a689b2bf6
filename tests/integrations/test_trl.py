"""Each function of TRL that kdfast.integrations.trl replaces, beside the original: values and gradients."""

import importlib
import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl_calls import BATCH, BETAS, LABELS, LENGTH, NAMES, VOCAB, check, found, logits, value_and_gradients

import kdfast.integrations.trl as integration
from kdfast import TopKTargets
from kdfast.integrations.trl.logits import leave_tail


@pytest.fixture(autouse=True, scope="module")
def patched() -> Iterator[None]:
    with integration.patch():
        yield


REDUCED: list[dict[str, Any]] = [
    *({"labels": labels, "reduction": each} for labels in (None, LABELS) for each in ("batchmean", "sum", "mean")),
    {"labels": LABELS, "num_items_in_batch": torch.tensor(23)},
    {"labels": LABELS, "num_items_in_batch": 23.5},
    {"labels": None, "num_items_in_batch": torch.tensor(7.5)},
    {"labels": torch.full_like(LABELS, -100)},
]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", NAMES)
def test_generalized_jsd_loss_is_the_originals(name: str, beta: float) -> None:
    student, teacher = logits()
    student.requires_grad_()
    loss = found(f"{name}.{NAMES[name]}.generalized_jsd_loss")
    for options, temperature in itertools.product(REDUCED, (1.0, 2.5)):
        check(loss, [student], student, teacher, beta=beta, temperature=temperature, **options)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("add_tail", [True, False])
def test_iw_opds_top_k_is_the_originals(beta: float, add_tail: bool) -> None:
    """k = 8 gives more entries than classes where both top k are taken, k = 15 all classes."""
    student, teacher = logits()
    student.requires_grad_()
    loss = found("iw_opd.IWOPDTrainer.generalized_jsd_loss")
    for options, top_k in itertools.product(REDUCED, (1, 3, 8, 15)):
        given = {"beta": beta, "temperature": 1.5, "top_k": top_k, "add_tail": add_tail}
        check(loss, [student], student, teacher, **given, **options)


@pytest.mark.parametrize("mode", ["argmax", "sampled"])
@pytest.mark.parametrize("beta", BETAS[1:])
def test_iw_opds_local_top_1_is_the_originals(beta: float, mode: str) -> None:
    student, teacher = logits()
    student.requires_grad_()
    trainer = found("iw_opd.IWOPDTrainer")
    tokens = torch.where(torch.arange(LENGTH) < 3, teacher.argmax(-1), LABELS.clamp(min=0))
    for add_tail, count in itertools.product((True, False), (None, torch.tensor(9))):
        own = object.__new__(trainer)
        own.__dict__ |= {"beta": beta, "temperature": 1.5, "loss_add_tail": add_tail, "reverse_kl_top_1_mode": mode}
        loss = trainer._compute_local_sparse_top_1_divergence_loss
        check(loss, [student], own, student, teacher, tokens, LABELS, num_items_in_batch=count)


@pytest.mark.parametrize("certain", [False, True])
def test_iw_opds_sampled_tokens_are_the_originals(certain: bool) -> None:
    """certain: the student is, of a sampled token."""
    student, teacher = logits()
    tokens = LABELS.clamp(min=0)
    if certain:
        student[1, 2] = -math.inf
        student[1, 2, tokens[1, 2]] = 0
    student.requires_grad_()
    trainer = found("iw_opd.IWOPDTrainer")
    log_p = torch.log_softmax(teacher, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    for rollout, count in itertools.product((None, log_p - 0.3), (None, torch.tensor(9))):
        metrics: list[Any] = []
        for loss in (trainer._compute_iw_opd_loss, trainer._compute_iw_opd_loss.kdfast_original):
            own = SimpleNamespace(temperature=1.5, iw_opd_epsilon=1e-6, iw_opd_gamma=0.4)
            own.model, own._metrics = SimpleNamespace(training=True), {"train": _Lists()}
            metrics.append([value_and_gradients(loss, [student], own, student, tokens, LABELS, log_p, rollout, count)])
            metrics[-1].append({name: torch.tensor(values) for name, values in own._metrics["train"].items()})
        torch.testing.assert_close(*metrics, rtol=1e-10, atol=1e-10)
        assert len(metrics[0][1]) == 5


class _Lists(dict[str, list[float]]):
    def __missing__(self, name: str) -> list[float]:
        return self.setdefault(name, [])


@pytest.mark.parametrize("alpha", BETAS)
@pytest.mark.parametrize("name", ["sdft", "sdpo"])
def test_self_distillation_losses_are_the_originals(name: str, alpha: float) -> None:
    student, teacher = logits()
    student.requires_grad_()
    full, top_k, sampled = (
        found(f"{name}.compute_{which}_self_distillation_loss") for which in ("full_logit", "topk", "sampled_token")
    )
    check(full, [student], student, teacher, distillation_alpha=alpha)
    for k, add_tail in itertools.product((1, 4), (True, False)):
        options = {"distillation_topk": k, "distillation_alpha": alpha, "distillation_add_tail": add_tail}
        check(top_k, [student], student, teacher, **options)
    if alpha == 1:
        check(sampled, [student], student, teacher, LABELS.clamp(min=0), distillation_alpha=alpha)
    else:
        with pytest.raises(ValueError, match="Only reverse KL"):
            sampled(student, teacher, LABELS.clamp(min=0), distillation_alpha=alpha)


HEADS: list[dict[str, Any]] = [
    {},
    {"num_items_in_batch": torch.tensor(23.0), "temperature": 2.5},
    {"num_items_in_batch": 23, "biases": True, "student_logit_scale": 0.5, "teacher_logit_scale": 2.0},
    {"student_final_logit_softcapping": 3.0, "temperature": 0.8},
    {"teacher_final_logit_softcapping": 2.0, "student_final_logit_softcapping": 1.5, "student_logit_scale": 3.0},
    {"masked": True},
    {"frozen": True},
]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_chunked_divergence_loss_is_the_originals(beta: float, options: dict[str, Any]) -> None:
    """TRL's runs in float32 whatever the dtype is; the entropy and the number of rows are part of this."""
    loss = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    options = dict(options)
    hidden, weight = torch.randn(BATCH, LENGTH, 8), torch.randn(VOCAB, 8)
    teacher_hidden, teacher_weight = torch.randn(BATCH, LENGTH, 12), torch.randn(VOCAB, 12)
    mask = (LABELS >= 0).long() * (0 if options.pop("masked", False) else 1)
    leaves = [hidden] if options.pop("frozen", False) else [hidden, weight]
    if options.pop("biases", False):
        leaves.append(torch.randn(VOCAB))
        options |= {"student_lm_head_bias": leaves[2], "teacher_lm_head_bias": torch.randn(VOCAB)}
    for leaf in leaves:
        leaf.requires_grad_()
    given = hidden, teacher_hidden, weight, teacher_weight, mask, beta
    check(loss, leaves, *given, rtol=2e-6, **options)
    with torch.no_grad():
        torch.testing.assert_close(loss(*given, **options), loss.kdfast_original(*given, **options))


def test_chunked_divergence_loss_takes_other_dtypes_and_a_larger_teacher() -> None:
    loss = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    hidden, weight = torch.randn(BATCH, LENGTH, 8, dtype=torch.bfloat16), torch.randn(VOCAB, 8, requires_grad=True)
    teacher = torch.randn(BATCH, LENGTH, 8), torch.randn(VOCAB + 3, 8)
    given = hidden.requires_grad_(), teacher[0], weight, teacher[1], LABELS >= 0, 0.5
    ours, theirs = (value_and_gradients(f, [hidden, weight], *given) for f in (loss, loss.kdfast_original))
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    torch.testing.assert_close(ours[:3], theirs[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[3:], theirs[3:], rtol=2e-2, atol=2e-3)  # both are rounded to bfloat16


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("add_tail", [True, False])
def test_async_distillations_chunked_loss_is_the_originals(beta: float, add_tail: bool) -> None:
    """With padded candidates, and with the numbers of each of two teachers."""
    loss = found("async_distillation._chunked_jsd_loss")
    rows, k = 7, 4
    hidden, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((rows, 8), (VOCAB, 8), (VOCAB,)))
    ids = torch.stack([torch.randperm(VOCAB)[:k] for _ in range(rows)])
    log_p = torch.log_softmax(2 * torch.randn(rows, VOCAB), -1).gather(-1, ids)
    there = torch.arange(k) < torch.tensor([4, 3, 4, 1, 2, 4, 4]).unsqueeze(-1)
    ids = ids.masked_fill(~there, -1)
    teachers = (torch.arange(rows) % 2, None)
    for (own, cap), whose, with_bias in itertools.product(((1.0, None), (0.5, 3.0)), teachers, (True, False)):
        leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
        given = hidden, weight, bias if with_bias else None, own, cap, ids, log_p, there, beta, 1.5, add_tail, whose, 2
        check(loss, leaves, *given, 3, rtol=2e-6)


def test_reverse_kl_of_a_teacher_that_is_sure_is_finite_as_trls_is() -> None:
    """Its tail is 0, so that reverse KL is infinite; TRL takes a tail of 1e-7."""
    student, teacher = logits()
    tokens = student.argmax(-1)
    teacher.scatter_(-1, tokens.unsqueeze(-1), 200.0)
    student.requires_grad_()
    iw_opd = found("iw_opd.IWOPDTrainer")
    check(iw_opd.generalized_jsd_loss, [student], student, teacher, beta=1.0, top_k=1, rtol=1e-6)
    own = object.__new__(iw_opd)
    own.__dict__ |= {"beta": 1.0, "temperature": 1.5, "loss_add_tail": True, "reverse_kl_top_1_mode": "sampled"}
    check(
        iw_opd._compute_local_sparse_top_1_divergence_loss, [student], own, student, teacher, tokens, LABELS, rtol=1e-6
    )
    options = {"distillation_topk": 3, "distillation_alpha": 1.0, "distillation_add_tail": True}
    check(found("sdft.compute_topk_self_distillation_loss"), [student], student, teacher, rtol=1e-6, **options)
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(VOCAB, 8, requires_grad=True)
    for log_p in (0.0, 3e-8):  # of rounding, a little more than all
        given = torch.tensor([[1], [2], [3], [4]]), torch.full((4, 1), log_p), torch.ones(4, 1, dtype=torch.bool)
        loss = found("async_distillation._chunked_jsd_loss")
        check(loss, [hidden, weight], hidden, weight, None, 1.0, None, *given, 1.0, 1.5, True, None, 1, 3, rtol=1e-5)


def test_rounded_entries_leave_a_tail() -> None:
    """Whatever float32 makes of their sum."""
    log_probs = torch.log_softmax(torch.randn(2000, 14), -1)
    targets = leave_tail(TopKTargets(torch.arange(14).expand(2000, 14), log_probs), 1.0, True)
    mass = targets.log_probs.double().exp().sum(-1)
    assert (mass < 1 - 5e-8).all() and (mass > 1 - 1e-6).all()
