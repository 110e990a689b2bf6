"""Each function of TRL that kdfast.integrations.trl replaces, beside the original: values and gradients."""

import importlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast.integrations.trl as integration
from kdfast.integrations.patching import FallbackWarning

BATCH, LENGTH, VOCAB = 2, 6, 15
BETAS = (0.0, 0.3, 0.5, 1.0)
NAMES = {"gkd": "GKDTrainer", "gold": "GOLDTrainer", "iw_opd": "IWOPDTrainer"}


@pytest.fixture(autouse=True, scope="module")
def patched() -> Iterator[None]:
    with integration.patch():
        yield


def found(path: str) -> Any:
    """An attribute of an experimental trainer's module: "gkd.GKDTrainer.generalized_jsd_loss"."""
    name, *path = path.split(".")
    owner = importlib.import_module(f"trl.experimental.{name}.{name}_trainer")
    for part in path:
        owner = getattr(owner, part)
    return owner


def logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(BATCH, LENGTH, VOCAB, dtype=torch.float64, generator=draw) for _ in range(2))


def value_and_gradients(function: Callable[..., Any], leaves: list[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    """The loss, what else is returned, and the gradients of leaves, with weights where the loss is no scalar."""
    results = function(*args, **kwargs)
    results = results if isinstance(results, tuple) else (results,)
    weights = torch.linspace(1, 2, results[0].numel(), dtype=results[0].dtype).view_as(results[0])
    grads = torch.autograd.grad((results[0] * weights).sum(), leaves)
    assert not any(x.requires_grad for x in results[1:])
    return [*results, *grads]


def check(function: Callable[..., Any], leaves: list[Tensor], *args: Any, rtol: float = 1e-10, **kwargs: Any) -> None:
    """As the original, of the same dtypes."""
    ours = value_and_gradients(function, leaves, *args, **kwargs)
    theirs = value_and_gradients(function.kdfast_original, leaves, *args, **kwargs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol, check_dtype=rtol < 1e-9)


LABELS = torch.tensor([[-100, -100, 3, 4, 14, -100], [-100, 0, 1, 2, 3, 4]])
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
    leaves = [hidden, weight]
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


# --- where TRL's is not a number, or is not the formula's ------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", NAMES)
def test_a_class_masked_in_both_makes_trls_loss_nan_and_ours_that_of_the_other_classes(name: str, beta: float) -> None:
    student, teacher = logits()
    loss = found(f"{name}.{NAMES[name]}.generalized_jsd_loss")
    whole = loss.kdfast_original(student[..., :-2], teacher[..., :-2], beta=beta)
    for x in (student, teacher):
        x[..., -2:] = -math.inf
    assert loss.kdfast_original(student, teacher, beta=beta).isnan()
    got, grad = value_and_gradients(loss, [student.requires_grad_()], student, teacher, beta=beta)
    torch.testing.assert_close(got, whole)
    assert grad.isfinite().all() and not grad[..., -2:].any()


def test_a_class_that_the_teacher_excludes_makes_trls_forward_kl_nan() -> None:
    student, teacher = logits()
    teacher[..., 0] = -math.inf
    for name in NAMES:
        loss = found(f"{name}.{NAMES[name]}.generalized_jsd_loss")
        assert loss.kdfast_original(student, teacher, beta=0.0).isnan()
        p = torch.softmax(teacher, -1)
        want = (torch.special.xlogy(p, p) - p * torch.log_softmax(student, -1)).sum() / BATCH
        torch.testing.assert_close(loss(student, teacher, beta=0.0), want)


def test_no_token_at_all_is_nan_in_trl_and_0_here() -> None:
    student, teacher = logits()
    nothing = torch.full_like(LABELS, -100)
    loss = found("gkd.GKDTrainer.generalized_jsd_loss")
    for options in ({"num_items_in_batch": torch.tensor(0)}, {"reduction": "mean"}):
        assert loss.kdfast_original(student, teacher, nothing, **options).isnan()
        got, grad = value_and_gradients(loss, [student.requires_grad_()], student, teacher, nothing, **options)
        assert got == 0 and not grad.any()


def test_the_rest_of_a_confident_student_has_its_gradient_here_and_none_in_trl() -> None:
    """TRL's tail takes the mass of the entries for at most 1 - 1e-7."""
    student, teacher = (x[0, 0] for x in logits())
    student[0], teacher[0] = 30.0, 1.0
    loss = found("iw_opd.IWOPDTrainer.generalized_jsd_loss")
    options = {"beta": 0.0, "top_k": 1}
    given = student.requires_grad_(), teacher.index_fill(-1, torch.tensor([0]), 5.0)
    _, theirs = value_and_gradients(loss.kdfast_original, [student], *given, **options)
    _, ours = value_and_gradients(loss, [student], *given, **options)
    rest = 1 - torch.softmax(given[1], -1)[0]
    torch.testing.assert_close(ours[0], rest, rtol=1e-6, atol=0)  # q - p
    assert theirs[0].abs() < 1e-6 * rest


def test_half_precision_logits_give_a_loss_of_float32() -> None:
    student, teacher = (x.bfloat16() for x in logits())
    loss = found("gkd.GKDTrainer.generalized_jsd_loss")
    want = loss.kdfast_original(student.double(), teacher.double()).float()
    assert loss.kdfast_original(student, teacher).dtype == torch.bfloat16
    torch.testing.assert_close(loss(student, teacher), want, rtol=1e-6, atol=0)


# --- what goes to TRL's own code -------------------------------------------------------------------------------------


def _probabilities() -> tuple[Tensor, Tensor]:
    return tuple(F.softmax(x, -1)[..., :9] for x in logits())


@pytest.mark.parametrize(
    ("path", "options", "reason"),
    [
        ("gkd.GKDTrainer.generalized_jsd_loss", {"reduction": "none"}, "a number for each class"),
        ("gold.GOLDTrainer.generalized_jsd_loss", {"logits_are_probs": True}, "do not sum to 1"),
        ("iw_opd.IWOPDTrainer.generalized_jsd_loss", {"teacher_grad": True}, "a gradient of the teacher"),
        ("sdft.compute_full_logit_self_distillation_loss", {"teacher_grad": True}, "a gradient of the teacher"),
    ],
)
def test_what_kdfast_does_not_compute_goes_to_trls_own_code_with_a_warning(
    path: str, options: dict[str, Any], reason: str
) -> None:
    student, teacher = _probabilities() if "logits_are_probs" in options else logits()
    options = dict(options)
    teacher.requires_grad_(options.pop("teacher_grad", False))
    if path.startswith("sdft"):
        options["distillation_alpha"] = 0.5
    leaves = [x for x in (student.requires_grad_(), teacher) if x.requires_grad]
    with pytest.warns(FallbackWarning, match=reason):
        check(found(path), leaves, student, teacher, **options)


def test_a_head_that_scales_by_0_goes_to_trls_own_code() -> None:
    loss = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    hidden, weight = torch.randn(BATCH, LENGTH, 8, requires_grad=True), torch.randn(VOCAB, 8)
    given = hidden, torch.randn(BATCH, LENGTH, 8), weight, torch.randn(VOCAB, 8), LABELS >= 0, 0.5
    with pytest.warns(FallbackWarning, match=r"a logit_scale of 0\.0"):
        check(loss, [hidden], *given, rtol=1e-6, student_logit_scale=0.0)


def test_vocabularies_of_different_size_are_an_error_that_names_both() -> None:
    student, teacher = logits()
    with pytest.raises(ValueError, match=r"15.*14|14.*15"):
        found("gkd.GKDTrainer.generalized_jsd_loss")(student, teacher[..., :-1])


def test_an_unpatched_trl_is_as_it_was() -> None:
    modules = {(module, name) for module, name, _ in integration.REPLACED}
    for path, name in modules:
        assert hasattr(_attribute(path, name), "kdfast_original")
    assert integration.patch()._before == []  # done already
    before = {key: _attribute(*key).kdfast_original for key in modules}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for path, name in modules:  # as if nothing had been patched
            owner, last = _owner(path, name)
            static = isinstance(owner, type) and isinstance(owner.__dict__[last], staticmethod)
            monkeypatch.setattr(owner, last, staticmethod(before[path, name]) if static else before[path, name])
        with integration.patch():
            assert all(_attribute(*key) is not each for key, each in before.items())
        assert all(_attribute(*key) is each for key, each in before.items())
        trainer = object.__new__(found("gkd.GKDTrainer"))
        assert trainer.generalized_jsd_loss(*logits()).isfinite()  # a static method still


def _owner(path: str, name: str) -> tuple[Any, str]:
    owner = importlib.import_module(path)
    *parts, last = name.split(".")
    for part in parts:
        owner = getattr(owner, part)
    return owner, last


def _attribute(path: str, name: str) -> Any:
    return getattr(*_owner(path, name))
