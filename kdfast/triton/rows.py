"""The passes over classes that are read from memory, and what a row's other inputs are."""

import triton
import triton.language as tl

from kdfast.triton.logits import add_moments, scaling_of, student_logits, teacher_tile
from kdfast.triton.metrics import best_of
from kdfast.triton.row_passes import add_divergence, gradient, linear_divergence, no_sums
from kdfast.triton.spec import Factors, Row
from kdfast.triton.statistics import accumulate, merge, no_statistics, sums_of
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
def prepared(s, ts, row, SPEC: tl.constexpr):
    """Logits as the terms see them."""
    out = ()
    for k in tl.static_range(len(ts)):
        out = out + (teacher_tile(ts[k], k, row, SPEC),)
    return student_logits(s, row, SPEC), out


@triton.jit
def widened_tiles(student, teachers, tiles, opaque, row, SPEC: tl.constexpr):
    s, ts = tiles
    out = ()
    for k in tl.static_range(len(ts)):
        out = out + (widened(teachers[k], ts[k], opaque, SPEC.dtype),)
    return prepared(widened(student, s, opaque, SPEC.dtype), out, row, SPEC)


@triton.jit
def load_ends(student, teachers, ends, there, SPEC: tl.constexpr):
    """The row's ends, (LANES, 1), as numbers of the arithmetic's type; `prepared` is still to come."""
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
    """A number that came as matrices.bits, and is rounded here, once; 1 in place of one that is not wanted."""
    if bits is None:
        value = tl.full((), 1, dtype)
    else:
        value = ((bits.to(tl.int64) >> 1) & 0x7FFFFFFFFFFFFFFF).to(tl.float64, bitcast=True).to(dtype)
    return value


@triton.jit
def number_or_0(bits, dtype: tl.constexpr):
    value = number(bits, dtype)
    return tl.where(value < 1e-299, 0, value)


@triton.jit
def weights_of(numbers, dtype: tl.constexpr):
    weights = ()
    for k in tl.static_range(12, len(numbers)):
        weights = weights + (number(numbers[k], dtype),)
    return weights


@triton.jit
def term_factors(numbers, factor, SPEC: tl.constexpr):
    dtype: tl.constexpr = SPEC.dtype
    return Factors(
        number(numbers[2], dtype), number(numbers[3], dtype), number(numbers[6], dtype), number(numbers[7], dtype),
        number_or_0(numbers[10], dtype), number_or_0(numbers[11], dtype), factor,
    )  # fmt: skip


@triton.jit
def row_of(temperature, at, numbers, label, SPEC: tl.constexpr):
    """A spec.Row, for now without its moments."""
    caps = ()
    for k in tl.static_range(2):
        cap = number(numbers[8 + k], SPEC.dtype)
        caps = caps + ((cap, 1 / cap),)
    return Row(
        base2(temperature), teacher_slope(at, SPEC), temperature, weights_of(numbers, SPEC.dtype),
        number(numbers[5], SPEC.dtype), label, caps, (), (),
    )  # fmt: skip


@triton.jit
def by_row(data, row, bits, dtype: tl.constexpr):
    return number(bits, dtype) if data is None else row_value(data, row, dtype)


@triton.jit
def row_scales(per_row, row, numbers, label, SPEC: tl.constexpr):
    temperature = by_row(per_row[3], row, numbers[0], SPEC.dtype)
    at = by_row(per_row[4], row, numbers[1], SPEC.dtype)
    return row_of(temperature, at, numbers, label, SPEC)


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def label_and_divisor(student, label, divisor, LANES: tl.constexpr, SPEC: tl.constexpr):
    """The label's logit, and what the reduction divides by."""
    logit = tl.zeros((LANES,), SPEC.dtype)
    if SPEC.hard or SPEC.dkd:
        logit = first_lane(student, label, LANES, label >= 0).to(SPEC.dtype)
    if divisor is None:
        return tl.sum(logit, 0), tl.full((), 1, SPEC.dtype)
    else:
        return tl.reduce((logit, first_lane(divisor, 0, LANES).to(SPEC.dtype)), 0, _add)


@triton.jit
def label_logits(logit, teachers, row, SPEC: tl.constexpr):
    """The label's logit as the terms see it, and for dkd the teachers'."""
    ts = ()
    if SPEC.dkd:
        for k in tl.static_range(len(teachers)):
            t = row_value(teachers[k], tl.maximum(row.label, 0), SPEC.dtype)
            ts = ts + (t,)
    return prepared(logit, ts, row, SPEC)


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
def first_difference(student, teachers, row, SPEC: tl.constexpr):
    """logit_mse: a number near the mean difference, from which its sums are taken."""
    difference = tl.zeros((), SPEC.dtype)
    if SPEC.difference and not SPEC.standardize:
        difference += student_logits(row_value(student, 0, SPEC.dtype), row, SPEC)
        for k in tl.static_range(len(teachers)):
            share = row.weights[k] if len(teachers) > 1 else 1
            difference -= teacher_tile(row_value(teachers[k], 0, SPEC.dtype), k, row, SPEC) * share
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
def no_moments(teachers, LANES: tl.constexpr, SPEC: tl.constexpr):
    nothing = tl.zeros((LANES,), SPEC.dtype)
    moments = ((nothing, nothing, nothing),)
    for _ in tl.static_range(len(teachers)):
        moments = moments + ((nothing, nothing, nothing),)
    return moments


@triton.jit
def add_tiles(moments, s, ts, there):
    out = (add_moments(moments[0], s, there),)
    for k in tl.static_range(len(ts)):
        out = out + (add_moments(moments[k + 1], ts[k], there),)
    return out


@triton.jit
def standardizing(moments, row):
    """The row with its moments known."""
    scalings = ()
    for k in tl.static_range(1, len(moments)):
        scalings = scalings + (scaling_of(moments[k]),)
    return Row(
        row.slope, row.teacher_slope, row.temperature, row.weights, row.beta, row.label, row.caps,
        scaling_of(moments[0]), scalings,
    )  # fmt: skip


@triton.jit
def standardized_row(student, teachers, n, row, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr):
    """A pass of its own where rows are standardized, the last classes first."""
    if not SPEC.standardize:
        return row
    else:
        head = head_of(student, n, VEC)
        ends, there = end_classes(head, n, LANES, VEC)
        s_ends, t_ends = load_ends(student, teachers, ends, there, SPEC)
        s_ends, t_ends = prepared(s_ends, t_ends, row, SPEC)
        moments = add_tiles(no_moments(teachers, LANES, SPEC), s_ends, t_ends, there)
        classes = body_classes(LANES, VEC)
        count = tl.cdiv(n - head, LANES * VEC)
        for i in range(count):
            at = (count - 1 - i) * (LANES * VEC)
            tiles = load_tiles(student, teachers, head, at, n, True, LANES, VEC, SPEC)
            s, ts = widened_tiles(student, teachers, tiles, 0, row, SPEC)
            moments = add_tiles(moments, s, ts, at + classes < (n - head) // VEC * VEC)
        return standardizing(moments, row)


@triton.jit
def statistics_of(
    student, teachers, shift, n, row, members: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr
):
    """Pass A over n classes."""
    statistics = no_statistics(members, shift, LANES, SPEC)
    head = head_of(student, n, VEC)
    ends, there = end_classes(head, n, LANES, VEC)
    s_ends, t_ends = load_ends(student, teachers, ends, there, SPEC)
    s_ends, t_ends = prepared(s_ends, t_ends, row, SPEC)
    statistics = accumulate(statistics, s_ends, t_ends, ends, there, row, SPEC)
    classes = body_classes(LANES, VEC)
    for at in range(0, n - head, LANES * VEC):
        tiles = load_tiles(student, teachers, head, at, n, True, LANES, VEC, SPEC)
        s, ts = widened_tiles(student, teachers, tiles, 0, row, SPEC)
        inside = at + classes < (n - head) // VEC * VEC
        statistics = accumulate(statistics, s, ts, head + at + classes, inside, row, SPEC)
    return merge(statistics, row, SPEC)


@triton.jit
def sums_of_row(sums, SPEC: tl.constexpr):
    """Those of the lanes, joined: the sums, and at their end the teacher's best class where it is known only now."""
    values, best = sums
    if SPEC.metrics and not SPEC.joint:
        return sums_of(values), best_of(best)
    else:
        return sums_of(values), ()


@triton.jit
def divergence_of(
    student, teachers, n, statistics, scales, row, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr
):
    """D and sum psi: from pass A's running sums, or pass B over n classes, the last ones first."""
    if SPEC.divergence is None:
        return (), ()
    elif SPEC.linear:
        return linear_divergence(statistics, row, SPEC), ()
    else:
        head = head_of(student, n, VEC)
        ends, there = end_classes(head, n, LANES, VEC)
        s_ends, t_ends = load_ends(student, teachers, ends, there, SPEC)
        s_ends, t_ends = prepared(s_ends, t_ends, row, SPEC)
        sums = add_divergence(no_sums(LANES, SPEC), s_ends, t_ends, ends, there, scales, row, SPEC)
        classes = body_classes(LANES, VEC)
        count = tl.cdiv(n - head, LANES * VEC)
        for i in range(count):
            at = (count - 1 - i) * (LANES * VEC)
            tiles = load_tiles(student, teachers, head, at, n, True, LANES, VEC, SPEC)
            s, ts = widened_tiles(student, teachers, tiles, 0, row, SPEC)
            inside = at + classes < (n - head) // VEC * VEC
            sums = add_divergence(sums, s, ts, head + at + classes, inside, scales, row, SPEC)
        return sums_of_row(sums, SPEC)


@triton.jit
def write_gradient(
    student, teachers, out, n, scales, coefficients, row, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr
):
    """Pass C over n classes, in the other direction than the pass before it: those are what the caches still hold."""
    head = head_of(student, n, VEC)
    classes = body_classes(LANES, VEC)
    count = tl.cdiv(n - head, LANES * VEC)
    for i in range(count):
        at = (count - 1 - i if SPEC.linear else i) * (LANES * VEC)
        tiles = load_tiles(student, teachers, head, at, n, False, LANES, VEC, SPEC)
        s, ts = widened_tiles(student, teachers, tiles, 0, row, SPEC)
        g = gradient(s, ts, head + at + classes, scales, coefficients, row, SPEC)
        store_body(out, head, at, n, g, SPEC.aligned[0])
    ends, there = end_classes(head, n, LANES, VEC)
    s_ends, t_ends = load_ends(student, teachers, ends, there, SPEC)
    s_ends, t_ends = prepared(s_ends, t_ends, row, SPEC)
    g_ends = gradient(s_ends, t_ends, ends, scales, coefficients, row, SPEC)
    tl.store(out + ends, g_ends.to(out.dtype.element_ty), mask=there)
