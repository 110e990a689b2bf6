"""What follows pass A: a divergence's own sums (B), a row's loss, and the gradient (C); csrc/cpu/row_loss.h and
row_gradient.h in C++.

Notation and statistics are those of statistics.py; `row` is spec.Row. Scalars are a row's, or vectors of one per row.
"""

import triton
import triton.language as tl

from kdfast.triton import dkd, logits, metrics
from kdfast.triton.divergences import masked
from kdfast.triton.spec import INF, LN2, Coefficients
from kdfast.triton.statistics import exponent, finite, hard_exponent, hard_exps, hard_offset, without_label
from kdfast.triton.teachers import teacher_logits, teacher_probabilities


@triton.jit
def scales_of(statistics, at_label, row, SPEC: tl.constexpr):
    """How exps become probabilities: an offset, a factor and its log2, of the student, and of each teacher."""
    student, teachers = statistics.student, statistics.teachers
    out = ()
    for k in tl.static_range(len(teachers)):
        offset, mass, parts = teachers[k]
        factor = mass * 0 + 1
        if SPEC.teacher == "softmaxed":
            offset = finite(offset)
            share = factor
            if SPEC.dkd and len(teachers) > 1:
                share = dkd.parted(mass, exponent(at_label[1][k], row.teacher_slope, offset))[0]
            if len(teachers) > 1:
                share *= row.weights[k]
            factor = over(share, mass, SPEC)
        log_factor = -tl.log2(mass) if SPEC.teacher == "softmaxed" else mass * 0
        out = out + ((offset, factor, log_factor),)
    return (finite(student.offset), over(student.total * 0 + 1, student.total, SPEC), -tl.log2(student.total)), out


@triton.jit
def over(share, total, SPEC: tl.constexpr):
    """share / total; without dkd's label there may be nothing left, and no class to be NaN for it."""
    return tl.where(total == 0, 0, share / total) if SPEC.dkd else share / total


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
    """D and sum psi, from running sums."""
    of_teacher = statistics.student.total * 0
    of_student = of_teacher
    if SPEC.divergence.over_teacher is not None:
        of_teacher = sum_over_teacher(statistics, 0, row, SPEC) * LN2
    if SPEC.divergence.over_student is not None:
        of_student = sum_over_student(statistics, 0, row, SPEC) * LN2
    mass = teacher_mass(statistics, row, SPEC)
    return of_teacher + of_student, SPEC.divergence.psi_sum(of_teacher, of_student, mass, row.beta)


@triton.jit
def psi_of(p, q, log_p, log_q, beta, SPEC: tl.constexpr):
    if SPEC.divergence.phi is None:
        return SPEC.divergence.psi(p, q, log_p, log_q, beta)
    else:
        return SPEC.divergence.psi(p, q, beta)


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
    offset, factor, log_factor = student
    y = exponent(s, row.slope, offset)
    e = tl.exp2(y)
    if SPEC.teacher == "given":
        p, log_p = teacher_probabilities(tiles, row.weights, SPEC)
    else:
        members = teacher_logits(tiles, row.weights, SPEC)
        for k in tl.static_range(len(members)):
            teacher_offset, teacher_factor, log_teacher_factor = teachers[k]
            member = exponent(members[k], row.teacher_slope, teacher_offset)
            if k == 0:
                p = tl.exp2(member) * teacher_factor
                log_p = member + log_teacher_factor
            else:
                p += tl.exp2(member) * teacher_factor
        if len(members) > 1:
            log_p = tl.log2(p)
    return p, e * factor, log_p * LN2, (y + log_factor) * LN2, y, e


@triton.jit
def no_sums(LANES: tl.constexpr, SPEC: tl.constexpr):
    """Each lane's sums of pass B: phi, psi; standardized also psi z, q z; for metrics p log(p / q), p log p; and the
    teacher's best class."""
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
    out = (
        before[0] + tl.sum(phi_of(p, q, log_p, log_q, beta, SPEC), 1),
        before[1] + tl.sum(psi, 1),
    )
    if SPEC.standardize:
        out = out + (before[2] + tl.sum(masked(psi, s), 1), before[3] + tl.sum(masked(q, s), 1))
    if SPEC.metrics and not SPEC.joint:
        of_kl = before[len(before) - 2] + tl.sum(masked(p, log_p - log_q), 1)
        out = out + (of_kl, before[len(before) - 1] + tl.sum(masked(p, log_p), 1))
    return out, best


@triton.jit
def soft_term(statistics, sums, at_label, row, factors, vocab, SPEC: tl.constexpr):
    """(soft term, soft, psi_sum, psi_scale, label_soft, KL(p, q)): the last three for dkd."""
    student = statistics.student
    term, soft, psi_sum, psi_scale, label_soft = student.total * 0, factors.gradient, student.total, row.beta, row.beta
    kl = term
    if SPEC.difference:
        shift, first, second = statistics.differences[0], statistics.differences[1], statistics.differences[2]
        mean = first / vocab
        term = (second - first * mean) / (2 * vocab)
        soft = factors.gradient * factors.alpha / vocab
        psi_sum = shift + tl.where(term == term, mean, term)  # a row with an infinity is NaN throughout
    elif SPEC.divergence is not None:
        divergence, psi_sum = sums[0][0], sums[0][1]
        soft = factors.gradient * factors.alpha
        soft = soft * row.temperature if SPEC.t_squared else soft / row.temperature
        if SPEC.dkd:
            found = dkd.divergence_of(statistics, sums[0], at_label, row, factors, SPEC)
            divergence, psi_sum, psi_scale, label_soft, kl = found
            label_soft = label_soft * soft
        elif not SPEC.linear:
            # for q as it is rounded: its sum is not quite 1, and the gradient's is to be 0
            psi_sum -= psi_sum * tl.fma(1 / student.total, student.total, student.total * 0 - 1)
            if SPEC.divergence.constant is not None:
                divergence += SPEC.divergence.constant(teacher_mass(statistics, row, SPEC), row.beta)
        term = divergence * (row.temperature * row.temperature if SPEC.t_squared else 1)
    return term, soft, psi_sum, psi_scale, label_soft, kl


@triton.jit
def hard_terms(statistics, s_label, row, factors, vocab, SPEC: tl.constexpr):
    """(CE(y, q1), lse, the gradient's coefficient of exps at temperature 1 per unit, exp at the label in their sum)."""
    student = statistics.student
    offset, total = finite(student.offset), student.hard
    y = hard_exponent(s_label, exponent(s_label, row.slope, offset), offset, row, SPEC)
    d = total * 0
    of_label = y
    if SPEC.dkd:
        total, d = dkd.raised(total, y)
        of_label = y - d
    log_total = tl.log2(total)
    if SPEC.smoothed:
        e = factors.smoothing
        mean = student.smooth[0]
        if SPEC.dkd:
            mean += y
        cross_entropy = log_total - (1 - e) * of_label - e * (mean / vocab - d)
    else:
        cross_entropy = log_total - of_label
    lse = (log_total + (d + hard_offset(offset, row, SPEC))) * LN2
    if SPEC.standardize:
        lse += row.scaling.mean
    lse = tl.where(lse == -INF, lse * 0, lse)  # NaN where all classes are masked
    return cross_entropy * LN2, lse, tl.exp2(-d) / total, tl.exp2(of_label) / total


@triton.jit
def finish(statistics, sums, at_label, row, factors, vocab, SPEC: tl.constexpr):
    """A row's loss without its weight, the gradient's coefficients, and its metrics."""
    student = statistics.student
    nothing = student.total * 0
    term, soft, psi_sum, psi_scale, label_soft, kl = soft_term(statistics, sums, at_label, row, factors, vocab, SPEC)
    loss = factors.alpha * term
    hard_loss, hard, label_hard, label, everywhere, spread = nothing, nothing, nothing, nothing, nothing, nothing
    if SPEC.hard:
        hard_loss, lse, per_exp, exp_of_label = hard_terms(statistics, at_label[0], row, factors, vocab, SPEC)
        if SPEC.labelled:
            loss += factors.hard_weight * hard_loss
            hard = factors.gradient * factors.hard_weight
            label = hard
            if SPEC.smoothed:
                everywhere = hard * factors.smoothing / vocab
                label = hard * (1 - factors.smoothing)
        if SPEC.z_loss:
            loss += factors.z_loss * lse * lse
            hard += factors.gradient * (2 * factors.z_loss) * lse
        label_hard = hard * exp_of_label
        hard = hard * per_exp
    if SPEC.standardize:
        if SPEC.difference:
            spread = soft * statistics.differences[3]
        elif SPEC.dkd:
            spread = soft * (psi_scale * sums[0][2] - psi_sum * sums[0][3]) + label_soft * at_label[0]
        elif SPEC.divergence is not None:
            spread = soft * (sums[0][2] - psi_sum * sums[0][3])
        spread = spread * row.scaling.spread
    coefficients = Coefficients(soft, psi_sum, psi_scale, label_soft, label_hard, hard, label, everywhere, spread)
    if SPEC.metrics:
        return loss, coefficients, measured(statistics, sums, at_label, row, term, hard_loss, kl, SPEC)
    else:
        return loss, coefficients, ()


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
def gradient(s, tiles, classes, scales, coefficients, row, SPEC: tl.constexpr):
    """dl/ds of a tile."""
    offset, factor, log_factor = scales[0]
    if SPEC.divergence is not None:
        p, q, log_p, log_q, y, e = distributions(s, tiles, scales, row, SPEC)
        psi = psi_of(p, q, log_p, log_q, row.beta, SPEC)
        if SPEC.dkd:
            psi = psi * coefficients.psi_scale
        g = coefficients.soft * (psi - q * coefficients.psi_sum)
        if SPEC.dkd:
            g = tl.where(classes == row.label, coefficients.label_soft, g)
    else:
        y = exponent(s, row.slope, offset)
        e = tl.exp2(y)
        if SPEC.difference:
            g = coefficients.soft * (s - teacher_logits(tiles, row.weights, SPEC)[0] - coefficients.psi_sum)
        else:
            g = tl.zeros_like(s)
    if SPEC.standardize:
        g = g * row.scaling.inverse - s * coefficients.spread
    if SPEC.labelled or SPEC.z_loss:
        of_hard = coefficients.hard * hard_exps(s, y, e, offset, row, SPEC)
        if SPEC.dkd:
            of_hard = tl.where(classes == row.label, coefficients.label_hard, of_hard)
        g += of_hard
    if SPEC.labelled:
        g = tl.where(classes == row.label, g - coefficients.label, g)
        if SPEC.smoothed:
            g -= coefficients.everywhere
    if SPEC.softcap:
        g = g * logits.capped_slope(s, row, SPEC)
    return g
