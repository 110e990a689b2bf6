"""Statistics in memory: a row of a table, the student's and a teacher's first, then the further teachers'."""

import triton
import triton.language as tl

from kdfast.triton.statistics import Statistics, Student, Teacher


@triton.jit
def _column(row, at: tl.constexpr):
    """A column of (..., COLUMNS) numbers."""
    axis: tl.constexpr = len(row.shape) - 1
    return tl.sum(tl.where(tl.arange(0, row.shape[axis]) == at, row, 0), axis)


@triton.jit
def statistics_in(row, members: tl.constexpr, SPEC: tl.constexpr):
    teachers, differences, smooth = (), (), ()
    for k in tl.static_range(members):
        offset = _column(row, 1 if k == 0 else 4 + 3 * k)
        mass = _column(row, 3 if k == 0 else 5 + 3 * k)
        parts = (_column(row, 5 if k == 0 else 6 + 3 * k),)
        teachers = teachers + (Teacher(offset, mass, parts[: len(SPEC.parts.over_teacher)]),)
    if SPEC.difference:
        differences = (_column(row, 1), _column(row, 3), _column(row, 5))
    last = _column(row, 6)
    if SPEC.smoothed:
        smooth = (last * 0, last * 0)  # which a gradient has no need of
    parts = (last,) if len(SPEC.parts.over_student) > 0 or not SPEC.linear else ()
    student = Student(_column(row, 0), _column(row, 2), _column(row, 4), parts, smooth)
    return Statistics(student, teachers, differences, ())


@triton.jit
def _with_column(row, at: tl.constexpr, value):
    axis: tl.constexpr = len(row.shape) - 1
    if axis > 0:
        value = tl.expand_dims(value, axis)
    return tl.where(tl.arange(0, row.shape[axis]) == at, value, row)


@triton.jit
def table_row(statistics, psi_sum, row, SPEC: tl.constexpr):
    """The statistics laid into zeros, (..., COLUMNS). psi_sum stands where the divergence has no running sums."""
    student, teachers, differences, best = statistics
    row = _with_column(row, 0, student.offset)
    row = _with_column(row, 2, student.total)
    row = _with_column(row, 4, student.hard)
    if not SPEC.linear:
        row = _with_column(row, 6, psi_sum)
    elif len(student.parts) > 0:
        row = _with_column(row, 6, student.parts[0])
    for k in tl.static_range(len(teachers)):
        row = _with_column(row, 1 if k == 0 else 4 + 3 * k, teachers[k].offset)
        row = _with_column(row, 3 if k == 0 else 5 + 3 * k, teachers[k].mass)
        if len(SPEC.parts.over_teacher) > 0:
            row = _with_column(row, 5 if k == 0 else 6 + 3 * k, teachers[k].parts[0])
    if SPEC.difference:
        row = _with_column(row, 1, differences[0])
        row = _with_column(row, 3, differences[1])
        row = _with_column(row, 5, differences[2])
    return row
