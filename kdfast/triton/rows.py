"""The passes over classes that are read from memory, and what a row's other inputs are."""

import triton
import triton.language as tl

from kdfast.triton.row_passes import add_divergence, gradient, linear_divergence
from kdfast.triton.statistics import accumulate, merge, no_statistics
from kdfast.triton.teachers import base2, teacher_slope
from kdfast.triton.tiles import (
    body_classes,
    end_classes,
    first_lane,
    head_of,
    load_body,
    row_value,
    store_body,
    widened,
)


@triton.jit
def load_tiles(
    student, teachers, head, at, n, AGAIN: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr
):
    """A tile of the body of the student and of each teacher, as they are stored."""
    s = load_body(student, head, at, n, False, True, AGAIN, LANES, VEC)
    ts = ()
    for k in tl.static_range(len(teachers)):
        t = load_body(teachers[k], head, at, n, SPEC.target == "probs", SPEC.aligned[k + 1], AGAIN, LANES, VEC)
        ts = ts + (t,)
    return s, ts


@triton.jit
def widened_tiles(student, teachers, tiles, opaque, SPEC: tl.constexpr):
    s, ts = tiles
    out = ()
    for k in tl.static_range(len(ts)):
        out = out + (widened(teachers[k], ts[k], opaque, SPEC.dtype),)
    return widened(student, s, opaque, SPEC.dtype), out


@triton.jit
def load_ends(student, teachers, ends, there, SPEC: tl.constexpr):
    """The row's ends, (LANES, 1), as numbers of the arithmetic's type."""
    s = tl.load(student + ends, mask=there, other=float("-inf")).to(SPEC.dtype)
    fill: tl.constexpr = 0.0 if SPEC.target == "probs" else float("-inf")
    ts = ()
    for k in tl.static_range(len(teachers)):
        ts = ts + (tl.load(teachers[k] + ends, mask=there, other=fill).to(SPEC.dtype),)
    return s, ts


# ---- what a row has beside its logits ----


@triton.jit
def kept_row(per_row, row, ignore_index, vocab, LANES: tl.constexpr, SPEC: tl.constexpr):
    """Whether a row has a term, its label (-1 where it has none in [0, vocab)), and its weight.

    LANES: of the whole program one lane reads them, and all wait for it; 32: one of each warp.
    """
    kept = tl.full((), True, tl.int1)
    label = tl.full((), -1, tl.int32)
    weight = tl.full((), 1, SPEC.dtype)
    if per_row[1] is not None:
        wide = tl.sum(first_lane(per_row[1], row, LANES), 0)
        kept = wide != ignore_index
        label = tl.where((wide >= 0) & (wide < vocab), wide, -1).to(tl.int32)
    if per_row[2] is not None:
        weight = tl.sum(first_lane(per_row[2], row, LANES).to(SPEC.dtype), 0)
        kept = kept & (weight != 0)
    return kept, label, weight


@triton.jit
def number(bits, dtype: tl.constexpr):
    """A number that came as matrices.bits, and is rounded here, once."""
    return ((bits.to(tl.int64) >> 1) & 0x7FFFFFFFFFFFFFFF).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def weights_of(numbers, dtype: tl.constexpr):
    weights = ()
    for k in tl.static_range(6, len(numbers)):
        weights = weights + (number(numbers[k], dtype),)
    return weights


@triton.jit
def term_factors(numbers, factor, SPEC: tl.constexpr):
    """alpha, hard_weight, and what the gradient is multiplied by."""
    return number(numbers[2], SPEC.dtype), number(numbers[3], SPEC.dtype), factor


@triton.jit
def by_row(data, row, bits, dtype: tl.constexpr):
    return number(bits, dtype) if data is None else row_value(data, row, dtype)


@triton.jit
def row_scales(per_row, row, numbers, SPEC: tl.constexpr):
    """(slope, teacher's slope, temperature, teachers' weights, beta)."""
    temperature = by_row(per_row[3], row, numbers[0], SPEC.dtype)
    at = by_row(per_row[4], row, numbers[1], SPEC.dtype)
    return (
        base2(temperature),
        teacher_slope(at, SPEC),
        temperature,
        weights_of(numbers, SPEC.dtype),
        number(numbers[5], SPEC.dtype),
    )


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def label_and_divisor(student, label, divisor, LANES: tl.constexpr, SPEC: tl.constexpr):
    """The label's logit, and what the reduction divides by."""
    logit = tl.zeros((LANES,), SPEC.dtype)
    if SPEC.hard:
        logit = first_lane(student, label, LANES, label >= 0).to(SPEC.dtype)
    if divisor is None:
        return tl.sum(logit, 0), tl.full((), 1, SPEC.dtype)
    else:
        return tl.reduce((logit, first_lane(divisor, 0, LANES).to(SPEC.dtype)), 0, _add)


@triton.jit
def gradient_factor(per_row, row, label, weight, scale, divisor, SPEC: tl.constexpr):
    """What dl/ds is multiplied by.

    A label out of range cannot raise here without a wait for the device: it makes its row NaN, loss and gradient, and
    no other row.
    """
    factor = weight * number(scale, SPEC.dtype) * tl.where(divisor == 0, 0, 1 / divisor)
    if per_row[5] is not None:
        factor *= row_value(per_row[5], row, SPEC.dtype)
    if per_row[1] is not None:
        factor = tl.where(label >= 0, factor, float("nan"))
    return factor


@triton.jit
def first_difference(student, teachers, weights, SPEC: tl.constexpr):
    """logit_mse: a number near the mean difference, from which its sums are taken."""
    difference = tl.zeros((), SPEC.dtype)
    if SPEC.teacher == "difference":
        difference += row_value(student, 0, SPEC.dtype)
        for k in tl.static_range(len(teachers)):
            share = weights[k] if len(teachers) > 1 else 1
            difference -= row_value(teachers[k], 0, SPEC.dtype) * share
    return difference


@triton.jit
def segment_of(student, unit, segments, segment, vocab, kept, VEC: tl.constexpr):
    """(begin, end): which classes a unit has of its row; all but the first segment begin with a whole vector."""
    part = unit % segments
    head = tl.where(segments > 1, head_of(student, vocab, VEC), 0)
    begin = tl.where(part == 0, 0, tl.minimum(head + part * segment, vocab))
    end = tl.where(part == segments - 1, vocab, tl.minimum(head + (part + 1) * segment, vocab))
    return begin, tl.where(kept, end, begin)


# ---- the passes ----


@triton.jit
def statistics_of(
    student, teachers, shift, n, row, members: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr
):
    """Pass A over n classes."""
    statistics = no_statistics(members, shift, LANES, SPEC)
    head = head_of(student, n, VEC)
    ends, there = end_classes(head, n, LANES, VEC)
    s_ends, t_ends = load_ends(student, teachers, ends, there, SPEC)
    statistics = accumulate(statistics, s_ends, t_ends, there, row, SPEC)
    classes = body_classes(LANES, VEC)
    for at in range(0, n - head, LANES * VEC):
        tiles = load_tiles(student, teachers, head, at, n, True, LANES, VEC, SPEC)
        s, ts = widened_tiles(student, teachers, tiles, 0, SPEC)
        statistics = accumulate(statistics, s, ts, at + classes < (n - head) // VEC * VEC, row, SPEC)
    return merge(statistics, row, SPEC)


@triton.jit
def divergence_of(
    student, teachers, n, statistics, scales, row, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr
):
    """D and sum psi: from pass A's running sums, or pass B over n classes, the last ones first."""
    if SPEC.teacher == "none" or SPEC.teacher == "difference":
        return tl.zeros((), SPEC.dtype), tl.zeros((), SPEC.dtype)
    elif SPEC.linear:
        return linear_divergence(statistics, row, SPEC)
    else:
        nothing = tl.zeros((LANES,), SPEC.dtype)
        head = head_of(student, n, VEC)
        ends, there = end_classes(head, n, LANES, VEC)
        s_ends, t_ends = load_ends(student, teachers, ends, there, SPEC)
        sums = add_divergence((nothing, nothing), s_ends, t_ends, scales, row, SPEC)
        count = tl.cdiv(n - head, LANES * VEC)
        for i in range(count):
            at = (count - 1 - i) * (LANES * VEC)
            tiles = load_tiles(student, teachers, head, at, n, True, LANES, VEC, SPEC)
            s, ts = widened_tiles(student, teachers, tiles, 0, SPEC)
            sums = add_divergence(sums, s, ts, scales, row, SPEC)
        return tl.reduce(sums, 0, _add)


@triton.jit
def write_gradient(
    student, teachers, out, label, n, scales, coefficients, row,
    LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Pass C over n classes, in the other direction than the pass before it: those are what the caches still hold."""
    head = head_of(student, n, VEC)
    classes = body_classes(LANES, VEC)
    count = tl.cdiv(n - head, LANES * VEC)
    for i in range(count):
        at = (count - 1 - i if SPEC.linear else i) * (LANES * VEC)
        tiles = load_tiles(student, teachers, head, at, n, False, LANES, VEC, SPEC)
        s, ts = widened_tiles(student, teachers, tiles, 0, SPEC)
        g = gradient(s, ts, head + at + classes, label, scales, coefficients, row, SPEC)
        store_body(out, head, at, n, g, SPEC.aligned[0])
    ends, there = end_classes(head, n, LANES, VEC)
    s_ends, t_ends = load_ends(student, teachers, ends, there, SPEC)
    g_ends = gradient(s_ends, t_ends, ends, label, scales, coefficients, row, SPEC)
    tl.store(out + ends, g_ends.to(out.dtype.element_ty), mask=there)
