"""Sums of lanes, or of segments, merged to those of a row, and what is known from them: pass A's row mathematics.

Notation and the one rule of merging are those of pass_a.py. Scalars are a row's, or vectors of one per row.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.triton import classifiers, metrics
from kdfast.triton.logits import exponent, finite
from kdfast.triton.pass_a import Sums, TeacherSums, hard_scale, old_offset, rescale, scaled
from kdfast.triton.spec import INF, LN2


class TeacherSoftmax(NamedTuple):
    """How exps become probabilities."""

    offset: Any
    total: Any  # what they are divided by


class Softmaxes(NamedTuple):
    student_offset: Any
    student_total: Any
    teachers: Any  # TeacherSoftmax of each distribution


class DivergenceSums(NamedTuple):
    """What pass B finds; () for what is not wanted."""

    phi: Any
    psi: Any  # of a linear divergence over_student's part of phi instead
    psi_z: Any  # standardized: of psi z and q z
    q_z: Any
    apart: Any  # of psi_apart, where the divergence has one, and of psi_apart z
    apart_z: Any
    kl: Any  # for metrics, of several distributions: of p log(p / q) and p log p
    p_log_p: Any
    best: Any  # and the teacher's metrics.Best


@triton.jit
def _max_pair(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def add_pair(a, b, c, d):
    return a + c, b + d


@triton.jit
def sum_pair(a, b):
    return tl.reduce((a, b), 0, add_pair)


@triton.jit
def sum_pairs(values):
    """Two at a time."""
    out = ()
    for k in tl.static_range(0, len(values), 2):
        if k + 1 < len(values):
            out = out + sum_pair(values[k], values[k + 1])
        else:
            out = out + (sum_pair(values[k], values[k])[0],)
    return out


@triton.jit
def merge(sums, row, SPEC: tl.constexpr):
    """Sums of lanes, or of segments, (n,), merged to those of the row."""
    if SPEC.teacher == "softmaxed":
        highest, first_highest = tl.reduce((sums.student_offset, sums.teachers[0].offset), 0, _max_pair)
    else:
        highest = tl.max(sums.student_offset, 0)
    new = finite(highest)
    old = old_offset(sums.student_offset, new)
    ds = exponent(old, row.exp2_scale, new)
    moved = scaled(sums.student_total, ds)
    hard = sums.hard_total
    if SPEC.hard:
        hard = scaled(hard, exponent(old, hard_scale(row, SPEC), new))
    teachers = ()
    dt = ds
    for k in tl.static_range(len(sums.teachers)):
        teacher = sums.teachers[k]
        if SPEC.teacher == "softmaxed":
            teacher_highest = first_highest if k == 0 else tl.max(teacher.offset, 0)
            base = finite(teacher_highest)
            dt = exponent(old_offset(teacher.offset, base), row.teacher_exp2_scale, base)
            total = scaled(teacher.total, dt)
        else:
            teacher_highest, dt, total = tl.max(teacher.offset, 0), teacher.offset, teacher.total
        running = rescale(teacher.over_teacher, SPEC.running.over_teacher, total, dt, dt, ds, row.beta)
        added = sum_pairs((total,) + running)
        teachers = teachers + (TeacherSums(teacher_highest, added[0], added[1:]),)
    running = rescale(sums.over_student, SPEC.running.over_student, moved, ds, dt, ds, row.beta)
    added = sum_pairs((moved, hard) + running)
    exponents, classes, differences, best = sums.exponents, sums.classes, sums.differences, sums.best
    if SPEC.smoothed:
        change = exponent(old, hard_scale(row, SPEC), new)
        exponents, classes = sum_pair(exponents + classes * change, classes)
    if SPEC.difference:
        first, second = sum_pair(differences.first, differences.second)
        with_z = tl.sum(differences.with_z, 0) if SPEC.standardize else ()
        differences = classifiers.Differences(tl.max(differences.center, 0), first, second, with_z)
    if SPEC.metrics:
        best = metrics.Bests(metrics.merge_best(best.student), metrics.merge_best(best.teacher))
    return Sums(highest, added[0], added[1], added[2:], exponents, classes, teachers, differences, best)


@triton.jit
def softmaxes(sums, at_label, row, SPEC: tl.constexpr):
    """How exps become probabilities, of the student and of each teacher. at_label: logits, which dkd needs."""
    teachers = ()
    for k in tl.static_range(len(sums.teachers)):
        teacher = sums.teachers[k]
        offset, total = teacher.offset, teacher.total * 0 + 1
        if SPEC.teacher == "softmaxed":
            offset, total = finite(offset), softmax_total(teacher.total, SPEC)
            if len(sums.teachers) > 1:
                share = row.weights[k]
                if SPEC.dkd:
                    share *= classifiers.split_teacher(teacher, at_label.teachers[k], row).rest
                total = total / share
        teachers = teachers + (TeacherSoftmax(offset, total),)
    return Softmaxes(finite(sums.student_offset), softmax_total(sums.student_total, SPEC), teachers)


@triton.jit
def softmax_total(total, SPEC: tl.constexpr):
    """A sum of exps; without dkd's label there may be nothing left, and no class to be NaN for it."""
    return tl.where(total == 0, INF, total) if SPEC.dkd else total


@triton.jit
def sum_over_teacher(sums, k: tl.constexpr, row, SPEC: tl.constexpr):
    """Of the k-th function of p, from its running sum; in bits."""
    log_total = -tl.log2(sums.student_total)
    function: tl.constexpr = SPEC.running.over_teacher[k]
    result = tl.zeros_like(sums.student_total)
    for i in tl.static_range(len(sums.teachers)):
        total, part = sums.teachers[i].total, sums.teachers[i].over_teacher[k]
        if SPEC.teacher == "softmaxed":
            mean = part / total + function(total / total, -tl.log2(total), log_total, row.beta)
        else:
            mean = part + function(total, total * 0, log_total, row.beta)
        result += mean * row.weights[i] if SPEC.teacher == "softmaxed" and len(sums.teachers) > 1 else mean
    return result


@triton.jit
def sum_over_student(sums, k: tl.constexpr, row, SPEC: tl.constexpr):
    """Of the k-th function of q, from its running sum; in bits."""
    log_total = sums.student_total * 0
    if SPEC.teacher == "softmaxed":
        log_total = -tl.log2(sums.teachers[0].total)
    function: tl.constexpr = SPEC.running.over_student[k]
    rest = function(sums.student_total * 0 + 1, log_total, -tl.log2(sums.student_total), row.beta)
    return sums.over_student[k] / sums.student_total + rest


@triton.jit
def teacher_mass(sums, row, SPEC: tl.constexpr):
    """sum p."""
    teachers = sums.teachers
    if SPEC.teacher == "given":
        return teachers[0].total
    else:
        mass = teachers[0].total / teachers[0].total
        if len(teachers) > 1:
            mass = mass * row.weights[0]
            for k in tl.static_range(1, len(teachers)):
                mass += teachers[k].total / teachers[k].total * row.weights[k]
        return mass


@triton.jit
def linear_divergence(sums, row, SPEC: tl.constexpr):
    """What pass B would find, from running sums; () without a divergence."""
    if SPEC.divergence is None:
        return ()
    else:
        of_teacher = sums.student_total * 0
        of_student = of_teacher
        if SPEC.divergence.over_teacher is not None:
            share = SPEC.divergence.teacher_share(row.beta, row.rest)
            of_teacher = share * sum_over_teacher(sums, 0, row, SPEC) * LN2
        if SPEC.divergence.over_student is not None:
            share = SPEC.divergence.student_share(row.beta, row.rest)
            of_student = share * sum_over_student(sums, 0, row, SPEC) * LN2
        return DivergenceSums(of_teacher + of_student, of_student, (), (), (), (), (), (), ())
