"""Rows whose classes are divided, over programs (segments) or over devices (shards); and backward's factor.

    sums              pass A of each segment, or of a shard
    pointwise_sums    pass B of each segment, or of a shard, from the sums of all of them
    merge_segments    no pass: of rows, from the sums of their segments, the loss and the gradient's coefficients
    losses_and_coefficients    the same from the sums of all shards, which row_math.py has merged
    scale             a gradient times backward's factor

Arguments are those of row_kernels.py.
"""

import triton
import triton.language as tl

from kdfast.triton.classifiers import first_difference
from kdfast.triton.pass_a import accumulate, label_exponent, no_sums
from kdfast.triton.pass_b_c import add_divergence, merge_divergence_sums, no_divergence_sums
from kdfast.triton.per_row import (
    divisor_of_lanes,
    kept_row,
    label_and_divisor,
    label_logits,
    load_row,
    segment_range,
    share_of_row,
    term_factors,
)
from kdfast.triton.row_kernels import MATRICES, SIZES, row_result, store_row
from kdfast.triton.row_math import loss_and_coefficients
from kdfast.triton.sums import DivergenceSums, linear_divergence, merge, softmaxes
from kdfast.triton.sweep import open_span, sweep
from kdfast.triton.tables import (
    COEFFICIENTS,
    coefficient_columns,
    load_parts,
    load_pointwise,
    load_table_row,
    read_all_sums,
    read_sums,
    store_table_row,
    sum_columns,
)
from kdfast.triton.tiles import row_start, row_starts, row_value, store_tile


@triton.jit(do_not_specialize=MATRICES + SIZES)
def sums(
    student, teachers, table, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64, segments: tl.int32, segment: tl.int32,
    SHARD: tl.constexpr, COLUMNS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Each segment's sums of `segment` classes, (rows, segments, COLUMNS), with a label among them of a SHARD alone."""
    for at in range(tl.program_id(0), rows * segments, tl.num_programs(0)):
        index = at // segments
        kept, label, weight = kept_row(per_row, index, ignore_index, vocab, SPEC.lanes, SPEC)
        s, ts = row_start(student, index), row_starts(teachers, index, 0)
        begin, end = segment_range(s, at, segments, segment, vocab, kept, SPEC.vec)
        row = load_row(per_row, index, numbers, label - begin, SPEC)
        span = open_span(s + begin, row_starts(teachers, index, begin), end - begin, kept, SPEC)
        found = no_sums(first_difference(s, ts, row, SPEC), SPEC)
        found = merge(sweep(accumulate, found, (), span, row, SPEC, KEEP_IN_CACHE=True), row, SPEC)
        y, classes = found.student_total, span.n
        if SHARD:
            logit, divisor = label_and_divisor(s, label, None, SPEC)
            y = label_exponent(label_logits(logit, (), row, SPEC).student, found.student_offset, row, SPEC)
            y = tl.where(kept & (label >= 0), y, float("-inf"))
        elif SPEC.smoothed:
            classes = found.classes  # dkd leaves the label's out
        store_table_row(table, at, sum_columns(found, y, classes, SPEC), COLUMNS, SPEC)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def pointwise_sums(
    student, teachers, table, parts, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64, segments: tl.int32, segment: tl.int32,
    SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """The last three of row_math.Sums of each segment's classes, (rows, segments, 3), from the others of all, (rows,
    segments, COLUMNS); of a shard's, from those of all shards, which are merged already."""
    for at in range(tl.program_id(0), rows * segments, tl.num_programs(0)):
        index = at // segments
        kept, label, weight = kept_row(per_row, index, ignore_index, vocab, SPEC.lanes, SPEC)
        s, ts = row_start(student, index), row_starts(teachers, index, 0)
        whole = load_row(per_row, index, numbers, label, SPEC)
        merged = merge(load_parts(parts, index, segments, COLUMNS, SEGMENTS, SPEC), whole, SPEC)
        logit, divisor = label_and_divisor(s, label, None, SPEC)
        divisors = softmaxes(merged, label_logits(logit, ts, whole, SPEC), whole, SPEC)
        begin, end = segment_range(s, at, segments, segment, vocab, kept, SPEC.vec)
        row = load_row(per_row, index, numbers, label - begin, SPEC)
        span = open_span(s + begin, row_starts(teachers, index, begin), end - begin, kept, SPEC)
        found = sweep(add_divergence, no_divergence_sums(SPEC), divisors, span, row, SPEC, NUMBER=2)
        found = merge_divergence_sums(found, SPEC)
        apart = found.phi * 0
        if SPEC.divergence.psi_apart is not None:
            apart = found.apart
        store_table_row(table, at, (apart, found.phi, found.psi), 3, SPEC)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def merge_segments(
    student, teachers, table, pointwise, parts, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64, segments: tl.int32,
    SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Each row's share of the loss and its coefficients, (rows, WIDTH), from the sums of its segments' classes, (rows,
    segments, COLUMNS), and from their phi and psi where there is a pass B."""
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        kept, label, weight = kept_row(per_row, index, ignore_index, vocab, SPEC.lanes, SPEC)
        row = load_row(per_row, index, numbers, label, SPEC)
        s, ts = row_start(student, index), row_starts(teachers, index, 0)
        logit, divisor = label_and_divisor(s, label, divisor_of_lanes(per_row, rows, ignore_index, SPEC), SPEC)
        at_label = label_logits(logit, ts, row, SPEC)
        sums = merge(load_parts(parts, index, segments, COLUMNS, SEGMENTS, SPEC), row, SPEC)
        if SPEC.linear:
            found = linear_divergence(sums, row, SPEC)
        else:
            found = load_pointwise(pointwise, index, segments, SEGMENTS, SPEC)
        share = share_of_row(weight, numbers.scale, divisor, SPEC)
        divisors = softmaxes(sums, at_label, row, SPEC)
        result = row_result(sums, divisors, found, at_label, row, numbers, per_row, share, vocab, SPEC)
        store_row(per_row, index, rows, result, kept, label, share, SPEC)
        store_table_row(table, index, coefficient_columns(result.coefficients, result.further), WIDTH, SPEC)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def losses_and_coefficients(
    student, teachers, table, of_all, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64, COLUMNS: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Each row's loss and its coefficients, 0 where it is dropped, from the sums of all of its classes."""
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        kept, label, weight = kept_row(per_row, index, ignore_index, vocab, SPEC.lanes, SPEC)
        row = load_row(per_row, index, numbers, label, SPEC)
        line = load_table_row(of_all, index, COLUMNS, SPEC)
        sums, columns = read_sums(line, SPEC), read_all_sums(line)
        if SPEC.linear:
            found = linear_divergence(sums, row, SPEC)
        else:
            found = DivergenceSums(columns.phi, columns.psi, (), (), columns.over_student, (), (), (), ())
        divisors, factors = softmaxes(sums, (), row, SPEC), term_factors(numbers, weight, SPEC)
        result = loss_and_coefficients(
            sums, divisors, found, columns.label, (), row, factors, columns.classes, SPEC
        )  # fmt: skip
        tl.store(per_row.losses + index, tl.where(kept, weight * result.loss, 0))
        store_table_row(table, index, coefficient_columns(result.coefficients, ()), COEFFICIENTS, SPEC, kept)


@triton.jit
def _scale_tile(state, tile, context, row, SPEC: tl.constexpr):
    start, prefix, n, by = context
    store_tile(start, prefix, n, tile, tile.s * by, True)
    return state


@triton.jit(do_not_specialize=["grad", *SIZES])
def scale(grad, factor, rows: tl.int32, width: tl.int32, SPEC: tl.constexpr):
    """grad *= factor. Where that is 1, as it is for loss.backward(), nothing more is read and nothing written."""
    by = row_value(factor, 0, SPEC.dtype)
    if by != 1:
        for index in range(tl.program_id(0), rows, tl.num_programs(0)):
            span = open_span(row_start(grad, index), (), width, True, SPEC)
            sweep(_scale_tile, (), (span.student, span.prefix, width, by), span, None, SPEC)
