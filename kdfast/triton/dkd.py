"""Decoupled KD: the label's class against the rest, and the classes of the rest among themselves.

    D = w_0 [ p_y log(p_y / q_y) + m log(m / (1 - q_y)) ] + w_1 sum_i p^_i log(p^_i / q^_i),   m = sum p_i over i != y

with p^ and q^ the distributions over i != y. Its gradient, times T:

    i != y:  q^_i (w_0 (p_y - q_y (p_y + m)) + w_1) - w_1 p^_i          i = y:  w_0 (q_y (p_y + m) - p_y)

Pass A leaves y out, so that a label that takes nearly everything costs the rest no digits; here it is added.
"""

import triton
import triton.language as tl

from kdfast.triton.divergences import masked
from kdfast.triton.logits import teacher_logits, teacher_probabilities
from kdfast.triton.spec import INF, LN2
from kdfast.triton.statistics import exponent, finite


@triton.jit
def raised(total, y):
    """A sum of exps with 2^y added, relative to an offset that leaves neither above 1 by far; that offset too."""
    d = tl.where(total == 0, finite(y), tl.maximum(y, 0))
    return total * tl.exp2(-d) + tl.exp2(y - d), d


@triton.jit
def parted(total, y):
    """(share of the rest, share of the label, log2 of each) of a sum over the rest and the label's exponent."""
    whole, d = raised(total, y)
    log_whole = tl.log2(whole)
    return total * tl.exp2(-d) / whole, tl.exp2(y - d) / whole, tl.log2(total) - d - log_whole, y - d - log_whole


@triton.jit
def teacher_shares(statistics, t_labels, row, SPEC: tl.constexpr):
    """(m, p_y, log2 m, log2 p_y, sum over the rest of p as the passes have it: 0 where it has nothing)."""
    teachers = statistics.teachers
    if SPEC.teacher == "given":
        p_y, log_p_y = teacher_probabilities(t_labels, row.weights, SPEC)
        m = teachers[0].mass
        return m, p_y, tl.log2(m), log_p_y, m
    else:
        logits = teacher_logits(t_labels, row.weights, SPEC)
        if len(teachers) == 1:
            y = exponent(logits[0], row.teacher_slope, finite(teachers[0].offset))
            m, p_y, log_m, log_p_y = parted(teachers[0].mass, y)
            return m, p_y, log_m, log_p_y, tl.where(teachers[0].mass == 0, 0, m * 0 + 1)
        else:
            m, p_y = teachers[0].mass * 0, teachers[0].mass * 0
            for k in tl.static_range(len(teachers)):
                y = exponent(logits[k], row.teacher_slope, finite(teachers[k].offset))
                rest, of_label, log_rest, log_of_label = parted(teachers[k].mass, y)
                m += row.weights[k] * rest
                p_y += row.weights[k] * of_label
            return m, p_y, tl.log2(m), tl.log2(p_y), m


@triton.jit
def divergence_of(statistics, sums, at_label, row, factors, SPEC: tl.constexpr):
    """sums.phi: of p log(p / q^) over the rest. (D, psi_sum, psi's scale, dl/ds_y) and, for metrics, KL(p, q)."""
    s_label, t_labels = at_label
    student = statistics.student
    m, p_y, log_m, log_p_y, mass = teacher_shares(statistics, t_labels, row, SPEC)
    y = exponent(s_label, row.slope, finite(student.offset))
    rest, q_y, log_rest, log_q_y = parted(student.total, y)
    of_label = masked(p_y, log_p_y - log_q_y) * LN2
    target = of_label + masked(m, log_m - log_rest) * LN2
    others = tl.where(student.total == 0, INF, sums.phi / mass - tl.log2(mass) * LN2)
    others = tl.where(mass == 0, 0, others)
    divergence = masked(factors.target, target) + masked(factors.others, others)
    kl = of_label + masked(m, others + (log_m - log_rest) * LN2)
    nothing = (mass == 0) | (student.total == 0)
    psi_scale = tl.where(nothing, 0, factors.others / mass)
    at_y = factors.target * (q_y * (p_y + tl.where(student.total == 0, 0, m)) - p_y)
    return divergence, at_y - tl.where(nothing, 0, factors.others), psi_scale, at_y, kl


@triton.jit
def whole_entropy(share, of_rest, log_share, log_of_label, part, total):
    """The entropy over all classes, in bits, from part = sum of P log2 P over the rest, total = sum of P."""
    rest = masked(share, part / total - tl.log2(total) + log_share)
    return -(rest + masked(of_rest, log_of_label))
