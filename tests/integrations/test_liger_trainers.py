"""Trainers that use Liger's losses, under kdfast's patch of Liger: five steps of SGD give the same parameters."""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor

from kdfast.integrations import liger

STEPS = 5
KERNELS = ("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy")  # that Liger puts into a Llama


def models() -> Iterator[transformers.LlamaForCausalLM]:
    """Student and teacher, whose heads make logits of a size of about 1: random models are uniform otherwise.

    All parameters are below 1, where float32 numbers lie closer than 1e-7.
    """
    torch.manual_seed(0)
    for _ in range(2):
        model = tiny_models.llama()
        model.lm_head.weight.data *= 10
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.fill_(0.9)
        yield model


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences whose first tokens are a prompt, of another length in each."""

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(3, tiny_models.VOCABULARY, (9,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < i % 4, -100)}


def arguments(folder: Path, kernels: tuple[str, ...] | None, accumulation: int = 1) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=0.01,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_liger_kernel=kernels is not None,
        liger_kernel_config={name: name in (kernels or ()) for name in KERNELS},
    )


def largest_difference(a: torch.nn.Module, b: torch.nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


def test_the_trainer_with_use_liger_kernel_trains_its_cross_entropy_on_a_cpu(tmp_path: Path) -> None:
    def trained(kernels: tuple[str, ...] | None, accumulation: int = 1) -> torch.nn.Module:
        model = next(models())
        options = arguments(tmp_path, kernels, accumulation)
        transformers.Trainer(model=model, args=options, train_dataset=Tokens()).train()
        return model

    plain = trained(None)
    with liger.patch():
        fused, accumulated = (trained(("fused_linear_cross_entropy",), n) for n in (1, 4))
    assert largest_difference(plain, next(models())) > 1e-3
    assert largest_difference(plain, fused) < 1e-7
    assert largest_difference(plain, accumulated) < 1e-7


def test_model_optimizers_kd_trainer_with_use_liger_kernel_is_its_own_loss(tmp_path: Path) -> None:
    """Its own loss is forward KL: at T = 1 what liger_jsd_beta = 0, its default, asks of Liger."""
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    def trained(kernels: tuple[str, ...] | None) -> torch.nn.Module:
        student, teacher = models()
        options: Any = {"args": arguments(tmp_path, kernels), "distill_args": {"teacher_model": teacher}}
        KDTrainer(model=student, train_dataset=Tokens(), **options).train()
        return student

    plain = trained(None)
    with liger.patch():
        fused = trained(())
    assert largest_difference(plain, next(models())) > 1e-3
    assert largest_difference(plain, fused) < 1e-7


def test_ms_swifts_gkd_loss_with_use_liger_kernel_is_ligers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its methods alone: ms-swift 4.6's trainer itself needs an older TRL, with trl.experimental.ppo."""
    if "trl.experimental.ppo" not in sys.modules:
        ppo: Any = types.ModuleType("trl.experimental.ppo")
        ppo.PPOConfig = type("PPOConfig", (), {})
        monkeypatch.setitem(sys.modules, "trl.experimental.ppo", ppo)
    from swift.rlhf_trainers.gkd_trainer import GKDTrainer

    def trained() -> tuple[torch.nn.Module, list[Tensor]]:
        student, teacher = models()
        trainer = object.__new__(GKDTrainer)
        state = SimpleNamespace(deepspeed_plugin=None)
        trainer.args = SimpleNamespace(
            use_liger_kernel=True, sft_alpha=0, offload_teacher_model=False, gradient_checkpointing_kwargs=None
        )
        trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model, state=state)
        trainer.teacher_model, trainer.is_teacher_ds3, trainer.gkd_logits_topk = teacher, False, None
        trainer.beta, trainer.temperature = 0.3, 2.0
        trainer._prepare_liger_loss()
        optimizer, losses, tokens = torch.optim.SGD(student.parameters(), 0.1), [], Tokens()
        for step in range(STEPS):
            rows = [tokens[4 * step + i] for i in range(4)]
            batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            loss = trainer._compute_liger_loss(student, batch, {"input_ids": batch["input_ids"]})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return student, losses

    theirs, their_losses = trained()
    with liger.patch():
        ours, our_losses = trained()
    assert largest_difference(theirs, next(models())) > 1e-3
    assert largest_difference(theirs, ours) < 1e-7
    torch.testing.assert_close(our_losses, their_losses, rtol=1e-6, atol=1e-6)
