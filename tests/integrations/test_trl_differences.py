"""Where kdfast.integrations.trl and TRL differ, what goes to TRL's own code, and how TRL is put back."""

import importlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from documentation import blocks
from torch import Tensor
from trl_calls import BATCH, BETAS, LABELS, LENGTH, NAMES, VOCAB, check, found, logits, value_and_gradients

import kdfast.integrations.trl as integration
from kdfast.integrations.patching import FallbackWarning


@pytest.fixture(autouse=True, scope="module")
def patched() -> Iterator[None]:
    with integration.patch():
        yield


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
    for options in ({"num_items_in_batch": torch.tensor(0)}, {"num_items_in_batch": 0}, {"reduction": "mean"}):
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


def test_hidden_states_of_a_teacher_that_requires_grad_are_kdfasts_too() -> None:
    """TRL's own function gives them no gradient."""
    loss = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    hidden, teacher = torch.randn(2, BATCH, LENGTH, 8).unbind()
    given = hidden.requires_grad_(), teacher.requires_grad_(), torch.randn(VOCAB, 8), torch.randn(VOCAB, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        check(loss, [hidden], *given, LABELS >= 0, 0.5, rtol=1e-6)


def test_vocabularies_of_different_size_are_an_error_that_names_both() -> None:
    student, teacher = logits()
    with pytest.raises(ValueError, match=r"15.*14|14.*15"):
        found("gkd.GKDTrainer.generalized_jsd_loss")(student, teacher[..., :-1])


def test_the_line_of_the_page_patches() -> None:
    (lines,) = (each for each in blocks("TRL") if ".trl.patch()" in each)
    exec(lines, {})
    assert hasattr(found("gkd.GKDTrainer.generalized_jsd_loss"), "kdfast_original")


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
