"""The row kernels. What passes compute is in pass_a.py and pass_b_c.py, how they read in sweep.py; sums.py and
row_math.py have a row's mathematics, per_row.py what it has besides its logits.

    loss_grad_short   a row and its teachers' stay in the registers of one program: each logit is read once
    loss_grad_long    pass A over the row, then pass C over it once more; pass B in between where there is one
    stats             pass A (and B), to the rows' coefficients
    grad              pass C alone, from the rows' coefficients

Rows whose classes are divided, over programs or over devices, take passes A and B in reductions.py; tiny_rows.py has
rows of which a program takes several.

A program that keeps no row in registers reads it twice, or three times where B is there, and goes from row to row. Each
sweep starts where the one before it ended, since the last classes read are those that the caches still hold; loads of
the first sweeps ask them to hold on to their lines, the last one's and the gradient's stores ask for no room.

Arguments of all of them: student, output and each of teachers is a matrix as tiles.py has it; per_row and numbers are
spec.PerRow and spec.Numbers.

A branch with a reduction in it makes the compiler provide for threads that part ways (at V = 32768 it spilled 96 bytes
for that on sm_90). So a dropped row is a row of no classes, and only arithmetic stands in branches.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.triton import metrics
from kdfast.triton.classifiers import add_scalings, first_difference, load_scalings, moments_pass, no_moments
from kdfast.triton.pass_a import accumulate, label_exponent, no_sums
from kdfast.triton.pass_b_c import (
    add_divergence,
    merge_divergence_sums,
    no_divergence_sums,
    write_gradient,
)
from kdfast.triton.per_row import (
    divisor_of_lanes,
    gradient_factor,
    kept_row,
    label_and_divisor,
    label_logits,
    load_row,
    number,
    segment_range,
    share_of_row,
    term_factors,
)
from kdfast.triton.row_math import loss_and_coefficients
from kdfast.triton.sums import linear_divergence, merge, softmaxes
from kdfast.triton.sweep import open_span, sweep
from kdfast.triton.tables import (
    coefficient_columns,
    load_table_row,
    read_coefficients,
    scale_coefficients,
    store_table_row,
)
from kdfast.triton.tiles import row_start, row_starts, row_value, zero

# Not specialized on value 1 or divisibility by 16. For values inside tuples see matrices.py.
MATRICES = ["student", "teachers", "output", "per_row", "numbers"]
SIZES = ["rows", "vocab", "width", "ignore_index", "segments", "segment"]


class RowStats(NamedTuple):
    """What is left to do after passes A and B."""

    span: Any
    row: Any
    coefficients: Any
    further: Any


@triton.jit
def store_row(per_row, index, rows, found, kept, label, share, SPEC: tl.constexpr):
    """A row's share of the loss, and its metrics; found: row_math.RowResult."""
    loss = found.loss
    if per_row.losses is not None:
        if per_row.labels is not None:
            loss = tl.where(label >= 0, loss, float("nan"))
        tl.store(per_row.losses + index, tl.where(kept, share * loss, 0))
    if SPEC.metrics:
        metrics.store(per_row, index, rows, found.metrics, kept, label, SPEC)


@triton.jit
def row_result(sums, divisors, found, at_label, row, numbers, per_row, share, vocab, SPEC: tl.constexpr):
    """row_math.RowResult, from a row's sums; found: sums.DivergenceSums; share: of the row, of the loss."""
    factors = term_factors(numbers, gradient_factor(per_row, row.label, share), SPEC)
    y = label_exponent(at_label.student, sums.student_offset, row, SPEC)
    return loss_and_coefficients(sums, divisors, found, y, at_label, row, factors, vocab.to(SPEC.dtype), SPEC)


@triton.jit
def row_stats(
    student, teachers, per_row, numbers, index, rows, vocab, ignore_index, READERS: tl.constexpr, SPEC: tl.constexpr
):
    """Passes A and B of a row, whose loss and metrics are stored."""
    kept, label, weight = kept_row(per_row, index, ignore_index, vocab, READERS, SPEC)
    row = load_row(per_row, index, numbers, label, SPEC)
    s, ts = row_start(student, index), row_starts(teachers, index, 0)
    span = open_span(s, ts, tl.where(kept, vocab, 0), kept, SPEC)
    logit, divisor = label_and_divisor(s, label, divisor_of_lanes(per_row, rows, ignore_index, SPEC), SPEC)
    if SPEC.standardize:
        moments = no_moments(ts, SPEC)
        moments = sweep(moments_pass, moments, (), span, row, SPEC, NUMBER=1, KEEP_IN_CACHE=True, REVERSED=True)
        row = add_scalings(row, moments)
    at_label = label_logits(logit, ts, row, SPEC)
    sums = no_sums(first_difference(s, ts, row, SPEC), SPEC)
    sums = merge(sweep(accumulate, sums, (), span, row, SPEC, KEEP_IN_CACHE=True), row, SPEC)
    divisors = softmaxes(sums, at_label, row, SPEC)
    if SPEC.linear:
        found = linear_divergence(sums, row, SPEC)
    else:
        found = no_divergence_sums(SPEC)
        found = sweep(add_divergence, found, divisors, span, row, SPEC, NUMBER=2, KEEP_IN_CACHE=True, REVERSED=True)
        found = merge_divergence_sums(found, SPEC)
    share = share_of_row(weight, numbers.scale, divisor, SPEC)
    result = row_result(sums, divisors, found, at_label, row, numbers, per_row, share, vocab, SPEC)
    store_row(per_row, index, rows, result, kept, label, share, SPEC)
    return RowStats(span, row, result.coefficients, result.further)


@triton.jit
def loss_grad_of_row(
    student, teachers, output, per_row, numbers, index, rows, vocab, width, ignore_index, SPEC: tl.constexpr
):
    found = row_stats(student, teachers, per_row, numbers, index, rows, vocab, ignore_index, 32, SPEC)
    span = found.span
    out = row_start(output, index)
    coefficients = scale_coefficients(found.coefficients, number(numbers.logit_scale, SPEC.dtype))
    context = (out, span.prefix, span.n, coefficients, found.further)
    sweep(write_gradient, (), context, span, found.row, SPEC, NUMBER=3, REVERSED=SPEC.linear)
    zero(out + span.n, width - span.n, SPEC)


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
        found = row_stats(student, teachers, per_row, numbers, index, rows, vocab, ignore_index, SPEC.lanes, SPEC)
        store_table_row(table, index, coefficient_columns(found.coefficients, found.further), COLUMNS, SPEC)


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
    begin, end = segment_range(s, at, segments, segment, vocab, kept, SPEC.vec)
    row = load_row(per_row, index, numbers, label - begin, SPEC)
    factor = number(numbers.logit_scale, SPEC.dtype)
    if per_row.grad_loss is not None:
        factor *= row_value(per_row.grad_loss, index, SPEC.dtype)
    coefficients, further = read_coefficients(load_table_row(table, index, COLUMNS, SPEC), factor, len(teachers))
    if SPEC.standardize:
        row = load_scalings(row, coefficients, further)
    out = row_start(output, index)
    span = open_span(s + begin, row_starts(teachers, index, begin), end - begin, kept, SPEC)
    context = (out + begin, span.prefix, span.n, coefficients, further)
    sweep(write_gradient, (), context, span, row, SPEC, NUMBER=3, REVERSED=SPEC.linear)
    # padding is the last segment's, and of a dropped row all is the first one's
    writes_rest = at % segments == tl.where(kept, segments - 1, 0)
    zero(out + end, tl.where(writes_rest, width - end, 0), SPEC)
