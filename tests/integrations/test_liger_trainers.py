"""Trainers that use Liger's losses, under kdfast's patch of Liger: five steps of SGD give the same parameters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
