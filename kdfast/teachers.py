"""Checks of the teacher: one tensor or an ensemble of them; logits, probabilities or log-probabilities."""

import math
from typing import Any

from torch import Tensor

from kdfast.tensor_checks import check_constant, check_dense, check_floating, kind, without


def check_teachers(
    teacher: Any, teacher_weights: Any, student: Tensor, vocab_size: int | None, dim: int
) -> tuple[list[Tensor], list[float]]:
    """The teachers whose weight is not 0, and their weights, which sum to 1.

    dim: of the classes, in the student's logits and in each teacher's. The teachers returned are (..., V).
    """
    if isinstance(teacher, Tensor):
        if teacher_weights is not None:
            raise ValueError("teacher_weights: given with one tensor as the teacher; it is for a sequence of teachers")
        teachers, weights = [teacher], [1.0]
    elif type(teacher) in (list, tuple):  # and no named tuple, which is a model's output
        teachers = list(teacher)
        weights = check_weights(teacher_weights, len(teachers))
    else:
        what = kind(teacher) + ("; pass its logits" if hasattr(teacher, "logits") else "")
        raise TypeError(
            "teacher: must be a tensor, a list or tuple of tensors, or kdfast.TopKTargets (or None with alpha=0), not "
            f"{what}"
        )
    several = len(teachers) > 1
    for index, each in enumerate(teachers):
        name = f"teacher[{index}]" if several else "teacher"
        if not isinstance(each, Tensor):
            hint = "; a sparse teacher goes alone, without others" if hasattr(each, "log_probs") else ""
            raise TypeError(f"{name}: must be a tensor, not {kind(each)}{hint}")
        check_dense(name, each)
        check_floating(name, each)
        if each.device != student.device:
            raise RuntimeError(f"{name}: is on {each.device}, but student_logits is on {student.device}")
        if each.shape != student.shape:
            _check_shape(name, each, student, vocab_size, dim)
    teachers = [t.detach() if t.requires_grad else t for t in teachers]
    if dim != student.dim() - 1:
        teachers = [t.movedim(dim, -1) for t in teachers]
    if several and 0.0 in weights:
        teachers = [t for t, w in zip(teachers, weights, strict=True) if w]
        weights = [w for w in weights if w]
    return teachers, weights


def check_weights(teacher_weights: Any, count: int) -> list[float]:
    if count == 0:
        raise ValueError("teacher: the sequence of teachers is empty")
    if teacher_weights is None:
        return [1.0 / count] * count
    try:
        if isinstance(teacher_weights, str):
            raise TypeError
        for each in (teacher_weights, *teacher_weights):
            if isinstance(each, Tensor):
                check_constant("teacher_weights", each)
        weights = [float(w) for w in teacher_weights]
    except (TypeError, ValueError):
        raise TypeError(f"teacher_weights: must be a sequence of {count} numbers, not {teacher_weights!r}") from None
    total = math.fsum(weights)
    if len(weights) != count or not all(0 <= w < math.inf for w in weights) or not 0 < total < math.inf:
        raise ValueError(
            f"teacher_weights: {weights} must be {count} finite numbers >= 0, one per teacher, that are not all 0"
        )
    return [w / total for w in weights]


def _check_shape(name: str, teacher: Tensor, student: Tensor, vocab_size: int | None, dim: int) -> None:
    rows = without(student.shape, dim)
    if teacher.dim() != student.dim() or without(teacher.shape, dim) != rows:
        raise ValueError(
            f"{name}: has shape {tuple(teacher.shape)}, but with student_logits of shape {tuple(student.shape)} it "
            f"must be ({', '.join(map(str, (*rows[:dim], 'V', *rows[dim:])))})"
        )
    classes = teacher.shape[dim]
    if vocab_size is None:
        raise ValueError(
            f"{name}: has {classes} classes, but student_logits has {student.shape[dim]}; where the last ones "
            "are padding, set vocab_size to the number of real classes"
        )
    if classes < vocab_size:
        raise ValueError(f"vocab_size: {vocab_size} is more than the {classes} classes of {name}")
