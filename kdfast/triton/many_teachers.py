"""More teachers than a kernel takes: they are made one before it. The largest ensemble of the paper has 61."""

import torch
from torch import Tensor

from kdfast import reference
from kdfast.arguments import Inputs, Settings
from kdfast.rows import loss_dtype


def as_one(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Inputs, Settings]:
    """The ensemble as one, (..., V), a teacher at a time: sum w_k p_k as probabilities, or sum w_k z_k as logits.

    z_k are a geometric ensemble's logits before T' divides them, or its log-probabilities.
    """
    classes = student.shape[-1] if settings.vocab_size < 0 else settings.vocab_size
    total = student.new_zeros((*student.shape[:-1], classes), dtype=loss_dtype(student))
    member = _probabilities if settings.ensemble == "arithmetic" else _logits
    for teacher, weight in zip(inputs.teachers, settings.teacher_weights, strict=True):
        total.add_(member(teacher[..., :classes], inputs, settings, total.dtype), alpha=weight)
    if settings.ensemble == "arithmetic":
        settings = settings._replace(target="probs", teacher_logit_scale=1.0)
    elif settings.target != "logits":
        inputs = inputs._replace(teacher_temperatures=None)
        settings = settings._replace(target="logits", teacher_temperature=1.0)
    elif settings.teacher_softcap:
        settings = settings._replace(teacher_logit_scale=1.0)
    return inputs._replace(teachers=[total]), settings._replace(teacher_weights=[1.0], teacher_softcap=0.0)


def _capped(teacher: Tensor, settings: Settings, dtype: torch.dtype) -> Tensor:
    """A teacher's logits; soft-capped ones are scaled too."""
    if not settings.teacher_softcap:
        return teacher
    return reference.softcap(settings.teacher_logit_scale * teacher.to(dtype), settings.teacher_softcap)


def _logits(teacher: Tensor, inputs: Inputs, settings: Settings, dtype: torch.dtype) -> Tensor:
    if settings.target == "logits":
        return _capped(teacher, settings, dtype)
    return teacher.to(dtype).log() if settings.target == "probs" else teacher


def _probabilities(teacher: Tensor, inputs: Inputs, settings: Settings, dtype: torch.dtype) -> Tensor:
    if settings.target == "probs":
        return teacher
    if settings.target == "log_probs":
        return teacher.to(dtype).exp()
    scale = 1.0 if settings.teacher_softcap else settings.teacher_logit_scale
    logits, temperatures = _capped(teacher, settings, dtype), inputs.teacher_temperatures
    return torch.ops.kdfast_triton.tempered_softmax(
        logits.double() if dtype == torch.float64 else logits,
        None if temperatures is None else temperatures.to(dtype) / scale,
        settings.teacher_temperature / scale,
        False,
        dtype,
    )
