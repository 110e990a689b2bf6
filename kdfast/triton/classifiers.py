"""The losses of image classifiers: logit_mse, standardized logits and decoupled KD. Branches by SPEC.difference,
SPEC.standardize and SPEC.dkd call what is here, or have what is one line: in accumulate (pass_a.py), add_divergence and
gradient (pass_b_c.py), logits.py and row_math.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.triton.divergences import masked
from kdfast.triton.logits import (
    Logits,
    adjust_logits,
    exponent,
    finite,
    joint_logits,
    teacher_logits,
    teacher_probabilities,
)
from kdfast.triton.spec import INF, LN2, Row
from kdfast.triton.tiles import fill_lanes, row_value

# ---- logit_mse: sum (d_i - mean)^2 / 2V, with d_i = s_i - t_i; its sums are of d_i - center ----


@triton.jit
def difference(s, ts, row, SPEC: tl.constexpr):
    t = joint_logits(ts, row.weights, SPEC)
    return s - t if SPEC.standardize else s * row.logit_scale - t * row.teacher_logit_scale


class Differences(NamedTuple):
    center: Any
    first: Any  # sum of d - center
    second: Any  # of its square
    with_z: Any  # standardized: of its product with z, else ()


@triton.jit
def first_difference(student, teachers, row, SPEC: tl.constexpr):
    """A number near the mean difference, to be the center: the first class's difference."""
    if SPEC.difference and not SPEC.standardize:
        ts = ()
        for k in tl.static_range(len(teachers)):
            ts = ts + (row_value(teachers[k], 0, SPEC.dtype),)
        first = adjust_logits(row_value(student, 0, SPEC.dtype), ts, row, SPEC)
        return difference(first.student, first.teachers, row, SPEC)
    else:
        return tl.zeros((), SPEC.dtype)


@triton.jit
def add_differences(differences, tile, row, SPEC: tl.constexpr):
    center, first, second, with_z = differences
    d = tl.where(tile.mask, difference(tile.s, tile.teachers, row, SPEC) - center[:, None], 0)
    if SPEC.standardize:
        with_z += tl.sum(tl.where(tile.mask, d * tile.s, 0), 1)
    return Differences(center, first + tl.sum(d, 1), second + tl.sum(d * d, 1), with_z)


@triton.jit
def mean_square(differences, classes):
    """The loss, and the center of the gradient: the mean difference."""
    mean = differences.first / classes
    loss = (differences.second - differences.first * mean) / (2 * classes)
    return loss, differences.center + tl.where(loss == loss, mean, loss)  # an infinity makes its row NaN


# ---- standardize: z = (s - mean) / d, d = 1e-7 + sd, sd^2 = sum (s - mean)^2 / (V - 1) ----
# its gradient   dl/ds_i = g_i / d - z_i G / ((V - 1) sd), with g = dl/dz, whose sum is 0, and G = sum g_j z_j
# Moments are merged as Chan et al. (1979) do: sums about one number for all would lose digits where that is far off,
# and equal logits must have a deviation of exactly 0.


class Scaling(NamedTuple):
    mean: Any
    unit: Any  # 1 / d
    d: Any  # 1 / unit: what a gradient has that knows the unit alone
    spread: Any  # 1 / ((V - 1) sd); 0 where all logits are equal


class Moments(NamedTuple):
    count: Any
    mean: Any
    squares: Any  # sum of squares about the mean


@triton.jit
def merge_moments(count_a, mean_a, squares_a, count_b, mean_b, squares_b):
    """The same bits in either order: threads merge theirs with each other's, and any one's result may be taken."""
    swap = mean_b < mean_a
    first, low = tl.where(swap, count_b, count_a), tl.where(swap, mean_b, mean_a)
    count, d = count_a + count_b, tl.where(swap, mean_a, mean_b) - low
    share = tl.where(swap, count_a, count_b) / tl.maximum(count, 1)
    return count, low + d * share, squares_a + squares_b + d * d * (first * share)


@triton.jit
def add_moments(moments, x, mask):
    """x, mask: (lanes, n)."""
    n = tl.sum(mask.to(x.dtype), 1)
    mean_x = tl.sum(tl.where(mask, x, 0), 1) / tl.maximum(n, 1)
    d = tl.where(mask, x - mean_x[:, None], 0)
    squares = tl.sum(d * d, 1)
    return Moments(*merge_moments(moments.count, moments.mean, moments.squares, n, mean_x, squares))


@triton.jit
def no_moments(teachers, SPEC: tl.constexpr):
    """Of the student and of each teacher, in each lane."""
    nothing = fill_lanes(0, SPEC)
    moments = ()
    for _ in tl.static_range(len(teachers)):
        moments = moments + (Moments(nothing, nothing, nothing),)
    return Logits(Moments(nothing, nothing, nothing), moments)


@triton.jit
def moments_pass(moments, tile, context, row, SPEC: tl.constexpr):
    teachers = ()
    for k in tl.static_range(len(tile.teachers)):
        teachers = teachers + (add_moments(moments.teachers[k], tile.teachers[k], tile.mask),)
    return Logits(add_moments(moments.student, tile.s, tile.mask), teachers)


@triton.jit
def make_scaling(moments, scale):
    """scale: what the logits of the moments lack of the logit scale."""
    count, mean, squares = tl.reduce((moments.count, moments.mean, moments.squares), 0, merge_moments)
    freedom = tl.maximum(count - 1, 1)
    mean, deviation = mean * scale, tl.sqrt(squares / freedom) * scale
    unit = 1 / (deviation + 1e-7)
    return Scaling(mean, unit, 1 / unit, tl.where(deviation == 0, 0, 1 / (freedom * deviation)))


@triton.jit
def add_scalings(row, moments):
    """The row with its moments known."""
    teachers = ()
    for k in tl.static_range(len(moments.teachers)):
        teachers = teachers + (make_scaling(moments.teachers[k], row.teacher_logit_scale),)
    return Row(*row[:-1], Logits(make_scaling(moments.student, row.logit_scale), teachers))


@triton.jit
def load_scalings(row, c, further):
    """The row with the moments that its coefficients have."""
    teachers = (Scaling(c.teacher_mean, c.teacher_unit, 1 / c.teacher_unit, 0),)
    for k in tl.static_range(len(further)):
        teachers = teachers + (Scaling(further[k].mean, further[k].unit, 1 / further[k].unit, 0),)
    return Row(*row[:-1], Logits(Scaling(c.mean, c.student_unit, 1 / c.student_unit, 0), teachers))


# ---- dkd: the label's class against the rest, and the classes of the rest among themselves ----
#
#   D = w_0 [ p_y log(p_y / q_y) + m log(m / (1 - q_y)) ] + w_1 sum_i p^_i log(p^_i / q^_i),   m = sum p_i over i != y
#
# with p^ and q^ the distributions over i != y. Its gradient, times T:
#
#   i != y:  q^_i (w_0 (p_y - q_y (p_y + m)) + w_1) - w_1 p^_i          i = y:  w_0 (q_y (p_y + m) - p_y)
#
# Pass A leaves y out, so that a label that takes nearly everything costs the rest no digits; here it is added.


class LabelSplit(NamedTuple):
    """The shares of all classes but the label's, and of the label's, and log2 of each."""

    rest: Any
    label: Any
    log_rest: Any
    log_label: Any


class DkdTerms(NamedTuple):
    divergence: Any
    psi: Any  # sum of psi
    psi_scale: Any
    at_label: Any  # dD/ds_y
    kl: Any  # KL(p, q), for metrics


@triton.jit
def add_label(total, offset, label, scale):
    """A sum of exps over the rest with the label's added, relative to the higher of `offset` and the label's logit;
    how far the rest's exponents change by that, and the label's."""
    new = finite(tl.maximum(offset, label))
    change, y = exponent(offset, scale, new), exponent(label, scale, new)
    return total * tl.exp2(change) + tl.exp2(y), change, y


@triton.jit
def split_label(total, offset, label, scale):
    whole, change, y = add_label(total, offset, label, scale)
    log_whole = tl.log2(whole)
    rest = total * tl.exp2(change) / whole
    return LabelSplit(rest, tl.exp2(y) / whole, tl.log2(total) + change - log_whole, y - log_whole)


@triton.jit
def split_student(sums, s_label, row):
    return split_label(sums.student_total, sums.student_offset, s_label, row.exp2_scale)


@triton.jit
def split_teacher(teacher, t_label, row):
    return split_label(teacher.total, teacher.offset, t_label, row.teacher_exp2_scale)


@triton.jit
def split_teachers(sums, t_labels, row, SPEC: tl.constexpr):
    """p split, and the sum over the rest of p as the passes have it: 0 where it has nothing."""
    teachers = sums.teachers
    m = teachers[0].total
    if SPEC.teacher == "given":
        p_y, log_p_y = teacher_probabilities(t_labels, row.weights, SPEC)
        return LabelSplit(m, p_y, tl.log2(m), log_p_y), m
    elif len(teachers) == 1:
        p = split_teacher(teachers[0], joint_logits(t_labels, row.weights, SPEC), row)
        return p, tl.where(m == 0, 0, p.rest * 0 + 1)
    else:
        logits = teacher_logits(t_labels, row.weights, SPEC)
        rest, label = m * 0, m * 0
        for k in tl.static_range(len(teachers)):
            p = split_teacher(teachers[k], logits[k], row)
            rest += row.weights[k] * p.rest
            label += row.weights[k] * p.label
        return LabelSplit(rest, label, tl.log2(rest), tl.log2(label)), rest


@triton.jit
def dkd_terms(sums, phi, at_label, row, factors, SPEC: tl.constexpr):
    """phi: the sum of p log(p / q^) over the rest."""
    p, mass = split_teachers(sums, at_label.teachers, row, SPEC)
    q = split_student(sums, at_label.student, row)
    no_rest = sums.student_total == 0
    of_label = masked(p.label, p.log_label - q.log_label) * LN2
    target = of_label + masked(p.rest, p.log_rest - q.log_rest) * LN2
    others = tl.where(no_rest, INF, phi / mass - tl.log2(mass) * LN2)
    others = tl.where(mass == 0, 0, others)
    divergence = masked(factors.target, target) + masked(factors.others, others)
    kl = of_label + masked(p.rest, others + (p.log_rest - q.log_rest) * LN2)
    nothing = (mass == 0) | no_rest
    psi_scale = tl.where(nothing, 0, factors.others / mass)
    at_y = factors.target * (q.label * (p.label + tl.where(no_rest, 0, p.rest)) - p.label)
    return DkdTerms(divergence, at_y - tl.where(nothing, 0, factors.others), psi_scale, at_y, kl)
