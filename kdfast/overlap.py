"""inplace=True: whether the memory that is overwritten can be, as PyTorch's own in-place operations check it.

The elements of a tensor begin at data_ptr + sum_k index_k * stride_k. Two tensors share memory where one such sum of
the first equals one of the second, up to the sizes of their elements. Both are looked for from the largest stride down:
what is left must be within reach of the smaller strides, so that of most strides one or two indices are possible.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.arguments import Inputs

_ARGUMENTS = {
    "temperatures": "temperature",
    "teacher_temperatures": "teacher_temperature",
    "indices": "teacher.indices",
}
_MOST_STEPS = 10_000  # of a search; layouts that need more are refused


def check_inplace(student: Tensor, inputs: Inputs) -> None:
    """The errors of PyTorch's own in-place operations. student: (..., V), before anything is written."""
    if not (student.requires_grad and torch.is_grad_enabled()):
        return
    base = student
    if not torch.compiler.is_compiling() and student._base is not None:
        base = student._base
    if base.is_leaf and base.requires_grad:
        raise RuntimeError("inplace: student_logits is a leaf (or a view of one) that requires grad")
    if not student.is_contiguous() and overlaps_itself(student):
        raise RuntimeError(
            "inplace: more than one element of student_logits refers to a single memory location; clone() it first"
        )
    if torch.compiler.is_compiling():  # there are no addresses yet
        return
    memory = storage_of(student)
    if memory is None:
        return
    for other in (*inputs.teachers, *inputs[1:]):
        if other is None or storage_of(other) != memory:
            continue
        is_teacher = any(other is teacher for teacher in inputs.teachers)
        if overlap(student, other) and not (is_teacher and is_same(student, other)):
            name = "teacher" if is_teacher else next(k for k, v in inputs._asdict().items() if v is other)
            raise RuntimeError(
                f"inplace: some elements of student_logits and {_ARGUMENTS.get(name, name)} refer to a single memory "
                "location; clone() one of them first"
            )


def overlaps_itself(x: Tensor) -> bool:
    """Whether two elements are at one place; also True where the strides do not tell."""
    dimensions = _dimensions(x)
    for at, (stride, _) in enumerate(dimensions):
        others = dimensions[:at] + dimensions[at + 1 :]
        if stride <= sum(smaller * (size - 1) for smaller, size in others if smaller <= stride):
            return True
    return False


def storage_of(x: Tensor) -> int | None:
    """The address of its storage; None where it has none, as on the meta device and under torch.func."""
    try:
        return x.untyped_storage().data_ptr() or None
    except RuntimeError:
        return None


def is_same(student: Tensor, teacher: Tensor) -> bool:
    """Whether each class of the teacher is at the student's: both are read before that place is overwritten."""
    return (
        teacher.data_ptr() == student.data_ptr()
        and teacher.dtype == student.dtype
        and teacher.stride() == student.stride()
    )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one storage share memory; also True where a search would take long."""
    reaches: dict[int, list[int]] = {1: [1 - b.element_size(), a.element_size() - 1]}  # by stride, in bytes
    if a.numel() == 0 or b.numel() == 0:
        return False
    for x, end in ((a, 1), (b, 0)):
        for stride, size in _dimensions(x):
            reach = reaches.setdefault(stride * x.element_size(), [0, 0])
            reach[end] += size - 1 if end else 1 - size
    terms = sorted(((stride, least, most) for stride, (least, most) in reaches.items()), reverse=True)
    return _has_sum(terms, b.data_ptr() - a.data_ptr())


def _dimensions(x: Tensor) -> list[tuple[int, int]]:
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _has_sum(terms: Sequence[tuple[int, int, int]], total: int) -> bool:
    """Whether total = sum_k stride_k * i_k with each i_k in its [least, most]; terms: these, largest stride first."""
    below = [(0, 0)]  # the least and the largest sum of the terms from here on
    for stride, least, most in reversed(terms):
        below.append((below[-1][0] + stride * least, below[-1][1] + stride * most))
    below.reverse()
    left, steps = [(0, total)], 0
    while left:
        at, rest = left.pop()
        if not below[at][0] <= rest <= below[at][1]:
            continue
        if at == len(terms):
            return True
        stride, least, most = terms[at]
        if stride == 0:
            left.append((at + 1, rest))
            continue
        low, high = below[at + 1]
        first, last = max(least, -((high - rest) // stride)), min(most, (rest - low) // stride)
        steps += 1 + max(0, last - first)
        if steps > _MOST_STEPS:
            return True
        left.extend((at + 1, rest - stride * i) for i in range(first, last + 1))
    return False
