"""From a row's sums its loss, its gradient's coefficients and its metrics; csrc/cpu/row_loss.h has it in C++.

Notation and statistics are those of statistics.py, coefficients are row_math.Coefficients and for further teachers
spec.Further; `row` is spec.Row. Scalars are a row's, or vectors of one per row.
"""

import triton
import triton.language as tl

from kdfast.row_math import Coefficients
from kdfast.triton import dkd, metrics
from kdfast.triton.spec import INF, LN2, Further
from kdfast.triton.statistics import exponent, finite, hard_exponent, hard_offset
from kdfast.triton.sums import sum_over_student, sum_over_teacher, teacher_mass


@triton.jit
def soft_terms(statistics, sums, at_label, row, factors, vocab, SPEC: tl.constexpr):
    """The soft term, its coefficients (level to center), sum of its gradient times z; dkd's at_label, KL."""
    student, beta = statistics.student, row.beta
    nothing = student.total * 0
    term, level, slope, teacher, soft, center = nothing, nothing, nothing, nothing, nothing, nothing
    pull, of_label, kl = nothing, nothing, nothing
    scale = factors.gradient * factors.alpha
    if SPEC.standardize:
        scale *= row.scaling.unit
    if SPEC.difference:
        d = statistics.differences
        mean = d.first / vocab
        term = (d.second - d.first * mean) / (2 * vocab)
        soft = scale / vocab
        center = d.shift + tl.where(term == term, mean, term)  # an infinity makes its row NaN
        if SPEC.standardize:
            pull = soft * d.with_z
    elif SPEC.divergence is not None:
        scale = scale * row.temperature if SPEC.t_squared else scale / row.temperature
        of_psi = scale
        if SPEC.dkd:
            divergence, of_q, psi_scale, of_label, kl = dkd.divergence_of(
                statistics, sums, at_label, row, factors, SPEC
            )
            of_label = of_label * scale
            level = -scale * of_q
            of_psi = scale * psi_scale
            teacher = of_psi
        elif SPEC.divergence.phi is None:
            divergence, over_student = sums.phi, sums.psi
            of_p = nothing
            if SPEC.divergence.student_share is not None:
                slope = scale * SPEC.divergence.student_share(beta)
            if SPEC.divergence.teacher_share is not None:
                share = SPEC.divergence.teacher_share(beta)
                teacher = scale * share
                of_p = share * teacher_mass(statistics, row, SPEC)
            level = scale * (of_p - over_student)
        else:
            divergence, center = sums.phi, sums.psi
            # for q as it is rounded: its sum is not quite 1, and the gradient's is to be 0
            center -= center * tl.fma(1 / student.total, student.total, nothing - 1)
            soft = scale
            if SPEC.divergence.constant is not None:
                divergence += SPEC.divergence.constant(teacher_mass(statistics, row, SPEC), beta)
        if SPEC.standardize:
            pull = of_psi * sums.psi_z + (level - soft * center) * sums.q_z
            if SPEC.dkd:
                pull += of_label * at_label[0]
        term = divergence * (row.temperature * row.temperature if SPEC.t_squared else 1)
    return term, (level, slope, teacher, soft, center), pull, of_label, kl


@triton.jit
def hard_terms(statistics, s_label, row, factors, vocab, SPEC: tl.constexpr):
    """(CE(y, q1), lse, what exps at temperature 1 are divided by, the label's share of them)."""
    student = statistics.student
    offset, total = finite(student.offset), student.hard
    at_1 = hard_offset(offset, row, SPEC)
    y = hard_exponent(s_label, exponent(s_label, row.slope, offset), at_1, row, SPEC)
    d = total * 0
    of_label, divisor = y, total
    if SPEC.dkd:
        total, d = dkd.raised(student.hard, y)
        of_label = y - d
        divisor = tl.where(student.hard == 0, INF, total * tl.exp2(d))
    log_total = tl.log2(total)
    if SPEC.smoothed:
        e = factors.smoothing
        mean = student.smooth[0]
        if SPEC.dkd:
            mean += y
        cross_entropy = log_total - (1 - e) * of_label - e * (mean / vocab - d)
    else:
        cross_entropy = log_total - of_label
    lse = (log_total + (d + at_1)) * LN2
    if SPEC.standardize:
        lse += row.scaling.mean
    lse = tl.where(lse == -INF, lse * 0, lse)  # NaN where all classes are masked
    return cross_entropy * LN2, lse, divisor, tl.exp2(of_label) / total


@triton.jit
def loss_and_coefficients(statistics, scales, sums, at_label, row, factors, vocab, SPEC: tl.constexpr):
    """A row's loss without its weight, its coefficients, further teachers', and what metrics.write takes."""
    student, teachers = scales
    nothing = statistics.student.total * 0
    term, of_soft, pull, whole, kl = soft_terms(statistics, sums, at_label, row, factors, vocab, SPEC)
    level, slope, teacher, soft, center = of_soft
    loss = factors.alpha * term
    hard_loss, hard_total, hard, label, uniform, tilt = nothing, nothing, nothing, nothing, nothing, nothing
    if SPEC.hard:
        hard_loss, lse, hard_total, of_label = hard_terms(statistics, at_label[0], row, factors, vocab, SPEC)
        if SPEC.labelled:
            loss += factors.hard_weight * hard_loss
            hard = factors.gradient * factors.hard_weight
            label = hard
            if SPEC.smoothed:
                uniform = hard * factors.smoothing / vocab
                label = hard * (1 - factors.smoothing)
        if SPEC.z_loss:
            loss += factors.z_loss * lse * lse
            hard += factors.gradient * (2 * factors.z_loss) * lse
        whole += hard * of_label - label - uniform
    mean, unit = nothing, nothing
    if SPEC.standardize:
        mean, unit = row.scaling.mean, row.scaling.unit
        tilt = -pull * row.scaling.spread
        whole += tilt * row.scaling.d * at_label[0]
    first, further = further_of(teachers, row, nothing, SPEC)
    coefficients = Coefficients(
        student.offset, student.total, first.offset, first.total,
        nothing + hard_offset(student.offset, row, SPEC), hard_total,
        level, slope, teacher, soft, center, hard, label, uniform,
        mean, tilt, unit, first.unit, first.mean, whole,
    )  # fmt: skip
    values = ()
    if SPEC.metrics:
        values = measured(statistics, sums, at_label, row, term, hard_loss, kl, SPEC)
    return loss, coefficients, further, values


@triton.jit
def further_of(teachers, row, nothing, SPEC: tl.constexpr):
    """spec.Further of the first teacher, and those of the others."""
    found = ()
    for k in tl.static_range(max(1, len(row.weights))):
        offset, total, unit, mean = nothing, nothing + 1, nothing, nothing
        if k < len(teachers):
            offset, total = nothing + teachers[k].offset, nothing + teachers[k].total
        if SPEC.standardize and k < len(row.teacher_scalings):
            unit, mean = row.teacher_scalings[k].unit, row.teacher_scalings[k].mean
        found = found + (Further(offset, total, unit, mean),)
    return found[0], found[1:]


@triton.jit
def measured(statistics, sums, at_label, row, term, hard_loss, kl, SPEC: tl.constexpr):
    """What metrics.write takes."""
    student = statistics.student
    nan = term * 0 + float("nan")
    LAST: tl.constexpr = len(SPEC.parts.over_teacher) - 1
    teacher_entropy, of_teacher = nan, statistics.best[1]
    if SPEC.dkd:
        y = exponent(at_label[0], row.slope, finite(student.offset))
        rest, of_label, log_rest, log_of_label = dkd.parted(student.total, y)
        part = student.parts[len(student.parts) - 1]
        student_entropy = dkd.whole_entropy(rest, of_label, log_rest, log_of_label, part, student.total) * LN2
        m, p_y, log_m, log_p_y, mass = dkd.teacher_shares(statistics, at_label[1], row, SPEC)
        if SPEC.joint:
            teacher = statistics.teachers[0]
            part, mass = teacher.parts[LAST], teacher.mass
        else:
            part = sums.p_log_p / LN2
            of_teacher = sums.best
            better = (p_y > of_teacher.value) | ((p_y == of_teacher.value) & (row.label < of_teacher.at))
            of_teacher = metrics.Best(of_teacher.value, tl.where(better, row.label, of_teacher.at))
        teacher_entropy = dkd.whole_entropy(m, p_y, log_m, log_p_y, part, mass) * LN2
    else:
        student_entropy = -sum_over_student(statistics, len(student.parts) - 1, row, SPEC) * LN2
        if SPEC.teacher == "none":
            term, kl = nan, nan
        elif SPEC.joint:
            kl = sum_over_teacher(statistics, LAST - 1, row, SPEC) * LN2
            teacher_entropy = -sum_over_teacher(statistics, LAST, row, SPEC) * LN2
        else:
            kl, teacher_entropy, of_teacher = sums.kl, -sums.p_log_p, sums.best
    return term, hard_loss, kl, student_entropy, teacher_entropy, statistics.best[0], of_teacher
