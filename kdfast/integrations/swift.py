"""ms-swift's GKD loss by kdfast: dense and top-k teachers, in one process and over Megatron's split vocabulary."""

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from swift.rlhf_trainers import gkd_loss as swift_loss
from torch import Tensor

from kdfast.integrations.patching import Patch, warn_fallback
from kdfast.losses import kd_loss
from kdfast.processes import gather
from kdfast.sparse import TopKTargets

TESTED = "4.6.0"
LOSS = "swift.rlhf_trainers.gkd_loss"
TRAINER = "swift.rlhf_trainers.gkd_trainer"
IMPORTERS = (TRAINER, "swift.megatron.trainers.gkd_trainer", "swift.ray.megatron.loss.gkd")  # gkd_loss by its name
IGNORED = -100

Split = dict[str, Any]  # kd_loss's process_group and vocab_start, or nothing where one process has all classes


def patch() -> Patch:
    """Puts kdfast's losses in the place of ms-swift's, for its GKD trainers: Hugging Face's, Megatron's and Ray's.

    Replaces `gkd_loss` and `jsd_loss`, and `GKDTrainer._compute_jsd_loss`, which is then the mean over the tokens
    of all micro-batches and processes of a step. Returns the patch, whose `undo()`, or the end of a `with`
    statement, puts the originals back. What kdfast does not compute, the originals do, with one warning.

    Raises:
        ImportError: ms-swift cannot be imported.
        AttributeError: another version of it, which lacks one of these functions.

    Example:

        import kdfast.integrations.swift

        kdfast.integrations.swift.patch()  # before trainer.train()
    """
    patch = _SwiftPatch("swift", TESTED)
    patch.replace(LOSS, "gkd_loss", replace_gkd_loss)
    patch.replace(LOSS, "jsd_loss", replace_jsd_loss)
    for name in IMPORTERS:
        if name in sys.modules:  # a module that is imported later gets what stands in gkd_loss.py
            patch.replace(name, "gkd_loss", replace_gkd_loss)
    with contextlib.suppress(ImportError):  # where this trainer's imports are missing; Megatron's needs less
        importlib.import_module(TRAINER)
        patch.replace(TRAINER, "GKDTrainer._compute_jsd_loss", replace_trainer_loss)
    return patch


class _SwiftPatch(Patch):
    def undo(self) -> None:
        """Also of the modules that have been imported since."""
        was_done = bool(self._before)
        super().undo()
        for name in IMPORTERS if was_done else ():
            module: Any = sys.modules.get(name)
            original = getattr(getattr(module, "gkd_loss", None), "kdfast_original", None)
            if original is not None:
                module.gkd_loss = original


def replace_gkd_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def gkd_loss(
        student_logits: Tensor,  # (B, S, V), or (B, S, V / tp)
        teacher_output: Any,  # TeacherOutput: (B, S, V), or (B, S, K) log-probabilities and indices
        labels: Tensor,  # (B, S), shifted
        beta: float,
        temperature: float,
        gather_fn: Callable[..., Tensor] = swift_loss.default_gather,
        log_softmax_fn: Callable[..., Tensor] = swift_loss.default_log_softmax,
        kl_div_fn: Callable[..., Tensor] = swift_loss.default_kl_div,
        chunk_size: int = 512,
    ) -> tuple[Tensor, Tensor]:
        teacher_output.validate()
        split = {} if teacher_output.is_topk_mode else split_of(log_softmax_fn, kl_div_fn, student_logits.shape[-1])
        if split is None:
            functions = gather_fn, log_softmax_fn, kl_div_fn
            return original(  # calls jsd_loss, which warns
                student_logits, teacher_output, labels, beta, temperature, *functions, chunk_size
            )
        student, teacher, kept = aligned_rows(student_logits, teacher_output, labels)
        options = loss_options(beta) | {"temperature": temperature}
        if teacher.is_topk_mode:
            kept = kept & is_covered(teacher.topk_logprobs)
            targets = TopKTargets(teacher.topk_indices, teacher.topk_logprobs / temperature)
            if gather_fn is not swift_loss.default_gather:
                student = gather_fn(student, targets.indices)  # (..., K), of all processes' classes
                every = torch.arange(student.shape[-1], device=student.device)
                targets = targets._replace(indices=every.expand(student.shape))
            loss = kd_loss(student, targets, missing="conditional", row_weight=kept, **options)
        else:
            logits, sizes = common_classes(student, teacher.full_logits, split)
            loss = kd_loss(student, logits, row_weight=kept, **sizes | split | options)
        return loss, kept.sum()

    return gkd_loss


def replace_jsd_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def jsd_loss(
        s_logits: Tensor,  # (N, V), or (N, V / tp)
        t_logits: Tensor,  # the same
        beta: float,
        log_softmax_fn: Callable[..., Tensor] = swift_loss.default_log_softmax,
        kl_div_fn: Callable[..., Tensor] = swift_loss.default_kl_div,
        chunk_size: int = 512,
    ) -> Tensor:
        split = split_of(log_softmax_fn, kl_div_fn, s_logits.shape[-1])
        if split is None:
            warn_fallback(f"{LOSS}.jsd_loss", "functions log_softmax_fn and kl_div_fn other than ms-swift's own")
            return original(s_logits, t_logits, beta, log_softmax_fn, kl_div_fn, chunk_size)
        return kd_loss(s_logits, t_logits, **split | loss_options(beta))

    return jsd_loss


def loss_options(beta: float) -> dict[str, Any]:
    return {"divergence": "jsd", "beta": float(beta), "t_squared": False, "reduction": "sum"}


def split_of(log_softmax_fn: Callable[..., Tensor], kl_div_fn: Callable[..., Tensor], classes: int) -> Split | None:
    """Where these functions say that the classes are; classes: of this process. None: functions of somebody else."""
    functions = log_softmax_fn, kl_div_fn
    if functions == (swift_loss.default_log_softmax, swift_loss.default_kl_div):
        return {}
    over_tp = sys.modules.get("swift.megatron.trainers.vocab_parallel_utils")
    if over_tp is None or functions != (over_tp.vocab_parallel_log_softmax, over_tp.vocab_parallel_kl_div):
        return None
    if over_tp.mpu.get_tensor_model_parallel_world_size() == 1:
        return {}
    start = over_tp.mpu.get_tensor_model_parallel_rank() * classes
    return {"process_group": over_tp.mpu.get_tensor_model_parallel_group(), "vocab_start": start}


def aligned_rows(student: Tensor, teacher: Any, labels: Tensor) -> tuple[Tensor, Any, Tensor]:
    """Student and teacher row by row, and which rows count, (...).

    They stay where they are unless the teacher has another prompt, so that its answer stands at other positions.
    """
    kept = labels != IGNORED
    if teacher.labels is None or torch.equal(kept, teacher.labels != IGNORED):
        return student, teacher, kept
    student, teacher, _ = swift_loss.extract_active(student, teacher, labels)
    return student, teacher, torch.ones(len(student), dtype=torch.bool, device=student.device)


def is_covered(log_probs: Tensor) -> Tensor:
    """Which rows the teacher has an entry for, (...), of (..., K)."""
    return ~log_probs.isinf().all(-1)


def common_classes(student: Tensor, teacher: Tensor, split: Split) -> tuple[Tensor, dict[str, Any]]:
    """The teacher's logits, and vocab_size where the heads have other sizes: classes that only one has are left out."""
    if student.shape[-1] == teacher.shape[-1]:
        return teacher, {}
    warnings.warn(
        f"{LOSS}.gkd_loss: student and teacher have {student.shape[-1]} and {teacher.shape[-1]} classes in this "
        "process; kdfast leaves out those that only one has, where ms-swift gives them the same logits in both",
        stacklevel=3,
    )
    if not split:
        return teacher, {"vocab_size": min(student.shape[-1], teacher.shape[-1])}
    group = split["process_group"]
    teacher = torch.cat(list(gather(teacher, group)), -1)  # its parts begin at other classes than the student's
    classes = student.shape[-1] * dist.get_world_size(group)
    sizes = {"vocab_size": min(classes, teacher.shape[-1])}
    return torch.nn.functional.pad(teacher, (0, max(0, classes - teacher.shape[-1]))), sizes


def replace_trainer_loss(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def compute_jsd_loss(self: Any, student_logits: Tensor, teacher_output: Any, labels: Tensor) -> Tensor:
        loss = original(self, student_logits, teacher_output, labels)
        share = share_of_step(self, loss)
        return loss if share is None else loss * share

    return compute_jsd_loss


def share_of_step(trainer: Any, loss: Tensor) -> Tensor | None:
    """What makes the micro-batch's mean a part of the mean over the step's tokens; None where that is not known.

    The trainer divides by the number of micro-batches, and DDP by that of processes.
    """
    if not trainer.model.training:  # where Trainer may not have counted the micro-batches yet
        return None
    batches, each = trainer._buffered_inputs, trainer.current_gradient_accumulation_steps
    if len(batches) % each or trainer.template.sequence_parallel_size > 1:
        where = f"{TRAINER}.GKDTrainer"
        warn_fallback(where, "a mean over a step whose micro-batches are generated apart, or whose sequences are split")
        return None
    at = (trainer._step - 1) % len(batches)
    first = at - at % each
    counts = torch.stack([count_rows(batch) for batch in batches[first : first + each]]).to(loss.device)
    total = trainer.accelerator.reduce(counts.sum(), "sum").clamp(min=1)
    return counts[at - first] * each * trainer.accelerator.num_processes / total


def count_rows(batch: dict[str, Any]) -> Tensor:
    """The number of rows that gkd_loss counts in a micro-batch."""
    labels, log_probs = batch["teacher_model_inputs"]["labels"], batch["gkd_batch"].teacher_topk_logprobs
    kept = labels.roll(-1, 1) != IGNORED
    return (kept if log_probs is None else kept & is_covered(log_probs)).sum()
