"""Pass A over a row, tile by tile; csrc/cpu/row_sums.h has it in C++.

Per row, in base 2, with slope = log2(e) / T and an offset o near the row's largest exponent (-inf where every class is
masked, and counted as 0 then):

    y_i = slope * s_i - o        Q_i = 2^y_i        q_i = Q_i / sum Q        the teacher's likewise
    hard term: exps at temperature 1 are Q_i^T for small whole T (SPEC.power), else taken by themselves

Each lane keeps the statistics of its own classes and its own offset, which grows as larger logits come by. Lanes, tiles
and segments of a row are joined by one rule, in sums.py: to bring sums from an old to a new offset, d = old - new,

    sum' = sum * 2^d            part' = (part + phi's part(sum P, d_teacher, d_student)) * 2^d_teacher

A teacher's probabilities given as such have the offset 0. dkd's exps are those of the classes that are not the label,
which dkd.py adds. `logit_mse` has sums of d_i = s_i - t_i - k and of d_i^2, with k the first class's difference.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.triton import metrics
from kdfast.triton.logits import teacher_logits, teacher_probabilities
from kdfast.triton.spec import INF, LOG2E
from kdfast.triton.tiles import in_lanes


class Student(NamedTuple):
    offset: Any
    total: Any  # sum Q
    hard: Any  # of exps at temperature 1
    parts: Any  # the running sums of SPEC.parts.over_student
    smooth: Any  # for label smoothing: sum of log2 of exps at temperature 1, and of how many


class Teacher(NamedTuple):
    offset: Any
    mass: Any  # sum P
    parts: Any


class Differences(NamedTuple):
    """logit_mse's, of d = s - t - shift."""

    shift: Any
    first: Any  # sum d
    second: Any  # sum d^2
    with_z: Any  # standardized: sum d z, else ()


class Statistics(NamedTuple):
    student: Any
    teachers: Any  # one of each distribution
    differences: Any
    best: Any  # metrics: the student's metrics.Best, the teacher's


@triton.jit
def finite(offset):
    """The offset that is subtracted: 0 where every class so far is masked."""
    return tl.where(offset == -INF, 0, offset)


@triton.jit
def before(offset, new):
    """The offset that sums had, as it is subtracted; the new one where they are sums of nothing."""
    return tl.where(offset == -INF, new, offset)


@triton.jit
def exponent(x, slope, offset):
    """x * slope - offset, rounded once: offset and x * slope may be large and alike."""
    return tl.fma(x, slope, -offset)


@triton.jit
def scaled(total, d):
    """total * 2^d for a sum that may be infinite already, also where 2^d underflows. Nor is it fused with a sum that
    follows, which happens or not as threads divide the numbers."""
    return tl.where(tl.abs(total) == INF, total, total * tl.exp2(d))


@triton.jit
def hard_offset(offset, row, SPEC: tl.constexpr):
    """The offset of exps at temperature 1: whole, for a product that the compiler fused with what it is subtracted
    from would not be the rounded one that other exps had subtracted."""
    if SPEC.power > 0:
        return offset * SPEC.power
    elif SPEC.standardize:
        return tl.floor(offset * (row.temperature * row.scaling.d))
    else:
        return tl.floor(offset * row.temperature)


@triton.jit
def hard_shift(old, new, row, SPEC: tl.constexpr):
    """How far the old offset of exps at temperature 1 is above the new one."""
    if SPEC.power > 0:
        return (old - new) * SPEC.power
    else:
        return hard_offset(old, row, SPEC) - hard_offset(new, row, SPEC)


@triton.jit
def hard_exponent(s, y, offset, row, SPEC: tl.constexpr):
    """log2 of an exp at temperature 1, from the logit and hard_offset's offset, or from the exponent at T."""
    if SPEC.power > 0:
        return y * SPEC.power
    else:
        slope = tl.full((), LOG2E, SPEC.dtype)
        if SPEC.standardize:
            slope = slope * row.scaling.d
        return exponent(s, slope, offset)


@triton.jit
def hard_exps(s, y, e, offset, row, SPEC: tl.constexpr):
    """Exps at temperature 1, from the logits or from the exps at T."""
    POWER: tl.constexpr = SPEC.power
    if POWER == 0:
        return tl.exp2(hard_exponent(s, y, offset, row, SPEC))
    else:
        power = e
        for _ in tl.static_range(1, POWER):
            power = power * e
        return power


@triton.jit
def zeros_like(parts, nothing):
    out = ()
    for _ in tl.static_range(len(parts)):
        out = out + (nothing,)
    return out


@triton.jit
def no_statistics(shift, SPEC: tl.constexpr):
    """The statistics of no class at all."""
    nothing = in_lanes(0, SPEC)
    teachers = ()
    MEMBERS: tl.constexpr = SPEC.members
    for _ in tl.static_range(MEMBERS):
        offset = nothing if SPEC.teacher == "given" else nothing - INF
        teachers = teachers + (Teacher(offset, nothing, zeros_like(SPEC.parts.over_teacher, nothing)),)
    smooth, differences, best = (), (), ()
    if SPEC.smoothed:
        smooth = (nothing, nothing)
    if SPEC.difference:
        differences = Differences(nothing + shift, nothing, nothing, nothing if SPEC.standardize else ())
    if SPEC.metrics:
        best = (metrics.no_best(SPEC), metrics.no_best(SPEC))
    student = Student(nothing - INF, nothing, nothing, zeros_like(SPEC.parts.over_student, nothing), smooth)
    return Statistics(student, teachers, differences, best)


@triton.jit
def moved(parts, functions: tl.constexpr, total, d, dt, ds, beta):
    """Running sums, from one offset, d above the new one, to another."""
    out = ()
    for k in tl.static_range(len(parts)):
        out = out + (scaled(parts[k] + functions[k](total, dt, ds, beta), d),)
    return out


@triton.jit
def added(parts, functions: tl.constexpr, p, log_p, log_q, beta):
    out = ()
    for k in tl.static_range(len(parts)):
        out = out + (parts[k] + tl.sum(functions[k](p, log_p, log_q, beta), 1),)
    return out


@triton.jit
def without_label(x, nothing, classes, row, SPEC: tl.constexpr):
    return tl.where(classes == row.label, nothing, x) if SPEC.dkd else x


@triton.jit
def accumulate(statistics, tile, given, row, SPEC: tl.constexpr):
    """Pass A: the statistics of each lane, (lanes,), with a tile, (lanes, n), added."""
    student, teachers, differences, best = statistics
    s, tiles, classes, there, at = tile
    if SPEC.metrics:
        best = metrics.add_best(best, tile, row, SPEC)
    if SPEC.difference:
        difference = s - teacher_logits(tiles, row.weights, SPEC)[0]
        shift, first, second, with_z = differences
        d = tl.where(there, difference - shift[:, None], 0)
        if SPEC.standardize:
            with_z += tl.sum(tl.where(there, d * s, 0), 1)
        differences = Differences(shift, first + tl.sum(d, 1), second + tl.sum(d * d, 1), with_z)

    s = without_label(s, float("-inf"), classes, row, SPEC)
    higher = tl.maximum(student.offset, tl.max(s, 1) * row.slope)
    new = finite(higher)
    old = before(student.offset, new)
    ds = old - new
    y = exponent(s, row.slope, new[:, None])
    e = tl.exp2(y)
    total = student.total * tl.exp2(ds) + tl.sum(e, 1)
    hard, smooth = student.hard, student.smooth
    if SPEC.hard:
        at_1 = hard_offset(new, row, SPEC)[:, None]
        hard = hard * tl.exp2(hard_shift(old, new, row, SPEC)) + tl.sum(hard_exps(s, y, e, at_1, row, SPEC), 1)
    if SPEC.smoothed:
        real = there & (classes != row.label) if SPEC.dkd else there
        moved_by = hard_shift(old, new, row, SPEC)
        y_hard = tl.where(real, hard_exponent(s, y, hard_offset(new, row, SPEC)[:, None], row, SPEC), 0)
        smooth = (
            smooth[0] + smooth[1] * moved_by + tl.sum(y_hard, 1),
            smooth[1] + tl.sum(real.to(SPEC.dtype), 1),
        )

    out = ()
    dt, log_p = ds, y
    if SPEC.teacher == "given":
        p, log_p = teacher_probabilities(tiles, row.weights, SPEC)
        p = without_label(p, 0, classes, row, SPEC)
        teacher = teachers[0]
        dt = teacher.offset
        parts = moved(teacher.parts, SPEC.parts.over_teacher, teacher.mass, dt, dt, ds, row.beta)
        parts = added(parts, SPEC.parts.over_teacher, p, log_p, y, row.beta)
        out = (Teacher(teacher.offset, teacher.mass + tl.sum(p, 1), parts),)
    elif SPEC.teacher == "softmaxed":
        logits = teacher_logits(tiles, row.weights, SPEC)
        for k in tl.static_range(len(logits)):
            t = without_label(logits[k], float("-inf"), classes, row, SPEC)
            teacher = teachers[k]
            teacher_higher = tl.maximum(teacher.offset, tl.max(t, 1) * row.teacher_slope)
            base = finite(teacher_higher)
            dt = before(teacher.offset, base) - base
            log_p = exponent(t, row.teacher_slope, base[:, None])
            p = tl.exp2(log_p)
            parts = moved(teacher.parts, SPEC.parts.over_teacher, teacher.mass, dt, dt, ds, row.beta)
            parts = added(parts, SPEC.parts.over_teacher, p, log_p, y, row.beta)
            out = out + (Teacher(teacher_higher, teacher.mass * tl.exp2(dt) + tl.sum(p, 1), parts),)
    parts = moved(student.parts, SPEC.parts.over_student, student.total, ds, dt, ds, row.beta)
    parts = added(parts, SPEC.parts.over_student, e, log_p, y, row.beta)
    return Statistics(Student(higher, total, hard, parts, smooth), out, differences, best)
