"""The row kernels. What passes compute is in statistics.py (A) and passes.py (B, C), how they read in sweep.py; sums.py
and row_math.py have a row's mathematics, per_row.py what it has beside its logits.

    loss_grad_short   a row and its teachers' stay in the registers of one program: each logit is read once
    loss_grad_long    pass A over the row, then pass C over it once more; pass B in between where there is one
    stats             pass A (and B), to the rows' coefficients
    sums              pass A alone, of a shard's classes, or of segments of few and long rows, which reductions.py joins
    pointwise_sums    pass B alone, of a shard's classes, from the sums of all shards
    grad              pass C alone, from the rows' coefficients

A program that keeps no row in registers reads it twice, or three times where B is there. Each sweep starts where the
one before it ended, since the last classes read are those that the caches still hold; the first sweeps ask them to hold
on to their lines, the last one's reads and the gradient's stores ask for no room. That helps as far as the rows in
flight fit into the L2, so launch.py bounds how many programs there are, each of which goes from row to row.

Arguments of all of them: student, output and each of teachers is a matrix as tiles.py has it; per_row and numbers are
spec.PerRow and spec.Numbers.

A branch with a reduction in it makes the compiler provide for threads that part ways (at V = 32768 it spilled 96 bytes
for that on sm_90). So a row that drops out is a row of no classes, and only arithmetic stands in branches.
"""

import triton
import triton.language as tl

from kdfast.triton import metrics
from kdfast.triton.logits import moments_pass, no_moments, rescaled, standardized
from kdfast.triton.passes import add_divergence, no_sums, sums_of_row, write_gradient
from kdfast.triton.per_row import (
    first_difference,
    gradient_factor,
    kept_row,
    label_and_divisor,
    label_logits,
    row_scales,
    segment_of,
    share_of_row,
    term_factors,
)
from kdfast.triton.row_math import loss_and_coefficients
from kdfast.triton.statistics import accumulate, exponent, finite, hard_exponent, hard_offset, no_statistics
from kdfast.triton.sums import linear_divergence, merge, scales_of
from kdfast.triton.sweep import opened, sweep
from kdfast.triton.tables import as_columns, coefficients_in, load_line, store_line, sums_as_columns, sums_in
from kdfast.triton.tiles import row_start, row_starts, row_value, zero

# Nothing is compiled for once more because it is 1 or a multiple of 16; what tuples hold, matrices.py keeps from it.
MATRICES = ["student", "teachers", "output", "per_row", "numbers"]
SIZES = ["rows", "vocab", "width", "ignore_index", "segments", "segment"]


@triton.jit
def store_row(per_row, index, rows, loss, values, kept, label, share, vocab, SPEC: tl.constexpr):
    """A row's share of the loss, and its metrics."""
    if per_row.losses is not None:
        if per_row.labels is not None:
            loss = tl.where(label >= 0, loss, float("nan"))
        tl.store(per_row.losses + index, tl.where(kept, share * loss, 0))
    if SPEC.metrics:
        metrics.write(per_row, index, rows, values, kept, label, vocab, SPEC)


@triton.jit
def loss_of_row(
    student, teachers, per_row, numbers, index, rows, vocab, ignore_index, READERS: tl.constexpr, SPEC: tl.constexpr
):
    """Passes A and B of a row, whose loss and metrics are stored; what is left to do: (unit, row, coefficients)."""
    kept, label, weight = kept_row(per_row, index, ignore_index, vocab, READERS, SPEC)
    row = row_scales(per_row, index, numbers, label, SPEC)
    s, ts = row_start(student, index), row_starts(teachers, index, 0)
    unit = opened(s, ts, tl.where(kept, vocab, 0), kept, SPEC)
    logit, divisor = label_and_divisor(s, label, per_row.divisor, SPEC)
    if SPEC.standardize:
        moments = sweep(moments_pass, no_moments(ts, SPEC), (), unit, row, SPEC, NUMBER=1, AGAIN=True, DOWN=True)
        row = standardized(row, moments)
    at_label = label_logits(logit, ts, row, SPEC)
    statistics = no_statistics(first_difference(s, ts, row, SPEC), SPEC)
    statistics = merge(sweep(accumulate, statistics, (), unit, row, SPEC, AGAIN=True), row, SPEC)
    scales = scales_of(statistics, at_label, row, SPEC)
    sums = ()
    if SPEC.divergence is not None:
        if SPEC.linear:
            sums = linear_divergence(statistics, row, SPEC)
        else:
            sums = sweep(add_divergence, no_sums(SPEC), scales, unit, row, SPEC, NUMBER=2, AGAIN=True, DOWN=True)
            sums = sums_of_row(sums, SPEC)
    share = share_of_row(weight, numbers.scale, divisor, SPEC)
    factors = term_factors(numbers, gradient_factor(per_row, label, share), SPEC)
    loss, coefficients, further, values = loss_and_coefficients(
        statistics, scales, sums, at_label, row, factors, vocab.to(SPEC.dtype), SPEC
    )
    store_row(per_row, index, rows, loss, values, kept, label, share, vocab, SPEC)
    return unit, row, (coefficients, further)


@triton.jit
def loss_grad_of_row(
    student, teachers, output, per_row, numbers, index, rows, vocab, width, ignore_index, SPEC: tl.constexpr
):
    unit, row, found = loss_of_row(student, teachers, per_row, numbers, index, rows, vocab, ignore_index, 32, SPEC)
    out = row_start(output, index)
    given = (out, unit.head, unit.n, found[0], found[1])
    sweep(write_gradient, (), given, unit, row, SPEC, NUMBER=3, DOWN=SPEC.linear)
    zero(out + unit.n, width - unit.n, SPEC)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def loss_grad_long(
    student, teachers, output, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, width: tl.int32, ignore_index: tl.int64, SPEC: tl.constexpr,
):  # fmt: skip
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        loss_grad_of_row(student, teachers, output, per_row, numbers, index, rows, vocab, width, ignore_index, SPEC)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def loss_grad_short(
    student, teachers, output, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, width: tl.int32, ignore_index: tl.int64, SPEC: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    loss_grad_of_row(student, teachers, output, per_row, numbers, index, rows, vocab, width, ignore_index, SPEC)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def stats(
    student, teachers, table, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64, COLUMNS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Each row's loss and its coefficients, (rows, COLUMNS)."""
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        found = loss_of_row(
            student, teachers, per_row, numbers, index, rows, vocab, ignore_index, SPEC.lanes, SPEC
        )[2]  # fmt: skip
        store_line(table, index, as_columns(found[0], found[1]), COLUMNS, SPEC)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def sums(
    student, teachers, table, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64, segments: tl.int32, segment: tl.int32,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Each segment's sums of `segment` classes, (rows, segments, COLUMNS): WHOLE, or what split rows have."""
    for at in range(tl.program_id(0), rows * segments, tl.num_programs(0)):
        index = at // segments
        kept, label, weight = kept_row(per_row, index, ignore_index, vocab, SPEC.lanes, SPEC)
        row = row_scales(per_row, index, numbers, label, SPEC)
        s, ts = row_start(student, index), row_starts(teachers, index, 0)
        begin, end = segment_of(s, at, segments, segment, vocab, kept, SPEC.vec)
        unit = opened(s + begin, row_starts(teachers, index, begin), end - begin, kept, SPEC)
        statistics = no_statistics(first_difference(s, ts, row, SPEC), SPEC)
        found = merge(sweep(accumulate, statistics, (), unit, row, SPEC, AGAIN=True), row, SPEC)
        y = found.student.total
        if WHOLE:
            logit, divisor = label_and_divisor(s, label, None, SPEC)
            logit = label_logits(logit, (), row, SPEC)[0]
            offset = finite(found.student.offset)
            y = hard_exponent(logit, exponent(logit, row.slope, offset), hard_offset(offset, row, SPEC), row, SPEC)
            y = tl.where(kept & (label >= 0), y, float("-inf"))
        store_line(table, at, sums_as_columns(found, y, unit.n, row, WHOLE, SPEC), COLUMNS, SPEC)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def pointwise_sums(
    student, teachers, table, of_all, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64, COLUMNS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """phi and psi of each row's classes, (rows, 2), from the sums of all of its classes, (rows, COLUMNS)."""
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        kept, label, weight = kept_row(per_row, index, ignore_index, vocab, SPEC.lanes, SPEC)
        row = row_scales(per_row, index, numbers, label, SPEC)
        unit = opened(
            row_start(student, index), row_starts(teachers, index, 0), tl.where(kept, vocab, 0), kept, SPEC
        )  # fmt: skip
        scales = scales_of(sums_in(load_line(of_all, index, COLUMNS, SPEC), SPEC), (), row, SPEC)
        found = sums_of_row(sweep(add_divergence, no_sums(SPEC), scales, unit, row, SPEC, NUMBER=2), SPEC)
        store_line(table, index, (found.phi, found.psi), 2, SPEC)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def grad(
    student, teachers, output, table, per_row, numbers,
    vocab: tl.int32, width: tl.int32, ignore_index: tl.int64, segments: tl.int32, segment: tl.int32,
    COLUMNS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """The gradient of each segment of `segment` classes, from the coefficients of the row, (rows, COLUMNS)."""
    at = tl.program_id(0)
    index = at // segments
    kept, label, weight = kept_row(per_row, index, ignore_index, vocab, SPEC.lanes, SPEC)
    s = row_start(student, index)
    begin, end = segment_of(s, at, segments, segment, vocab, kept, SPEC.vec)
    row = row_scales(per_row, index, numbers, label - begin, SPEC)
    factor = tl.full((), 1, SPEC.dtype)
    if per_row.grad_loss is not None:
        factor = row_value(per_row.grad_loss, index, SPEC.dtype)
    coefficients, further = coefficients_in(load_line(table, index, COLUMNS, SPEC), factor, len(teachers))
    if SPEC.standardize:
        row = rescaled(row, coefficients, further)
    out = row_start(output, index)
    unit = opened(s + begin, row_starts(teachers, index, begin), end - begin, kept, SPEC)
    given = (out + begin, unit.head, unit.n, coefficients, further)
    sweep(write_gradient, (), given, unit, row, SPEC, NUMBER=3, DOWN=SPEC.linear)
    # padding is the last segment's, and of a row that drops out all is the first one's
    writes_rest = at % segments == tl.where(kept, segments - 1, 0)
    zero(out + end, tl.where(writes_rest, width - end, 0), SPEC)
