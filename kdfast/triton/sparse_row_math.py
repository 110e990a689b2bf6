"""From the sums of a row's rest a sparse teacher's loss and its gradient's coefficients; sparse_kernels.py says how.

`sums` are pass_a.Sums of the rest, `row` is spec.Row, `given` support.Given.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.row_math import Coefficients
from kdfast.triton.logits import finite
from kdfast.triton.pass_a import Sums, accumulate, label_exponent, no_sums
from kdfast.triton.pass_b_c import add_divergence, gradient, no_divergence_sums
from kdfast.triton.row_math import RowResult, loss_and_coefficients
from kdfast.triton.sums import Softmaxes, TeacherSoftmax, linear_divergence, softmaxes
from kdfast.triton.support import add_to_rest, common_offset, load_given, rest_logit, row_of, scalar, sum_all
from kdfast.triton.tables import padded_width
from kdfast.triton.tiles import Tile
from kdfast.triton.tiny_rows import as_columns


class Entries(NamedTuple):
    """Pointers to a sparse teacher's rows."""

    log_probs: Any  # (rows, K)
    indices: Any  # (rows, K)
    ordered: Any  # (rows, K + 1) int32: the indices in ascending order, then support.ABSENT; None: not wanted


class Form(NamedTuple):
    """What the kernels are compiled for beside Spec, which is that of the rows."""

    missing: Any
    entries: Any  # K
    dense: Any  # the Spec of the loss of K + 1 classes
    reads_rows: Any  # else only entries are read


class Soft(NamedTuple):
    """What a row has from its entries."""

    given: Any  # support.Given
    gradient: Any  # (1, COLUMNS)
    result: Any  # row_math.RowResult


@triton.jit
def load_log_probs(entries, index, kept, FORM: tl.constexpr, SPEC: tl.constexpr):
    """(1, COLUMNS); -inf where there is no entry."""
    column = tl.arange(0, padded_width(FORM.entries + 1))[None, :]
    line = row_of(entries.log_probs, index, FORM.entries)
    return tl.load(line + column, mask=kept & (column < FORM.entries), other=float("-inf")).to(SPEC.dtype)


@triton.jit
def with_rest(log_p, given, count, vocab, FORM: tl.constexpr):
    """The teacher's log-probabilities with the rest's in their last column."""
    rest = tl.full((), float("-inf"), log_p.dtype)
    if FORM.missing == "tail":
        left = 1 - sum_all(tl.exp(log_p.to(tl.float64)))
        left = tl.log(tl.where(left < 0, 0, left)).to(log_p.dtype)
        rest = tl.where(count == vocab, rest, left)
    rest = tl.where(count == 0, 0, rest)  # no entries: all is rest, on both sides
    return tl.where(given.column == FORM.entries, rest, log_p)


@triton.jit
def soft_results(student, entries, index, kept, sums, row, factors, vocab, FORM: tl.constexpr, SPEC: tl.constexpr):
    """The loss of K + 1 classes; sums: of the rest."""
    DENSE: tl.constexpr = FORM.dense
    log_p = load_log_probs(entries, index, kept, FORM, SPEC)
    present = log_p != float("-inf")
    count = sum_all(present.to(tl.int32))
    given = load_given(student, row_of(entries.indices, index, FORM.entries), present, vocab, row, FORM.entries, SPEC)
    log_p = with_rest(tl.where(given.out_of_range, float("nan"), log_p), given, count, vocab, FORM)
    offset = common_offset(given, sums.student_offset)
    if FORM.missing == "conditional":
        offset = common_offset(given, tl.full((), float("-inf"), SPEC.dtype))
        rest = tl.where(count == 0, 0, float("-inf")).to(SPEC.dtype)
    else:
        rest = rest_logit(sums, offset, row)
    z = tl.where(given.column == FORM.entries, rest, given.s - offset)
    tile = Tile(z, (log_p,), given.column, given.column <= FORM.entries, 0)
    found = accumulate(no_sums(tl.zeros((), SPEC.dtype), DENSE), tile, (), row, DENSE)
    divisors = softmaxes(found, (), row, DENSE)
    if DENSE.linear:
        divergence = linear_divergence(found, row, DENSE)
    else:
        teacher = TeacherSoftmax(*as_columns(divisors.teachers[0]))
        columns = Softmaxes(divisors.student_offset[:, None], divisors.student_total[:, None], (teacher,))
        divergence = add_divergence(no_divergence_sums(DENSE), tile, columns, row, DENSE)
    nothing = found.student_total * 0
    result = loss_and_coefficients(
        found, divisors, divergence, nothing, (), row, factors, vocab.to(SPEC.dtype), DENSE
    )  # fmt: skip
    g = gradient(tile, Coefficients(*as_columns(result.coefficients)), (), row, DENSE)
    return Soft(given, g, result)


@triton.jit
def row_results(sums, soft, at_label, row, factors, vocab, FORM: tl.constexpr, SPEC: tl.constexpr):
    """row_math.RowResult, of both terms."""
    given, loss = soft.given, soft.result.loss
    if FORM.missing == "tail":  # a distribution: rounding may leave less than 0
        loss = tl.where(loss < 0, 0, loss)
    offset = common_offset(given, sums.student_offset)
    hard_total, exponents = sums.student_total * 0 + 1, sums.student_total * 0
    if SPEC.hard:
        hard_total, exponents = add_to_rest(sums, given, offset, row, SPEC)
    total = sums.student_total
    of_all = Sums(offset, total, hard_total, (), exponents, (), (), (), ())
    y = label_exponent(at_label.student, offset, row, SPEC)
    divisors = Softmaxes(finite(sums.student_offset), tl.where(total == 0, 1, total), ())
    hard = loss_and_coefficients(of_all, divisors, (), y, at_label, row, factors, vocab.to(SPEC.dtype), SPEC)
    of_rest = sum_all(tl.where(given.column == FORM.entries, soft.gradient, 0))
    c = hard.coefficients
    c = Coefficients(
        c.student_offset, c.student_total, offset, c.teacher_total, hard_total, of_rest, c.slope, c.teacher, c.soft,
        c.center, c.hard, c.label, c.uniform, c.mean, c.tilt, c.student_unit, c.teacher_unit, c.teacher_mean,
        c.at_label,
    )  # fmt: skip
    loss = scalar(loss) + scalar(hard.loss)
    # an index out of range cannot raise without a wait for the device: it makes its row NaN
    bad = tl.max(tl.max(given.out_of_range.to(tl.int32), 1), 0) > 0
    return RowResult(tl.where(bad, float("nan"), loss), c, (), ())
