"""loss_grad of rows of few classes, of which a program takes several.

A row is a lane here: a tile is (ROWS, CLASSES), so what passes A and B leave to each lane is a row's already. Arguments
are those of row_kernels.py.
"""

import triton
import triton.language as tl

from kdfast.row_math import Coefficients
from kdfast.triton.classifiers import difference
from kdfast.triton.logits import Logits, adjust_logits
from kdfast.triton.pass_a import accumulate, label_exponent, no_sums
from kdfast.triton.pass_b_c import add_divergence, gradient, no_divergence_sums
from kdfast.triton.per_row import (
    COUNTED_ROWS,
    gradient_factor,
    load_row,
    number,
    share_of_row,
    term_factors,
    weights_of_rows,
)
from kdfast.triton.row_kernels import MATRICES, SIZES
from kdfast.triton.row_math import loss_and_coefficients
from kdfast.triton.spec import Further
from kdfast.triton.sums import Softmaxes, TeacherSoftmax, linear_divergence, softmaxes
from kdfast.triton.tables import scale_coefficients
from kdfast.triton.tiles import Tile, fill_lanes, row_start, row_value


@triton.jit
def as_columns(values):
    """Numbers of rows, (ROWS,) each, to be used with tiles of these rows."""
    columns = ()
    for k in tl.static_range(len(values)):
        columns = columns + (values[k][:, None],)
    return columns


@triton.jit
def _load_tile(student, teachers, index, kept, vocab, row, CLASSES: tl.constexpr, SPEC: tl.constexpr):
    """Rows, (ROWS,), as a tile, (ROWS, CLASSES)."""
    classes = tl.arange(0, CLASSES)[None, :]
    mask = kept[:, None] & (classes < vocab)
    fill: tl.constexpr = 0.0 if SPEC.target == "probs" else float("-inf")
    s = tl.load(row_start(student, index)[:, None] + classes, mask=mask, other=float("-inf")).to(SPEC.dtype)
    ts = ()
    for k in tl.static_range(len(teachers)):
        t = tl.load(row_start(teachers[k], index)[:, None] + classes, mask=mask, other=fill)
        ts = ts + (t.to(SPEC.dtype),)
    s, ts = adjust_logits(s, ts, row, SPEC)
    return Tile(s, ts, classes, mask, 0)


@triton.jit
def _row_sums(tile, row, SPEC: tl.constexpr):
    """Each row's, from pass A: nothing is left to merge."""
    center = tl.zeros((), SPEC.dtype)
    if SPEC.difference:
        center = tl.sum(tl.where(tile.classes == 0, difference(tile.s, tile.teachers, row, SPEC), 0), 1)
    return accumulate(no_sums(center, SPEC), tile, (), row, SPEC)


@triton.jit
def _row_results(tile, label, row, factors, vocab, SPEC: tl.constexpr):
    """row_math.RowResult of each row."""
    sums = _row_sums(tile, row, SPEC)
    at_label = Logits(tl.sum(tl.where(tile.classes == label[:, None], tile.s, 0), 1), ())
    divisors = softmaxes(sums, at_label, row, SPEC)
    if SPEC.linear:
        found = linear_divergence(sums, row, SPEC)
    else:
        teachers = ()
        for k in tl.static_range(len(divisors.teachers)):
            teachers = teachers + (TeacherSoftmax(*as_columns(divisors.teachers[k])),)
        of_tile = Softmaxes(divisors.student_offset[:, None], divisors.student_total[:, None], teachers)
        found = add_divergence(no_divergence_sums(SPEC), tile, of_tile, row, SPEC)
    y = label_exponent(at_label.student, sums.student_offset, row, SPEC)
    return loss_and_coefficients(sums, divisors, found, y, at_label, row, factors, vocab.to(SPEC.dtype), SPEC)


@triton.jit(do_not_specialize=MATRICES + SIZES)
def loss_grad_tiny(
    student, teachers, output, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, width: tl.int32, ignore_index: tl.int64,
    CLASSES: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """SPEC.lanes rows a program, of at most CLASSES classes, padding included."""
    index = tl.program_id(0) * SPEC.lanes + tl.arange(0, SPEC.lanes)
    there = index < rows
    kept, label, weight = there, fill_lanes(-1, SPEC).to(tl.int32), fill_lanes(1, SPEC)
    if per_row.labels is not None:
        wide = tl.load(per_row.labels + index, mask=there, other=0)
        kept = kept & (wide != ignore_index)
        label = tl.where((wide >= 0) & (wide < vocab), wide, -1).to(tl.int32)
    if per_row.weights is not None:
        weight = tl.load(per_row.weights + index, mask=there, other=0).to(SPEC.dtype)
        kept = kept & (weight != 0)
    divisor = tl.full((), 1, SPEC.dtype)
    if SPEC.counted:
        divisor = tl.sum(weights_of_rows(per_row, tl.arange(0, COUNTED_ROWS), rows, ignore_index, SPEC), 0)
    elif per_row.divisor is not None:
        divisor = row_value(per_row.divisor, 0, SPEC.dtype)
    row = load_row(per_row, 0, numbers, label[:, None], SPEC)
    tile = _load_tile(student, teachers, index, kept, vocab, row, CLASSES, SPEC)
    share = share_of_row(weight, numbers.scale, divisor, SPEC)
    factors = term_factors(numbers, gradient_factor(per_row, label, share), SPEC)
    result = _row_results(tile, label, row, factors, vocab, SPEC)
    loss = result.loss if per_row.labels is None else tl.where(label >= 0, result.loss, float("nan"))
    loss = tl.where(kept, share * loss, 0)[:, None]
    # by the lanes of the first class: as (ROWS,) it would go through shared memory
    at = tl.where(there, index, 0)[:, None] + tile.classes * 0
    tl.store(per_row.losses + at, loss + tl.zeros_like(tile.s), mask=there[:, None] & (tile.classes == 0))
    further = ()
    for k in tl.static_range(len(result.further)):
        further = further + (Further(*as_columns(result.further[k])),)
    coefficients = scale_coefficients(result.coefficients, number(numbers.logit_scale, SPEC.dtype))
    g = gradient(tile, Coefficients(*as_columns(coefficients)), further, row, SPEC)
    g = tl.where(tile.mask, g, 0).to(output[0].dtype.element_ty)
    tl.store(row_start(output, index)[:, None] + tile.classes, g, mask=there[:, None] & (tile.classes < width))
