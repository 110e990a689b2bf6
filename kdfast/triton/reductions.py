"""Segments of few and long rows joined, and backward's factor."""

import triton
import triton.language as tl

from kdfast.triton.logits import prepared
from kdfast.triton.per_row import gradient_factor, number, row_of, share_of_row, term_factors
from kdfast.triton.row_math import loss_and_coefficients
from kdfast.triton.sums import linear_divergence, merge, scales_of
from kdfast.triton.sweep import opened, sweep
from kdfast.triton.tables import PARTS, as_columns, laid, sums_in, width_of
from kdfast.triton.tiles import row_start, row_value, store_tile

RUN_TIME = ["student", "per_row", "numbers", "grad", "rows", "vocab", "width", "ignore_index", "segments"]


@triton.jit
def _by_row(data, at, there, fallback, dtype: tl.constexpr):
    if data is None:
        return number(fallback, dtype) + tl.zeros(at.shape, dtype)
    else:
        return tl.load(data + at, mask=there, other=1).to(dtype)


@triton.jit(do_not_specialize=RUN_TIME)
def join(
    student, parts, table, loss, per_row, numbers, rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64,
    segments: tl.int32,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Few and long rows, all of them at once, from the sums of their segments, SUMS numbers each: their coefficients,
    COLUMNS each, their shares of the loss, and the sum of these."""
    at = tl.arange(0, ROWS)
    there = at < rows
    row = tl.minimum(at, rows - 1)
    t = _by_row(per_row.temperatures, row, there, numbers.temperature, SPEC.dtype)
    t_teacher = _by_row(per_row.teacher_temperatures, row, there, numbers.teacher_temperature, SPEC.dtype)
    scalars = row_of(t, t_teacher, numbers, None, SPEC)

    part = tl.arange(0, SEGMENTS)[:, None, None]
    column = tl.arange(0, width_of(SUMS))
    cells = (row[None, :, None] * segments + part).to(tl.int64) * SUMS + column[None, None, :]
    is_offset = (column == 0) | (column == 2) | ((column >= PARTS) & ((column - PARTS) % 3 == 0))
    nothing = tl.where(is_offset, float("-inf"), 0)[None, None, :]
    lines = tl.load(parts + cells, mask=(part < segments) & (column < SUMS)[None, None, :], other=nothing)
    statistics = merge(sums_in(lines, SPEC), scalars, SPEC)

    label = tl.zeros((ROWS,), tl.int32)
    logit = tl.zeros((ROWS,), SPEC.dtype)
    weight = tl.full((ROWS,), 1, SPEC.dtype)
    if per_row.weights is not None:
        weight = tl.load(per_row.weights + row).to(SPEC.dtype)
    divisor = tl.full((), 1, SPEC.dtype)
    if per_row.divisor is not None:
        divisor = row_value(per_row.divisor, 0, SPEC.dtype)
    if per_row.labels is not None:
        wide = tl.load(per_row.labels + row)
        label = tl.where((wide >= 0) & (wide < vocab), wide, -1).to(tl.int32)
        weight = tl.where(wide != ignore_index, weight, 0)
    if SPEC.hard:
        logit = tl.load(row_start(student, row) + label, mask=there & (label >= 0), other=0).to(SPEC.dtype)
    sums = ()
    if SPEC.divergence is not None:
        sums = linear_divergence(statistics, scalars, SPEC)
    share = share_of_row(weight, numbers.scale, divisor, SPEC)
    factors = term_factors(numbers, gradient_factor(per_row, label, share), SPEC)
    at_label = prepared(logit, (), scalars, SPEC)
    scales = scales_of(statistics, at_label, scalars, SPEC)
    found = loss_and_coefficients(statistics, scales, sums, at_label, scalars, factors, vocab.to(SPEC.dtype), SPEC)
    each, coefficients, further, none = found
    line = laid(as_columns(coefficients, further), tl.zeros((ROWS, width_of(COLUMNS)), SPEC.dtype))
    column = tl.arange(0, width_of(COLUMNS))
    tl.store(table + at[:, None] * COLUMNS + column[None, :], line, mask=there[:, None] & (column < COLUMNS)[None, :])
    if per_row.labels is not None:
        each = tl.where(label >= 0, each, float("nan"))
    each = tl.where(there & (weight != 0), each * share, 0)
    tl.store(per_row.losses + at, each, mask=there)
    tl.store(loss, tl.sum(each, 0))


@triton.jit
def _scale_tile(state, tile, given, row, SPEC: tl.constexpr):
    start, head, n, by = given
    store_tile(start, head, n, tile, tile.s * by, True)
    return state


@triton.jit(do_not_specialize=RUN_TIME)
def scale(grad, factor, rows: tl.int32, width: tl.int32, SPEC: tl.constexpr):
    """grad *= factor. Where that is 1, as it is for loss.backward(), nothing more is read and nothing written."""
    by = row_value(factor, 0, SPEC.dtype)
    if by != 1:
        for index in range(tl.program_id(0), rows, tl.num_programs(0)):
            unit = opened(row_start(grad, index), (), width, True, SPEC)
            sweep(_scale_tile, (), (unit.student, unit.head, width, by), unit, None, SPEC)
