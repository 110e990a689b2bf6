"""From a row's sums its loss, its gradient's coefficients and its metrics; csrc/cpu/row_loss.h has it in C++.

`sums` are pass_a.Sums, `found` sums.DivergenceSums, coefficients row_math.Coefficients and for further teachers
spec.Further; `row` is spec.Row. Scalars are a row's, or vectors of one per row.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.row_math import Coefficients
from kdfast.triton import classifiers, metrics
from kdfast.triton.divergences import masked
from kdfast.triton.logits import finite
from kdfast.triton.pass_a import hard_scale, logit_unit
from kdfast.triton.spec import INF, LN2, Further
from kdfast.triton.sums import sum_over_student, sum_over_teacher, teacher_mass


class SoftTerm(NamedTuple):
    loss: Any
    level: Any
    slope: Any
    teacher: Any
    soft: Any
    center: Any
    with_z: Any  # standardized: the sum of its gradient times z
    at_label: Any  # dkd's gradient there
    kl: Any  # dkd's, for metrics


class HardTerm(NamedTuple):
    cross_entropy: Any
    lse: Any
    total: Any  # what exps at temperature 1 are divided by
    of_label: Any  # its share of them


class RowResult(NamedTuple):
    loss: Any  # without the row's weight
    coefficients: Any
    further: Any
    metrics: Any  # metrics.RowMetrics, or ()


@triton.jit
def without_rounding(divergence, SPEC: tl.constexpr):
    """A divergence of distributions, of which rounding may leave less than 0; NaN stays."""
    return tl.where(divergence < 0, 0, divergence) if SPEC.teacher == "softmaxed" else divergence


@triton.jit
def soft_term(sums, found, at_label, row, factors, classes, SPEC: tl.constexpr):
    beta, rest = row.beta, row.rest
    nothing = sums.student_total * 0
    loss, level, slope, teacher, soft, center = nothing, nothing, nothing, nothing, nothing, nothing
    with_z, of_label, kl = nothing, nothing, nothing
    scale = tl.where(classes == 1, 0, factors.gradient * factors.alpha)  # a single class always has q = 1
    if SPEC.standardize:
        scale *= row.scalings.student.unit
    if SPEC.difference:
        loss, center = classifiers.mean_square(sums.differences, classes)
        soft = scale / classes
        if SPEC.standardize:
            with_z = soft * sums.differences.with_z
    elif SPEC.divergence is not None:
        scale = scale * row.temperature if SPEC.t_squared else scale / row.temperature
        psi_scale, psi_z = scale, found.psi_z
        if SPEC.dkd:
            terms = classifiers.dkd_terms(sums, found.phi, at_label, row, factors, SPEC)
            divergence, kl = terms.divergence, terms.kl
            of_label = terms.at_label * scale
            level = -scale * terms.psi
            psi_scale = scale * terms.psi_scale
            teacher = psi_scale
        elif SPEC.divergence.phi is None:
            divergence, over_student = found.phi, found.psi
            of_p = nothing
            if SPEC.divergence.student_share is not None:
                slope = scale * SPEC.divergence.student_share(beta, rest)
            if SPEC.divergence.teacher_share is not None:
                share = SPEC.divergence.teacher_share(beta, rest)
                teacher = scale * share
                of_p = share * teacher_mass(sums, row, SPEC)
            level = scale * (of_p - over_student)
        else:
            divergence, center = found.phi, found.psi
            if SPEC.divergence.psi_apart is not None:
                is_apart = -4 * found.apart < found.psi
                center, slope = tl.where(is_apart, found.apart, found.psi), tl.where(is_apart, nothing + 1, nothing)
                if SPEC.standardize:
                    psi_z = tl.where(is_apart, found.apart_z, psi_z)
            # for q as it is rounded: its sum is not quite 1, and the gradient's is to be 0
            center -= center * tl.fma(1 / sums.student_total, sums.student_total, nothing - 1)
            soft = scale
            if SPEC.divergence.constant is not None:
                divergence += SPEC.divergence.constant(teacher_mass(sums, row, SPEC), beta, rest)
        if SPEC.standardize:
            with_z = psi_scale * psi_z + (level - soft * center) * found.q_z
            if SPEC.dkd:
                with_z += of_label * at_label.student
        loss = without_rounding(divergence, SPEC) * (row.temperature * row.temperature if SPEC.t_squared else 1)
    return SoftTerm(loss, level, slope, teacher, soft, center, with_z, of_label, kl)


@triton.jit
def hard_term(sums, label, at_label, row, factors, classes, SPEC: tl.constexpr):
    """label: log2 of its exp at temperature 1."""
    total, offset, exponents = sums.hard_total, sums.student_offset, sums.exponents
    of_label, divisor = label, total
    if SPEC.dkd:
        offset = tl.maximum(offset, at_label.student)
        total, change, of_label = classifiers.add_label(
            total, sums.student_offset, at_label.student, hard_scale(row, SPEC)
        )
        divisor = total * tl.exp2(-change)  # infinite where there is no rest
        if SPEC.smoothed:
            exponents = exponents + masked(sums.classes, change) + of_label
    log_total = tl.log2(total)
    if SPEC.smoothed:
        e = factors.smoothing
        cross_entropy = log_total - (1 - e) * of_label - e * (exponents / classes)
    else:
        cross_entropy = log_total - of_label
    lse = log_total * LN2 + finite(offset) * logit_unit(row, SPEC)
    if SPEC.standardize:
        lse += row.scalings.student.mean
    lse = tl.where(lse == -INF, lse * 0, lse)  # NaN where all classes are masked
    return HardTerm(cross_entropy * LN2, lse, divisor, tl.exp2(of_label) / total)


@triton.jit
def loss_and_coefficients(sums, softmaxes, found, label, at_label, row, factors, classes, SPEC: tl.constexpr):
    """label: log2 of its exp at temperature 1; at_label: its logits; classes: how many."""
    nothing = sums.student_total * 0
    term = soft_term(sums, found, at_label, row, factors, classes, SPEC)
    loss, whole = factors.alpha * term.loss, term.at_label
    hard_total, cross_entropy, hard, of_label, uniform, tilt = (
        sums.hard_total,
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
    )
    if SPEC.hard:
        of_hard = hard_term(sums, label, at_label, row, factors, classes, SPEC)
        cross_entropy, hard_total = of_hard.cross_entropy, of_hard.total
        if SPEC.labelled:
            loss += factors.hard_weight * cross_entropy
            hard = factors.gradient * factors.hard_weight
            of_label = hard
            if SPEC.smoothed:
                uniform = hard * factors.smoothing / classes
                of_label = hard * (1 - factors.smoothing)
        if SPEC.z_loss:
            loss += factors.z_loss * of_hard.lse * of_hard.lse
            hard += factors.gradient * (2 * factors.z_loss) * of_hard.lse
        if SPEC.dkd:
            whole += hard * of_hard.of_label - of_label - uniform
    mean, unit = nothing, nothing + 1
    if SPEC.standardize:
        mean, unit = row.scalings.student.mean, row.scalings.student.unit
        tilt = -term.with_z * row.scalings.student.spread
        if SPEC.dkd:
            whole += tilt * row.scalings.student.d * at_label.student
    teachers = teacher_columns(softmaxes.teachers, row, nothing, SPEC)
    first = teachers[0]
    coefficients = Coefficients(
        softmaxes.student_offset, softmaxes.student_total, first.offset, first.total,
        hard_total, term.level, term.slope, term.teacher, term.soft, term.center, hard, of_label, uniform,
        mean, tilt, unit, first.unit, first.mean, whole,
    )  # fmt: skip
    of_metrics = ()
    if SPEC.metrics:
        of_metrics = row_metrics(sums, found, at_label, row, term, cross_entropy, SPEC)
    return RowResult(loss, coefficients, teachers[1:], of_metrics)


@triton.jit
def teacher_columns(teachers, row, nothing, SPEC: tl.constexpr):
    """spec.Further of every teacher; the first one's is part of the coefficients."""
    columns = ()
    for k in tl.static_range(max(1, len(row.weights))):
        offset, total, unit, mean = nothing, nothing + 1, nothing + 1, nothing
        if k < len(teachers):
            offset, total = nothing + teachers[k].offset, nothing + teachers[k].total
        if SPEC.standardize and k < len(row.scalings.teachers):
            unit, mean = row.scalings.teachers[k].unit, row.scalings.teachers[k].mean
        columns = columns + (Further(offset, total, unit, mean),)
    return columns


@triton.jit
def entropy_with_label(split, part, total):
    """dkd: the entropy over all classes, in bits, from part = sum of P log2 P over the rest, total = sum of P."""
    rest = masked(split.rest, part / total - tl.log2(total) + split.log_rest)
    return -(rest + masked(split.label, split.log_label))


@triton.jit
def dkd_entropies(sums, found, at_label, row, SPEC: tl.constexpr):
    """The student's and the teacher's, over all classes, and the teacher's metrics.Best."""
    q = classifiers.split_student(sums, at_label.student, row)
    part = sums.over_student[len(sums.over_student) - 1]
    student_entropy = entropy_with_label(q, part, sums.student_total) * LN2
    p, mass = classifiers.split_teachers(sums, at_label.teachers, row, SPEC)
    best = sums.best.teacher
    if SPEC.joint:
        LAST: tl.constexpr = len(SPEC.running.over_teacher) - 1
        part, mass = sums.teachers[0].over_teacher[LAST], sums.teachers[0].total
    else:
        part, best = found.p_log_p / LN2, metrics.first_best(found.best, p.label, row.label)
    return student_entropy, entropy_with_label(p, part, mass) * LN2, best


@triton.jit
def row_metrics(sums, found, at_label, row, term, cross_entropy, SPEC: tl.constexpr):
    nan = term.loss * 0 + float("nan")
    soft, kl, teacher_entropy, best = term.loss, term.kl, nan, sums.best
    if SPEC.dkd:
        student_entropy, teacher_entropy, of_teacher = dkd_entropies(sums, found, at_label, row, SPEC)
        best = metrics.Bests(best.student, of_teacher)
    else:
        student_entropy = -sum_over_student(sums, len(sums.over_student) - 1, row, SPEC) * LN2
        if SPEC.teacher == "none":
            soft, kl = nan, nan
        elif SPEC.joint:
            LAST: tl.constexpr = len(SPEC.running.over_teacher) - 1
            kl = sum_over_teacher(sums, LAST - 1, row, SPEC) * LN2
            teacher_entropy = -sum_over_teacher(sums, LAST, row, SPEC) * LN2
        else:
            kl, teacher_entropy = found.kl, -found.p_log_p
            best = metrics.Bests(best.student, found.best)
    kl = without_rounding(kl, SPEC)
    return metrics.RowMetrics(soft, cross_entropy, kl, student_entropy, teacher_entropy, best)
