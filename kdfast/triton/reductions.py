"""Segments of few and long rows merged, and backward's factor."""

import triton
import triton.language as tl

from kdfast.triton.logits import adjust_logits
from kdfast.triton.pass_a import label_exponent
from kdfast.triton.per_row import (
    gradient_factor,
    make_row,
    number,
    share_of_row,
    term_factors,
    weights_of_rows,
)
from kdfast.triton.row_math import loss_and_coefficients
from kdfast.triton.sums import linear_divergence, merge, softmaxes
from kdfast.triton.sweep import open_span, sweep
from kdfast.triton.tables import SEGMENT_SUMS, coefficient_columns, padded_width, read_sums, write_columns
from kdfast.triton.tiles import row_start, row_value, store_tile

RUN_TIME = ["student", "per_row", "numbers", "grad", "rows", "vocab", "width", "ignore_index", "segments"]


@triton.jit
def _row_numbers(data, at, mask, fallback, dtype: tl.constexpr):
    if data is None:
        return number(fallback, dtype) + tl.zeros(at.shape, dtype)
    else:
        return tl.load(data + at, mask=mask, other=1).to(dtype)


@triton.jit(do_not_specialize=RUN_TIME)
def merge_segments(
    student, parts, table, loss, per_row, numbers, rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64,
    segments: tl.int32,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Few and long rows, all of them at once, from the sums of their segments, SUMS numbers each: their coefficients,
    COLUMNS each, their shares of the loss, and the sum of these."""
    at = tl.arange(0, ROWS)
    mask = at < rows
    row = tl.minimum(at, rows - 1)
    t = _row_numbers(per_row.temperatures, row, mask, numbers.temperature, SPEC.dtype)
    t_teacher = _row_numbers(per_row.teacher_temperatures, row, mask, numbers.teacher_temperature, SPEC.dtype)
    scalars = make_row(t, t_teacher, numbers, None, SPEC)

    part = tl.arange(0, SEGMENTS)[:, None, None]
    column = tl.arange(0, padded_width(SUMS))
    cells = (row[None, :, None] * segments + part).to(tl.int64) * SUMS + column[None, None, :]
    is_offset = (column == 0) | (column == 2) | ((column >= SEGMENT_SUMS) & ((column - SEGMENT_SUMS) % 3 == 0))
    nothing = tl.where(is_offset, float("-inf"), 0)[None, None, :]
    lines = tl.load(parts + cells, mask=(part < segments) & (column < SUMS)[None, None, :], other=nothing)
    sums = merge(read_sums(lines, False, SPEC), scalars, SPEC)

    label = tl.zeros((ROWS,), tl.int32)
    logit = tl.zeros((ROWS,), SPEC.dtype)
    weight = tl.full((ROWS,), 1, SPEC.dtype)
    if per_row.weights is not None:
        weight = tl.load(per_row.weights + row).to(SPEC.dtype)
    divisor = tl.full((), 1, SPEC.dtype)
    if SPEC.counted:
        divisor = tl.sum(weights_of_rows(per_row, at, rows, ignore_index, SPEC), 0)
    elif per_row.divisor is not None:
        divisor = row_value(per_row.divisor, 0, SPEC.dtype)
    if per_row.labels is not None:
        wide = tl.load(per_row.labels + row)
        label = tl.where((wide >= 0) & (wide < vocab), wide, -1).to(tl.int32)
        weight = tl.where(wide != ignore_index, weight, 0)
    if SPEC.hard:
        logit = tl.load(row_start(student, row) + label, mask=mask & (label >= 0), other=0).to(SPEC.dtype)
    found = ()
    if SPEC.divergence is not None:
        found = linear_divergence(sums, scalars, SPEC)
    share = share_of_row(weight, numbers.scale, divisor, SPEC)
    factors = term_factors(numbers, gradient_factor(per_row, label, share), SPEC)
    at_label = adjust_logits(logit, (), scalars, SPEC)
    divisors = softmaxes(sums, at_label, scalars, SPEC)
    y = label_exponent(at_label.student, sums.student_offset, scalars, SPEC)
    result = loss_and_coefficients(
        sums, divisors, found, y, at_label, scalars, factors, vocab.to(SPEC.dtype), SPEC
    )  # fmt: skip
    columns = coefficient_columns(result.coefficients, result.further)
    line = write_columns(columns, tl.zeros((ROWS, padded_width(COLUMNS)), SPEC.dtype))
    column = tl.arange(0, padded_width(COLUMNS))
    tl.store(table + at[:, None] * COLUMNS + column[None, :], line, mask=mask[:, None] & (column < COLUMNS)[None, :])
    each = result.loss
    if per_row.labels is not None:
        each = tl.where(label >= 0, each, float("nan"))
    each = tl.where(mask & (weight != 0), each * share, 0)
    tl.store(per_row.losses + at, each, mask=mask)
    tl.store(loss, tl.sum(each, 0))


@triton.jit
def _scale_tile(state, tile, context, row, SPEC: tl.constexpr):
    start, prefix, n, by = context
    store_tile(start, prefix, n, tile, tile.s * by, True)
    return state


@triton.jit(do_not_specialize=RUN_TIME)
def scale(grad, factor, rows: tl.int32, width: tl.int32, SPEC: tl.constexpr):
    """grad *= factor. Where that is 1, as it is for loss.backward(), nothing more is read and nothing written."""
    by = row_value(factor, 0, SPEC.dtype)
    if by != 1:
        for index in range(tl.program_id(0), rows, tl.num_programs(0)):
            span = open_span(row_start(grad, index), (), width, True, SPEC)
            sweep(_scale_tile, (), (span.student, span.prefix, width, by), span, None, SPEC)
