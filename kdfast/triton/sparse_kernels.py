"""The row kernels of sparse teachers.

A row is a dense loss of K + 1 classes, which are in the registers of one program: its K entries, and one in the place
of the rest, of logit T logsumexp(z / T) over the rest. Its divergence and its gradient G are the dense functions'. Then

    dl/dz_j = G_rest Q_j / sum of Q over the rest      for a class of the rest        dl/dz_k = G_k      for an entry

with the hard term's gradient added at every class. The gradient of a row is written as if every class were of the rest,
then its entries over it.

    loss_grad_short, loss_grad_long, stats, grad        as in row_kernels.py

The table of `stats` has Coefficients, then G_k. Of the coefficients teacher_offset is that of hard_total, and level is
G_rest; student_offset and student_total are the rest's.
"""

import triton
import triton.language as tl

from kdfast.row_math import Coefficients
from kdfast.triton.logits import exponent, softcap_derivative
from kdfast.triton.pass_a import hard_exps, hard_scale
from kdfast.triton.per_row import (
    divisor_of_lanes,
    gradient_factor,
    kept_row,
    label_and_divisor,
    label_logits,
    load_row,
    number,
    share_of_row,
    term_factors,
)
from kdfast.triton.row_kernels import store_row
from kdfast.triton.sparse_row_math import load_log_probs, row_results, soft_results
from kdfast.triton.support import hard_exps_of, load_given, rest_sums, row_of
from kdfast.triton.sweep import open_span, sweep
from kdfast.triton.tables import (
    COEFFICIENTS,
    coefficient_columns,
    padded_width,
    read_columns,
    scale_coefficients,
    write_columns,
)
from kdfast.triton.tiles import row_start, row_value, store_tile, zero

RUN_TIME = ["student", "output", "entries", "per_row", "numbers", "rows", "vocab", "width", "ignore_index"]


@triton.jit
def row_stats(
    student, entries, per_row, numbers, index, rows, vocab, ignore_index,
    READERS: tl.constexpr, FORM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """A row's loss, which is stored, its span, spec.Row, coefficients, and Soft."""
    kept, label, weight = kept_row(per_row, index, ignore_index, vocab, READERS, SPEC)
    row = load_row(per_row, index, numbers, label, SPEC)
    s = row_start(student, index)
    span = open_span(s, (), tl.where(kept & FORM.reads_rows, vocab, 0), kept, SPEC)
    logit, divisor = label_and_divisor(s, label, divisor_of_lanes(per_row, rows, ignore_index, SPEC), SPEC)
    at_label = label_logits(logit, (), row, SPEC)
    sums = rest_sums(span, entries.ordered, index, row, FORM.entries, SPEC)
    share = share_of_row(weight, numbers.scale, divisor, SPEC)
    factors = term_factors(numbers, gradient_factor(per_row, label, share), SPEC)
    soft = soft_results(s, entries, index, kept, sums, row, factors, vocab, FORM, SPEC)
    result = row_results(sums, soft, at_label, row, factors, vocab, FORM, SPEC)
    store_row(per_row, index, rows, result, kept, label, share, SPEC)
    return span, row, result.coefficients, soft


@triton.jit
def entry_gradient(given, soft, c, row, factor, SPEC: tl.constexpr):
    """dl/ds of the entries, (1, COLUMNS); soft: of the divergence, without the factor that c has already."""
    g = soft * factor
    if SPEC.labelled or SPEC.z_loss:
        g += c.hard * (1 / c.hard_total) * hard_exps_of(given.s, c.teacher_offset, row, SPEC)
    if SPEC.labelled and SPEC.smoothed:
        g -= c.uniform
    if SPEC.labelled:
        g = tl.where(given.classes == row.label, g - c.label, g)
    if SPEC.softcap:
        g = g * softcap_derivative(given.s, row, SPEC)
    return g


@triton.jit
def _write_rest(state, tile, context, row, SPEC: tl.constexpr):
    """The gradient of a tile, as if all of its classes were of the rest."""
    out, prefix, n, c = context
    y = exponent(tile.s, row.exp2_scale, c.student_offset)
    e = tl.exp2(y)
    g = c.level * (1 / c.student_total) * e
    if SPEC.labelled or SPEC.z_loss:
        change = exponent(c.student_offset, hard_scale(row, SPEC), c.teacher_offset)
        g += c.hard * (1 / c.hard_total) * tl.exp2(change) * hard_exps(tile.s, e, c.student_offset, row, SPEC)
    if SPEC.labelled and SPEC.smoothed:
        g -= c.uniform
    if SPEC.labelled:
        g = tl.where(tile.classes == row.label, g - c.label, g)
    if SPEC.softcap:
        g = g * softcap_derivative(tile.s, row, SPEC)
    store_tile(out, prefix, n, tile, g, SPEC.aligned[0])
    return state


@triton.jit
def write_gradient(
    out, span, row, given, soft, c, factor, width, REVERSED: tl.constexpr, FORM: tl.constexpr, SPEC: tl.constexpr
):
    """c: not yet scaled."""
    c = scale_coefficients(c, factor)
    g = entry_gradient(given, soft, c, row, factor, SPEC)
    tl.debug_barrier()  # in place, entries are read before anything is written
    if FORM.reads_rows:
        sweep(_write_rest, (), (out, span.prefix, span.n, c), span, row, SPEC, NUMBER=3, REVERSED=REVERSED)
    zero(out + span.n, width - span.n, SPEC)
    tl.debug_barrier()  # entries come last
    tl.store(out + given.classes, g.to(out.dtype.element_ty), mask=given.used)


@triton.jit
def loss_grad_of_row(
    student, output, entries, per_row, numbers, index, rows, vocab, width, ignore_index,
    FORM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    span, row, c, soft = row_stats(
        student, entries, per_row, numbers, index, rows, vocab, ignore_index, 32, FORM, SPEC
    )  # fmt: skip
    out, factor = row_start(output, index), number(numbers.logit_scale, SPEC.dtype)
    write_gradient(out, span, row, soft.given, soft.gradient, c, factor, width, True, FORM, SPEC)


@triton.jit(do_not_specialize=RUN_TIME)
def sparse_loss_grad_short(
    student, output, entries, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, width: tl.int32, ignore_index: tl.int64, FORM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    loss_grad_of_row(
        student, output, entries, per_row, numbers, index, rows, vocab, width, ignore_index, FORM, SPEC
    )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def sparse_loss_grad_long(
    student, output, entries, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, width: tl.int32, ignore_index: tl.int64, FORM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        loss_grad_of_row(
            student, output, entries, per_row, numbers, index, rows, vocab, width, ignore_index, FORM, SPEC
        )  # fmt: skip


@triton.jit(do_not_specialize=RUN_TIME)
def sparse_stats(
    student, table, entries, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, ignore_index: tl.int64, FORM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Each row's loss, its coefficients, and G of its entries."""
    WIDTH: tl.constexpr = padded_width(COEFFICIENTS)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        span, row, c, soft = row_stats(
            student, entries, per_row, numbers, index, rows, vocab, ignore_index, SPEC.lanes, FORM, SPEC
        )  # fmt: skip
        line = row_of(table, index, COEFFICIENTS + FORM.entries)
        lane = tl.arange(0, WIDTH)
        columns = write_columns(coefficient_columns(c, ()), tl.zeros((WIDTH,), SPEC.dtype))
        tl.store(line + lane, columns, mask=lane < COEFFICIENTS)
        column = soft.given.column
        tl.store(line + COEFFICIENTS + column, soft.gradient, mask=column < FORM.entries)


@triton.jit(do_not_specialize=RUN_TIME)
def sparse_grad(
    student, output, table, entries, per_row, numbers,
    vocab: tl.int32, width: tl.int32, ignore_index: tl.int64, FORM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """The gradient of each row, from its line of the table."""
    index = tl.program_id(0)
    kept, label, weight = kept_row(per_row, index, ignore_index, vocab, SPEC.lanes, SPEC)
    row = load_row(per_row, index, numbers, label, SPEC)
    s, out = row_start(student, index), row_start(output, index)
    factor = number(numbers.logit_scale, SPEC.dtype) * row_value(per_row.grad_loss, index, SPEC.dtype)
    line = row_of(table, index, COEFFICIENTS + FORM.entries)
    lane = tl.arange(0, max(4 * SPEC.lanes, padded_width(COEFFICIENTS)))  # as load_table_row
    c = Coefficients(*read_columns(tl.load(line + lane, mask=lane < COEFFICIENTS, other=0), 0, COEFFICIENTS))
    present = load_log_probs(entries, index, kept, FORM, SPEC) != float("-inf")
    given = load_given(s, row_of(entries.indices, index, FORM.entries), present, vocab, row, FORM.entries, SPEC)
    there = given.column < FORM.entries
    soft = tl.load(line + COEFFICIENTS + given.column, mask=there, other=0)
    span = open_span(s, (), tl.where(kept & FORM.reads_rows, vocab, 0), kept, SPEC)
    write_gradient(out, span, row, given, soft, c, factor, width, False, FORM, SPEC)
