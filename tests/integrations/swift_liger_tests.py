"""ms-swift's GKD with use_liger_kernel, under kdfast's patch of Liger; test_swift.py runs it."""

from types import SimpleNamespace

import swift_stubs  # noqa: F401 - before ms-swift's trainers
import torch
from swift.rlhf_trainers.gkd_trainer import GKDTrainer
from test_liger_trainers import STEPS, Tokens, largest_difference, models
from torch import Tensor

from kdfast.integrations import liger


def test_ms_swifts_gkd_loss_with_use_liger_kernel_is_ligers() -> None:
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
