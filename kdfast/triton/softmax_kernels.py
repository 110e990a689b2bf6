"""softmax(z / T) and its logarithm; and the gradient, p * (g - sum p g) / T, for the logarithm (g - p * sum g) / T.

Forward: inputs are (logits,); backward: (output, its gradient). Short rows stay in registers, as in row_kernels.py.
"""

import triton
import triton.language as tl

from kdfast.triton.per_row import by_row
from kdfast.triton.spec import LN2, LOG2E, Row
from kdfast.triton.statistics import accumulate, exponent, finite, merge, no_statistics
from kdfast.triton.teachers import base2
from kdfast.triton.tiles import end_classes, head_of, load_body, row_start, row_starts, store_body, widened

RUN_TIME = ["inputs", "output", "temperatures", "temperature", "rows", "vocab", "opaque"]


@triton.jit
def _load(starts, head, at, n, AGAIN: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr):
    PROBS: tl.constexpr = len(starts) == 2
    tiles = ()
    for k in tl.static_range(len(starts)):
        tiles = tiles + (load_body(starts[k], head, at, n, PROBS, SPEC.aligned[k + 1], AGAIN, LANES, VEC),)
    return tiles


@triton.jit
def _widened(starts, tiles, opaque, SPEC: tl.constexpr):
    out = ()
    for k in tl.static_range(len(tiles)):
        out = out + (widened(starts[k], tiles[k], opaque, SPEC.dtype),)
    return out


@triton.jit
def _load_ends(starts, ends, there, SPEC: tl.constexpr):
    fill: tl.constexpr = 0.0 if len(starts) == 2 else float("-inf")
    out = ()
    for k in tl.static_range(len(starts)):
        out = out + (tl.load(starts[k] + ends, mask=there, other=fill).to(SPEC.dtype),)
    return out


@triton.jit
def _nothing(LANES: tl.constexpr, BACKWARD: tl.constexpr, SPEC: tl.constexpr):
    if BACKWARD:
        return tl.zeros((LANES,), SPEC.dtype)
    else:
        return no_statistics(0, 0, LANES, SPEC)


@triton.jit
def _add(sums, tiles, row, LOG: tl.constexpr, SPEC: tl.constexpr):
    """Forward: the logits' statistics; backward: the row's sum."""
    if len(tiles) == 1:
        return accumulate(sums, tiles[0], (), None, None, row, SPEC)
    elif LOG:
        return sums + tl.sum(tiles[1], 1)
    else:
        return sums + tl.sum(tiles[0] * tiles[1], 1)


@triton.jit
def _join(sums, row, BACKWARD: tl.constexpr, SPEC: tl.constexpr):
    if BACKWARD:
        return tl.sum(sums, 0)
    else:
        return merge(sums, row, SPEC)


@triton.jit
def _value(sums, tiles, row, LOG: tl.constexpr, SPEC: tl.constexpr):
    if len(tiles) == 1:
        y = exponent(tiles[0], row.slope, finite(sums.student.offset))
        if LOG:
            return (y - tl.log2(sums.student.total)) * LN2
        else:
            return tl.exp2(y) * (1 / sums.student.total)
    elif LOG:
        return (tiles[1] - tl.exp2(tiles[0] * LOG2E) * sums) * (1 / row.temperature)
    else:
        return tiles[0] * (tiles[1] - sums) * (1 / row.temperature)


@triton.jit
def _row(temperatures, index, temperature, SPEC: tl.constexpr):
    t = by_row(temperatures, index, temperature, SPEC.dtype)
    return Row(base2(t), t, t, (), t, None, (), (), ())


@triton.jit(do_not_specialize=RUN_TIME)
def softmax_short(
    inputs, output, temperatures, temperature, vocab: tl.int32, opaque: tl.int32, LOG: tl.constexpr,
    TILES: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    BACKWARD: tl.constexpr = len(inputs) == 2
    row = _row(temperatures, index, temperature, SPEC)
    starts, out = row_starts(inputs, index, 0), row_start(output, index)
    head = head_of(starts[0], vocab, VEC)
    held = ()
    for i in tl.static_range(TILES):
        held = held + (_load(starts, head, i * (LANES * VEC), vocab, False, LANES, VEC, SPEC),)
    ends, there = end_classes(head, vocab, LANES, VEC)
    at_ends = _load_ends(starts, ends, there, SPEC)
    sums = _add(_nothing(LANES, BACKWARD, SPEC), at_ends, row, LOG, SPEC)
    for i in tl.static_range(TILES):
        sums = _add(sums, _widened(starts, held[i], 0, SPEC), row, LOG, SPEC)
    sums = _join(sums, row, BACKWARD, SPEC)
    for i in tl.static_range(TILES):
        x = _value(sums, _widened(starts, held[i], opaque, SPEC), row, LOG, SPEC)
        store_body(out, head, i * (LANES * VEC), vocab, x, SPEC.aligned[0])
    x_ends = _value(sums, at_ends, row, LOG, SPEC)
    tl.store(out + ends, x_ends.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=RUN_TIME)
def softmax_long(
    inputs, output, temperatures, temperature, rows: tl.int32, vocab: tl.int32, LOG: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    BACKWARD: tl.constexpr = len(inputs) == 2
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = _row(temperatures, index, temperature, SPEC)
        starts, out = row_starts(inputs, index, 0), row_start(output, index)
        head = head_of(starts[0], vocab, VEC)
        ends, there = end_classes(head, vocab, LANES, VEC)
        sums = _add(_nothing(LANES, BACKWARD, SPEC), _load_ends(starts, ends, there, SPEC), row, LOG, SPEC)
        for at in range(0, vocab - head, LANES * VEC):
            tiles = _load(starts, head, at, vocab, True, LANES, VEC, SPEC)
            sums = _add(sums, _widened(starts, tiles, 0, SPEC), row, LOG, SPEC)
        sums = _join(sums, row, BACKWARD, SPEC)
        count = tl.cdiv(vocab - head, LANES * VEC)
        for i in range(count):
            at = (count - 1 - i) * (LANES * VEC)
            tiles = _load(starts, head, at, vocab, False, LANES, VEC, SPEC)
            x = _value(sums, _widened(starts, tiles, 0, SPEC), row, LOG, SPEC)
            store_body(out, head, at, vocab, x, SPEC.aligned[0])
        x_ends = _value(sums, _load_ends(starts, ends, there, SPEC), row, LOG, SPEC)
        tl.store(out + ends, x_ends.to(out.dtype.element_ty), mask=there)
