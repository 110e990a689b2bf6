"""The passes over classes that are read from memory."""

import triton
import triton.language as tl

from kdfast.triton.logits import add_moments, prepared, scaling_of
from kdfast.triton.metrics import best_of
from kdfast.triton.row_passes import add_divergence, gradient, linear_divergence, no_sums
from kdfast.triton.spec import Row
from kdfast.triton.statistics import accumulate, merge, no_statistics, sums_of
from kdfast.triton.tiles import (
    body_classes,
    end_classes,
    head_of,
    load_body,
    store_body,
    widened,
)


@triton.jit
def load_tiles(
    student, teachers, head, at, n, AGAIN: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr
):
    """A tile of the body of the student and of each teacher, as they are stored."""
    s = load_body(student, head, at, n, False, True, AGAIN, LANES, VEC)
    ts = ()
    for k in tl.static_range(len(teachers)):
        t = load_body(teachers[k], head, at, n, SPEC.target == "probs", SPEC.aligned[k + 1], AGAIN, LANES, VEC)
        ts = ts + (t,)
    return s, ts


@triton.jit
def widened_tiles(student, teachers, tiles, opaque, row, SPEC: tl.constexpr):
    s, ts = tiles
    out = ()
    for k in tl.static_range(len(ts)):
        out = out + (widened(teachers[k], ts[k], opaque, SPEC.dtype),)
    return prepared(widened(student, s, opaque, SPEC.dtype), out, row, SPEC)


@triton.jit
def load_ends(student, teachers, ends, there, SPEC: tl.constexpr):
    """The row's ends, (LANES, 1), as numbers of the arithmetic's type; `prepared` is still to come."""
    s = tl.load(student + ends, mask=there, other=float("-inf")).to(SPEC.dtype)
    fill: tl.constexpr = 0.0 if SPEC.target == "probs" else float("-inf")
    ts = ()
    for k in tl.static_range(len(teachers)):
        ts = ts + (tl.load(teachers[k] + ends, mask=there, other=fill).to(SPEC.dtype),)
    return s, ts


@triton.jit
def no_moments(teachers, LANES: tl.constexpr, SPEC: tl.constexpr):
    nothing = tl.zeros((LANES,), SPEC.dtype)
    moments = ((nothing, nothing, nothing),)
    for _ in tl.static_range(len(teachers)):
        moments = moments + ((nothing, nothing, nothing),)
    return moments


@triton.jit
def add_tiles(moments, s, ts, there):
    out = (add_moments(moments[0], s, there),)
    for k in tl.static_range(len(ts)):
        out = out + (add_moments(moments[k + 1], ts[k], there),)
    return out


@triton.jit
def standardizing(moments, row):
    """The row with its moments known."""
    scalings = ()
    for k in tl.static_range(1, len(moments)):
        scalings = scalings + (scaling_of(moments[k]),)
    return Row(
        row.slope, row.teacher_slope, row.temperature, row.weights, row.beta, row.label, row.caps,
        scaling_of(moments[0]), scalings,
    )  # fmt: skip


@triton.jit
def standardized_row(student, teachers, n, row, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr):
    """A pass of its own where rows are standardized, the last classes first."""
    if not SPEC.standardize:
        return row
    else:
        head = head_of(student, n, VEC)
        ends, there = end_classes(head, n, LANES, VEC)
        s_ends, t_ends = load_ends(student, teachers, ends, there, SPEC)
        s_ends, t_ends = prepared(s_ends, t_ends, row, SPEC)
        moments = add_tiles(no_moments(teachers, LANES, SPEC), s_ends, t_ends, there)
        classes = body_classes(LANES, VEC)
        count = tl.cdiv(n - head, LANES * VEC)
        for i in range(count):
            at = (count - 1 - i) * (LANES * VEC)
            tiles = load_tiles(student, teachers, head, at, n, True, LANES, VEC, SPEC)
            s, ts = widened_tiles(student, teachers, tiles, 0, row, SPEC)
            moments = add_tiles(moments, s, ts, at + classes < (n - head) // VEC * VEC)
        return standardizing(moments, row)


@triton.jit
def statistics_of(
    student, teachers, shift, n, row, members: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr
):
    """Pass A over n classes."""
    statistics = no_statistics(members, shift, LANES, SPEC)
    head = head_of(student, n, VEC)
    ends, there = end_classes(head, n, LANES, VEC)
    s_ends, t_ends = load_ends(student, teachers, ends, there, SPEC)
    s_ends, t_ends = prepared(s_ends, t_ends, row, SPEC)
    statistics = accumulate(statistics, s_ends, t_ends, ends, there, row, SPEC)
    classes = body_classes(LANES, VEC)
    for at in range(0, n - head, LANES * VEC):
        tiles = load_tiles(student, teachers, head, at, n, True, LANES, VEC, SPEC)
        s, ts = widened_tiles(student, teachers, tiles, 0, row, SPEC)
        inside = at + classes < (n - head) // VEC * VEC
        statistics = accumulate(statistics, s, ts, head + at + classes, inside, row, SPEC)
    return merge(statistics, row, SPEC)


@triton.jit
def sums_of_row(sums, SPEC: tl.constexpr):
    """Those of the lanes, joined: the sums, and at their end the teacher's best class where it is known only now."""
    values, best = sums
    if SPEC.metrics and not SPEC.joint:
        return sums_of(values), best_of(best)
    else:
        return sums_of(values), ()


@triton.jit
def divergence_of(
    student, teachers, n, statistics, scales, row, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr
):
    """D and sum psi: from pass A's running sums, or pass B over n classes, the last ones first."""
    if SPEC.divergence is None:
        return (), ()
    elif SPEC.linear:
        return linear_divergence(statistics, row, SPEC), ()
    else:
        head = head_of(student, n, VEC)
        ends, there = end_classes(head, n, LANES, VEC)
        s_ends, t_ends = load_ends(student, teachers, ends, there, SPEC)
        s_ends, t_ends = prepared(s_ends, t_ends, row, SPEC)
        sums = add_divergence(no_sums(LANES, SPEC), s_ends, t_ends, ends, there, scales, row, SPEC)
        classes = body_classes(LANES, VEC)
        count = tl.cdiv(n - head, LANES * VEC)
        for i in range(count):
            at = (count - 1 - i) * (LANES * VEC)
            tiles = load_tiles(student, teachers, head, at, n, True, LANES, VEC, SPEC)
            s, ts = widened_tiles(student, teachers, tiles, 0, row, SPEC)
            inside = at + classes < (n - head) // VEC * VEC
            sums = add_divergence(sums, s, ts, head + at + classes, inside, scales, row, SPEC)
        return sums_of_row(sums, SPEC)


@triton.jit
def write_gradient(
    student, teachers, out, n, coefficients, further, row, LANES: tl.constexpr, VEC: tl.constexpr, SPEC: tl.constexpr
):
    """Pass C over n classes, in the other direction than the pass before it: those are what the caches still hold."""
    head = head_of(student, n, VEC)
    classes = body_classes(LANES, VEC)
    count = tl.cdiv(n - head, LANES * VEC)
    for i in range(count):
        at = (count - 1 - i if SPEC.linear else i) * (LANES * VEC)
        tiles = load_tiles(student, teachers, head, at, n, False, LANES, VEC, SPEC)
        s, ts = widened_tiles(student, teachers, tiles, 0, row, SPEC)
        g = gradient(s, ts, head + at + classes, coefficients, further, row, SPEC)
        store_body(out, head, at, n, g, SPEC.aligned[0])
    ends, there = end_classes(head, n, LANES, VEC)
    s_ends, t_ends = load_ends(student, teachers, ends, there, SPEC)
    s_ends, t_ends = prepared(s_ends, t_ends, row, SPEC)
    g_ends = gradient(s_ends, t_ends, ends, coefficients, further, row, SPEC)
    tl.store(out + ends, g_ends.to(out.dtype.element_ty), mask=there)
