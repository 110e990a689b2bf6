"""The one loop of all passes over a row's classes, of tiles in registers or in memory.

A pass is a function of (state, tile, context, row, SPEC) that returns the next state; `context` is what else it needs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language import target_info

from kdfast.triton.logits import adjust_logits
from kdfast.triton.tiles import Tile, body_classes, end_classes, load_body, prefix_length, widen


class Span(NamedTuple):
    """A row, or a segment of one: n classes from where these pointers are."""

    student: Any
    teachers: Any
    prefix: Any
    n: Any
    kept: Any  # else n is 0
    tiles: Any  # where the row is in registers: its tiles as they are stored, and its ends


@triton.jit
def open_span(student, teachers, n, kept, SPEC: tl.constexpr):
    prefix = prefix_length(student, n, SPEC.vec)
    tiles = ()
    TILES: tl.constexpr = SPEC.tiles
    if TILES > 0:
        for i in tl.static_range(TILES):
            tiles = tiles + (_load_body(student, teachers, prefix, i * (SPEC.lanes * SPEC.vec), n, False, SPEC),)
        tiles = tiles + (_load_ends(student, teachers, prefix, n, SPEC),)
    return Span(student, teachers, prefix, n, kept, tiles)


@triton.jit
def _load_body(student, teachers, prefix, at, n, KEEP_IN_CACHE: tl.constexpr, SPEC: tl.constexpr):
    """A tile of the body of the student and of each teacher, as they are stored."""
    ts = ()
    PROBS: tl.constexpr = SPEC.target == "probs"
    s = load_body(student, prefix, at, n, False, True, KEEP_IN_CACHE, SPEC)
    for k in tl.static_range(len(teachers)):
        ts = ts + (load_body(teachers[k], prefix, at, n, PROBS, SPEC.aligned[k + 1], KEEP_IN_CACHE, SPEC),)
    return s, ts


@triton.jit
def _load_ends(student, teachers, prefix, n, SPEC: tl.constexpr):
    """The row's ends, (LANES, 1), as numbers of the arithmetic's type."""
    ends, mask = end_classes(prefix, n, SPEC)
    s = tl.load(student + ends, mask=mask, other=float("-inf")).to(SPEC.dtype)
    fill: tl.constexpr = 0.0 if SPEC.target == "probs" else float("-inf")
    ts = ()
    for k in tl.static_range(len(teachers)):
        ts = ts + (tl.load(teachers[k] + ends, mask=mask, other=fill).to(SPEC.dtype),)
    return s, ts


@triton.jit
def _body_tile(span, loaded, at, hidden_zero, row, SPEC: tl.constexpr):
    s, ts = loaded
    out = ()
    for k in tl.static_range(len(ts)):
        out = out + (widen(span.teachers[k], ts[k], hidden_zero, SPEC.dtype),)
    s, out = adjust_logits(widen(span.student, s, hidden_zero, SPEC.dtype), out, row, SPEC)
    classes = body_classes(SPEC.lanes, SPEC.vec)
    mask = at + classes < (span.n - span.prefix) // SPEC.vec * SPEC.vec
    return Tile(s, out, span.prefix + at + classes, mask, at)


@triton.jit
def _end_tile(span, loaded, row, SPEC: tl.constexpr):
    s, ts = loaded
    s, ts = adjust_logits(s, ts, row, SPEC)
    ends, mask = end_classes(span.prefix, span.n, SPEC)
    return Tile(s, ts, ends, mask, 0)


@triton.constexpr_function
def pipeline_stages(lanes: Any, teachers: Any) -> int:
    """Of the loop over tiles in memory: the tiles that are loaded ahead while one is computed, and two more.

    On NVIDIA's devices copies to shared memory: 12 KB or more of each of two programs, which is what a multiprocessor
    of an H100 needs for its bandwidth (25 bytes a ns for 0.7 us are 17 KB), but not more than 3 tiles. They carry no
    hints for the caches. On AMD's to registers, all of which an iteration waits for before it loads more: one tile.
    """
    tile = int(lanes) * 16 * (1 + int(teachers))
    return 2 if target_info.is_hip() else 2 + min(3, -(-12288 // tile))


@triton.jit
def sweep(
    PASS: tl.constexpr, state, context, span, row, SPEC: tl.constexpr,
    NUMBER: tl.constexpr = 0, KEEP_IN_CACHE: tl.constexpr = False, REVERSED: tl.constexpr = False,
):  # fmt: skip
    """The state after all tiles.

    NUMBER: the pass's own; of a row in registers each pass but that of number 0 widens the tiles anew, see tiles.widen.
    KEEP_IN_CACHE: the classes will be read once more; REVERSED: the last ones come first, which are those that the
    caches still hold of the sweep before.
    """
    BLOCK: tl.constexpr = SPEC.lanes * SPEC.vec
    TILES: tl.constexpr = SPEC.tiles
    if TILES > 0:
        hidden_zero = (span.n < -NUMBER).to(tl.int32) if NUMBER > 0 else 0
        if span.kept:
            for i in tl.static_range(TILES):
                state = PASS(
                    state, _body_tile(span, span.tiles[i], i * BLOCK, hidden_zero, row, SPEC), context, row, SPEC
                )
            state = PASS(state, _end_tile(span, span.tiles[TILES], row, SPEC), context, row, SPEC)
    else:
        ends = _load_ends(span.student, span.teachers, span.prefix, span.n, SPEC)
        state = PASS(state, _end_tile(span, ends, row, SPEC), context, row, SPEC)
        body = span.n - span.prefix
        last = (tl.cdiv(body, BLOCK) - 1) * BLOCK
        for i in tl.range(0, body, BLOCK, num_stages=pipeline_stages(SPEC.lanes, len(span.teachers))):
            at = last - i if REVERSED else i
            loaded = _load_body(span.student, span.teachers, span.prefix, at, span.n, KEEP_IN_CACHE, SPEC)
            state = PASS(state, _body_tile(span, loaded, at, 0, row, SPEC), context, row, SPEC)
    return state


@triton.jit
def sweep_in_groups(PASS: tl.constexpr, state, context, span, row, SPEC: tl.constexpr, GROUP: tl.constexpr):
    """`sweep` for a pass with a loop inside, with which the compiler loads nothing ahead: GROUP tiles come first."""
    if SPEC.tiles > 0:
        state = sweep(PASS, state, context, span, row, SPEC)
    else:
        BLOCK: tl.constexpr = SPEC.lanes * SPEC.vec
        ends = _load_ends(span.student, span.teachers, span.prefix, span.n, SPEC)
        state = PASS(state, _end_tile(span, ends, row, SPEC), context, row, SPEC)
        for at in range(0, span.n - span.prefix, GROUP * BLOCK):
            tiles = ()
            for k in tl.static_range(GROUP):
                place = at + k * BLOCK
                tiles = tiles + (_load_body(span.student, span.teachers, span.prefix, place, span.n, True, SPEC),)
            for k in tl.static_range(GROUP):
                state = PASS(state, _body_tile(span, tiles[k], at + k * BLOCK, 0, row, SPEC), context, row, SPEC)
    return state
