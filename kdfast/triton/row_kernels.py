"""The row kernels. What passes compute is in statistics.py and row_passes.py, how they read in rows.py and per_row.py.

    loss_grad_short   a row and its teachers' stay in the registers of one program: each logit is read once
    loss_grad_long    pass A over the row, then pass C over it once more; pass B in between where there is one
    stats             pass A (and B), of whole rows or of segments of few and long ones, which reductions.py joins
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
from kdfast.triton.logits import prepared
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
from kdfast.triton.row_passes import add_divergence, finish, gradient, linear_divergence, no_sums, rescaled, scales_of
from kdfast.triton.rows import (
    add_tiles,
    divergence_of,
    load_ends,
    load_tiles,
    no_moments,
    standardized_row,
    standardizing,
    statistics_of,
    sums_of_row,
    widened_tiles,
    write_gradient,
)
from kdfast.triton.statistics import accumulate, hard_offset, merge, no_statistics
from kdfast.triton.tables import as_columns, coefficients_in, laid, sums_as_columns, width_of
from kdfast.triton.tiles import body_classes, end_classes, head_of, row_start, row_starts, row_value, store_body, zero

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


@triton.jit(do_not_specialize=MATRICES + SIZES)
def loss_grad_long(
    student, teachers, output, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, width: tl.int32, ignore_index: tl.int64,
    members: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        kept, label, weight = kept_row(per_row, index, ignore_index, vocab, 32, SPEC)
        n = tl.where(kept, vocab, 0)
        row = row_scales(per_row, index, numbers, label, SPEC)
        s, ts = row_start(student, index), row_starts(teachers, index, 0)
        logit, divisor = label_and_divisor(s, label, per_row.divisor, LANES, SPEC)
        row = standardized_row(s, ts, n, row, LANES, VEC, SPEC)
        at_label = label_logits(logit, ts, row, SPEC)
        shift = first_difference(s, ts, row, SPEC)
        statistics = statistics_of(s, ts, shift, n, row, members, LANES, VEC, SPEC)
        scales = scales_of(statistics, at_label, row, SPEC)
        sums = divergence_of(s, ts, n, statistics, scales, row, LANES, VEC, SPEC)
        share = share_of_row(weight, numbers.scale, divisor, SPEC)
        factors = term_factors(numbers, gradient_factor(per_row, label, share), SPEC)
        found = finish(statistics, scales, sums, at_label, row, factors, vocab.to(SPEC.dtype), SPEC)
        loss, coefficients, further, values = found
        store_row(per_row, index, rows, loss, values, kept, label, share, vocab, SPEC)
        out = row_start(output, index)
        write_gradient(s, ts, out, n, coefficients, further, row, LANES, VEC, SPEC)
        zero(out + n, width - n, LANES, VEC)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def loss_grad_short(
    student, teachers, output, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, width: tl.int32, ignore_index: tl.int64,
    members: tl.constexpr, TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    kept, label, weight = kept_row(per_row, index, ignore_index, vocab, 32, SPEC)
    n = tl.where(kept, vocab, 0)
    row = row_scales(per_row, index, numbers, label, SPEC)
    s, ts = row_start(student, index), row_starts(teachers, index, 0)
    head = head_of(s, n, VEC)
    held = ()
    for i in tl.static_range(TILES):
        held = held + (load_tiles(s, ts, head, i * (LANES * VEC), n, False, LANES, VEC, SPEC),)
    ends, there = end_classes(head, n, LANES, VEC)
    s_ends, t_ends = load_ends(s, ts, ends, there, SPEC)
    logit, divisor = label_and_divisor(s, label, per_row.divisor, LANES, SPEC)
    opaque, again = (rows < 0).to(tl.int32), (rows < -1).to(tl.int32)  # pass B's and pass C's, see tiles.widened
    classes = body_classes(LANES, VEC)
    body = (n - head) // VEC * VEC
    if SPEC.standardize:
        s_raw, t_raw = prepared(s_ends, t_ends, row, SPEC)
        moments = add_tiles(no_moments(ts, LANES, SPEC), s_raw, t_raw, there)
        for i in tl.static_range(TILES):
            s_tile, t_tiles = widened_tiles(s, ts, held[i], opaque, row, SPEC)
            moments = add_tiles(moments, s_tile, t_tiles, i * (LANES * VEC) + classes < body)
        row = standardizing(moments, row)
    s_ends, t_ends = prepared(s_ends, t_ends, row, SPEC)
    at_label = label_logits(logit, ts, row, SPEC)
    statistics = no_statistics(members, first_difference(s, ts, row, SPEC), LANES, SPEC)
    if kept:
        for i in tl.static_range(TILES):
            s_tile, t_tiles = widened_tiles(s, ts, held[i], 0, row, SPEC)
            at = i * (LANES * VEC)
            statistics = accumulate(statistics, s_tile, t_tiles, head + at + classes, at + classes < body, row, SPEC)
        statistics = accumulate(statistics, s_ends, t_ends, ends, there, row, SPEC)
    statistics = merge(statistics, row, SPEC)
    scales = scales_of(statistics, at_label, row, SPEC)
    if SPEC.divergence is None:
        sums = ((), ())
    elif SPEC.linear:
        sums = (linear_divergence(statistics, row, SPEC), ())
    else:
        sums = add_divergence(no_sums(LANES, SPEC), s_ends, t_ends, ends, there, scales, row, SPEC)
        for i in tl.static_range(TILES):
            s_tile, t_tiles = widened_tiles(s, ts, held[i], opaque, row, SPEC)
            at = i * (LANES * VEC)
            sums = add_divergence(sums, s_tile, t_tiles, head + at + classes, at + classes < body, scales, row, SPEC)
        sums = sums_of_row(sums, SPEC)
    share = share_of_row(weight, numbers.scale, divisor, SPEC)
    factors = term_factors(numbers, gradient_factor(per_row, label, share), SPEC)
    found = finish(statistics, scales, sums, at_label, row, factors, vocab.to(SPEC.dtype), SPEC)
    loss, coefficients, further, values = found
    store_row(per_row, index, rows, loss, values, kept, label, share, vocab, SPEC)
    out = row_start(output, index)
    if kept:
        for i in tl.static_range(TILES):
            s_tile, t_tiles = widened_tiles(s, ts, held[i], again, row, SPEC)
            at = i * (LANES * VEC)
            g = gradient(s_tile, t_tiles, head + at + classes, coefficients, further, row, SPEC)
            store_body(out, head, at, n, g, SPEC.aligned[0])
        g_ends = gradient(s_ends, t_ends, ends, coefficients, further, row, SPEC)
        tl.store(out + ends, g_ends.to(out.dtype.element_ty), mask=there)
    zero(out + n, width - n, LANES, VEC)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def stats(
    student, teachers, table, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64, segments: tl.int32, segment: tl.int32,
    members: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Each row's loss and its coefficients, (rows, COLUMNS); SPLIT: each segment's sums, (rows, segments, COLUMNS)."""
    for unit in range(tl.program_id(0), rows * segments, tl.num_programs(0)):
        index = unit // segments
        kept, label, weight = kept_row(per_row, index, ignore_index, vocab, LANES, SPEC)
        row = row_scales(per_row, index, numbers, label, SPEC)
        s, ts = row_start(student, index), row_starts(teachers, index, 0)
        begin, end = segment_of(s, unit, segments, segment, vocab, kept, VEC)
        row = standardized_row(s, ts, end, row, LANES, VEC, SPEC)
        shift = first_difference(s, ts, row, SPEC)
        parts = row_starts(teachers, index, begin)
        statistics = statistics_of(s + begin, parts, shift, end - begin, row, members, LANES, VEC, SPEC)
        if SPLIT:
            at_1 = hard_offset(statistics.student.offset, row, SPEC)
            columns = sums_as_columns(statistics, at_1, end - begin, SPEC)
        else:
            logit, divisor = label_and_divisor(s, label, per_row.divisor, LANES, SPEC)
            at_label = label_logits(logit, ts, row, SPEC)
            scales = scales_of(statistics, at_label, row, SPEC)
            sums = divergence_of(s, ts, end, statistics, scales, row, LANES, VEC, SPEC)
            share = share_of_row(weight, numbers.scale, divisor, SPEC)
            factors = term_factors(numbers, gradient_factor(per_row, label, share), SPEC)
            found = finish(statistics, scales, sums, at_label, row, factors, vocab.to(SPEC.dtype), SPEC)
            loss, coefficients, further, values = found
            store_row(per_row, index, rows, loss, values, kept, label, share, vocab, SPEC)
            columns = as_columns(coefficients, further)
        WIDTH: tl.constexpr = width_of(COLUMNS)
        lane = tl.arange(0, WIDTH)
        line = laid(columns, tl.zeros((WIDTH,), SPEC.dtype))
        tl.store(table + (unit + tl.zeros((), tl.int64)) * COLUMNS + lane, line, mask=lane < COLUMNS)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def grad(
    student, teachers, output, table, per_row, numbers,
    vocab: tl.int32, width: tl.int32, ignore_index: tl.int64, segments: tl.int32, segment: tl.int32,
    COLUMNS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """The gradient of each segment of `segment` classes, from the coefficients of the row, (rows, COLUMNS)."""
    unit = tl.program_id(0)
    index = unit // segments
    kept, label, weight = kept_row(per_row, index, ignore_index, vocab, LANES, SPEC)
    s = row_start(student, index)
    begin, end = segment_of(s, unit, segments, segment, vocab, kept, VEC)
    row = row_scales(per_row, index, numbers, label - begin, SPEC)
    WIDTH: tl.constexpr = max(LANES, width_of(COLUMNS))  # of the program's threads each reads one at most
    lane = tl.arange(0, WIDTH)
    line = tl.load(table + (index + tl.zeros((), tl.int64)) * COLUMNS + lane, mask=lane < COLUMNS, other=0)
    factor = tl.full((), 1, SPEC.dtype)
    if per_row.grad_loss is not None:
        factor = row_value(per_row.grad_loss, index, SPEC.dtype)
    coefficients, further = coefficients_in(line, factor, max(1, len(teachers)))
    if SPEC.standardize:
        row = rescaled(row, coefficients, further)
    out = row_start(output, index)
    parts = row_starts(teachers, index, begin)
    write_gradient(s + begin, parts, out + begin, end - begin, coefficients, further, row, LANES, VEC, SPEC)
    # padding is the last segment's, and of a row that drops out all is the first one's
    writes_rest = unit % segments == tl.where(kept, segments - 1, 0)
    zero(out + end, tl.where(writes_rest, width - end, 0), LANES, VEC)
