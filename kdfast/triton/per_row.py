"""What a row has besides its logits: its label, weight, temperatures and factors, and which classes a program has."""

import triton
import triton.language as tl

from kdfast.triton.logits import adjust_logits, exp2_scale, teacher_exp2_scale
from kdfast.triton.spec import Caps, Factors, Row
from kdfast.triton.sums import add_pair
from kdfast.triton.tiles import fill_lanes, load_first_lane, prefix_length, row_value

COUNTED_ROWS = tl.constexpr(128)  # as many rows' weights at most each program sums itself, which spares two launches


@triton.jit
def kept_row(per_row, row, ignore_index, vocab, LANES: tl.constexpr, SPEC: tl.constexpr):
    """Whether a row has a term, its label (-1 where it has none in [0, vocab)), and its weight.

    LANES: of the whole program one lane reads them, and all wait for it; 32: one of each warp.
    """
    kept = tl.full((), True, tl.int1)
    label = tl.full((), -1, tl.int32)
    weight = tl.full((), 1, SPEC.dtype)
    if per_row.labels is not None:
        wide = tl.sum(load_first_lane(per_row.labels, row, LANES), 0)
        kept = wide != ignore_index
        label = tl.where((wide >= 0) & (wide < vocab), wide, -1).to(tl.int32)
    if per_row.weights is not None:
        weight = tl.sum(load_first_lane(per_row.weights, row, LANES).to(SPEC.dtype), 0)
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
def teacher_weights(numbers, dtype: tl.constexpr):
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
def make_row(temperature, teacher_temperature, numbers, label, SPEC: tl.constexpr):
    """A spec.Row, for now without its moments."""
    cap, teacher_cap = number(numbers.softcap, SPEC.dtype), number(numbers.teacher_softcap, SPEC.dtype)
    scale, teacher_scale = number(numbers.logit_scale, SPEC.dtype), number(numbers.teacher_logit_scale, SPEC.dtype)
    caps = Caps(cap, scale / cap, teacher_cap, teacher_scale / teacher_cap)
    if SPEC.softcap:
        scale = number(None, SPEC.dtype)
    if SPEC.teacher_softcap:
        teacher_scale = number(None, SPEC.dtype)
    to_base_2, teacher_to_base_2 = exp2_scale(temperature), teacher_exp2_scale(teacher_temperature, SPEC)
    if not SPEC.standardize:
        to_base_2, teacher_to_base_2 = to_base_2 * scale, teacher_to_base_2 * teacher_scale
    return Row(
        to_base_2, teacher_to_base_2, temperature, teacher_weights(numbers, SPEC.dtype),
        number(numbers.beta, SPEC.dtype), number(numbers.rest, SPEC.dtype), label, scale, teacher_scale, caps, (),
    )  # fmt: skip


@triton.jit
def row_number(data, row, bits, dtype: tl.constexpr):
    return number(bits, dtype) if data is None else row_value(data, row, dtype)


@triton.jit
def load_row(per_row, row, numbers, label, SPEC: tl.constexpr):
    temperature = row_number(per_row.temperatures, row, numbers.temperature, SPEC.dtype)
    teacher_temperature = row_number(per_row.teacher_temperatures, row, numbers.teacher_temperature, SPEC.dtype)
    return make_row(temperature, teacher_temperature, numbers, label, SPEC)


@triton.jit
def weights_of_rows(per_row, at, rows, ignore_index, SPEC: tl.constexpr):
    """Those of many rows at once; 0 for ignored rows and beyond the last."""
    kept = at < rows
    weights = tl.full(at.shape, 1, SPEC.dtype)
    if per_row.weights is not None:
        weights = tl.load(per_row.weights + at, mask=at < rows, other=0).to(SPEC.dtype)
    if per_row.labels is not None:
        kept = kept & (tl.load(per_row.labels + at, mask=at < rows, other=0) != ignore_index)
    return tl.where(kept, weights, 0)


@triton.jit
def divisor_of_lanes(per_row, rows, ignore_index, SPEC: tl.constexpr):
    """What the reduction divides by, as numbers of the lanes to be summed; None: 1."""
    if SPEC.counted:
        LANES: tl.constexpr = SPEC.lanes
        divisor = fill_lanes(0, SPEC)
        for first in tl.static_range(0, COUNTED_ROWS, LANES):  # up to `rows` it spilled 8 bytes at V = 32768 on sm_90
            divisor += weights_of_rows(per_row, first + tl.arange(0, LANES), rows, ignore_index, SPEC)
        return divisor
    elif per_row.divisor is not None:
        return load_first_lane(per_row.divisor, 0, SPEC.lanes).to(SPEC.dtype)
    else:
        return None


@triton.jit
def label_and_divisor(student, label, divisor, SPEC: tl.constexpr):
    """The label's logit, and what the reduction divides by: divisor_of_lanes."""
    logit = fill_lanes(0, SPEC)
    if SPEC.hard or SPEC.dkd:
        logit = load_first_lane(student, label, SPEC.lanes, label >= 0).to(SPEC.dtype)
    if divisor is None:
        return tl.sum(logit, 0), tl.full((), 1, SPEC.dtype)
    else:
        return tl.reduce((logit, divisor), 0, add_pair)


@triton.jit
def label_logits(logit, teachers, row, SPEC: tl.constexpr):
    """The label's logit as the terms see it, and for dkd the teachers'."""
    ts = ()
    if SPEC.dkd:
        for k in tl.static_range(len(teachers)):
            t = row_value(teachers[k], tl.maximum(row.label, 0), SPEC.dtype)
            ts = ts + (t,)
    return adjust_logits(logit, ts, row, SPEC)


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
def segment_range(student, at, segments, segment, vocab, kept, VEC: tl.constexpr):
    """(begin, end): which classes a segment has of its row; all but the first segment begin with a whole vector."""
    part = at % segments
    prefix = tl.where(segments > 1, prefix_length(student, vocab, VEC), 0)
    begin = tl.where(part == 0, 0, tl.minimum(prefix + part * segment, vocab))
    end = tl.where(part == segments - 1, vocab, tl.minimum(prefix + (part + 1) * segment, vocab))
    return begin, tl.where(kept, end, begin)
