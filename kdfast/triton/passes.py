"""A divergence's own sums (pass B) and the gradient (pass C), tile by tile; row_gradient.h has the latter in C++.

Coefficients are row_math.Coefficients, and for further teachers spec.Further; `row` is spec.Row.
"""

import triton
import triton.language as tl

from kdfast.triton import logits, metrics
from kdfast.triton.divergences import masked
from kdfast.triton.logits import teacher_logits, teacher_probabilities
from kdfast.triton.spec import LN2
from kdfast.triton.statistics import exponent, hard_exps, without_label
from kdfast.triton.sums import DivergenceSums, Scale, Scales, sums_of
from kdfast.triton.tiles import in_lanes, store_tile


@triton.jit
def scales_in(coefficients, further, SPEC: tl.constexpr):
    """The same, from what a gradient has."""
    c = coefficients
    teachers = ()
    if SPEC.divergence is not None:
        teachers = (Scale(c.teacher_offset, c.teacher_total),)
        if SPEC.teacher == "softmaxed" and not SPEC.joint:
            for k in tl.static_range(len(further)):
                teachers = teachers + (Scale(further[k].offset, further[k].total),)
    return Scales(Scale(c.student_offset, c.student_total), teachers)


@triton.jit
def psi_of(p, q, log_p, log_q, beta, SPEC: tl.constexpr):
    """psi, of a linear divergence but for a multiple of q."""
    psi = tl.zeros_like(p)
    if SPEC.divergence.phi is not None:
        psi = SPEC.divergence.psi(p, q, beta)
    if SPEC.divergence.student_share is not None:
        psi += SPEC.divergence.student_share(beta) * masked(q, log_q - log_p)
    if SPEC.divergence.teacher_share is not None:
        psi -= SPEC.divergence.teacher_share(beta) * p
    return psi


@triton.jit
def phi_of(p, q, log_p, log_q, beta, SPEC: tl.constexpr):
    phi = tl.zeros_like(p)
    if SPEC.divergence.phi is not None:
        phi = SPEC.divergence.phi(p, q, beta)
    if SPEC.divergence.over_teacher is not None:
        phi += SPEC.divergence.teacher_share(beta) * SPEC.divergence.over_teacher(p, log_p, log_q, beta)
    if SPEC.divergence.over_student is not None:
        phi += SPEC.divergence.student_share(beta) * SPEC.divergence.over_student(q, log_p, log_q, beta)
    return phi


@triton.jit
def distributions(s, tiles, scales, row, SPEC: tl.constexpr):
    """(p, q, log p, log q, y, Q) of a tile."""
    student, teachers = scales
    y = exponent(s, row.slope, student.offset)
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
    return p, e * (1 / student.total), log_p * LN2, (y - tl.log2(student.total)) * LN2, y, e


@triton.jit
def no_sums(SPEC: tl.constexpr):
    """Each lane's: those of DivergenceSums that are wanted, and the best class."""
    nothing = in_lanes(0, SPEC)
    sums = (nothing, nothing)
    if SPEC.standardize:
        sums = sums + (nothing, nothing)
    if SPEC.metrics and not SPEC.joint:
        sums = sums + (nothing, nothing)
        return sums, metrics.no_best(SPEC)
    else:
        return sums, ()


@triton.jit
def add_divergence(sums, tile, scales, row, SPEC: tl.constexpr):
    """Pass B: a tile added."""
    before, best = sums
    s, tiles, classes, there, at = tile
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
            second = SPEC.divergence.student_share(beta) * SPEC.divergence.over_student(q, log_p, log_q, beta)
    out = (before[0] + tl.sum(phi_of(p, q, log_p, log_q, beta, SPEC), 1), before[1] + tl.sum(second, 1))
    if SPEC.standardize:
        out = out + (before[2] + tl.sum(masked(psi, s), 1), before[3] + tl.sum(masked(q, s), 1))
    if SPEC.metrics and not SPEC.joint:
        of_kl = before[len(before) - 2] + tl.sum(masked(p, log_p - log_q), 1)
        out = out + (of_kl, before[len(before) - 1] + tl.sum(masked(p, log_p), 1))
    return out, best


@triton.jit
def sums_of_row(sums, SPEC: tl.constexpr):
    """Those of the lanes, joined."""
    values, best = sums_of(sums[0]), ()
    psi_z, q_z, kl, p_log_p = (), (), (), ()
    if SPEC.standardize:
        psi_z, q_z = values[2], values[3]
    if SPEC.metrics and not SPEC.joint:
        kl, p_log_p, best = values[len(values) - 2], values[len(values) - 1], metrics.best_of(sums[1])
    return DivergenceSums(values[0], values[1], psi_z, q_z, kl, p_log_p, best)


@triton.jit
def gradient(tile, c, further, row, SPEC: tl.constexpr):
    """dl/ds of a tile: the formula of row_math.Coefficients."""
    s, tiles, classes, there, at = tile
    if SPEC.divergence is not None:
        p, q, log_p, log_q, y, e = distributions(s, tiles, scales_in(c, further, SPEC), row, SPEC)
        if SPEC.divergence.phi is not None:
            g = c.soft * (SPEC.divergence.psi(p, q, row.beta) - q * c.center)
        else:
            g = q * c.level
        if SPEC.divergence.student_share is not None:
            g += c.slope * masked(q, log_q - log_p)
        if SPEC.divergence.teacher_share is not None:
            g -= c.teacher * p
    else:
        y = exponent(s, row.slope, c.student_offset)
        e = tl.exp2(y)
        if SPEC.difference:
            g = c.soft * (s - teacher_logits(tiles, row.weights, SPEC)[0] - c.center)
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


@triton.jit
def write_gradient(state, tile, given, row, SPEC: tl.constexpr):
    """Pass C, to what begins at `out`."""
    out, head, n, coefficients, further = given
    store_tile(out, head, n, tile, gradient(tile, coefficients, further, row, SPEC), SPEC.aligned[0])
    return state
