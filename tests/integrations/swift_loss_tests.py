"""ms-swift's GKD loss: its own code beside kdfast's. Run by test_swift.py."""

import importlib
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import swift_stubs  # noqa: F401, before ms-swift
import torch
from swift.rlhf_trainers import gkd_trainer
from swift_cases import (
    GKD,
    JSD,
    VOCAB,
    assert_same,
    batch,
    dense,
    library,
    logits,
    top_k,
    with_absent_entries,
    with_gradient,
)
from torch import Tensor

from kdfast.integrations import swift
from kdfast.integrations.patching import FallbackWarning

BETAS = pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1])  # forward KL, two mixtures, reverse KL
TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 2.5])


@pytest.fixture
def patched() -> Iterator[Any]:
    with swift.patch():
        yield library


@BETAS
@TEMPERATURES
@pytest.mark.parametrize("made", [dense, top_k])
def test_gkd_loss_is_ms_swifts(patched: Any, made: Callable[..., Any], beta: float, temperature: float) -> None:
    student, teacher, labels = batch()
    arguments = made(teacher, labels), labels, beta, temperature
    assert_same(with_gradient(patched.gkd_loss, student, *arguments), with_gradient(GKD, student, *arguments))


@pytest.mark.parametrize("made", [dense, top_k])
def test_teacher_with_another_prompt_is_aligned_by_its_own_labels(patched: Any, made: Callable[..., Any]) -> None:
    student, _, labels = batch()
    teacher, own_labels = logits(2, 9, VOCAB, seed=1), torch.full((2, 9), -100)
    own_labels[0, 4:7], own_labels[1, 2:7] = 1, 1
    arguments = made(teacher, own_labels), labels, 0.3, 2.0
    assert_same(with_gradient(patched.gkd_loss, student, *arguments), with_gradient(GKD, student, *arguments))


@BETAS
@TEMPERATURES
def test_jsd_loss_is_ms_swifts(patched: Any, beta: float, temperature: float) -> None:
    student, teacher = logits(9, VOCAB) / temperature, logits(9, VOCAB, seed=1) / temperature
    arguments = teacher, beta
    want = with_gradient(JSD, student, *arguments, chunk_size=4)
    assert_same(with_gradient(patched.jsd_loss, student, *arguments), want)


def test_batch_without_labels_costs_nothing_and_has_gradient_zero(patched: Any) -> None:
    student, teacher, labels = batch()
    labels.fill_(-100)
    loss, grad, count = with_gradient(patched.gkd_loss, student, dense(teacher, labels), labels, 0.5, 1.0)
    assert loss == 0 and count == 0 and not grad.any()
    loss, grad = with_gradient(patched.jsd_loss, student[:, 0][:0], teacher[:, 0][:0], 0.5)
    assert loss == 0 and grad.shape == (0, VOCAB)


# ---- what is wrong in ms-swift ----


@pytest.mark.parametrize("classes", [VOCAB - 5, VOCAB + 5])
def test_classes_that_one_head_lacks_are_left_out(patched: Any, classes: int) -> None:
    student, teacher, labels = batch(classes)
    arguments = labels, 0.3, 2.0
    with pytest.warns(UserWarning, match=f"have {VOCAB} and {classes} classes"):
        loss, grad, count = with_gradient(patched.gkd_loss, student, dense(teacher, labels), *arguments)
    both = min(classes, VOCAB)
    want = with_gradient(GKD, student[..., :both], dense(teacher[..., :both], labels), *arguments)
    assert_same((loss, grad[..., :both], count), want)
    assert not grad[..., both:].any()


def test_ms_swift_pads_a_shorter_teacher_with_the_students_logits_which_sends_a_gradient_through_it(
    patched: Any,
) -> None:
    """A softmax does not change with a constant that is added to all logits: the gradient of a row adds up to 0."""
    student, teacher, labels = batch(VOCAB - 5)
    arguments = dense(teacher, labels), labels, 0.3, 2.0
    assert with_gradient(GKD, student, *arguments)[1].sum(-1).abs().max() > 1e-3
    assert with_gradient(patched.gkd_loss, student, *arguments)[1].sum(-1).abs().max() < 1e-15


def losses_of_present_entries(student: Tensor, teacher: Any, labels: Tensor, beta: float) -> tuple[Tensor, int]:
    """ms-swift's own loss of each row's own entries."""
    total, count = student.sum() * 0, 0
    rows = student[labels != -100], *(x[labels != -100] for x in (teacher.topk_logprobs, teacher.topk_indices))
    for logits_of_row, values, indices in zip(*rows, strict=True):
        present = values > -math.inf
        if present.any():
            chosen = logits_of_row[indices[present]].unsqueeze(0)
            total, count = total + JSD(chosen / 2.0, values[present].unsqueeze(0) / 2.0, beta), count + 1
    return total, count


@BETAS
def test_absent_entries_make_ms_swifts_loss_nan_and_kdfast_leaves_them_out(patched: Any, beta: float) -> None:
    student, teacher, labels = batch()
    made = with_absent_entries(teacher, labels)
    want = with_gradient(losses_of_present_entries, student, made, labels, beta)
    got = with_gradient(patched.gkd_loss, student, made, labels, beta, 2.0)
    assert_same(got[:2], want[:2])
    assert got[2] == want[2] == 7  # of 8 labels; one row has no entry
    theirs = with_gradient(GKD, student, made, labels, beta, 2.0)
    assert theirs[0].isnan() if beta < 1 else theirs[0].isinf()


# ---- what the originals do ----


def test_functions_of_somebody_else_run_with_a_warning(patched: Any) -> None:
    student, teacher, labels = batch()

    def kl(input_log: Tensor, target_log: Tensor) -> Tensor:
        return 2 * library.default_kl_div(input_log, target_log)

    arguments = dense(teacher, labels), labels, 0.3, 2.0
    with pytest.warns(FallbackWarning, match="jsd_loss: kdfast does not compute functions"):
        got = with_gradient(patched.gkd_loss, student, *arguments, kl_div_fn=kl)
    assert_same(got, with_gradient(GKD, student, *arguments, kl_div_fn=kl))
    loss = patched.jsd_loss(student[0], teacher[0], 0.3, kl_div_fn=kl)
    assert_same(loss, JSD(student[0], teacher[0], 0.3, kl_div_fn=kl))


def test_trainer_whose_imports_are_missing_leaves_the_losses_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = importlib.import_module

    def import_module(name: str) -> Any:
        if name == gkd_trainer.__name__:
            raise ModuleNotFoundError(name)
        return imported(name)

    monkeypatch.delitem(sys.modules, gkd_trainer.__name__)
    monkeypatch.setattr(importlib, "import_module", import_module)
    with swift.patch():
        assert library.gkd_loss.kdfast_original and library.jsd_loss.kdfast_original


def test_evaluation_before_training_keeps_the_mean_of_its_batch() -> None:
    """Trainer has no current_gradient_accumulation_steps then."""
    trainer = types.SimpleNamespace(model=types.SimpleNamespace(training=False), _buffered_inputs=None)
    assert swift.share_of_step(trainer, torch.zeros(())) is None


def test_patch_is_undone_in_all_modules_that_have_the_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    gkd_loss, jsd_loss = library.gkd_loss, library.jsd_loss
    of_trainer = gkd_trainer.GKDTrainer._compute_jsd_loss
    later = types.ModuleType("swift.ray.megatron.loss.gkd")
    with swift.patch():
        assert library.gkd_loss is not gkd_loss and library.jsd_loss is not jsd_loss
        assert gkd_trainer.gkd_loss is not gkd_loss and gkd_trainer.GKDTrainer._compute_jsd_loss is not of_trainer
        later.gkd_loss = library.gkd_loss  # as of a module that is imported now
        monkeypatch.setitem(sys.modules, later.__name__, later)
        with swift.patch():
            pass  # does nothing, and neither does its end
        assert later.gkd_loss is library.gkd_loss is not gkd_loss
    assert library.gkd_loss is gkd_trainer.gkd_loss is later.gkd_loss is gkd_loss and library.jsd_loss is jsd_loss
    assert gkd_trainer.GKDTrainer._compute_jsd_loss is of_trainer
