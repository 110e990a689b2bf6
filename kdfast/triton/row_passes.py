"""What follows pass A: a divergence's own sums (B), a row's loss, and the gradient (C); csrc/cpu/row_gradient.h in C++.

Notation and statistics are those of statistics.py; `row` is (slope, teacher's slope, temperature, teachers'
weights, beta).
Scalars may be a row's, or vectors of one per row.
"""

import triton
import triton.language as tl

from kdfast.triton.spec import LN2
from kdfast.triton.statistics import exponent, finite, hard_exponent, hard_exps
from kdfast.triton.teachers import teacher_logits, teacher_probabilities


@triton.jit
def hard_loss(statistics, label_logit, row, SPEC: tl.constexpr):
    """CE(y, q at temperature 1)."""
    slope, teacher_slope, temperature, weights, beta = row
    offset, total, hard, over_student = statistics[0]
    if SPEC.power == 0:
        y = hard_exponent(label_logit, finite(offset), temperature, SPEC)
    else:
        y = SPEC.power * exponent(label_logit, slope, finite(offset))
    return (tl.log2(hard) - y) * LN2


@triton.jit
def scales_of(statistics, row, SPEC: tl.constexpr):
    """How exps become probabilities: an offset, a factor and its log2, of the student, and of each teacher."""
    slope, teacher_slope, temperature, weights, beta = row
    student, teachers = statistics
    out = ()
    for k in tl.static_range(len(teachers)):
        offset, mass, running = teachers[k]
        if SPEC.teacher != "softmaxed":
            out = out + ((offset, mass * 0 + 1, mass * 0),)
        elif len(teachers) == 1:
            out = out + ((finite(offset), 1 / mass, -tl.log2(mass)),)
        else:
            out = out + ((finite(offset), weights[k] / mass, -tl.log2(mass)),)
    return (finite(student[0]), 1 / student[1], -tl.log2(student[1])), out


@triton.jit
def linear_divergence(statistics, row, SPEC: tl.constexpr):
    """D and sum psi, from running sums."""
    slope, teacher_slope, temperature, weights, beta = row
    student, teachers = statistics
    offset, total, hard, over_student = student
    log_total = -tl.log2(total)
    of_teacher, of_student, mean_mass = total * 0, total * 0, total * 0
    for k in tl.static_range(len(teachers)):
        teacher_offset, mass, over_teacher = teachers[k]
        if SPEC.teacher == "softmaxed":
            share, log_mass, mean = mass / mass, -tl.log2(mass), over_teacher / mass
        else:
            share, log_mass, mean = mass, mass * 0, over_teacher
        if SPEC.divergence.over_teacher is not None:
            mean += SPEC.divergence.over_teacher(share, log_mass, log_total, beta)
        if SPEC.divergence.over_student is not None:
            of_student = over_student / total + SPEC.divergence.over_student(share * 0 + 1, log_mass, log_total, beta)
        if SPEC.teacher == "softmaxed" and len(teachers) > 1:
            of_teacher += mean * weights[k]
            mean_mass += share * weights[k]
        else:
            of_teacher += mean
            mean_mass += share
    of_teacher, of_student = of_teacher * LN2, of_student * LN2
    return of_teacher + of_student, SPEC.divergence.psi_sum(of_teacher, of_student, mean_mass, beta)


@triton.jit
def teacher_mass(statistics, SPEC: tl.constexpr):
    """sum p."""
    student, teachers = statistics
    mass = teachers[0][1]
    if SPEC.teacher == "softmaxed":
        mass = mass * 0 + 1
    return mass


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
    slope, teacher_slope, temperature, weights, beta = row
    student, teachers = scales
    offset, factor, log_factor = student
    y = exponent(s, slope, offset)
    e = tl.exp2(y)
    if SPEC.teacher == "given":
        p, log_p = teacher_probabilities(tiles, weights, SPEC)
    else:
        logits = teacher_logits(tiles, weights, SPEC)
        for k in tl.static_range(len(logits)):
            teacher_offset, teacher_factor, log_teacher_factor = teachers[k]
            member = exponent(logits[k], teacher_slope, teacher_offset)
            if k == 0:
                p = tl.exp2(member) * teacher_factor
                log_p = member + log_teacher_factor
            else:
                p += tl.exp2(member) * teacher_factor
        if len(logits) > 1:
            log_p = tl.log2(p)
    return p, e * factor, log_p * LN2, (y + log_factor) * LN2, y, e


@triton.jit
def add_divergence(sums, s, tiles, scales, row, SPEC: tl.constexpr):
    """Each lane's sums of phi and psi, (lanes,), with a tile added."""
    slope, teacher_slope, temperature, weights, beta = row
    phi, psi = sums
    p, q, log_p, log_q, y, e = distributions(s, tiles, scales, row, SPEC)
    phi += tl.sum(phi_of(p, q, log_p, log_q, beta, SPEC), 1)
    psi += tl.sum(psi_of(p, q, log_p, log_q, beta, SPEC), 1)
    return phi, psi


@triton.jit
def finish(statistics, sums, label_logit, row, factors, vocab, SPEC: tl.constexpr):
    """A row's loss without its weight, and what the gradient's terms are multiplied by."""
    slope, teacher_slope, temperature, weights, beta = row
    alpha, hard_weight, factor = factors
    offset, total, hard, over_student = statistics[0]
    loss = total * 0
    soft, psi_sum = loss, loss
    if SPEC.teacher == "difference":
        shift, first, second = statistics[1][0]
        mean = first / vocab
        loss = alpha * (second - first * mean) / (2 * vocab)
        soft = factor * alpha / vocab
        psi_sum = shift + tl.where(loss == loss, mean, loss)  # a row with an infinity is NaN throughout
    elif SPEC.teacher != "none":
        divergence, psi_sum = sums
        if not SPEC.linear:
            # for q as it is rounded: its sum is not quite 1, and the gradient's is to be 0
            psi_sum -= psi_sum * tl.fma(1 / total, total, total * 0 - 1)
            if SPEC.divergence.constant is not None:
                divergence += SPEC.divergence.constant(teacher_mass(statistics, SPEC), beta)
        loss = alpha * divergence * (temperature * temperature if SPEC.t_squared else 1)
        soft = factor * (alpha * temperature if SPEC.t_squared else alpha / temperature)
    hard_scale = total * 0
    if SPEC.hard:
        loss += hard_weight * hard_loss(statistics, label_logit, row, SPEC)
        hard_scale = factor * hard_weight / hard
    return loss, (soft, psi_sum, hard_scale, factor * hard_weight)


@triton.jit
def gradient(s, tiles, classes, label, scales, coefficients, row, SPEC: tl.constexpr):
    """dl/ds of a tile."""
    slope, teacher_slope, temperature, weights, beta = row
    soft, psi_sum, hard_scale, label_weight = coefficients
    offset, factor, log_factor = scales[0]
    if SPEC.teacher == "softmaxed" or SPEC.teacher == "given":
        p, q, log_p, log_q, y, e = distributions(s, tiles, scales, row, SPEC)
        g = soft * (psi_of(p, q, log_p, log_q, beta, SPEC) - q * psi_sum)
    else:
        y = exponent(s, slope, offset)
        e = tl.exp2(y)
        if SPEC.teacher == "difference":
            g = soft * (s - teacher_logits(tiles, weights, SPEC)[0] - psi_sum)
        else:
            g = tl.zeros_like(s)
    if SPEC.hard:
        g += hard_scale * hard_exps(s, y, e, offset, temperature, SPEC)
        g = tl.where(classes == label, g - label_weight, g)
    return g
