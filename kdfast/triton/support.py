"""Which classes of a row are given, by their numbers, and what the rest of them, all others, have.

The sums of the rest must not be a difference: a rest of 1e-12 would be its rounding. So each tile of a row leaves the
given classes out. Their numbers are sorted, so that those of a tile follow each other: a row's tiles, in ascending
order, walk along. A vector of classes, which one thread has, then has a bit for each class.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.triton.logits import adjust_student, exponent, finite
from kdfast.triton.pass_a import accumulate, hard_scale, no_sums
from kdfast.triton.sums import merge
from kdfast.triton.sweep import sweep_in_groups
from kdfast.triton.tables import padded_width
from kdfast.triton.tiles import Tile

ABSENT = tl.constexpr(2**31 - 1)  # above every class: ends the walk


class Given(NamedTuple):
    """Classes given by number, as (1, COLUMNS): one column each, then one for the rest."""

    s: Any  # their logits as the terms see them; -inf where there is none
    classes: Any  # their numbers
    used: Any  # whether there is one, in range
    out_of_range: Any
    column: Any


@triton.constexpr_function
def log2_of(n: Any) -> int:
    return int(n).bit_length() - 1


@triton.jit
def row_of(data, index, WIDTH: tl.constexpr):
    """Where a row of (rows, WIDTH) begins."""
    return data + (index + tl.zeros((), tl.int64)) * WIDTH


@triton.jit
def _bits_of_tile(line, at, found, begin, SPEC: tl.constexpr):
    """Of each vector of a tile that begins at a class the given classes as bits, (LANES, 1); and where the walk is.

    found: the first given class that no tile before had, the one at `at`.
    """
    LANES: tl.constexpr = SPEC.lanes
    VEC: tl.constexpr = SPEC.vec
    first = begin + tl.arange(0, LANES)[:, None] * VEC
    bits = tl.zeros((LANES, 1), tl.int32)
    while found < begin + LANES * VEC:
        place = found - first
        at += 1
        found = tl.load(line + at)
        bits |= tl.where((place >= 0) & (place < VEC), 1 << place, 0)
    return bits, at, found


@triton.jit
def _is_among(line, classes, mask, COUNT: tl.constexpr):
    """Whether each of the classes is one of the COUNT given, by bisection."""
    at = classes * 0
    for k in tl.static_range(log2_of(COUNT), -1, -1):
        above = at + (1 << k)
        there = mask & (above <= COUNT)
        at = tl.where(there & (tl.load(line + above - 1, mask=there, other=0) < classes), above, at)
    return mask & (tl.load(line + at, mask=mask, other=0) == classes)


@triton.jit
def _accumulate_rest(state, tile, context, row, SPEC: tl.constexpr):
    """Pass A without the given classes."""
    sums, at, found = state
    line, prefix = context[0], context[1]
    COUNT: tl.constexpr = context[2]
    if tile.s.shape[1] == 1:
        is_given = _is_among(line, tile.classes, tile.mask, COUNT)
    else:
        bits, at, found = _bits_of_tile(line, at, found, prefix + tile.at, SPEC)
        is_given = ((bits >> tl.arange(0, SPEC.vec)[None, :]) & 1) != 0
    rest = Tile(tl.where(is_given, float("-inf"), tile.s), (), tile.classes, tile.mask & ~is_given, tile.at)
    return accumulate(sums, rest, (), row, SPEC), at, found


@triton.jit
def rest_sums(span, ordered, index, row, COUNT: tl.constexpr, SPEC: tl.constexpr):
    """pass_a.Sums of a row's other classes. ordered: (rows, COUNT + 1), ascending, at last ABSENT; None: of none."""
    found = no_sums(tl.zeros((), SPEC.dtype), SPEC)
    if ordered is not None:
        line = row_of(ordered, index, COUNT + 1)
        state = found, tl.zeros((), tl.int32), tl.load(line)
        GROUP: tl.constexpr = 2 if SPEC.softcap or SPEC.smoothed else 4  # which take registers themselves
        found, at, last = sweep_in_groups(
            _accumulate_rest, state, (line, span.prefix, COUNT), span, row, SPEC, GROUP
        )  # fmt: skip
    return merge(found, row, SPEC)


@triton.jit
def sum_all(x):
    """Of (1, n)."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def load_given(student, line, present, vocab, row, COUNT: tl.constexpr, SPEC: tl.constexpr):
    """Given, from the COUNT class numbers of a row, and which of them count, (1, COLUMNS)."""
    column = tl.arange(0, padded_width(COUNT + 1))[None, :]
    classes = tl.load(line + column, mask=present & (column < COUNT), other=-1)
    used = present & (classes >= 0) & (classes < vocab)
    s = tl.load(student + classes, mask=used, other=float("-inf")).to(SPEC.dtype)
    s = tl.where(used, adjust_student(s, row, SPEC), float("-inf"))
    return Given(s, classes, used, present & ~used, column)


@triton.jit
def common_offset(given, rest_offset):
    """The row's largest logit."""
    return finite(tl.maximum(tl.max(tl.max(given.s, 1), 0), rest_offset))


@triton.jit
def rest_logit(sums, offset, row):
    """The logit less `offset` that one class would have in the place of the rest; sums: theirs."""
    return (sums.student_offset - offset) + tl.log2(sums.student_total) / row.exp2_scale


@triton.jit
def hard_exps_of(s, offset, row, SPEC: tl.constexpr):
    """Exps at temperature 1."""
    return tl.exp2(exponent(s, hard_scale(row, SPEC), offset))


@triton.jit
def scalar(x):
    """A number of (1,), or one that is a scalar already, as a scalar."""
    return tl.sum(x + tl.zeros((1,), x.dtype), 0)


@triton.jit
def add_to_rest(sums, given, offset, row, SPEC: tl.constexpr):
    """The sums at temperature 1 of the rest and of all classes given: the total and the exponents, at `offset`."""
    change = exponent(sums.student_offset, hard_scale(row, SPEC), offset)
    total = sums.hard_total * tl.exp2(change) + sum_all(hard_exps_of(given.s, offset, row, SPEC))
    exponents = total * 0
    if SPEC.smoothed:
        y = tl.where(given.used, exponent(given.s, hard_scale(row, SPEC), offset), 0)
        of_rest = tl.where(sums.classes == 0, 0, sums.exponents + sums.classes * change)
        exponents = of_rest + sum_all(y)
    return total, exponents
