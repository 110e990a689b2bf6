"""Sums of lanes, or of segments, joined to those of a row, and what is known from them: pass A's row mathematics.

Notation and the one rule of joining are those of statistics.py. Scalars are a row's, or vectors of one per row.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.triton import dkd, metrics
from kdfast.triton.spec import INF, LN2
from kdfast.triton.statistics import (
    Differences,
    Statistics,
    Student,
    Teacher,
    before,
    exponent,
    finite,
    hard_shift,
    moved,
    scaled,
)


class Scale(NamedTuple):
    """How exps become probabilities."""

    offset: Any
    total: Any  # what they are divided by


class Scales(NamedTuple):
    student: Any
    teachers: Any  # one of each distribution


class DivergenceSums(NamedTuple):
    """What pass B finds; () for what is not wanted."""

    phi: Any
    psi: Any  # of a linear divergence over_student's part of phi instead
    psi_z: Any  # standardized: of psi z and q z
    q_z: Any
    kl: Any  # for metrics, of several distributions: of p log(p / q) and p log p
    p_log_p: Any
    best: Any  # and the teacher's metrics.Best


@triton.jit
def _largest(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _pair(a, b, c, d):
    return a + c, b + d


@triton.constexpr_function
def _log2(n):
    return int(n).bit_length() - 1


@triton.jit
def _pair_sums(a, b):
    """Over the first axis; of segments of several rows by halves, or the number of rows would decide on the order."""
    if len(a.shape) > 1:
        SEGMENTS: tl.constexpr = a.shape[0]
        ROWS: tl.constexpr = a.shape[1]
        HALVINGS: tl.constexpr = _log2(SEGMENTS)
        for k in tl.static_range(HALVINGS):
            a = tl.reshape(a, 2, SEGMENTS >> (k + 1), ROWS)
            b = tl.reshape(b, 2, SEGMENTS >> (k + 1), ROWS)
            a, b = tl.reduce((a, b), 0, _pair)
        return tl.reshape(a, ROWS), tl.reshape(b, ROWS)
    else:
        return tl.reduce((a, b), 0, _pair)


@triton.jit
def sums_of(values):
    """Sums over the first axis, two at a time."""
    out = ()
    for k in tl.static_range(0, len(values), 2):
        if k + 1 < len(values):
            out = out + _pair_sums(values[k], values[k + 1])
        else:
            out = out + (_pair_sums(values[k], values[k])[0],)
    return out


@triton.jit
def merge(statistics, row, SPEC: tl.constexpr):
    """Statistics of lanes, or of segments, (n,), joined to those of the row."""
    student, teachers, differences, best = statistics
    if SPEC.teacher == "softmaxed":
        highest, first_highest = tl.reduce((student.offset, teachers[0].offset), 0, _largest)
    else:
        highest = tl.max(student.offset, 0)
    new = finite(highest)
    old = before(student.offset, new)
    ds = old - new
    hard = student.hard
    if SPEC.hard:
        hard = scaled(hard, hard_shift(old, new, row, SPEC))
    out = ()
    dt = ds
    for k in tl.static_range(len(teachers)):
        teacher = teachers[k]
        if SPEC.teacher == "softmaxed":
            teacher_highest = first_highest if k == 0 else tl.max(teacher.offset, 0)
            base = finite(teacher_highest)
            dt = before(teacher.offset, base) - base
            mass = scaled(teacher.mass, dt)
        else:
            teacher_highest, dt, mass = tl.max(teacher.offset, 0), teacher.offset, teacher.mass
        parts = moved(teacher.parts, SPEC.parts.over_teacher, teacher.mass, dt, dt, ds, row.beta)
        sums = sums_of((mass,) + parts)
        out = out + (Teacher(teacher_highest, sums[0], sums[1:]),)
    parts = moved(student.parts, SPEC.parts.over_student, student.total, ds, dt, ds, row.beta)
    sums = sums_of((scaled(student.total, ds), hard) + parts)
    smooth = student.smooth
    if SPEC.smoothed:
        moved_by = hard_shift(old, new, row, SPEC)
        smooth = sums_of((smooth[0] + smooth[1] * moved_by, smooth[1]))
    if SPEC.difference:
        first, second = sums_of((differences.first, differences.second))
        with_z = tl.sum(differences.with_z, 0) if SPEC.standardize else ()
        differences = Differences(tl.max(differences.shift, 0), first, second, with_z)
    if SPEC.metrics:
        best = (metrics.best_of(best[0]), metrics.best_of(best[1]))
    return Statistics(Student(highest, sums[0], sums[1], sums[2:], smooth), out, differences, best)


@triton.jit
def scales_of(statistics, at_label, row, SPEC: tl.constexpr):
    """How exps become probabilities: an offset, and what they are divided by, of the student and of each teacher."""
    student, teachers = statistics.student, statistics.teachers
    out = ()
    for k in tl.static_range(len(teachers)):
        offset, mass, parts = teachers[k]
        total = mass * 0 + 1
        if SPEC.teacher == "softmaxed":
            offset, total = finite(offset), divisor_of(mass, SPEC)
            if len(teachers) > 1:
                share = row.weights[k]
                if SPEC.dkd:
                    share *= dkd.parted(mass, exponent(at_label[1][k], row.teacher_slope, offset))[0]
                total = total / share
        out = out + (Scale(offset, total),)
    return Scales(Scale(finite(student.offset), divisor_of(student.total, SPEC)), out)


@triton.jit
def divisor_of(total, SPEC: tl.constexpr):
    """A sum of exps; without dkd's label there may be nothing left, and no class to be NaN for it."""
    return tl.where(total == 0, INF, total) if SPEC.dkd else total


@triton.jit
def sum_over_teacher(statistics, k: tl.constexpr, row, SPEC: tl.constexpr):
    """Of the k-th part over p, from its running sum; in bits."""
    student, teachers = statistics.student, statistics.teachers
    log_total = -tl.log2(student.total)
    total = tl.zeros_like(student.total)
    for i in tl.static_range(len(teachers)):
        offset, mass, parts = teachers[i]
        if SPEC.teacher == "softmaxed":
            mean = parts[k] / mass + SPEC.parts.over_teacher[k](mass / mass, -tl.log2(mass), log_total, row.beta)
        else:
            mean = parts[k] + SPEC.parts.over_teacher[k](mass, mass * 0, log_total, row.beta)
        total += mean * row.weights[i] if SPEC.teacher == "softmaxed" and len(teachers) > 1 else mean
    return total


@triton.jit
def sum_over_student(statistics, k: tl.constexpr, row, SPEC: tl.constexpr):
    """Of the k-th part over q, from its running sum; in bits."""
    student, teachers = statistics.student, statistics.teachers
    log_mass = student.total * 0
    if SPEC.teacher == "softmaxed":
        log_mass = -tl.log2(teachers[0].mass)
    part = SPEC.parts.over_student[k](student.total * 0 + 1, log_mass, -tl.log2(student.total), row.beta)
    return student.parts[k] / student.total + part


@triton.jit
def teacher_mass(statistics, row, SPEC: tl.constexpr):
    """sum p."""
    teachers = statistics.teachers
    if SPEC.teacher == "given":
        return teachers[0].mass
    else:
        mass = teachers[0].mass / teachers[0].mass
        if len(teachers) > 1:
            mass = mass * row.weights[0]
            for k in tl.static_range(1, len(teachers)):
                mass += teachers[k].mass / teachers[k].mass * row.weights[k]
        return mass


@triton.jit
def linear_divergence(statistics, row, SPEC: tl.constexpr):
    """What pass B would find, from running sums."""
    of_teacher = statistics.student.total * 0
    of_student = of_teacher
    if SPEC.divergence.over_teacher is not None:
        of_teacher = SPEC.divergence.teacher_share(row.beta) * sum_over_teacher(statistics, 0, row, SPEC) * LN2
    if SPEC.divergence.over_student is not None:
        of_student = SPEC.divergence.student_share(row.beta) * sum_over_student(statistics, 0, row, SPEC) * LN2
    return DivergenceSums(of_teacher + of_student, of_student, (), (), (), (), ())
