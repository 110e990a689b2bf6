"""Rows of numbers in memory: a row's coefficients, and the sums of a segment's classes."""

from typing import Any

import triton
import triton.language as tl

from kdfast import row_math
from kdfast.row_math import Coefficients
from kdfast.triton.classifiers import Differences
from kdfast.triton.pass_a import Sums, TeacherSums
from kdfast.triton.spec import Further
from kdfast.triton.sums import DivergenceSums

COEFFICIENTS = tl.constexpr(len(Coefficients._fields))
ALL_SUMS = tl.constexpr(len(row_math.Sums._fields))


@triton.constexpr_function
def padded_width(columns: Any) -> int:
    """Lanes for so many columns."""
    return 1 << (int(columns) - 1).bit_length()


@triton.jit
def column(line, at: tl.constexpr):
    """A column of (..., n) numbers."""
    axis: tl.constexpr = len(line.shape) - 1
    return tl.sum(tl.where(tl.arange(0, line.shape[axis]) == at, line, 0), axis)


@triton.jit
def read_columns(line, first: tl.constexpr, count: tl.constexpr):
    found = ()
    for k in tl.static_range(count):
        found = found + (column(line, first + k),)
    return found


@triton.jit
def write_columns(values, line):
    """Numbers, each (...), in the first columns of zeros, (..., n)."""
    axis: tl.constexpr = len(line.shape) - 1
    for k in tl.static_range(len(values)):
        value = values[k]
        if axis > 0:
            value = tl.expand_dims(value, axis)
        line = tl.where(tl.arange(0, line.shape[axis]) == k, value, line)
    return line


@triton.jit
def store_table_row(table, index, values, COLUMNS: tl.constexpr, SPEC: tl.constexpr, kept=True):
    """kept: else zeros."""
    WIDTH: tl.constexpr = padded_width(COLUMNS)
    lane = tl.arange(0, WIDTH)
    line = tl.where(kept, write_columns(values, tl.zeros((WIDTH,), SPEC.dtype)), 0)
    tl.store(table + (index + tl.zeros((), tl.int64)) * COLUMNS + lane, line, mask=lane < COLUMNS)


@triton.jit
def load_table_row(table, index, COLUMNS: tl.constexpr, SPEC: tl.constexpr):
    WIDTH: tl.constexpr = max(4 * SPEC.lanes, padded_width(COLUMNS))  # 16 bytes a thread, and each number by one alone
    lane = tl.arange(0, WIDTH)
    return tl.load(table + (index + tl.zeros((), tl.int64)) * COLUMNS + lane, mask=lane < COLUMNS, other=0)


@triton.jit
def coefficient_columns(coefficients, further):
    """In the order in which a table has them."""
    values = ()
    for k in tl.static_range(len(coefficients)):
        values = values + (coefficients[k],)
    for k in tl.static_range(len(further)):
        values = values + (further[k].offset, further[k].total, further[k].unit, further[k].mean)
    return values


@triton.jit
def read_coefficients(line, factor, teachers: tl.constexpr):
    """A row's coefficients from its line of the table, as scale_coefficients scales them; further teachers' too."""
    c = Coefficients(*read_columns(line, 0, COEFFICIENTS))
    further = ()
    for k in tl.static_range(teachers - 1):
        further = further + (Further(*read_columns(line, COEFFICIENTS + 4 * k, 4)),)
    return scale_coefficients(c, factor), further


@triton.jit
def scale_coefficients(c, factor):
    """What the gradient is linear in, times a factor."""
    return Coefficients(
        c.student_offset, c.student_total, c.teacher_offset, c.teacher_total, c.hard_total, factor * c.level,
        factor * c.slope, factor * c.teacher, factor * c.soft, c.center, factor * c.hard,
        factor * c.label, factor * c.uniform, c.mean, factor * c.tilt, c.student_unit, c.teacher_unit,
        c.teacher_mean, factor * c.at_label,
    )  # fmt: skip


# Sums of a segment: row_math.Sums, and for each further teacher its offset, its total and its over_teacher. logit_mse,
# without a teacher's distribution, has its sums of differences in their places.


@triton.jit
def read_all_sums(line):
    return row_math.Sums(*read_columns(line, 0, ALL_SUMS))


@triton.jit
def read_sums(line, SPEC: tl.constexpr):
    """pass_a.Sums."""
    s = read_all_sums(line)
    teachers, differences, exponents, classes = (), (), (), ()
    MEMBERS: tl.constexpr = SPEC.members
    for k in tl.static_range(MEMBERS):
        offset, total, part = s.teacher_offset, s.teacher_total, s.over_teacher
        if k > 0:
            offset, total, part = read_columns(line, ALL_SUMS + 3 * (k - 1), 3)
        teachers = teachers + (TeacherSums(offset, total, (part,)[: len(SPEC.running.over_teacher)]),)
    if SPEC.difference:
        differences = Differences(s.teacher_offset, s.teacher_total, s.over_teacher, ())
    if SPEC.smoothed:
        exponents, classes = s.exponents, s.classes
    over_student = (s.over_student,)[: len(SPEC.running.over_student)]
    return Sums(
        s.student_offset, s.student_total, s.hard_total, over_student, exponents, classes, teachers, differences, (),
    )  # fmt: skip


@triton.jit
def load_parts(parts, index, segments, COLUMNS: tl.constexpr, SEGMENTS: tl.constexpr, SPEC: tl.constexpr):
    """pass_a.Sums of a row's segments, (SEGMENTS,) each, for sums.merge; there are only `segments` of them."""
    part = tl.arange(0, SEGMENTS)[:, None]
    at = tl.arange(0, padded_width(COLUMNS))[None, :]
    is_offset = (at == 0) | (at == 2) | ((at >= ALL_SUMS) & ((at - ALL_SUMS) % 3 == 0))
    cells = ((index + tl.zeros((), tl.int64)) * segments + part) * COLUMNS + at
    nothing = tl.where(is_offset, float("-inf"), 0)
    return read_sums(tl.load(parts + cells, mask=(part < segments) & (at < COLUMNS), other=nothing), SPEC)


@triton.jit
def load_pointwise(pointwise, index, segments, SEGMENTS: tl.constexpr, SPEC: tl.constexpr):
    """sums.DivergenceSums of a row, from those of its segments."""
    part, at = tl.arange(0, SEGMENTS)[:, None], tl.arange(0, 4)[None, :]
    cells = ((index + tl.zeros((), tl.int64)) * segments + part) * 3 + at
    line = tl.sum(tl.load(pointwise + cells, mask=(part < segments) & (at < 3), other=0), 0)
    return DivergenceSums(column(line, 1), column(line, 2), (), (), column(line, 0), (), (), (), ())


@triton.jit
def sum_columns(sums, label, classes, SPEC: tl.constexpr):
    """label: its log2 E; classes: how many."""
    nothing = sums.student_total * 0
    offset, total, over_teacher, over_student, exponents = nothing, nothing, nothing, nothing, nothing
    further = ()
    for k in tl.static_range(len(sums.teachers)):
        part = nothing
        if len(SPEC.running.over_teacher) > 0:
            part = sums.teachers[k].over_teacher[0]
        if k == 0:
            offset, total, over_teacher = sums.teachers[k].offset, sums.teachers[k].total, part
        else:
            further = further + (sums.teachers[k].offset, sums.teachers[k].total, part)
    if len(SPEC.running.over_student) > 0:
        over_student = sums.over_student[0]
    if SPEC.difference:
        offset, total, over_teacher = sums.differences.center, sums.differences.first, sums.differences.second
    if SPEC.smoothed:
        exponents = sums.exponents
    s = row_math.Sums(
        sums.student_offset, sums.student_total, offset, total, sums.hard_total, over_teacher,
        label, exponents, nothing + classes, over_student, nothing, nothing,
    )  # fmt: skip
    columns = ()
    for k in tl.static_range(len(s)):
        columns = columns + (s[k],)
    return columns + further
