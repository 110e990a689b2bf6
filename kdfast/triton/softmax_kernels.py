"""softmax(z / T) and its logarithm; and the gradient, p * (g - sum p g) / T, for the logarithm (g - p * sum g) / T.

Forward: inputs are (logits,); backward: (output, its gradient). Short rows stay in registers, as in row_kernels.py.
"""

import triton
import triton.language as tl

from kdfast.triton.logits import exp2_scale, exponent, finite
from kdfast.triton.pass_a import accumulate, no_sums
from kdfast.triton.per_row import row_number
from kdfast.triton.spec import LN2, LOG2E, Row
from kdfast.triton.sums import merge
from kdfast.triton.sweep import open_span, sweep
from kdfast.triton.tiles import fill_lanes, row_start, row_starts, store_tile

RUN_TIME = ["inputs", "output", "temperatures", "temperature", "rows", "vocab"]


@triton.jit
def _add(total, tile, LOG: tl.constexpr, row, SPEC: tl.constexpr):
    """Backward: each lane's sum."""
    g = tile.teachers[0]
    return total + tl.sum(tl.where(tile.mask, g if LOG else tile.s * g, 0), 1)


@triton.jit
def _write(state, tile, context, row, SPEC: tl.constexpr):
    out, prefix, n, found, LOG = context
    if len(tile.teachers) == 0:
        y = exponent(tile.s, row.exp2_scale, finite(found.student_offset))
        x = (y - tl.log2(found.student_total)) * LN2 if LOG else tl.exp2(y) * (1 / found.student_total)
    elif LOG:
        x = (tile.teachers[0] - tl.exp2(tile.s * LOG2E) * found) * (1 / row.temperature)
    else:
        x = tile.s * (tile.teachers[0] - found) * (1 / row.temperature)
    store_tile(out, prefix, n, tile, x, SPEC.aligned[0])
    return state


@triton.jit
def _softmax_of_row(inputs, output, temperatures, temperature, index, vocab, LOG: tl.constexpr, SPEC: tl.constexpr):
    t = row_number(temperatures, index, temperature, SPEC.dtype)
    row = Row(exp2_scale(t), t, t, (), t, t, None, 1, 1, (), ())
    starts, out = row_starts(inputs, index, 0), row_start(output, index)
    span = open_span(starts[0], starts[1:], vocab, True, SPEC)
    if len(inputs) == 1:
        found = merge(sweep(accumulate, no_sums(0, SPEC), (), span, row, SPEC, KEEP_IN_CACHE=True), row, SPEC)
    else:
        found = tl.sum(sweep(_add, fill_lanes(0, SPEC), LOG, span, row, SPEC, KEEP_IN_CACHE=True), 0)
    sweep(_write, (), (out, span.prefix, vocab, found, LOG), span, row, SPEC, NUMBER=3, REVERSED=True)


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
