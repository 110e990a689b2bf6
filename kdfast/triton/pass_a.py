"""Pass A over a row, tile by tile; csrc/cpu/row_sums.h has it in C++.

Per row, in base 2, with scale = log2(e) / T and the offset o, the row's largest logit (-inf where every class is
masked, and counted as 0 then):

    y_i = (s_i - o) scale        Q_i = 2^y_i        q_i = Q_i / sum Q        the teacher's likewise
    hard term: exps at temperature 1 are Q_i^T for small whole T (SPEC.power), else computed from the logits

Each lane keeps the sums of its own classes and its own offset, which grows as larger logits come by. Lanes, tiles and
segments of a row are merged by one rule, in sums.py: to bring sums from an old to a new offset, d = (old - new) scale,

    sum' = sum * 2^d            part' = part * 2^d_teacher + phi's part(sum P', d_teacher, d_student)

A teacher's probabilities given as such have the offset 0. dkd's exps are those of the classes that are not the label.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.triton import classifiers, metrics
from kdfast.triton.logits import exponent, finite, mask_label, teacher_logits, teacher_probabilities
from kdfast.triton.spec import INF, LOG2E
from kdfast.triton.tiles import fill_lanes


class TeacherSums(NamedTuple):
    """Of one distribution of the teachers, as row_math.Sums has them."""

    offset: Any
    total: Any  # sum P
    over_teacher: Any  # of each function of SPEC.running.over_teacher


class Sums(NamedTuple):
    """row_math.Sums of each lane's classes, (lanes,), or of all of a row's; () for what is not wanted."""

    student_offset: Any
    student_total: Any  # sum Q
    hard_total: Any  # sum of exps at temperature 1
    over_student: Any  # of each function of SPEC.running.over_student
    exponents: Any  # label smoothing: sum of log2 of exps at temperature 1
    classes: Any  # of how many
    teachers: Any  # TeacherSums of each distribution
    differences: Any  # logit_mse: classifiers.Differences
    best: Any  # metrics.Bests


@triton.jit
def old_offset(offset, new):
    """The offset that sums had, as it is subtracted; the new one where they are sums of nothing."""
    return tl.where(offset == -INF, new, offset)


@triton.jit
def scaled(total, d):
    """total * 2^d for a sum that may be infinite already, also where 2^d underflows, but not where it is 0 in every
    precision. Nor is it fused with a sum that follows, which happens or not as threads divide the numbers."""
    return tl.where(tl.abs(total) == INF, tl.where(d < -1100, 0, total), total * tl.exp2(d))


@triton.jit
def logit_unit(row, SPEC: tl.constexpr):
    """What the student's logits, as the sums have them, are multiplied by at temperature 1."""
    return row.scalings.student.d if SPEC.standardize else row.logit_scale


@triton.jit
def hard_scale(row, SPEC: tl.constexpr):
    """The exp2_scale of temperature 1."""
    if SPEC.power > 0:
        return row.exp2_scale * SPEC.power
    else:
        return logit_unit(row, SPEC) * LOG2E


@triton.jit
def label_exponent(s_label, student_offset, row, SPEC: tl.constexpr):
    """row_math.Sums's label, from its logit: log2 of its exp at temperature 1."""
    return exponent(s_label, hard_scale(row, SPEC), finite(student_offset))


@triton.jit
def hard_exps(s, e, offset, row, SPEC: tl.constexpr):
    """Exps at temperature 1, from the logits or from the exps at T."""
    POWER: tl.constexpr = SPEC.power
    if POWER == 0:
        return tl.exp2(exponent(s, hard_scale(row, SPEC), offset))
    else:
        power = e
        for _ in tl.static_range(1, POWER):
            power = power * e
        return power


@triton.jit
def repeat(value, COUNT: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (value,)
    return values


@triton.jit
def no_sums(difference, SPEC: tl.constexpr):
    """The sums of no class at all; difference: classifiers.first_difference."""
    nothing = fill_lanes(0, SPEC)
    teachers = ()
    MEMBERS: tl.constexpr = SPEC.members
    for _ in tl.static_range(MEMBERS):
        offset = nothing if SPEC.teacher == "given" else nothing - INF
        teachers = teachers + (TeacherSums(offset, nothing, repeat(nothing, len(SPEC.running.over_teacher))),)
    exponents, classes, differences, best = (), (), (), ()
    if SPEC.smoothed:
        exponents, classes = nothing, nothing
    if SPEC.difference:
        with_z = nothing if SPEC.standardize else ()
        differences = classifiers.Differences(nothing + difference, nothing, nothing, with_z)
    if SPEC.metrics:
        best = metrics.Bests(metrics.no_best(SPEC), metrics.no_best(SPEC))
    over_student = repeat(nothing, len(SPEC.running.over_student))
    return Sums(nothing - INF, nothing, nothing, over_student, exponents, classes, teachers, differences, best)


@triton.jit
def rescale(sums, functions: tl.constexpr, total, d, dt, ds, beta):
    """Running sums, from one offset, d above the new one, to another, where their sum of exps is `total`."""
    out = ()
    for k in tl.static_range(len(sums)):
        out = out + (scaled(sums[k], d) + functions[k](total, dt, ds, beta),)
    return out


@triton.jit
def add_terms(sums, functions: tl.constexpr, p, log_p, log_q, beta):
    """Running sums with those of a tile added."""
    out = ()
    for k in tl.static_range(len(sums)):
        out = out + (sums[k] + tl.sum(functions[k](p, log_p, log_q, beta), 1),)
    return out


@triton.jit
def add_teacher(teacher, offset, p, log_p, log_q, dt, ds, row, SPEC: tl.constexpr):
    """A teacher's sums at their new offset, with a tile's added."""
    total = teacher.total * tl.exp2(dt)
    running = rescale(teacher.over_teacher, SPEC.running.over_teacher, total, dt, dt, ds, row.beta)
    running = add_terms(running, SPEC.running.over_teacher, p, log_p, log_q, row.beta)
    return TeacherSums(offset, total + tl.sum(p, 1), running)


@triton.jit
def accumulate(sums, tile, context, row, SPEC: tl.constexpr):
    """Pass A: each lane's sums, with a tile, (lanes, n), added."""
    s, classes = tile.s, tile.classes
    best, differences = sums.best, sums.differences
    if SPEC.metrics:
        best = metrics.update_bests(best, tile, row, SPEC)
    if SPEC.difference:
        differences = classifiers.add_differences(differences, tile, row, SPEC)

    s = mask_label(s, float("-inf"), classes, row, SPEC)
    higher = tl.maximum(sums.student_offset, tl.max(s, 1))
    new = finite(higher)
    old = old_offset(sums.student_offset, new)
    ds = exponent(old, row.exp2_scale, new)
    y = exponent(s, row.exp2_scale, new[:, None])
    e = tl.exp2(y)
    moved = sums.student_total * tl.exp2(ds)
    total = moved + tl.sum(e, 1)
    hard, exponents, count = sums.hard_total, sums.exponents, sums.classes
    if SPEC.hard:
        change = exponent(old, hard_scale(row, SPEC), new)
        hard = hard * tl.exp2(change) + tl.sum(hard_exps(s, e, new[:, None], row, SPEC), 1)
    if SPEC.smoothed:
        real = tile.mask & (classes != row.label) if SPEC.dkd else tile.mask
        change = exponent(old, hard_scale(row, SPEC), new)
        y_hard = tl.where(real, exponent(s, hard_scale(row, SPEC), new[:, None]), 0)
        exponents = exponents + count * change + tl.sum(y_hard, 1)
        count = count + tl.sum(real.to(SPEC.dtype), 1)

    teachers = ()
    dt, log_p = ds, y
    if SPEC.teacher == "given":
        p, log_p = teacher_probabilities(tile.teachers, row.weights, SPEC)
        p = mask_label(p, 0, classes, row, SPEC)
        teacher = sums.teachers[0]
        dt = teacher.offset
        teachers = (add_teacher(teacher, teacher.offset, p, log_p, y, dt, ds, row, SPEC),)
    elif SPEC.teacher == "softmaxed":
        logits = teacher_logits(tile.teachers, row.weights, SPEC)
        for k in tl.static_range(len(logits)):
            t = mask_label(logits[k], float("-inf"), classes, row, SPEC)
            teacher = sums.teachers[k]
            teacher_higher = tl.maximum(teacher.offset, tl.max(t, 1))
            base = finite(teacher_higher)
            dt = exponent(old_offset(teacher.offset, base), row.teacher_exp2_scale, base)
            log_p = exponent(t, row.teacher_exp2_scale, base[:, None])
            p = tl.exp2(log_p)
            teachers = teachers + (add_teacher(teacher, teacher_higher, p, log_p, y, dt, ds, row, SPEC),)
    over_student = rescale(sums.over_student, SPEC.running.over_student, moved, ds, dt, ds, row.beta)
    over_student = add_terms(over_student, SPEC.running.over_student, e, log_p, y, row.beta)
    return Sums(higher, total, hard, over_student, exponents, count, teachers, differences, best)
