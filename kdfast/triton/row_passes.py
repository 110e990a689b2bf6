"""What follows pass A: a divergence's own sums (B), a row's loss, and the gradient (C); csrc/cpu/row_loss.h and
row_gradient.h in C++.

Notation and statistics are those of statistics.py, coefficients are row_math.Coefficients and for further teachers
spec.Further; `row` is spec.Row. Scalars are a row's, or vectors of one per row.
"""

import triton
import triton.language as tl

from kdfast.row_math import Coefficients
from kdfast.triton import dkd, logits, metrics
from kdfast.triton.divergences import masked
from kdfast.triton.spec import INF, LN2, Further, Row
from kdfast.triton.statistics import exponent, finite, hard_exponent, hard_exps, hard_offset, without_label
from kdfast.triton.teachers import teacher_logits, teacher_probabilities


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
        out = out + ((offset, total),)
    return (finite(student.offset), divisor_of(student.total, SPEC)), out


@triton.jit
def divisor_of(total, SPEC: tl.constexpr):
    """A sum of exps; without dkd's label there may be nothing left, and no class to be NaN for it."""
    return tl.where(total == 0, INF, total) if SPEC.dkd else total


@triton.jit
def scales_in(coefficients, further, SPEC: tl.constexpr):
    """The same, from what a gradient has."""
    c = coefficients
    teachers = ()
    if SPEC.divergence is not None:
        teachers = ((c.teacher_offset, c.teacher_total),)
        if SPEC.teacher == "softmaxed" and not SPEC.joint:
            for k in tl.static_range(len(further)):
                teachers = teachers + ((further[k].offset, further[k].total),)
    return (c.student_offset, c.student_total), teachers


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
    """D and over_student's part of it, from running sums."""
    of_teacher = statistics.student.total * 0
    of_student = of_teacher
    if SPEC.divergence.over_teacher is not None:
        of_teacher = sum_over_teacher(statistics, 0, row, SPEC) * LN2
    if SPEC.divergence.over_student is not None:
        of_student = sum_over_student(statistics, 0, row, SPEC) * LN2
    return of_teacher + of_student, of_student


@triton.jit
def psi_of(p, q, log_p, log_q, beta, SPEC: tl.constexpr):
    """psi, of a linear divergence but for a multiple of q."""
    psi = tl.zeros_like(p)
    if SPEC.divergence.phi is not None:
        psi = SPEC.divergence.psi(p, q, beta)
    if SPEC.divergence.slope is not None:
        psi += SPEC.divergence.slope(beta) * masked(q, log_q - log_p)
    if SPEC.divergence.teacher is not None:
        psi -= SPEC.divergence.teacher(beta) * p
    return psi


@triton.jit
def phi_of(p, q, log_p, log_q, beta, SPEC: tl.constexpr):
    phi = tl.zeros_like(p)
    if SPEC.divergence.phi is not None:
        phi = SPEC.divergence.phi(p, q, beta)
    if SPEC.divergence.over_teacher is not None:
        phi += SPEC.divergence.over_teacher(p, log_p, log_q, beta)
    if SPEC.divergence.over_student is not None:
        phi += SPEC.divergence.over_student(q, log_p, log_q, beta)
    return phi


@triton.jit
def distributions(s, tiles, scales, row, SPEC: tl.constexpr):
    """(p, q, log p, log q, y, Q) of a tile."""
    student, teachers = scales
    y = exponent(s, row.slope, student[0])
    e = tl.exp2(y)
    if SPEC.teacher == "given":
        p, log_p = teacher_probabilities(tiles, row.weights, SPEC)
    else:
        members = teacher_logits(tiles, row.weights, SPEC)
        for k in tl.static_range(len(members)):
            offset, total = teachers[k]
            member = exponent(members[k], row.teacher_slope, offset)
            if k == 0:
                p = tl.exp2(member) * (1 / total)
                log_p = member - tl.log2(total)
            else:
                p += tl.exp2(member) * (1 / total)
        if len(members) > 1:
            log_p = tl.log2(p)
    return p, e * (1 / student[1]), log_p * LN2, (y - tl.log2(student[1])) * LN2, y, e


@triton.jit
def no_sums(LANES: tl.constexpr, SPEC: tl.constexpr):
    """Each lane's sums of pass B: phi, and psi or of a linear divergence over_student's part of phi; standardized also
    psi z, q z; for metrics p log(p / q), p log p; and the teacher's best class."""
    nothing = tl.zeros((LANES,), SPEC.dtype)
    sums = (nothing, nothing)
    if SPEC.standardize:
        sums = sums + (nothing, nothing)
    if SPEC.metrics and not SPEC.joint:
        sums = sums + (nothing, nothing)
        return sums, metrics.no_best(LANES, SPEC)
    else:
        return sums, ()


@triton.jit
def add_divergence(sums, s, tiles, classes, there, scales, row, SPEC: tl.constexpr):
    """A tile added."""
    before, best = sums
    beta = row.beta
    p, q, log_p, log_q, y, e = distributions(s, tiles, scales, row, SPEC)
    p = without_label(p, 0, classes, row, SPEC)
    if SPEC.metrics and not SPEC.joint:
        best = metrics.larger(best, p, classes, there)
    q = without_label(q, 0, classes, row, SPEC)
    psi = psi_of(p, q, log_p, log_q, beta, SPEC)
    second = psi
    if SPEC.divergence.phi is None:
        second = tl.zeros_like(p)
        if SPEC.divergence.over_student is not None:
            second = SPEC.divergence.over_student(q, log_p, log_q, beta)
    out = (before[0] + tl.sum(phi_of(p, q, log_p, log_q, beta, SPEC), 1), before[1] + tl.sum(second, 1))
    if SPEC.standardize:
        out = out + (before[2] + tl.sum(masked(psi, s), 1), before[3] + tl.sum(masked(q, s), 1))
    if SPEC.metrics and not SPEC.joint:
        of_kl = before[len(before) - 2] + tl.sum(masked(p, log_p - log_q), 1)
        out = out + (of_kl, before[len(before) - 1] + tl.sum(masked(p, log_p), 1))
    return out, best


@triton.jit
def soft_terms(statistics, sums, at_label, row, factors, vocab, SPEC: tl.constexpr):
    """The soft term, its coefficients (level, slope, teacher, soft, shift), sum of gradient z; dkd's at_label, KL."""
    student, beta = statistics.student, row.beta
    nothing = student.total * 0
    term, level, slope, teacher, soft, shift = nothing, nothing, nothing, nothing, nothing, nothing
    pull, of_label, kl = nothing, nothing, nothing
    scale = factors.gradient * factors.alpha
    if SPEC.standardize:
        scale *= row.scaling.unit
    if SPEC.difference:
        first, second = statistics.differences[1], statistics.differences[2]
        mean = first / vocab
        term = (second - first * mean) / (2 * vocab)
        soft = scale / vocab
        shift = statistics.differences[0] + tl.where(term == term, mean, term)  # an infinity makes its row NaN
        if SPEC.standardize:
            pull = soft * statistics.differences[3]
    elif SPEC.divergence is not None:
        scale = scale * row.temperature if SPEC.t_squared else scale / row.temperature
        of_psi = scale
        if SPEC.dkd:
            divergence, psi_sum, psi_scale, of_label, kl = dkd.divergence_of(
                statistics, sums[0], at_label, row, factors, SPEC
            )
            of_label = of_label * scale
            level = -scale * psi_sum
            of_psi = scale * psi_scale
            teacher = of_psi
        elif SPEC.divergence.phi is None:
            divergence, over_student = sums[0][0], sums[0][1]
            of_p = nothing
            if SPEC.divergence.slope is not None:
                slope = scale * SPEC.divergence.slope(beta)
            if SPEC.divergence.teacher is not None:
                share = SPEC.divergence.teacher(beta)
                teacher = scale * share
                of_p = share * teacher_mass(statistics, row, SPEC)
            level = scale * (of_p - over_student)
        else:
            divergence, psi_sum = sums[0][0], sums[0][1]
            # for q as it is rounded: its sum is not quite 1, and the gradient's is to be 0
            psi_sum -= psi_sum * tl.fma(1 / student.total, student.total, nothing - 1)
            level = -scale * psi_sum
            soft = scale
            if SPEC.divergence.constant is not None:
                divergence += SPEC.divergence.constant(teacher_mass(statistics, row, SPEC), beta)
        if SPEC.standardize:
            pull = of_psi * sums[0][2] + level * sums[0][3]
            if SPEC.dkd:
                pull += of_label * at_label[0]
        term = divergence * (row.temperature * row.temperature if SPEC.t_squared else 1)
    return term, (level, slope, teacher, soft, shift), pull, of_label, kl


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
def finish(statistics, scales, sums, at_label, row, factors, vocab, SPEC: tl.constexpr):
    """A row's loss without its weight, its coefficients, further teachers', and what metrics.write takes."""
    student, teachers = scales
    nothing = statistics.student.total * 0
    term, of_soft, pull, whole, kl = soft_terms(statistics, sums, at_label, row, factors, vocab, SPEC)
    level, slope, teacher, soft, shift = of_soft
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
        student[0], student[1], first.offset, first.total, nothing + hard_offset(student[0], row, SPEC), hard_total,
        level, slope, teacher, soft, hard, label, uniform, shift, mean, tilt, unit, first.unit, first.mean, whole,
    )  # fmt: skip
    values = ()
    if SPEC.metrics:
        values = measured(statistics, sums, at_label, row, term, hard_loss, kl, SPEC)
    return loss, coefficients, further, values


@triton.jit
def rescaled(row, coefficients, further):
    """The row with the moments that its coefficients have."""
    c = coefficients
    scalings = (logits.Scaling(c.teacher_mean, c.teacher_unit, 1 / c.teacher_unit, 0),)
    for k in tl.static_range(len(further)):
        scalings = scalings + (logits.Scaling(further[k].mean, further[k].unit, 1 / further[k].unit, 0),)
    return Row(
        row.slope, row.teacher_slope, row.temperature, row.weights, row.beta, row.label, row.caps,
        logits.Scaling(c.mean, c.student_unit, 1 / c.student_unit, 0), scalings,
    )  # fmt: skip


@triton.jit
def further_of(teachers, row, nothing, SPEC: tl.constexpr):
    """spec.Further of the first teacher, and those of the others."""
    found = ()
    for k in tl.static_range(max(1, len(row.weights))):
        offset, total, unit, mean = nothing, nothing + 1, nothing, nothing
        if k < len(teachers):
            offset, total = nothing + teachers[k][0], nothing + teachers[k][1]
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
    SUMS: tl.constexpr = 4 if SPEC.standardize else 2
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
            part = sums[0][SUMS + 1] / LN2
            of_teacher = sums[1]
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
            kl, teacher_entropy, of_teacher = sums[0][SUMS], -sums[0][SUMS + 1], sums[1]
    return term, hard_loss, kl, student_entropy, teacher_entropy, statistics.best[0], of_teacher


@triton.jit
def gradient(s, tiles, classes, coefficients, further, row, SPEC: tl.constexpr):
    """dl/ds of a tile: the formula of row_math.Coefficients."""
    c = coefficients
    if SPEC.divergence is not None:
        p, q, log_p, log_q, y, e = distributions(s, tiles, scales_in(c, further, SPEC), row, SPEC)
        g = q * c.level
        if SPEC.divergence.phi is not None:
            g += c.soft * SPEC.divergence.psi(p, q, row.beta)
        if SPEC.divergence.slope is not None:
            g += c.slope * masked(q, log_q - log_p)
        if SPEC.divergence.teacher is not None:
            g -= c.teacher * p
    else:
        y = exponent(s, row.slope, c.student_offset)
        e = tl.exp2(y)
        if SPEC.difference:
            g = c.soft * (s - teacher_logits(tiles, row.weights, SPEC)[0] - c.shift)
        else:
            g = tl.zeros_like(s)
    if SPEC.labelled or SPEC.z_loss:
        g += c.hard * (1 / c.hard_total) * hard_exps(s, y, e, c.hard_offset, row, SPEC)
    if SPEC.standardize:
        g += c.tilt * row.scaling.d * s
    if SPEC.labelled and SPEC.smoothed:
        g -= c.uniform
    if SPEC.dkd:
        g = tl.where(classes == row.label, c.at_label, g)
    elif SPEC.labelled:
        g = tl.where(classes == row.label, g - c.label, g)
    if SPEC.softcap:
        g = g * logits.capped_slope(s, row, SPEC)
    return g
