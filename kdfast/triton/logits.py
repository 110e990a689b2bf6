"""Logits as the terms see them: soft-capped, then standardized; a class that is masked, or not there, is at -inf. And
what a tile of the teachers is: logits to be softmaxed, each teacher's or their mean, or probabilities as given.

softcap        s' = c tanh(s / c)                   ds'/ds = 1 - (s' / c)^2
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.triton.spec import INF, LOG2E


class Logits(NamedTuple):
    student: Any
    teachers: Any  # of each


@triton.jit
def tanh(x):
    """To within 2 ulp: polynomials near 0 (Moshier's Cephes), where the other form cancels."""
    z = x * x
    far = 1 - 2 / (tl.exp2(tl.abs(x) * (2 * LOG2E)) + 1)
    if x.dtype == tl.float64:
        top = (z * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
        bottom = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
        series = top / bottom
    else:
        series = ((z * -5.70498872745e-3 + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
        series = series * z - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, x + x * z * series, tl.where(x < 0, -far, far))


@triton.jit
def softcap(x, cap, inverse):
    return tl.where(x == -INF, x, cap * tanh(x * inverse))


@triton.jit
def softcap_derivative(s, row, SPEC: tl.constexpr):
    """ds'/ds from what adjust_student gave."""
    if SPEC.standardize:
        s = s * row.scalings.student.d + row.scalings.student.mean
    x = s * (1 / row.caps.student)
    return tl.where(x == -INF, 0, (1 - x) * (1 + x))


@triton.jit
def standardize(x, scaling, scale):
    """scaling: classifiers.Scaling; scale: what x lacks of the logit scale."""
    return (x - scaling.mean / scale) * (scaling.unit * scale)


@triton.jit
def adjust_student(s, row, SPEC: tl.constexpr):
    if SPEC.softcap:
        s = softcap(s, row.caps.student, row.caps.student_inverse)
    if SPEC.standardize and len(row.scalings) > 0:
        s = standardize(s, row.scalings.student, row.logit_scale)
    return s


@triton.jit
def adjust_teacher(t, k: tl.constexpr, row, SPEC: tl.constexpr):
    if SPEC.teacher_softcap:
        t = softcap(t, row.caps.teacher, row.caps.teacher_inverse)
    if SPEC.standardize and len(row.scalings) > 0:
        t = standardize(t, row.scalings.teachers[k], row.teacher_logit_scale)
    return t


@triton.jit
def adjust_logits(s, ts, row, SPEC: tl.constexpr):
    """Logits as the terms see them."""
    teachers = ()
    for k in tl.static_range(len(ts)):
        teachers = teachers + (adjust_teacher(ts[k], k, row, SPEC),)
    return Logits(adjust_student(s, row, SPEC), teachers)


@triton.jit
def mask_label(x, nothing, classes, row, SPEC: tl.constexpr):
    """dkd: without the label, which its sums leave out."""
    return tl.where(classes == row.label, nothing, x) if SPEC.dkd else x


# ---- exponents to base 2 ----


@triton.jit
def exp2_scale(temperature):
    """log2(e) / T: what logits are multiplied by."""
    return (temperature * 0 + LOG2E) / temperature  # a constant on the left would swallow the rest as its value


@triton.jit
def teacher_exp2_scale(temperature, SPEC: tl.constexpr):
    """What the teacher's logits are multiplied by."""
    if SPEC.target == "logits":
        return exp2_scale(temperature)
    else:
        return temperature * 0 + LOG2E


@triton.jit
def finite(offset):
    """The offset that is subtracted: 0 where every class so far is masked."""
    return tl.where(offset == -INF, 0, offset)


@triton.jit
def exponent(x, scale, offset):
    """log2 of an exp. Logits that are large and alike leave no rounding error: the difference comes first."""
    return (x - offset) * scale


# ---- the teachers' distributions ----


@triton.jit
def weighted_mean(tiles, weights):
    mean = tiles[0]
    if len(tiles) > 1:
        mean = mean * weights[0]
    for k in tl.static_range(1, len(tiles)):
        mean += tiles[k] * weights[k]
    return mean


@triton.jit
def teacher_logits(tiles, weights, SPEC: tl.constexpr):
    """What is softmaxed: a tile for each teacher, or one for all of them (a geometric ensemble)."""
    logits = ()
    for k in tl.static_range(len(tiles)):
        x = tiles[k]
        if SPEC.target == "probs":
            x = tl.log(x)
        logits = logits + (x,)
    return (weighted_mean(logits, weights),) if SPEC.joint else logits


@triton.jit
def joint_logits(tiles, weights, SPEC: tl.constexpr):
    """Where one distribution is softmaxed: its tile."""
    return teacher_logits(tiles, weights, SPEC)[0]


@triton.jit
def teacher_probabilities(tiles, weights, SPEC: tl.constexpr):
    """p as it is given, or as the weighted mean of those given, and log2 p."""
    probabilities = ()
    for k in tl.static_range(len(tiles)):
        x = tiles[k]
        if SPEC.target == "log_probs":
            x = tl.exp2(x * LOG2E)
        probabilities = probabilities + (x,)
    p = weighted_mean(probabilities, weights)
    if SPEC.target == "log_probs" and len(tiles) == 1:
        return p, tiles[0] * LOG2E
    else:
        return p, tl.log2(p)
