"""What `return_metrics` wants of a row: KDMetrics of arguments.py, from sums that run along with the passes."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.triton.logits import teacher_logits, teacher_probabilities
from kdfast.triton.tiles import in_lanes

NO_CLASS = tl.constexpr(2**31 - 1)


class Best(NamedTuple):
    """The largest number, and the first class that has it."""

    value: Any
    at: Any


@triton.jit
def no_best(SPEC: tl.constexpr):
    nothing = in_lanes(float("-inf"), SPEC)
    return Best(nothing, tl.full(nothing.shape, NO_CLASS, tl.int32))


@triton.jit
def larger(best, x, classes, there):
    value = tl.max(x, 1)
    at = tl.min(tl.where(there & (x == value[:, None]), classes, NO_CLASS), 1)
    better = (value > best.value) | ((value == best.value) & (at < best.at))
    return Best(tl.where(better, value, best.value), tl.where(better, at, best.at))


@triton.jit
def best_of(best):
    """Of lanes, (lanes,), that of the row."""
    value = tl.max(best.value, 0)
    return Best(value, tl.min(tl.where(best.value == value, best.at, NO_CLASS), 0))


@triton.jit
def add_best(best, tile, row, SPEC: tl.constexpr):
    """Of several teachers with a distribution each p is known in pass B alone."""
    of_student, of_teacher = best
    s, tiles, classes, there, at = tile
    of_student = larger(of_student, s, classes, there)
    if len(tiles) == 1:
        of_teacher = larger(of_teacher, tiles[0], classes, there)
    elif SPEC.teacher == "given":
        of_teacher = larger(of_teacher, teacher_probabilities(tiles, row.weights, SPEC)[0], classes, there)
    elif len(tiles) > 1 and SPEC.joint:
        of_teacher = larger(of_teacher, teacher_logits(tiles, row.weights, SPEC)[0], classes, there)
    return of_student, of_teacher


@triton.jit
def write(per_row, index, rows, values, kept, label, vocab, SPEC: tl.constexpr):
    """values: (soft, hard, kl, student's entropy, teacher's, student's best, teacher's); NaN where a row drops out."""
    soft, hard, kl, student_entropy, teacher_entropy, of_student, of_teacher = values
    nan = soft * 0 + float("nan")
    accuracy, agreement = nan, nan
    if per_row.labels is not None:
        kept = kept & (label >= 0)
        accuracy = (of_student.at == label).to(SPEC.dtype)
    else:
        hard = nan
    if SPEC.teacher != "none":
        agreement = (of_student.at == of_teacher.at).to(SPEC.dtype)
    columns = (soft, hard, kl, student_entropy, teacher_entropy, agreement, accuracy)
    for k in tl.static_range(len(columns)):
        at = (rows + tl.zeros((), tl.int64)) * k + index
        tl.store(per_row.metrics + at, tl.where(kept, columns[k], nan))
