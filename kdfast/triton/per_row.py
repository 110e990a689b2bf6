"""What a row has beside its logits: its label, weight, temperatures and factors, and which classes a unit has."""

import triton
import triton.language as tl

from kdfast.triton.logits import base2, prepared, student_logits, teacher_slope, teacher_tile
from kdfast.triton.spec import Caps, Factors, Row
from kdfast.triton.tiles import first_lane, head_of, in_lanes, row_value


@triton.jit
def kept_row(per_row, row, ignore_index, vocab, LANES: tl.constexpr, SPEC: tl.constexpr):
    """Whether a row has a term, its label (-1 where it has none in [0, vocab)), and its weight.

    LANES: of the whole program one lane reads them, and all wait for it; 32: one of each warp.
    """
    kept = tl.full((), True, tl.int1)
    label = tl.full((), -1, tl.int32)
    weight = tl.full((), 1, SPEC.dtype)
    if per_row.labels is not None:
        wide = tl.sum(first_lane(per_row.labels, row, LANES), 0)
        kept = wide != ignore_index
        label = tl.where((wide >= 0) & (wide < vocab), wide, -1).to(tl.int32)
    if per_row.weights is not None:
        weight = tl.sum(first_lane(per_row.weights, row, LANES).to(SPEC.dtype), 0)
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
    for k in tl.static_range(len(numbers.teacher_weights)):
        weights = weights + (number(numbers.teacher_weights[k], dtype),)
    return weights


@triton.jit
def term_factors(numbers, factor, SPEC: tl.constexpr):
    dtype: tl.constexpr = SPEC.dtype
    return Factors(
        number(numbers.alpha, dtype), number(numbers.hard_weight, dtype),
        number(numbers.label_smoothing, dtype), number(numbers.z_loss, dtype),
        number_or_0(numbers.dkd_target, dtype), number_or_0(numbers.dkd_others, dtype), factor,
    )  # fmt: skip


@triton.jit
def row_of(temperature, at, numbers, label, SPEC: tl.constexpr):
    """A spec.Row, for now without its moments."""
    cap, teacher_cap = number(numbers.softcap, SPEC.dtype), number(numbers.teacher_softcap, SPEC.dtype)
    return Row(
        base2(temperature), teacher_slope(at, SPEC), temperature, weights_of(numbers, SPEC.dtype),
        number(numbers.beta, SPEC.dtype), label, Caps(cap, 1 / cap, teacher_cap, 1 / teacher_cap), (), (),
    )  # fmt: skip


@triton.jit
def by_row(data, row, bits, dtype: tl.constexpr):
    return number(bits, dtype) if data is None else row_value(data, row, dtype)


@triton.jit
def row_scales(per_row, row, numbers, label, SPEC: tl.constexpr):
    temperature = by_row(per_row.temperatures, row, numbers.temperature, SPEC.dtype)
    at = by_row(per_row.teacher_temperatures, row, numbers.teacher_temperature, SPEC.dtype)
    return row_of(temperature, at, numbers, label, SPEC)


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def label_and_divisor(student, label, divisor, SPEC: tl.constexpr):
    """The label's logit, and what the reduction divides by."""
    logit = in_lanes(0, SPEC)
    if SPEC.hard or SPEC.dkd:
        logit = first_lane(student, label, SPEC.lanes, label >= 0).to(SPEC.dtype)
    if divisor is None:
        return tl.sum(logit, 0), tl.full((), 1, SPEC.dtype)
    else:
        return tl.reduce((logit, first_lane(divisor, 0, SPEC.lanes).to(SPEC.dtype)), 0, _add)


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
def share_of_row(weight, scale, divisor, SPEC: tl.constexpr):
    """What a row's loss is multiplied by; 0 where no row is kept."""
    return weight * number(scale, SPEC.dtype) * tl.where(divisor == 0, 0, 1 / divisor)


@triton.jit
def gradient_factor(per_row, label, share):
    """What dl/ds is multiplied by.

    A label out of range cannot raise here without a wait for the device: it makes its row NaN, loss and gradient, and
    no other row.
    """
    return share if per_row.labels is None else tl.where(label >= 0, share, float("nan"))


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
