"""Losses of TRL that take hidden states and heads: of DistillationTrainer and AsyncDistillationTrainer."""

import functools
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kdfast import TopKTargets, linear_kd_loss
from kdfast.integrations.trl.calls import in_place_of
from kdfast.integrations.trl.logits import divergence, leave_tail, missing
from kdfast.tensor_checks import is_dtensor


def _chunked_divergence(
    student_hidden_states: Tensor,  # (B, K, H)
    teacher_hidden_states: Tensor,  # (B, K, H')
    student_lm_head_weight: Tensor,  # (V, H)
    teacher_lm_head_weight: Tensor,  # (V, H')
    completion_mask: Tensor,  # (B, K)
    beta: float,
    num_items_in_batch: Tensor | int | None,
    student_lm_head_bias: Tensor | None,
    teacher_lm_head_bias: Tensor | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_final_logit_softcapping: float | None,
    teacher_final_logit_softcapping: float | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the sum of the student's entropies, and the number of rows that are kept."""
    student, teacher = student_hidden_states, teacher_hidden_states
    classes = student_lm_head_weight.shape[0]
    kept = (completion_mask != 0).reshape(student.shape[:-1])
    loss, metrics = linear_kd_loss(
        student,
        whole(student_lm_head_weight).to(student.dtype),
        teacher,
        whole(teacher_lm_head_weight).to(teacher.dtype),
        student_bias=_optional(student_lm_head_bias, student.dtype),
        teacher_bias=_optional(teacher_lm_head_bias, teacher.dtype),
        row_weight=kept,
        normalizer=None if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=student.device),
        logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        softcap=student_final_logit_softcapping,
        teacher_softcap=teacher_final_logit_softcapping,
        vocab_size=classes if teacher_lm_head_weight.shape[0] > classes else None,  # as TRL cuts the teacher's
        return_metrics=True,
        **divergence(beta, temperature),
    )
    count = kept.sum()
    return loss, torch.where(count > 0, metrics.student_entropy * count, 0), count


def _cannot(call: Mapping[str, Any]) -> str:
    if hasattr(call["student_lm_head_weight"], "ds_id"):
        return "a head that DeepSpeed ZeRO-3 has partitioned"
    scaled = [
        _cannot_scale(call[f"{side}_logit_scale"], call[f"{side}_final_logit_softcapping"])
        for side in ("student", "teacher")
    ]
    return scaled[0] or scaled[1]


def _cannot_scale(scale: float, cap: float | None) -> str:
    if not scale > 0:
        return f"a logit_scale of {scale}"
    return "" if cap is None or cap > 0 else f"a final_logit_softcapping of {cap}"


def _candidates(
    hidden_valid: Tensor,  # (rows, H)
    lm_head_weight: Tensor,  # (V, H)
    lm_head_bias: Tensor | None,
    logit_scale: float,
    final_logit_softcapping: float | None,
    target_ids: Tensor,  # (rows, K)
    teacher_target_logps: Tensor,
    valid_candidate_mask: Tensor,
    beta: float,
    temperature: float,
    add_tail_bucket: bool,
    teacher_id_idx: Tensor | None,  # (rows,)
    num_teachers: int,
    chunk_size: int,  # kdfast has its own
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums over rows: the loss, its value, both entropies, and of each teacher its rows, their loss and entropy."""
    dtype = torch.promote_types(hidden_valid.dtype, lm_head_weight.dtype)
    served = TopKTargets(target_ids, teacher_target_logps.masked_fill(~valid_candidate_mask, -math.inf))
    loss, metrics = linear_kd_loss(
        hidden_valid.to(dtype),
        lm_head_weight.to(dtype),
        leave_tail(served, beta, add_tail_bucket),
        None,
        student_bias=_optional(lm_head_bias, dtype),
        missing=missing(add_tail_bucket),
        logit_scale=logit_scale,
        softcap=final_logit_softcapping,
        reduction="sum" if teacher_id_idx is None else "none",
        return_metrics=True,
        **divergence(beta, temperature),
    )
    value, own, teachers = loss.detach(), metrics.student_entropy, metrics.teacher_entropy
    if teacher_id_idx is None:
        number = len(hidden_valid)
        return loss, value, own * number, teachers * number, value.new_zeros(3 * num_teachers)
    columns = torch.stack([torch.ones_like(value), value, teachers], -1)
    stats = value.new_zeros(num_teachers, 3).index_add_(0, teacher_id_idx, columns)
    return loss.sum(), value.sum(), own.sum(), teachers.sum(), stats.flatten()


def _cannot_candidates(call: Mapping[str, Any]) -> str:
    return _cannot_scale(call["logit_scale"], call["final_logit_softcapping"])


def _optional(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else whole(bias).to(dtype)


def whole(parameter: Tensor) -> Tensor:
    """A parameter of a head, gathered where FSDP2 has sharded it apart from the model.

    Its gradient is averaged over the processes, as FSDP2 averages those of other parameters. full_tensor(), TRL's way,
    gives each process the gradient of its own rows alone.
    """
    if not is_dtensor(parameter):
        return parameter
    from torch.distributed.tensor import DTensor, Partial, Replicate

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    gathered = parameter.redistribute(placements=[Replicate()] * mesh.ndim)
    local = gathered.to_local(grad_placements=[Partial()] * mesh.ndim)
    if local.requires_grad:
        local.register_hook(lambda grad: grad / mesh.size())
    return local


def whole_head_for(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """AsyncDistillationTrainer._compute_loss, given a head that whole() has gathered, so that it does not do so."""

    @functools.wraps(original)
    def compute_loss(self: Any, unwrapped_model: Any, inputs: Any) -> Tensor:
        head = unwrapped_model.get_output_embeddings()
        if not is_dtensor(head.weight):
            return original(self, unwrapped_model, inputs)
        bias = None if head.bias is None else whole(head.bias)
        gathered = SimpleNamespace(weight=whole(head.weight), bias=bias)
        unwrapped_model.get_output_embeddings = lambda: gathered
        try:
            return original(self, unwrapped_model, inputs)
        finally:
            del unwrapped_model.get_output_embeddings

    return compute_loss


two_heads = in_place_of(_chunked_divergence, _cannot)
one_head = in_place_of(_candidates, _cannot_candidates)
