"""A divergence's own sums (pass B) and the gradient (pass C), tile by tile; row_gradient.h has the latter in C++.

Coefficients are row_math.Coefficients, and for further teachers spec.Further; `row` is spec.Row.
"""

import triton
import triton.language as tl

from kdfast.triton import metrics
from kdfast.triton.classifiers import difference
from kdfast.triton.divergences import masked
from kdfast.triton.logits import exponent, mask_label, softcap_derivative, teacher_logits, teacher_probabilities
from kdfast.triton.pass_a import hard_exps
from kdfast.triton.spec import LN2
from kdfast.triton.sums import DivergenceSums, Softmaxes, TeacherSoftmax, sum_pair
from kdfast.triton.tiles import fill_lanes, store_tile


@triton.jit
def read_softmaxes(c, further, SPEC: tl.constexpr):
    """sums.softmaxes, from a row's coefficients."""
    teachers = ()
    if SPEC.divergence is not None:
        teachers = (TeacherSoftmax(c.teacher_offset, c.teacher_total),)
        if SPEC.teacher == "softmaxed" and not SPEC.joint:
            for k in tl.static_range(len(further)):
                teachers = teachers + (TeacherSoftmax(further[k].offset, further[k].total),)
    return Softmaxes(c.student_offset, c.student_total, teachers)


@triton.jit
def psi_terms(p, q, log_p, log_q, beta, rest, SPEC: tl.constexpr):
    """psi, of a linear divergence but for a multiple of q."""
    psi = tl.zeros_like(p)
    if SPEC.divergence.phi is not None:
        psi = SPEC.divergence.psi(p, q, beta, rest)
    if SPEC.divergence.student_share is not None:
        psi += SPEC.divergence.student_share(beta, rest) * masked(q, log_q - log_p)
    if SPEC.divergence.teacher_share is not None:
        psi -= SPEC.divergence.teacher_share(beta, rest) * p
    return psi


@triton.jit
def phi_terms(p, q, log_p, log_q, beta, rest, SPEC: tl.constexpr):
    phi = tl.zeros_like(p)
    if SPEC.divergence.phi is not None:
        phi = SPEC.divergence.phi(p, q, beta, rest)
    if SPEC.divergence.over_teacher is not None:
        phi += SPEC.divergence.teacher_share(beta, rest) * SPEC.divergence.over_teacher(p, log_p, log_q, beta)
    if SPEC.divergence.over_student is not None:
        phi += SPEC.divergence.student_share(beta, rest) * SPEC.divergence.over_student(q, log_p, log_q, beta)
    return phi


@triton.jit
def distributions(tile, softmaxes, row, SPEC: tl.constexpr):
    """(p, q, log p, log q, y, Q) of a tile."""
    student_total = softmaxes.student_total
    y = exponent(tile.s, row.exp2_scale, softmaxes.student_offset)
    e = tl.exp2(y)
    if SPEC.teacher == "given":
        p, log_p = teacher_probabilities(tile.teachers, row.weights, SPEC)
    else:
        members = teacher_logits(tile.teachers, row.weights, SPEC)
        for k in tl.static_range(len(members)):
            offset, total = softmaxes.teachers[k]
            member = exponent(members[k], row.teacher_exp2_scale, offset)
            if k == 0:
                p = tl.exp2(member) * (1 / total)
                log_p = member - tl.log2(total)
            else:
                p += tl.exp2(member) * (1 / total)
        if len(members) > 1:
            log_p = tl.log2(p)
    return p, e * (1 / student_total), log_p * LN2, (y - tl.log2(student_total)) * LN2, y, e


@triton.jit
def no_divergence_sums(SPEC: tl.constexpr):
    """Each lane's."""
    nothing = fill_lanes(0, SPEC)
    psi_z, q_z, apart, apart_z, kl, p_log_p, best = (), (), (), (), (), (), ()
    if SPEC.standardize:
        psi_z, q_z = nothing, nothing
    if SPEC.divergence.psi_apart is not None:
        apart, apart_z = nothing, nothing
    if SPEC.metrics and not SPEC.joint:
        kl, p_log_p, best = nothing, nothing, metrics.no_best(SPEC)
    return DivergenceSums(nothing, nothing, psi_z, q_z, apart, apart_z, kl, p_log_p, best)


@triton.jit
def add_divergence(sums, tile, softmaxes, row, SPEC: tl.constexpr):
    """Pass B: each lane's sums, with a tile added."""
    phi, psi, psi_z, q_z, apart, apart_z, kl, p_log_p, best = sums
    classes, beta, rest = tile.classes, row.beta, row.rest
    p, q, log_p, log_q, y, e = distributions(tile, softmaxes, row, SPEC)
    p = mask_label(p, 0, classes, row, SPEC)
    if SPEC.metrics and not SPEC.joint:
        best = metrics.update_best(best, p, classes, tile.mask)
    q = mask_label(q, 0, classes, row, SPEC)
    of_psi = psi_terms(p, q, log_p, log_q, beta, rest, SPEC)
    second = of_psi
    if SPEC.divergence.phi is None:
        second = tl.zeros_like(p)
        if SPEC.divergence.over_student is not None:
            second = SPEC.divergence.student_share(beta, rest) * SPEC.divergence.over_student(q, log_p, log_q, beta)
    phi += tl.sum(phi_terms(p, q, log_p, log_q, beta, rest, SPEC), 1)
    psi += tl.sum(second, 1)
    if SPEC.standardize:
        psi_z += tl.sum(masked(of_psi, tile.s), 1)
        q_z += tl.sum(masked(q, tile.s), 1)
    if SPEC.divergence.psi_apart is not None:
        of_psi = SPEC.divergence.psi_apart(p, q, beta, rest)
        apart += tl.sum(of_psi, 1)
        if SPEC.standardize:
            apart_z += tl.sum(masked(of_psi, tile.s), 1)
    if SPEC.metrics and not SPEC.joint:
        kl += tl.sum(masked(p, log_p - log_q), 1)
        p_log_p += tl.sum(masked(p, log_p), 1)
    return DivergenceSums(phi, psi, psi_z, q_z, apart, apart_z, kl, p_log_p, best)


@triton.jit
def merge_divergence_sums(sums, SPEC: tl.constexpr):
    """Those of the lanes, merged."""
    phi, psi = sum_pair(sums.phi, sums.psi)
    psi_z, q_z, apart, apart_z, kl, p_log_p, best = (), (), (), (), (), (), ()
    if SPEC.standardize:
        psi_z, q_z = sum_pair(sums.psi_z, sums.q_z)
    if SPEC.divergence.psi_apart is not None:
        apart, apart_z = sum_pair(sums.apart, sums.apart_z)
    if SPEC.metrics and not SPEC.joint:
        kl, p_log_p = sum_pair(sums.kl, sums.p_log_p)
        best = metrics.merge_best(sums.best)
    return DivergenceSums(phi, psi, psi_z, q_z, apart, apart_z, kl, p_log_p, best)


@triton.jit
def gradient(tile, c, further, row, SPEC: tl.constexpr):
    """dl/ds of a tile: the formula of row_math.Coefficients."""
    s, classes = tile.s, tile.classes
    if SPEC.divergence is not None:
        p, q, log_p, log_q, y, e = distributions(tile, read_softmaxes(c, further, SPEC), row, SPEC)
        if SPEC.divergence.phi is not None:
            psi = SPEC.divergence.psi(p, q, row.beta, row.rest)
            if SPEC.divergence.psi_apart is not None:
                psi = tl.where(c.slope == 0, psi, SPEC.divergence.psi_apart(p, q, row.beta, row.rest))
            g = c.soft * (psi - q * c.center)
        else:
            g = q * c.level
        if SPEC.divergence.student_share is not None:
            g += c.slope * masked(q, log_q - log_p)
        if SPEC.divergence.teacher_share is not None:
            g -= c.teacher * p
    else:
        y = exponent(s, row.exp2_scale, c.student_offset)
        e = tl.exp2(y)
        g = c.soft * (difference(s, tile.teachers, row, SPEC) - c.center) if SPEC.difference else tl.zeros_like(s)
    if SPEC.labelled or SPEC.z_loss:
        g += c.hard * (1 / c.hard_total) * hard_exps(s, e, c.student_offset, row, SPEC)
    if SPEC.standardize:
        g += c.tilt * row.scalings.student.d * s
    if SPEC.labelled and SPEC.smoothed:
        g -= c.uniform
    if SPEC.dkd:
        g = tl.where(classes == row.label, c.at_label, g)
    elif SPEC.labelled:
        g = tl.where(classes == row.label, g - c.label, g)
    if SPEC.softcap:
        g = g * softcap_derivative(s, row, SPEC)
    return g


@triton.jit
def write_gradient(state, tile, context, row, SPEC: tl.constexpr):
    """Pass C, to what begins at `out`."""
    out, prefix, n, coefficients, further = context
    store_tile(out, prefix, n, tile, gradient(tile, coefficients, further, row, SPEC), SPEC.aligned[0])
    return state
