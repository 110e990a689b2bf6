"""Losses of TRL that take both models' logits: of GKD, GOLD, IW-OPD, SDFT and SDPO."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdfast import TopKTargets, kd_loss, token_log_probs, topk_targets
from kdfast.integrations.trl.calls import in_place_of, teacher_gradient
from kdfast.options import Missing

IGNORED = -100


def divergence(beta: float, temperature: float) -> dict[str, Any]:
    """kd_loss's options for TRL's generalized JSD: beta is the teacher's weight in the mixture, and there is no T^2."""
    return {"divergence": "jsd", "beta": beta, "temperature": temperature, "t_squared": False}


def missing(add_tail: bool) -> Missing:
    return "tail" if add_tail else "conditional"


def leave_tail(teacher: TopKTargets, beta: float, add_tail: bool) -> TopKTargets:
    """For reverse KL, which is infinite where the teacher has no tail: entries whose mass is at most 1 - 1e-7.

    So TRL has it. Served log-probabilities of tokens that a teacher is sure of are often rounded to 0. The entropy
    bounds what rounding the entries to float32 adds to their mass.
    """
    if beta != 1 or not add_tail:
        return teacher
    mass = torch.logsumexp(teacher.log_probs, -1, keepdim=True)
    least = 1e-7 * (1 + torch.special.entr(teacher.log_probs.exp()).sum(-1, keepdim=True))
    over = (mass + least).clamp(min=0)
    return TopKTargets(teacher.indices, torch.where(mass > -math.inf, teacher.log_probs - over, teacher.log_probs))


def _generalized_jsd(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,
    labels: Tensor | None,  # (...)
    beta: float,
    temperature: float,
    reduction: str,
    num_items_in_batch: Tensor | int | None,
    top_k: int = 0,
    add_tail: bool = True,
    logits_are_probs: bool = False,
) -> Tensor:
    options = divergence(beta, temperature)
    columns = student_logits.shape[-1]  # of what TRL's "mean" is the mean of
    teacher: Tensor | TopKTargets = teacher_logits
    if 0 < top_k < columns:
        teacher = _top_k(student_logits.detach(), teacher_logits, top_k, beta, temperature)
        teacher = leave_tail(teacher, beta, add_tail)
        columns = (top_k if beta in (0, 1) else 2 * top_k) + add_tail
        options["missing"] = missing(add_tail)
    options |= _reduced(labels, reduction, num_items_in_batch, student_logits, columns)
    return kd_loss(student_logits, teacher, **options)


def _cannot_reduce(call: Mapping[str, Any]) -> str:
    if call.get("logits_are_probs"):
        return "divergences of probabilities that do not sum to 1, as logits_are_probs has them"
    if call["num_items_in_batch"] is None and call["reduction"] not in ("batchmean", "sum", "mean"):
        return f"a number for each class, as reduction={call['reduction']!r} asks for"
    return teacher_gradient(call["teacher_logits"])


def _reduced(
    labels: Tensor | None, reduction: str, count: Tensor | int | None, logits: Tensor, columns: int
) -> dict[str, Any]:
    """kd_loss's options for the rows that TRL keeps, and for the sum over them."""
    kept = None if labels is None else labels != IGNORED
    if count is not None:
        return {"row_weight": kept, "normalizer": torch.as_tensor(count, device=logits.device)}
    if reduction == "sum":
        return {"row_weight": kept, "reduction": "sum"}
    if reduction == "mean":
        rows = torch.tensor(logits.shape[:-1].numel(), device=logits.device) if kept is None else kept.sum()
        return {"row_weight": kept, "normalizer": rows * columns}
    return {"row_weight": kept, "reduction": "batchmean" if kept is None else "mean"}


@torch.no_grad()
def _top_k(student: Tensor, teacher: Tensor, k: int, beta: float, temperature: float) -> TopKTargets:
    """The teacher at its own top k (beta = 0), at the student's (beta = 1), or at both."""
    if beta == 0:
        return topk_targets(teacher, k, temperature)
    of_student = student.topk(k, -1).indices
    if beta == 1:
        return _teacher_at(teacher, of_student, temperature)
    of_teacher = teacher.topk(k, -1).indices
    again = (of_student.unsqueeze(-1) == of_teacher.unsqueeze(-2)).any(-1)
    absent = torch.cat([torch.zeros_like(again), again], -1)
    indices, log_probs = _teacher_at(teacher, torch.cat([of_teacher, of_student], -1), temperature)
    targets = TopKTargets(indices, log_probs.masked_fill(absent, -math.inf))
    if 2 * k <= teacher.shape[-1]:
        return targets
    first = absent.byte().argsort(dim=-1, stable=True)[..., : teacher.shape[-1]]  # no more entries than classes
    return TopKTargets(*(x.gather(-1, first) for x in targets))


def _teacher_at(teacher: Tensor, indices: Tensor, temperature: float) -> TopKTargets:
    return TopKTargets(indices, token_log_probs(teacher, indices, temperature=temperature, entropy=False).log_probs)


def _local_top_1(
    self: Any,
    student_logits: Tensor,  # (B, T, V)
    teacher_logits: Tensor,
    completion_tokens: Tensor,  # (B, T)
    labels: Tensor,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """The teacher's likeliest token and the student's (or the sampled one), which alone is there where beta is 1."""
    reverse = self._get_reverse_kl_top_1_tokens(student_logits, completion_tokens)
    indices, absent = reverse.unsqueeze(-1), torch.zeros_like(reverse, dtype=torch.bool).unsqueeze(-1)
    if self.beta != 1:
        first = teacher_logits.argmax(-1)
        indices = torch.stack([first, reverse], -1)
        absent = torch.stack([absent[..., 0], first == reverse], -1)
    with torch.no_grad():
        teacher = _teacher_at(teacher_logits, indices, self.temperature)
    teacher = TopKTargets(indices, teacher.log_probs.masked_fill(absent, -math.inf))
    options = divergence(self.beta, self.temperature) | {"missing": missing(self.loss_add_tail)}
    options |= _reduced(labels, "batchmean", num_items_in_batch, student_logits, 1)
    return kd_loss(student_logits, leave_tail(teacher, self.beta, self.loss_add_tail), **options)


def _full_logit(student_logits: Tensor, teacher_logits: Tensor, distillation_alpha: float) -> Tensor:
    """(...): a loss for each row."""
    return kd_loss(student_logits, teacher_logits, reduction="none", **divergence(distillation_alpha, 1.0))


def _of_students_top_k(
    student_logits: Tensor,
    teacher_logits: Tensor,
    distillation_topk: int,
    distillation_alpha: float,
    distillation_add_tail: bool,
) -> Tensor:
    """(...): a loss for each row, of the student's top k."""
    with torch.no_grad():
        indices = student_logits.topk(distillation_topk, -1).indices
        if distillation_add_tail:
            teacher = _teacher_at(teacher_logits, indices, 1.0)
        else:  # which is right up to a constant for each row
            teacher = TopKTargets(indices, teacher_logits.gather(-1, indices))
    teacher = leave_tail(teacher, distillation_alpha, distillation_add_tail)
    options = divergence(distillation_alpha, 1.0) | {"missing": missing(distillation_add_tail)}
    return kd_loss(student_logits, teacher, reduction="none", **options)


def _cannot(call: Mapping[str, Any]) -> str:
    return teacher_gradient(call["teacher_logits"])


generalized_jsd = in_place_of(_generalized_jsd, _cannot_reduce)
local_top_1 = in_place_of(_local_top_1, _cannot)
full_logit = in_place_of(_full_logit, _cannot)
students_top_k = in_place_of(_of_students_top_k, _cannot)
