"""What `return_metrics` wants of a row: KDMetrics of arguments.py, from sums that run along with the passes."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.triton.logits import joint_logits, teacher_probabilities
from kdfast.triton.tiles import fill_lanes

NO_CLASS = tl.constexpr(2**31 - 1)


class Best(NamedTuple):
    """The largest number, and the first class that has it."""

    value: Any
    index: Any


class Bests(NamedTuple):
    student: Any
    teacher: Any


class RowMetrics(NamedTuple):
    """From what a row's KDMetrics are stored."""

    soft: Any
    hard: Any
    kl: Any
    student_entropy: Any
    teacher_entropy: Any
    best: Any


@triton.jit
def no_best(SPEC: tl.constexpr):
    nothing = fill_lanes(float("-inf"), SPEC)
    return Best(nothing, tl.full(nothing.shape, NO_CLASS, tl.int32))


@triton.jit
def first_best(best, value, index):
    better = (value > best.value) | ((value == best.value) & (index < best.index))
    return Best(tl.where(better, value, best.value), tl.where(better, index, best.index))


@triton.jit
def update_best(best, x, classes, mask):
    """Each lane's, (lanes,), with a tile's numbers, (lanes, n)."""
    value = tl.max(x, 1)
    return first_best(best, value, tl.min(tl.where(mask & (x == value[:, None]), classes, NO_CLASS), 1))


@triton.jit
def merge_best(best):
    """Of lanes, (lanes,), that of the row."""
    value = tl.max(best.value, 0)
    return Best(value, tl.min(tl.where(best.value == value, best.index, NO_CLASS), 0))


@triton.jit
def update_bests(best, tile, row, SPEC: tl.constexpr):
    """Of several teachers with a distribution each p is known in pass B alone."""
    teacher = best.teacher
    student = update_best(best.student, tile.s, tile.classes, tile.mask)
    if len(tile.teachers) == 1:
        teacher = update_best(teacher, tile.teachers[0], tile.classes, tile.mask)
    elif SPEC.teacher == "given":
        p, log_p = teacher_probabilities(tile.teachers, row.weights, SPEC)
        teacher = update_best(teacher, p, tile.classes, tile.mask)
    elif len(tile.teachers) > 1 and SPEC.joint:
        logits = joint_logits(tile.teachers, row.weights, SPEC)
        teacher = update_best(teacher, logits, tile.classes, tile.mask)
    return Bests(student, teacher)


@triton.jit
def store(per_row, index, rows, found, kept, label, SPEC: tl.constexpr):
    """found: RowMetrics; NaN where a row is dropped."""
    hard = found.hard
    nan = found.soft * 0 + float("nan")
    accuracy, agreement = nan, nan
    if per_row.labels is not None:
        kept = kept & (label >= 0)
        accuracy = (found.best.student.index == label).to(SPEC.dtype)
    else:
        hard = nan
    if SPEC.teacher != "none":
        agreement = (found.best.student.index == found.best.teacher.index).to(SPEC.dtype)
    columns = (found.soft, hard, found.kl, found.student_entropy, found.teacher_entropy, agreement, accuracy)
    for k in tl.static_range(len(columns)):
        at = (rows + tl.zeros((), tl.int64)) * k + index
        tl.store(per_row.metrics + at, tl.where(kept, columns[k], nan))
