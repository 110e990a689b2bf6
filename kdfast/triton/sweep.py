"""How a row's classes are gone over: the one loop of all passes, over tiles in registers or in memory.

A pass is a function of (state, tile, given, row, SPEC), which gives the next state; `given` is what it knows beside.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kdfast.triton.logits import prepared
from kdfast.triton.tiles import Tile, body_classes, end_classes, head_of, load_body, widened


class Unit(NamedTuple):
    """A row, or a segment of one: n classes from where these pointers are."""

    student: Any
    teachers: Any
    head: Any
    n: Any
    kept: Any  # else n is 0
    held: Any  # where the row is in registers: its tiles as they are stored, and its ends


@triton.jit
def opened(student, teachers, n, kept, SPEC: tl.constexpr):
    head = head_of(student, n, SPEC.vec)
    held = ()
    TILES: tl.constexpr = SPEC.tiles
    if TILES > 0:
        for i in tl.static_range(TILES):
            held = held + (_load(student, teachers, head, i * (SPEC.lanes * SPEC.vec), n, False, SPEC),)
        held = held + (_load_ends(student, teachers, head, n, SPEC),)
    return Unit(student, teachers, head, n, kept, held)


@triton.jit
def _load(student, teachers, head, at, n, AGAIN: tl.constexpr, SPEC: tl.constexpr):
    """A tile of the body of the student and of each teacher, as they are stored."""
    ts = ()
    s = load_body(student, head, at, n, False, True, AGAIN, SPEC)
    for k in tl.static_range(len(teachers)):
        ts = ts + (load_body(teachers[k], head, at, n, SPEC.target == "probs", SPEC.aligned[k + 1], AGAIN, SPEC),)
    return s, ts


@triton.jit
def _load_ends(student, teachers, head, n, SPEC: tl.constexpr):
    """The row's ends, (LANES, 1), as numbers of the arithmetic's type."""
    ends, there = end_classes(head, n, SPEC)
    s = tl.load(student + ends, mask=there, other=float("-inf")).to(SPEC.dtype)
    fill: tl.constexpr = 0.0 if SPEC.target == "probs" else float("-inf")
    ts = ()
    for k in tl.static_range(len(teachers)):
        ts = ts + (tl.load(teachers[k] + ends, mask=there, other=fill).to(SPEC.dtype),)
    return s, ts


@triton.jit
def _body(unit, loaded, at, opaque, row, SPEC: tl.constexpr):
    s, ts = loaded
    out = ()
    for k in tl.static_range(len(ts)):
        out = out + (widened(unit.teachers[k], ts[k], opaque, SPEC.dtype),)
    s, out = prepared(widened(unit.student, s, opaque, SPEC.dtype), out, row, SPEC)
    classes = body_classes(SPEC.lanes, SPEC.vec)
    there = at + classes < (unit.n - unit.head) // SPEC.vec * SPEC.vec
    return Tile(s, out, unit.head + at + classes, there, at)


@triton.jit
def _ends(unit, loaded, row, SPEC: tl.constexpr):
    s, ts = prepared(loaded[0], loaded[1], row, SPEC)
    ends, there = end_classes(unit.head, unit.n, SPEC)
    return Tile(s, ts, ends, there, 0)


@triton.jit
def sweep(
    PASS: tl.constexpr, state, given, unit, row, SPEC: tl.constexpr,
    NUMBER: tl.constexpr = 0, AGAIN: tl.constexpr = False, DOWN: tl.constexpr = False,
):  # fmt: skip
    """The state after all tiles.

    NUMBER: the pass's own; of a row in registers each pass but that of number 0 widens the tiles anew, see
    tiles.widened. AGAIN: the classes will be read once more; DOWN: the last ones come first, which are those that the
    caches still hold of the sweep before.
    """
    BLOCK: tl.constexpr = SPEC.lanes * SPEC.vec
    TILES: tl.constexpr = SPEC.tiles
    if TILES > 0:
        opaque = (unit.n < -NUMBER).to(tl.int32) if NUMBER > 0 else 0
        if unit.kept:
            for i in tl.static_range(TILES):
                state = PASS(state, _body(unit, unit.held[i], i * BLOCK, opaque, row, SPEC), given, row, SPEC)
            state = PASS(state, _ends(unit, unit.held[TILES], row, SPEC), given, row, SPEC)
    else:
        ends = _load_ends(unit.student, unit.teachers, unit.head, unit.n, SPEC)
        state = PASS(state, _ends(unit, ends, row, SPEC), given, row, SPEC)
        body = unit.n - unit.head
        last = (tl.cdiv(body, BLOCK) - 1) * BLOCK
        for i in range(0, body, BLOCK):
            at = last - i if DOWN else i
            loaded = _load(unit.student, unit.teachers, unit.head, at, unit.n, AGAIN, SPEC)
            state = PASS(state, _body(unit, loaded, at, 0, row, SPEC), given, row, SPEC)
    return state
