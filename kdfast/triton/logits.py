"""Logits as the terms see them: soft-capped, then standardized; a class that is masked, or not there, is at -inf. And
what a tile of the teachers is: logits to be softmaxed, each teacher's or their mean, or probabilities as given.

softcap        s' = c tanh(s / c)                   ds'/ds = 1 - (s' / c)^2
standardize    z = (s' - mean) / d, d = 1e-7 + sd   sd^2 = sum (s' - mean)^2 / (V - 1)
its gradient   dl/ds'_i = g_i / d - z_i G / ((V - 1) sd), with g = dl/dz, whose sum is 0, and G = sum g_j z_j
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.triton.spec import INF, LOG2E, Row
from kdfast.triton.tiles import in_lanes


class Scaling(NamedTuple):
    mean: Any
    unit: Any  # 1 / d
    d: Any  # 1 / unit: what a gradient has that knows the unit alone
    spread: Any  # 1 / ((V - 1) sd); 0 where all logits are equal


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
def capped(x, cap, inverse):
    return tl.where(x == -INF, x, cap * tanh(x * inverse))


@triton.jit
def capped_slope(s, row, SPEC: tl.constexpr):
    """ds'/ds from what student_logits gave."""
    if SPEC.standardize:
        s = s * row.scaling.d + row.scaling.mean
    x = s * row.caps.student_inverse
    return tl.where(x == -INF, 0, (1 - x) * (1 + x))


@triton.jit
def scaled_by(x, scaling):
    return (x - scaling.mean) * scaling.unit


@triton.jit
def student_logits(s, row, SPEC: tl.constexpr):
    if SPEC.softcap:
        s = capped(s, row.caps.student, row.caps.student_inverse)
    if SPEC.standardize and len(row.scaling) > 0:
        s = scaled_by(s, row.scaling)
    return s


@triton.jit
def teacher_tile(t, k: tl.constexpr, row, SPEC: tl.constexpr):
    if SPEC.teacher_softcap:
        t = capped(t, row.caps.teacher, row.caps.teacher_inverse)
    if SPEC.standardize and len(row.teacher_scalings) > 0:
        t = scaled_by(t, row.teacher_scalings[k])
    return t


@triton.jit
def prepared(s, ts, row, SPEC: tl.constexpr):
    """Logits as the terms see them."""
    out = ()
    for k in tl.static_range(len(ts)):
        out = out + (teacher_tile(ts[k], k, row, SPEC),)
    return student_logits(s, row, SPEC), out


# ---- moments: (count, mean, sum of squares about it) of each lane, joined as Chan et al. (1979) do: sums about one
# number for all would lose digits where that is far off, and equal logits must have a deviation of exactly 0 ----


@triton.jit
def joined(count_a, mean_a, squares_a, count_b, mean_b, squares_b):
    count = count_a + count_b
    d = mean_b - mean_a
    share = count_b / tl.maximum(count, 1)
    return count, mean_a + d * share, squares_a + squares_b + d * d * (count_a * share)


@triton.jit
def add_moments(moments, x, there):
    """x, there: (lanes, n)."""
    count, mean, squares = moments
    n = tl.sum(there.to(x.dtype), 1)
    mean_x = tl.sum(tl.where(there, x, 0), 1) / tl.maximum(n, 1)
    d = tl.where(there, x - mean_x[:, None], 0)
    return joined(count, mean, squares, n, mean_x, tl.sum(d * d, 1))


@triton.jit
def no_moments(teachers, SPEC: tl.constexpr):
    nothing = in_lanes(0, SPEC)
    moments = ((nothing, nothing, nothing),)
    for _ in tl.static_range(len(teachers)):
        moments = moments + ((nothing, nothing, nothing),)
    return moments


@triton.jit
def moments_pass(moments, tile, given, row, SPEC: tl.constexpr):
    out = (add_moments(moments[0], tile.s, tile.there),)
    for k in tl.static_range(len(tile.teachers)):
        out = out + (add_moments(moments[k + 1], tile.teachers[k], tile.there),)
    return out


@triton.jit
def scaling_of(moments):
    count, mean, squares = tl.reduce(moments, 0, joined)
    freedom = tl.maximum(count - 1, 1)
    deviation = tl.sqrt(squares / freedom)
    unit = 1 / (deviation + 1e-7)
    return Scaling(mean, unit, 1 / unit, tl.where(deviation == 0, 0, 1 / (freedom * deviation)))


@triton.jit
def with_scalings(row, student, teachers):
    """The row with its moments known."""
    return Row(
        row.slope, row.teacher_slope, row.temperature, row.weights, row.beta, row.label, row.caps, student, teachers
    )


@triton.jit
def standardized(row, moments):
    scalings = ()
    for k in tl.static_range(1, len(moments)):
        scalings = scalings + (scaling_of(moments[k]),)
    return with_scalings(row, scaling_of(moments[0]), scalings)


@triton.jit
def rescaled(row, c, further):
    """The row with the moments that its coefficients have."""
    scalings = (Scaling(c.teacher_mean, c.teacher_unit, 1 / c.teacher_unit, 0),)
    for k in tl.static_range(len(further)):
        scalings = scalings + (Scaling(further[k].mean, further[k].unit, 1 / further[k].unit, 0),)
    return with_scalings(row, Scaling(c.mean, c.student_unit, 1 / c.student_unit, 0), scalings)


@triton.jit
def base2(temperature):
    """log2(e) / T: what logits are multiplied by."""
    return (temperature * 0 + LOG2E) / temperature  # a constant on the left would swallow the rest as its value


@triton.jit
def teacher_slope(temperature, SPEC: tl.constexpr):
    """What the teacher's logits are multiplied by, in base 2."""
    if SPEC.target == "logits":
        return base2(temperature)
    elif SPEC.target == "log_probs":
        return temperature * 0 + LOG2E
    else:
        return temperature * 0 + 1  # their logarithms are to base 2


@triton.jit
def weighted_mean(tiles, weights):
    mean = tiles[0] * weights[0]
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
            x = tl.log2(x)
        logits = logits + (x,)
    if SPEC.joint and len(tiles) > 1:
        return (weighted_mean(logits, weights),)
    else:
        return logits


@triton.jit
def teacher_probabilities(tiles, weights, SPEC: tl.constexpr):
    """p as it is given, or as the weighted mean of those given, and log2 p."""
    probabilities = ()
    for k in tl.static_range(len(tiles)):
        x = tiles[k]
        if SPEC.target == "log_probs":
            x = tl.exp2(x * LOG2E)
        probabilities = probabilities + (x,)
    if len(tiles) > 1:
        p = weighted_mean(probabilities, weights)
        return p, tl.log2(p)
    elif SPEC.target == "log_probs":
        return probabilities[0], tiles[0] * LOG2E
    else:
        return probabilities[0], tl.log2(probabilities[0])
