"""torchtitan: kdfast's DistillationLoss in its Trainer, beside its own CrossEntropyLoss and beside plain formulas."""

from typing import Any

import pytest
import torch
import tyro
from documentation import blocks
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.config import CompileConfig
from torchtitan_cases import HARD_ALONE, KD, Model, T, assert_same, models, one_batch, plain_loss, train, train_plainly

import kdfast
from kdfast.integrations.torchtitan import Distill, DistillationLoss


@pytest.mark.parametrize("pieces", [1, 4])
def test_labels_alone_train_as_torchtitans_cross_entropy(pieces):
    ours, theirs = models()[0], models()[0]
    train(DistillationLoss.Config(kd=HARD_ALONE).build(), ours, pieces=pieces)
    train(CrossEntropyLoss.Config().build(), theirs, pieces=pieces)
    assert_same(ours, theirs)
    assert not torch.equal(ours.lm_head.weight, models()[0].lm_head.weight), "it was trained"


@pytest.mark.parametrize("pieces", [1, 2, 4], ids=lambda n: f"{n} micro-batches")
def test_a_teacher_trains_as_the_plain_formula_over_the_whole_batch(pieces):
    student, teacher = models(torch.float64)
    before = [p.clone() for p in teacher.parameters()]
    train(DistillationLoss.Config(kd=KD).build(), student, teacher, pieces=pieces)
    assert_same(student, train_plainly())
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(teacher.parameters(), before, strict=True))


@pytest.mark.parametrize("skips", [False, True], ids=["the teacher's logits", "the teacher's hidden states"])
def test_the_chunked_loss_wrapper_trains_as_the_loss_alone(skips):
    student, teacher = models(torch.float64)
    loss_fn = ChunkedLossWrapper.Config(num_chunks=3, loss_fn=DistillationLoss.Config(kd=KD)).build()
    loss_fn.set_lm_head(student.lm_head)
    student._skip_lm_head, teacher._skip_lm_head = True, skips
    loss_fn.loss_fn.set_teacher_head(teacher.lm_head)
    train(loss_fn, student, teacher, pieces=2)
    assert_same(student, train_plainly())


@pytest.mark.parametrize("is_divided", [True, False], ids=["global_valid_tokens", "none"])
def test_the_loss_is_a_sum_over_global_valid_tokens(is_divided):
    student, teacher, labels, tokens = one_batch()
    total = tokens if is_divided else None
    loss, metrics = DistillationLoss.Config(kd=KD).build()(student, labels, total, teacher_logits=teacher)
    expected = plain_loss(student, teacher, labels) / (tokens if is_divided else 1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)))
    assert metrics == {}


def test_a_teachers_top_k_is_two_tensors():
    student, teacher, labels, tokens = one_batch()
    top = kdfast.topk_targets(teacher, 5, temperature=T)
    loss_fn = DistillationLoss.Config(kd=KD).build()
    loss, _ = loss_fn(student, labels, tokens, teacher_indices=top.indices, teacher_log_probs=top.log_probs)
    assert loss == kdfast.kd_loss(student, top, labels, normalizer=tokens, **KD)


def test_validation_reports_torchtitans_cross_entropy():
    student, _, labels, tokens = one_batch(torch.float32)
    loss_fn = DistillationLoss.Config(kd={**KD, "label_smoothing": 0.1, "z_loss": 0.1}).build()
    for total in (None, tokens):
        loss, _ = loss_fn(student.detach(), labels, total)
        expected, _ = CrossEntropyLoss.Config().build()(student.detach(), labels, total)
        torch.testing.assert_close(loss, expected)


def test_training_without_a_teacher_is_an_error():
    student, _, labels, tokens = one_batch()
    with pytest.raises(TypeError, match="teacher: must be a tensor"):
        DistillationLoss.Config(kd=KD).build()(student, labels, tokens)
    with pytest.raises(ValueError, match="teacher_hidden: given without a head"):
        DistillationLoss.Config(kd=KD).build()(student, labels, tokens, teacher_hidden=student)


def test_arguments_that_torchtitan_decides_are_refused_and_others_checked():
    for name, value in (("reduction", "mean"), ("ignore_index", 0), ("process_group", None), ("return_metrics", True)):
        with pytest.raises(ValueError, match=f"kd: '{name}' is torchtitan's to decide"):
            DistillationLoss.Config(kd={name: value}).build()
    with pytest.raises(ValueError, match="temperature: 0 must be finite and > 0"):
        DistillationLoss.Config(kd={"temperature": 0}).build()
    assert DistillationLoss.Config(kd=KD).to_dict() == {"kd": KD}


def test_an_argument_can_be_changed_on_the_command_line():
    """By tyro, with which torchtitan parses its own."""
    config = tyro.cli(DistillationLoss.Config, default=DistillationLoss.Config(kd=KD), args=["--kd.temperature", "3"])
    assert config.build().kd["temperature"] == 3


def test_a_compiled_loss_is_the_same():
    student, teacher, labels, tokens = one_batch()
    config = CompileConfig(enable=True, components=["loss"], backend="aot_eager")
    loss_fn = DistillationLoss.Config(kd=KD).build(compile_config=config)
    assert loss_fn.fn is not kdfast.kd_loss
    loss, _ = loss_fn(student, labels, tokens, teacher_logits=teacher)
    expected = plain_loss(student, teacher, labels) / tokens
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)))


def test_the_documentations_code_makes_a_loss_and_a_trainer():
    class Trainer:
        def __init__(self, config: Any) -> None:
            self.config = config

    namespace: dict[str, Any] = {"Trainer": Trainer, "load_teacher": lambda config: Model().train()}
    for code in blocks("torchtitan"):
        exec(code, namespace)
    assert (loss_fn := namespace["loss"].build()).kd["temperature"] == 2 and loss_fn.kd["alpha"] == 0.9
    trainer = namespace["DistillTrainer"]("config")
    assert isinstance(trainer, Distill) and not trainer.teacher.training
