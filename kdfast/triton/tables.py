"""Rows of numbers in memory: a row's coefficients, and the sums of a segment's classes."""

from typing import Any

import triton
import triton.language as tl

from kdfast.row_math import Coefficients, Sums
from kdfast.triton.spec import Further
from kdfast.triton.statistics import Differences, Statistics, Student, Teacher, hard_offset

COEFFICIENTS = tl.constexpr(len(Coefficients._fields))
PARTS = tl.constexpr(Sums._fields.index("label"))


@triton.constexpr_function
def width_of(columns: Any) -> int:
    """Lanes for so many columns."""
    return 1 << (int(columns) - 1).bit_length()


@triton.jit
def column(line, at: tl.constexpr):
    """A column of (..., n) numbers."""
    axis: tl.constexpr = len(line.shape) - 1
    return tl.sum(tl.where(tl.arange(0, line.shape[axis]) == at, line, 0), axis)


@triton.jit
def columns_of(line, first: tl.constexpr, count: tl.constexpr):
    found = ()
    for k in tl.static_range(count):
        found = found + (column(line, first + k),)
    return found


@triton.jit
def laid(values, line):
    """Numbers, each (...), laid into the first columns of zeros, (..., n)."""
    axis: tl.constexpr = len(line.shape) - 1
    for k in tl.static_range(len(values)):
        value = values[k]
        if axis > 0:
            value = tl.expand_dims(value, axis)
        line = tl.where(tl.arange(0, line.shape[axis]) == k, value, line)
    return line


@triton.jit
def store_line(table, index, values, COLUMNS: tl.constexpr, SPEC: tl.constexpr):
    WIDTH: tl.constexpr = width_of(COLUMNS)
    lane = tl.arange(0, WIDTH)
    line = laid(values, tl.zeros((WIDTH,), SPEC.dtype))
    tl.store(table + (index + tl.zeros((), tl.int64)) * COLUMNS + lane, line, mask=lane < COLUMNS)


@triton.jit
def load_line(table, index, COLUMNS: tl.constexpr, SPEC: tl.constexpr):
    WIDTH: tl.constexpr = max(4 * SPEC.lanes, width_of(COLUMNS))  # 16 bytes a thread, and each number by one alone
    lane = tl.arange(0, WIDTH)
    return tl.load(table + (index + tl.zeros((), tl.int64)) * COLUMNS + lane, mask=lane < COLUMNS, other=0)


@triton.jit
def as_columns(coefficients, further):
    """In the order in which a table has them."""
    values = ()
    for k in tl.static_range(len(coefficients)):
        values = values + (coefficients[k],)
    for k in tl.static_range(len(further)):
        values = values + (further[k].offset, further[k].total, further[k].unit, further[k].mean)
    return values


@triton.jit
def coefficients_in(line, factor, teachers: tl.constexpr):
    """A row's coefficients from its line of the table, what is linear in them times a factor; further teachers' too."""
    c = Coefficients(*columns_of(line, 0, COEFFICIENTS))
    further = ()
    for k in tl.static_range(teachers - 1):
        further = further + (Further(*columns_of(line, COEFFICIENTS + 4 * k, 4)),)
    scaled = Coefficients(
        c.student_offset, c.student_total, c.teacher_offset, c.teacher_total, c.hard_offset, c.hard_total,
        factor * c.level, factor * c.slope, factor * c.teacher, factor * c.soft, c.center, factor * c.hard,
        factor * c.label, factor * c.uniform, c.mean, factor * c.tilt, c.student_unit, c.teacher_unit,
        c.teacher_mean, factor * c.at_label,
    )  # fmt: skip
    return scaled, further


# Sums of a segment: row_math.Sums up to what the rows that are split have, and for each further teacher its offset, its
# total and its over_teacher. logit_mse, without a teacher's distribution, has its sums of differences in their places.


@triton.jit
def sums_in(line, SPEC: tl.constexpr):
    nothing = column(line, 0) * 0
    s = Sums(*columns_of(line, 0, PARTS), nothing, nothing, nothing, nothing, nothing)
    teachers, differences = (), ()
    MEMBERS: tl.constexpr = SPEC.members
    for k in tl.static_range(MEMBERS):
        offset, mass, part = s.teacher_offset, s.teacher_total, s.over_teacher
        if k > 0:
            offset, mass, part = columns_of(line, PARTS + 3 * (k - 1), 3)
        teachers = teachers + (Teacher(offset, mass, (part,)[: len(SPEC.parts.over_teacher)]),)
    if SPEC.difference:
        differences = Differences(s.teacher_offset, s.teacher_total, s.over_teacher, ())
    parts = (s.over_student,)[: len(SPEC.parts.over_student)]
    student = Student(s.student_offset, s.student_total, s.hard_total, parts, ())
    return Statistics(student, teachers, differences, ())


@triton.jit
def sums_as_columns(statistics, label, classes, row, WHOLE: tl.constexpr, SPEC: tl.constexpr):
    """label: its log2 E; classes: how many; WHOLE: all of row_math.Sums, of one teacher."""
    student, teachers, differences, best = statistics
    nothing = student.total * 0
    offset, total, of_teacher, of_student, exponents = nothing, nothing, nothing, nothing, nothing
    further = ()
    for k in tl.static_range(len(teachers)):
        part = nothing
        if len(SPEC.parts.over_teacher) > 0:
            part = teachers[k].parts[0]
        if k == 0:
            offset, total, of_teacher = teachers[k].offset, teachers[k].mass, part
        else:
            further = further + (teachers[k].offset, teachers[k].mass, part)
    if len(SPEC.parts.over_student) > 0:
        of_student = student.parts[0]
    if SPEC.difference:
        offset, total, of_teacher = differences.shift, differences.first, differences.second
    if SPEC.smoothed:
        exponents = student.smooth[0]
    s = Sums(
        student.offset, student.total, offset, total, hard_offset(student.offset, row, SPEC), student.hard,
        of_teacher, of_student, label, exponents, nothing + classes, nothing, nothing,
    )  # fmt: skip
    columns = ()
    for k in tl.static_range(len(s) if WHOLE else PARTS):
        columns = columns + (s[k],)
    return columns + further
