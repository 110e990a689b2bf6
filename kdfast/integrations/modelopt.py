"""Model-Optimizer's logits losses by kdfast, and its KDTrainer's mean. Megatron's are in modelopt_megatron.py."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from modelopt.torch.distill.losses import LogitsDistillationLoss as OriginalLogitsLoss
from modelopt.torch.distill.losses import MFTLoss as OriginalMFTLoss
from torch import Tensor

from kdfast.integrations.patching import Patch, warn_fallback
from kdfast.losses import kd_loss
from kdfast.modules import KDLoss

TESTED = "0.47.0"
PACKAGE = "modelopt.torch.distill"
TRAINER = f"{PACKAGE}.plugins.huggingface"
MEGATRON = f"{PACKAGE}.plugins.megatron"
IGNORED = -100


def patch() -> Patch:
    """Puts kdfast's losses in the place of Model-Optimizer's: for KDTrainer, `mtd.convert` and Megatron.

    `LogitsDistillationLoss` and `MFTLoss` become the classes of this file, Megatron's `LogitsKLLoss` and
    `TopKLogitsKLLoss` those of modelopt_megatron.py, and KDTrainer's loss is the mean over the tokens of all
    micro-batches and processes of a step. Returns the patch, whose `undo()`, or the end of a `with` statement, puts
    the originals back; what has been made in between keeps its loss.

    Raises:
        ImportError: Model-Optimizer cannot be imported.
        AttributeError: another version of it, which lacks one of these names.

    Example:

        import kdfast.integrations.modelopt

        kdfast.integrations.modelopt.patch()  # before the trainer, or the criterion, is made
    """
    patch = Patch("modelopt", TESTED)
    for module in (f"{PACKAGE}.losses", PACKAGE):
        patch.replace(module, "LogitsDistillationLoss", lambda original: LogitsDistillationLoss)
        patch.replace(module, "MFTLoss", lambda original: MFTLoss)
    if TRAINER in sys.modules:  # the package has imported these two where what they need is installed
        patch.replace(TRAINER, "LogitsDistillationLoss", lambda original: LogitsDistillationLoss)
        patch.replace(TRAINER, "KDTrainer._standard_kd_loss", replace_trainer_loss)
    if MEGATRON in sys.modules:
        from kdfast.integrations import modelopt_megatron

        for module in (MEGATRON, f"{PACKAGE}.plugins"):
            patch.replace(module, "LogitsKLLoss", lambda original: modelopt_megatron.LogitsKLLoss)
            patch.replace(module, "TopKLogitsKLLoss", lambda original: modelopt_megatron.TopKLogitsKLLoss)
    return patch


class LogitsDistillationLoss(OriginalLogitsLoss):
    """Model-Optimizer's loss of this name: T^2 KL(p, q), by `kd_loss`.

    Args:
        temperature: T.
        reduction: `"mean"`, which divides by all logits, V included, `"batchmean"`, `"sum"`, or `"none"`: (...)
            row losses.

    `forward` takes (..., V) logits of student and teacher. The loss is float32, for float64 logits float64.

    Example:

        criterion = LogitsDistillationLoss(temperature=2.0)
        model = mtd.convert(student, mode=[("kd_loss", {"teacher_model": teacher, "criterion": criterion})])
    """

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        options = reduction(self._reduction, logits_s)
        return kd_loss(logits_s, logits_t, divergence="forward_kl", temperature=self._temperature, **options)


class MFTLoss(OriginalMFTLoss):
    """Model-Optimizer's loss of this name: T^2 KL(p, q), where p is corrected by the labels, by `kd_loss`.

    "Minifinetuning" (2025). Model-Optimizer's own code corrects p. The arguments are those of the original.

    Args:
        temperature: T.
        threshold: how far the label's probability shall be above all others, in [0, 1].
        reduction: as in `LogitsDistillationLoss`. `"none"` is one loss for each logit, which the original
            computes.

    `forward` takes (..., V) logits of student and teacher, and (rows,) labels, of which none may be ignored.
    """

    def forward(self, logits_s: Tensor, logits_t: Tensor, labels: Tensor) -> Tensor:
        if self._reduction == "none":
            warn_fallback(f"{PACKAGE}.MFTLoss", 'the terms of single classes, which are its reduction="none"')
            return super().forward(logits_s, logits_t, labels)
        student, teacher = (x.reshape(-1, x.shape[-1]) for x in (logits_s, logits_t / self._temperature))
        corrected = self._prepare_corrected_distributions(teacher, labels, self._threshold)
        options = reduction(self._reduction, student) | {"temperature": self._temperature}
        return kd_loss(student, corrected, target="probs", divergence="forward_kl", **options)


def reduction(name: str, logits: Tensor) -> dict[str, Any]:
    """F.kl_div's, as kd_loss's: its mean is over the classes too."""
    return {"normalizer": max(1, logits.numel())} if name == "mean" else {"reduction": name}


def replace_trainer_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def standard_kd_loss(self: Any, outputs: Any, labels: Tensor | None, **kwargs: Any) -> Tensor:
        criterion = self._kd_criterion
        if type(criterion) is KDLoss:  # a subclass may have a forward of its own
            options = criterion.options()
        elif type(criterion) in (OriginalLogitsLoss, LogitsDistillationLoss):
            options = {"divergence": "forward_kl", "temperature": criterion._temperature}
        else:
            where = f"{TRAINER}.KDTrainer"
            warn_fallback(where, f"a criterion of type {type(criterion).__name__}, other than Model-Optimizer's own")
            return original(self, outputs, labels, **kwargs)
        student, teacher = outputs.logits, self._last_teacher_outputs.logits
        self._last_teacher_outputs = None
        # the labels are shifted, not the logits, as a slice of these would be copied
        kept = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
        if labels is not None:
            kept = torch.nn.functional.pad(labels[..., 1:] != IGNORED, (0, 1))
        else:
            kept[..., -1] = False
        options |= {"row_weight": kept, "normalizer": normalizer(self, kwargs.get("num_items_in_batch"))}
        return kd_loss(student, teacher, **options | {"reduction": "mean"})

    return standard_kd_loss


def normalizer(trainer: Any, items: Tensor | int | None) -> Tensor | float | None:
    """The step's labels, where Trainer counts them, by the number of the processes whose gradients are averaged."""
    if items is None or not trainer.args.average_tokens_across_devices:
        return items
    return items / (trainer.accelerator.num_processes // trainer.get_tp_size())
