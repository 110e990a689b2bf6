"""softmax(z / T) and its logarithm; and the gradient, p * (g - sum p g) / T, for the logarithm (g - p * sum g) / T.

Forward: inputs are (logits,); backward: (output, its gradient). Short rows stay in registers, as in row_kernels.py.
"""

import triton
import triton.language as tl

from kdfast.triton.logits import base2
from kdfast.triton.per_row import by_row
from kdfast.triton.spec import LN2, LOG2E, Row
from kdfast.triton.statistics import accumulate, exponent, finite, no_statistics
from kdfast.triton.sums import merge
from kdfast.triton.sweep import opened, sweep
from kdfast.triton.tiles import in_lanes, row_start, row_starts, store_tile

RUN_TIME = ["inputs", "output", "temperatures", "temperature", "rows", "vocab"]


@triton.jit
def _add(total, tile, LOG: tl.constexpr, row, SPEC: tl.constexpr):
    """Backward: the row's sum."""
    g = tile.teachers[0]
    return total + tl.sum(tl.where(tile.there, g if LOG else tile.s * g, 0), 1)


@triton.jit
def _write(state, tile, given, row, SPEC: tl.constexpr):
    out, head, n, found, LOG = given
    if len(tile.teachers) == 0:
        offset, total = found
        y = exponent(tile.s, row.slope, offset)
        x = (y - tl.log2(total)) * LN2 if LOG else tl.exp2(y) * (1 / total)
    elif LOG:
        x = (tile.teachers[0] - tl.exp2(tile.s * LOG2E) * found) * (1 / row.temperature)
    else:
        x = tile.s * (tile.teachers[0] - found) * (1 / row.temperature)
    store_tile(out, head, n, tile, x, SPEC.aligned[0])
    return state


@triton.jit
def _softmax_of_row(inputs, output, temperatures, temperature, index, vocab, LOG: tl.constexpr, SPEC: tl.constexpr):
    t = by_row(temperatures, index, temperature, SPEC.dtype)
    row = Row(base2(t), t, t, (), t, None, (), (), ())
    starts, out = row_starts(inputs, index, 0), row_start(output, index)
    unit = opened(starts[0], starts[1:], vocab, True, SPEC)
    if len(inputs) == 1:
        sums = merge(sweep(accumulate, no_statistics(0, SPEC), (), unit, row, SPEC, AGAIN=True), row, SPEC)
        found = (finite(sums.student.offset), sums.student.total)
    else:
        found = tl.sum(sweep(_add, in_lanes(0, SPEC), LOG, unit, row, SPEC, AGAIN=True), 0)
    sweep(_write, (), (out, unit.head, vocab, found, LOG), unit, row, SPEC, NUMBER=3, DOWN=True)


@triton.jit(do_not_specialize=RUN_TIME)
def softmax_short(
    inputs, output, temperatures, temperature, rows: tl.int32, vocab: tl.int32, LOG: tl.constexpr, SPEC: tl.constexpr
):
    _softmax_of_row(inputs, output, temperatures, temperature, tl.program_id(0), vocab, LOG, SPEC)


@triton.jit(do_not_specialize=RUN_TIME)
def softmax_long(
    inputs, output, temperatures, temperature, rows: tl.int32, vocab: tl.int32, LOG: tl.constexpr, SPEC: tl.constexpr
):
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        _softmax_of_row(inputs, output, temperatures, temperature, index, vocab, LOG, SPEC)
