"""Kernels of one number for many: the mean's denominator, a reduced loss, segments joined; and backward's factor.

Sums are of a fixed order, by one program: the same bits at every run.
"""

import triton
import triton.language as tl

from kdfast.triton.logits import prepared
from kdfast.triton.per_row import number, row_of, term_factors
from kdfast.triton.row_passes import finish, linear_divergence
from kdfast.triton.statistics import merge
from kdfast.triton.tables import statistics_in, table_row
from kdfast.triton.tiles import end_classes, head_of, load_body, row_start, row_value, store_body, widened

RUN_TIME = ["student", "per_row", "numbers", "grad", "scale", "rows", "vocab", "width", "ignore_index", "segments"]


@triton.jit
def _weights(labels, weight, at, there, ignore_index, dtype: tl.constexpr):
    """The weights with which rows enter the mean: 0 for those that drop out."""
    w = there.to(dtype)
    if weight is not None:
        w = tl.load(weight + at, mask=there, other=0).to(dtype)
    if labels is not None:
        w = tl.where(tl.load(labels + at, mask=there, other=ignore_index) != ignore_index, w, 0)
    return w


@triton.jit(do_not_specialize=RUN_TIME)
def normalizer(
    labels, weight, divisor, rows: tl.int32, ignore_index: tl.int64, LANES: tl.constexpr, dtype: tl.constexpr
):
    total = tl.zeros((LANES,), dtype)
    for first in range(0, rows, LANES):
        at = first + tl.arange(0, LANES)
        total += _weights(labels, weight, at, at < rows, ignore_index, dtype)
    tl.store(divisor, tl.sum(total, 0))


@triton.jit(do_not_specialize=RUN_TIME)
def reduce(losses, divisor, scale, loss, rows: tl.int32, LANES: tl.constexpr, dtype: tl.constexpr):
    total = tl.zeros((LANES,), dtype)
    for first in range(0, rows, LANES):
        at = first + tl.arange(0, LANES)
        total += tl.load(losses + at, mask=at < rows, other=0)
    tl.store(loss, _mean(tl.sum(total, 0), divisor, scale, dtype))


@triton.jit(do_not_specialize=RUN_TIME)
def average(
    by_row, labels, weight, metrics, rows: tl.int32, ignore_index: tl.int64, LANES: tl.constexpr, COUNT: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """KDMetrics from those of the rows, (COUNT, rows): weighted means over the rows kept; NaN where there are none."""
    column = tl.arange(0, 8)[:, None]
    total, sums = tl.zeros((LANES,), dtype), tl.zeros((8, LANES), dtype)
    for first in range(0, rows, LANES):
        at = first + tl.arange(0, LANES)
        w = _weights(labels, weight, at, at < rows, ignore_index, dtype)
        cells = (rows + tl.zeros((), tl.int64)) * column + at[None, :]
        values = tl.load(by_row + cells, mask=(column < COUNT) & (at < rows)[None, :], other=0)
        total += w
        sums += tl.where((w != 0)[None, :], values * w[None, :], 0)
    means = tl.sum(sums, 1) / tl.sum(total, 0)
    tl.store(metrics + tl.arange(0, 8), means, mask=tl.arange(0, 8) < COUNT)


@triton.jit
def _mean(total, divisor, scale, dtype: tl.constexpr):
    by = number(scale, dtype)
    if divisor is not None:
        d = row_value(divisor, 0, dtype)
        by *= tl.where(d == 0, 0, 1 / d)  # no row is kept: the mean is 0
    return total * by


@triton.jit
def _by_row(data, at, there, fallback, dtype: tl.constexpr):
    if data is None:
        return number(fallback, dtype) + tl.zeros(at.shape, dtype)
    else:
        return tl.load(data + at, mask=there, other=1).to(dtype)


@triton.jit(do_not_specialize=RUN_TIME)
def join(
    student, parts, table, loss, new_divisor, per_row, numbers, rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64,
    segments: tl.int32, members: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Few and long rows, all of them at once: their statistics and losses, the denominator, the reduced loss."""
    at = tl.arange(0, ROWS)
    there = at < rows
    row = tl.minimum(at, rows - 1)
    t = _by_row(per_row[3], row, there, numbers[0], SPEC.dtype)
    t_teacher = _by_row(per_row[4], row, there, numbers[1], SPEC.dtype)
    scalars = row_of(t, t_teacher, numbers, None, SPEC)

    part = tl.arange(0, SEGMENTS)[:, None, None]
    column = tl.arange(0, WIDTH)
    cells = (row[None, :, None] * segments + part).to(tl.int64) * COLUMNS + column[None, None, :]
    nothing = tl.where(column <= 1, float("-inf"), 0)[None, None, :]
    lines = tl.load(parts + cells, mask=(part < segments) & (column < COLUMNS)[None, None, :], other=nothing)
    statistics = merge(statistics_in(lines, members, SPEC), scalars, SPEC)
    line = table_row(statistics, statistics.student.total, tl.zeros((ROWS, WIDTH), SPEC.dtype), SPEC)
    tl.store(table + at[:, None] * COLUMNS + column[None, :], line, mask=there[:, None] & (column < COLUMNS)[None, :])

    label = tl.zeros((ROWS,), tl.int32)
    logit = tl.zeros((ROWS,), SPEC.dtype)
    kept = _weights(per_row[1], per_row[2], row, there, ignore_index, SPEC.dtype)
    if per_row[1] is not None:
        wide = tl.load(per_row[1] + row)
        label = tl.where((wide >= 0) & (wide < vocab), wide, -1).to(tl.int32)
    if SPEC.hard:
        logit = tl.load(row_start(student, row) + label, mask=there & (label >= 0), other=0).to(SPEC.dtype)
    sums = ((), ())
    if SPEC.divergence is not None:
        sums = (linear_divergence(statistics, scalars, SPEC), ())
    factors = term_factors(numbers, logit, SPEC)
    at_label = prepared(logit, (), scalars, SPEC)
    each, coefficients, none = finish(statistics, sums, at_label, scalars, factors, vocab.to(SPEC.dtype), SPEC)
    each = tl.where(kept != 0, tl.where(label >= 0, each, float("nan")) * kept, 0)
    tl.store(per_row[0] + at, each, mask=there)
    if loss is not None:
        divisor = per_row[6]
        if new_divisor is not None:
            total = tl.sum(kept, 0)
            tl.store(new_divisor, total)
            tl.store(loss, tl.where(total == 0, 0, tl.sum(each, 0) / total))
        else:
            tl.store(loss, _mean(tl.sum(each, 0), divisor, numbers[4], SPEC.dtype))


@triton.jit(do_not_specialize=RUN_TIME)
def scale(grad, factor, rows: tl.int32, width: tl.int32, LANES: tl.constexpr, VEC: tl.constexpr, dtype: tl.constexpr):
    """grad *= factor. Where that is 1, as it is for loss.backward(), nothing more is read and nothing written."""
    by = row_value(factor, 0, dtype)
    if by != 1:
        for index in range(tl.program_id(0), rows, tl.num_programs(0)):
            start = row_start(grad, index)
            head = head_of(start, width, VEC)
            for at in range(0, width - head, LANES * VEC):
                tile = load_body(start, head, at, width, True, True, False, LANES, VEC)
                store_body(start, head, at, width, widened(start, tile, 0, dtype) * by, True)
            ends, there = end_classes(head, width, LANES, VEC)
            x = tl.load(start + ends, mask=there, other=0).to(dtype)
            tl.store(start + ends, (x * by).to(start.dtype.element_ty), mask=there)
