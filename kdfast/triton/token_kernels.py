"""The row kernels of token statistics; reference_tokens.py says what each is.

Per row, with Q and its offset as in pass_a.py, e_k the Q of the ids' classes, each once, and R the sum of Q over the
others, Z = sum e + R:

    log_probs_k = log e_k - log Z       entropy = log Z - sum Q log Q / Z       log_rest = log R - log Z

    dl/dz_j = own_j - q_j (sum own + g_entropy (log q_j + entropy)) - g_rest q_j             for an id's class
                    - q_j (sum own + g_entropy (log q_j + entropy)) + g_rest Q_j/R sum e/Z   for the others

own_j being what the gradients of the log-probabilities of class j add up to. The offset is the row's largest logit, and
where that is an id's, Z - 1 is a sum of its own: so a probability near 1 has the digits of its logarithm.

    token_stats     one read
    token_grad      one read, one write, from the table of token_stats: the offset, sum e, log2 R, the entropy, and
                    log2 of sum e of ids that other processes have
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast import arguments
from kdfast.arguments import TOKEN_STATS
from kdfast.triton.divergences import log_ratio, masked
from kdfast.triton.logits import exponent, softcap_derivative
from kdfast.triton.per_row import load_row, number
from kdfast.triton.row_kernels import SIZES
from kdfast.triton.spec import LN2
from kdfast.triton.support import ABSENT, common_offset, load_given, rest_sums, row_of, sum_all
from kdfast.triton.sweep import open_span, sweep
from kdfast.triton.tables import padded_width, read_columns, store_table_row
from kdfast.triton.tiles import row_start, row_value, store_tile, zero

RUN_TIME = ["logits", "grad", "results", "gradients", "per_row", "numbers", *SIZES]
COLUMNS = tl.constexpr(TOKEN_STATS)
IGNORED = tl.constexpr(arguments.IGNORED)


class Results(NamedTuple):
    """Pointers to what token_stats writes."""

    log_probs: Any  # (rows, K)
    entropy: Any  # (rows,), or None
    log_rest: Any  # (rows,)
    table: Any  # (rows, TOKEN_STATS)


class Gradients(NamedTuple):
    """Pointers to the gradients of the results, or None."""

    log_probs: Any
    entropy: Any
    log_rest: Any
    elsewhere: Any  # the sum of those of ids that other processes have


@triton.jit
def load_unique(logits, ordered, index, vocab, row, COUNT: tl.constexpr, SPEC: tl.constexpr):
    """support.Given of the ids in ascending order, of equal ones the first."""
    line = row_of(ordered, index, COUNT + 1)
    column = tl.arange(0, padded_width(COUNT + 1))[None, :]
    own = tl.load(line + column, mask=column < COUNT, other=ABSENT)
    before = tl.load(line + column - 1, mask=(column > 0) & (column < COUNT), other=-1)
    return load_given(logits, line, (own != ABSENT) & (own != before), vocab, row, COUNT, SPEC)


@triton.jit
def is_kept(ids, index, COUNT: tl.constexpr):
    """Whether a row is not ignored."""
    return tl.load(row_of(ids, index, COUNT)) != IGNORED


@triton.jit
def log_of_sum(total, above_1):
    """log(1 + above_1); NaN where there is no sum."""
    return tl.where(total == 0, float("nan"), log_ratio(1 + above_1, above_1 * 0 + 1, above_1))


@triton.jit(do_not_specialize=RUN_TIME)
def token_stats(
    logits, ids, ordered, results, per_row, numbers,
    rows: tl.int32, vocab: tl.int32, COUNT: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = load_row(per_row, index, numbers, None, SPEC)
        start = row_start(logits, index)
        kept = is_kept(ids, index, COUNT)
        span = open_span(start, (), tl.where(kept, vocab, 0), kept, SPEC)
        rest = rest_sums(span, ordered, index, row, COUNT, SPEC)
        unique = load_unique(start, ordered, index, vocab, row, COUNT, SPEC)
        offset = common_offset(unique, rest.student_offset)

        y = exponent(unique.s, row.exp2_scale, offset)
        e = tl.exp2(y)
        of_ids, is_largest = sum_all(e), unique.used & (y == 0)
        change = exponent(rest.student_offset, row.exp2_scale, offset)
        log_others = change + tl.log2(rest.student_total)
        others = rest.student_total * tl.exp2(change)
        total = of_ids + others
        above_1 = sum_all(tl.where(is_largest, 0, e)) + (sum_all(is_largest.to(SPEC.dtype)) - 1) + others
        log_total = log_of_sum(total, above_1)
        far, near = log_others * LN2 - log_total, -log_ratio(total, others, of_ids)
        tl.store(results.log_rest + index, tl.where(kept, tl.where(others > of_ids, near, far), 0))

        numbers_of_ids = row_of(ids, index, COUNT)
        column = unique.column
        own = tl.load(numbers_of_ids + column, mask=column < COUNT, other=-1)
        given = load_given(start, numbers_of_ids, own >= 0, vocab, row, COUNT, SPEC)
        log_probs = exponent(given.s, row.exp2_scale, offset) * LN2 - log_total
        log_probs = tl.where(given.out_of_range, float("nan"), tl.where(given.used, log_probs, float("-inf")))
        log_probs = tl.where(kept, log_probs, 0)
        tl.store(row_of(results.log_probs, index, COUNT) + column, log_probs, mask=column < COUNT)

        entropy = total * 0
        if results.entropy is not None:
            of_rest = tl.exp2(change) * (rest.over_student[0] + change * rest.student_total)
            terms = sum_all(masked(e, y)) + tl.where(rest.student_total == 0, 0, of_rest)
            entropy = tl.where(kept, log_total - terms / total * LN2, 0)
            tl.store(results.entropy + index, entropy)
        nothing = tl.zeros_like(total) - float("inf")
        store_table_row(results.table, index, (offset, of_ids, log_others, entropy, nothing), COLUMNS, SPEC)


@triton.constexpr_function
def chunk_of(columns: Any) -> int:
    """How many ids are compared with all at a time."""
    return max(1, min(16, 8192 // int(columns)))


@triton.jit
def add_up(ids, grads, given, COUNT: tl.constexpr, SPEC: tl.constexpr):
    """Of each id the sum of the gradients of all that equal it, (1, COLUMNS)."""
    CHUNK: tl.constexpr = chunk_of(padded_width(COUNT + 1))
    own = tl.zeros_like(given.s)
    lane = tl.arange(0, CHUNK)[:, None]
    for first in range(0, COUNT, CHUNK):
        there = first + lane < COUNT
        others = tl.load(ids + first + lane, mask=there, other=-1)
        g = tl.load(grads + first + lane, mask=there, other=0).to(SPEC.dtype)
        own += tl.sum(tl.where((others == given.classes) & given.used, g, 0), 0)[None, :]
    return own


@triton.jit
def optional_value(data, index, dtype: tl.constexpr):
    return tl.zeros((), dtype) if data is None else row_value(data, index, dtype)


@triton.jit
def shared_gradient(y, e, c, WITH_ENTROPY: tl.constexpr):
    """What every class has of its q. c: (total, log total, factor of q, gradient of the entropy, entropy)."""
    q = e * (1 / c[0])
    g = q * c[2]
    if WITH_ENTROPY:
        g -= c[3] * masked(q, y * LN2 - c[1] + c[4])
    return g


@triton.jit
def _write_others(state, tile, context, row, SPEC: tl.constexpr):
    """The gradient of a tile, as if none of its classes were an id's."""
    out, prefix, n = context[0], context[1], context[2]
    offset, log_others, of_rest, factor, c = context[3], context[4], context[5], context[6], context[7]
    WITH_ENTROPY: tl.constexpr = context[8]
    WITH_REST: tl.constexpr = context[9]
    y = exponent(tile.s, row.exp2_scale, offset)
    g = shared_gradient(y, tl.exp2(y), c, WITH_ENTROPY)
    if WITH_REST:
        g += of_rest * tl.exp2(y - log_others)
    if SPEC.softcap:
        g *= softcap_derivative(tile.s, row, SPEC)
    store_tile(out, prefix, n, tile, g * factor, SPEC.aligned[0])
    return state


@triton.jit(do_not_specialize=RUN_TIME)
def token_grad(
    logits, grad, ids, table, gradients, per_row, numbers,
    vocab: tl.int32, width: tl.int32, COUNT: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    WITH_ENTROPY: tl.constexpr = gradients.entropy is not None
    WITH_REST: tl.constexpr = gradients.log_rest is not None
    row = load_row(per_row, index, numbers, None, SPEC)
    start, out = row_start(logits, index), row_start(grad, index)
    lane = tl.arange(0, padded_width(COLUMNS))
    line = tl.load(row_of(table, index, COLUMNS) + lane, mask=lane < COLUMNS, other=0)
    offset, of_ids, log_others, entropy, elsewhere = read_columns(line, 0, COLUMNS)
    of_entropy = optional_value(gradients.entropy, index, SPEC.dtype)
    of_rest = optional_value(gradients.log_rest, index, SPEC.dtype)
    of_rest = tl.where(log_others == float("-inf"), 0, of_rest)  # no others: a constant

    numbers_of_ids = row_of(ids, index, COUNT)
    column = tl.arange(0, padded_width(COUNT + 1))[None, :]
    own = tl.load(numbers_of_ids + column, mask=column < COUNT, other=-1)
    given = load_given(start, numbers_of_ids, own >= 0, vocab, row, COUNT, SPEC)
    own, of_all = tl.zeros_like(given.s), offset * 0
    if gradients.log_probs is not None:
        grads = row_of(gradients.log_probs, index, COUNT)
        own = add_up(numbers_of_ids, grads, given, COUNT, SPEC)
        of_all = sum_all(tl.load(grads + column, mask=given.used, other=0).to(SPEC.dtype))
    if gradients.elsewhere is not None:
        of_ids += tl.exp2(elsewhere)
        of_all += row_value(gradients.elsewhere, index, SPEC.dtype)

    factor = row.exp2_scale * LN2
    if SPEC.softcap:
        factor *= number(numbers.logit_scale, SPEC.dtype)
    others = tl.exp2(log_others)
    total = of_ids + others
    log_total = log_of_sum(total, tl.where(of_ids < others, (others - 1) + of_ids, (of_ids - 1) + others))
    y = exponent(given.s, row.exp2_scale, offset)
    e = tl.exp2(y)
    # not own - q own: of a class with nearly all of the mass 1 - q is the mass of the others
    c = (total, log_total, -(of_all - own) - of_rest, of_entropy, entropy)
    g = own * (((of_ids - e) + others) * (1 / total)) + shared_gradient(y, e, c, WITH_ENTROPY)
    if SPEC.softcap:
        g *= softcap_derivative(given.s, row, SPEC)

    kept = is_kept(ids, index, COUNT)
    span = open_span(start, (), tl.where(kept, vocab, 0), kept, SPEC)
    c = (total, log_total, -of_all, of_entropy, entropy)
    of_rest *= of_ids / total
    sweep(
        _write_others, (),
        (out, span.prefix, span.n, offset, log_others, of_rest, factor, c, WITH_ENTROPY, WITH_REST), span, row, SPEC,
    )  # fmt: skip
    zero(out + span.n, width - span.n, SPEC)
    tl.debug_barrier()
    tl.store(out + given.classes, (g * factor).to(out.dtype.element_ty), mask=given.used)
