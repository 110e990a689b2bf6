"""How the kernels touch memory: rows, whole 16-byte vectors of them, and their two ragged ends.

A matrix is (data, inner, outer_stride, stride), as matrices.py writes it: row r starts at
data + r // inner * outer_stride + r % inner * stride, so that a slice such as logits[:, :-1] is read as it lies. Its
classes are contiguous.

Of a row's n classes those after its prefix are whole vectors of VEC classes, of 16 bytes, which start at a sector of
32: a warp's request then touches no sector in part. The up to 2 * VEC - 1 classes of the prefix, and the up to VEC - 1
after the vectors, are the row's ends. A tile of the body is (LANES, VEC), each row of it one thread's vector; the ends
are a tile (LANES, 1), of which 3 * VEC lanes are used. Triton makes 16-byte accesses of a tile only when it knows both
the address and the mask's bound to be multiples of a vector: it is told the one by a hint, and sees the other from its
form.

Tiles of a 16-bit type are loaded, and held, as pairs in 32-bit words. As single numbers the compiler gives each a
register of its own, and keeps what it widened in one pass for the next: at 64 classes a thread that was 658 bytes of
spills on sm_80, and none with pairs.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tile(NamedTuple):
    """Of the student and of each teacher the same classes, as the terms see them: of the body, or the row's ends."""

    s: Any
    teachers: Any
    classes: Any
    mask: Any
    at: Any  # where the body's tile begins, from the first of the body


@triton.jit
def row_start(matrix, row):
    data = matrix[0]
    inner, outer_stride, stride = (matrix[1] - 3) >> 1, (matrix[2] - 3) >> 1, (matrix[3] - 3) >> 1
    return data + ((row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * stride)


@triton.jit
def row_starts(matrices, row, begin):
    starts = ()
    for k in tl.static_range(len(matrices)):
        starts = starts + (row_start(matrices[k], row) + begin,)
    return starts


@triton.jit
def row_value(data, row, dtype: tl.constexpr):
    """A number of a row, read by one lane of each warp: a scalar load would be one by every thread."""
    lane = tl.arange(0, 32)
    return tl.sum(tl.load(data + row + lane * 0, mask=lane == 0, other=0).to(dtype), 0)


@triton.jit
def load_first_lane(data, at, LANES: tl.constexpr, mask=True):
    """(LANES,): a number that one lane of the program reads, and zeros: to be summed."""
    lane = tl.arange(0, LANES)
    return tl.load(data + at + lane * 0, mask=(lane == 0) & mask, other=0)


@triton.jit
def prefix_length(start, n, VEC: tl.constexpr):
    """How many of n classes come before the first sector."""
    size: tl.constexpr = start.dtype.element_ty.primitive_bitwidth // 8
    past = (start.to(tl.int64) // size) % (2 * VEC)
    return tl.minimum((2 * VEC - past) % (2 * VEC), n).to(tl.int32)


@triton.jit
def fill_lanes(value, SPEC: tl.constexpr):
    """A number for each lane, (LANES,)."""
    LANES: tl.constexpr = SPEC.lanes
    return tl.full((LANES,), value, SPEC.dtype)


@triton.jit
def body_classes(LANES: tl.constexpr, VEC: tl.constexpr):
    """Where a tile's classes are, (LANES, VEC), from the tile's first."""
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def end_classes(prefix, n, SPEC: tl.constexpr):
    """The classes of a row's ends, (LANES, 1), and which of them there are."""
    VEC: tl.constexpr = SPEC.vec
    lane = tl.arange(0, SPEC.lanes)[:, None]
    tail = prefix + (n - prefix) // VEC * VEC
    classes = tl.where(lane < 2 * VEC, lane, tail + lane - 2 * VEC)
    mask = tl.where(lane < 2 * VEC, lane < prefix, classes < n)
    return classes, mask & (lane < 3 * VEC)


@triton.jit
def filler(start, PROBS: tl.constexpr):
    """The word for a class that is not there: a logit of -inf, or a probability of 0; twice for a 16-bit type."""
    if PROBS:
        return 0
    elif start.dtype.element_ty == tl.float64:
        return -0x0010000000000000  # 0xfff0000000000000
    elif start.dtype.element_ty == tl.bfloat16:
        return -0x007F0080  # 0xff80ff80
    elif start.dtype.element_ty == tl.float16:
        return -0x03FF0400  # 0xfc00fc00
    else:
        return -0x00800000  # 0xff800000


@triton.jit
def vector_start(first, ALIGNED: tl.constexpr, PAIRS: tl.constexpr, BYTES: tl.constexpr = 16):
    """A pointer to words that are numbers, or PAIRS of them; ALIGNED: with the hint that it is to whole vectors.

    BYTES: of a vector.

    The hint hangs on a bitcast, without the offset of a tile: AMD's compiler folds an addition into the offsets that
    follow, and where the offset is 0 every compiler does, and the hint is gone with it.
    """
    size: tl.constexpr = first.dtype.element_ty.primitive_bitwidth * (2 if PAIRS else 1)
    word: tl.constexpr = tl.int16 if size == 16 else tl.int32 if size == 32 else tl.int64
    first = first.to(tl.pointer_type(word))
    if ALIGNED:
        first = tl.multiple_of(first, BYTES)
    return first


@triton.jit
def load_body(
    start, prefix, at, n, PROBS: tl.constexpr, ALIGNED: tl.constexpr, KEEP_IN_CACHE: tl.constexpr, SPEC: tl.constexpr
):
    """Classes `at` and on of the body as they are stored; KEEP_IN_CACHE: they will be read once more."""
    LANES: tl.constexpr = SPEC.lanes
    VEC: tl.constexpr = SPEC.vec
    policy: tl.constexpr = "evict_last" if KEEP_IN_CACHE else "evict_first"
    narrow: tl.constexpr = start.dtype.element_ty.primitive_bitwidth == 16
    pair: tl.constexpr = 2 if narrow and ALIGNED else 1
    first = vector_start(start + prefix, ALIGNED, narrow and ALIGNED)
    words = at // pair + body_classes(LANES, VEC // pair)
    mask = words < (n - prefix) // VEC * VEC // pair
    tile = tl.load(first + words, mask=mask, other=filler(start, PROBS), eviction_policy=policy)
    if narrow and not ALIGNED:
        low, high = tl.split(tl.reshape(tile, LANES, VEC // 2, 2))
        return (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)
    else:
        return tile


@triton.jit
def widen(start, tile, hidden_zero, dtype: tl.constexpr):
    """A tile of load_body, (LANES, VEC), as numbers of the arithmetic's type.

    hidden_zero: a 0 that the compiler does not know to be one, where the same tile is widened once more: the compiler
    does not keep what it does not recognise as the same numbers.
    """
    storage: tl.constexpr = start.dtype.element_ty
    if storage.primitive_bitwidth == 16:
        word = tile ^ hidden_zero
        if storage == tl.bfloat16:
            low = (word << 16).to(tl.float32, bitcast=True)
            high = (word & -0x10000).to(tl.float32, bitcast=True)
        else:
            low = word.to(tl.int16).to(tl.float16, bitcast=True)
            high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return tl.reshape(tl.join(low, high), tile.shape[0], 2 * tile.shape[1]).to(dtype)
    else:
        return tile.to(storage, bitcast=True).to(dtype)


@triton.jit
def store_body(start, prefix, at, n, values, ALIGNED: tl.constexpr):
    LANES: tl.constexpr = values.shape[0]
    VEC: tl.constexpr = values.shape[1]
    size: tl.constexpr = start.dtype.element_ty.primitive_bitwidth // 8
    bytes_of_vector: tl.constexpr = min(16, VEC * size)  # a vector of fp32 logits has 4 numbers, of 16 bits too
    first = vector_start(start + prefix, ALIGNED, False, bytes_of_vector)
    classes = at + body_classes(LANES, VEC)
    mask = classes < (n - prefix) // VEC * VEC
    words = values.to(start.dtype.element_ty).to(first.dtype.element_ty, bitcast=True)
    tl.store(first + classes, words, mask=mask, eviction_policy="evict_first")


@triton.jit
def store_tile(start, prefix, n, tile, values, ALIGNED: tl.constexpr):
    """Values in the place of a tile's."""
    if values.shape[1] == 1:
        tl.store(start + tile.classes, values.to(start.dtype.element_ty), mask=tile.mask)
    else:
        store_body(start, prefix, tile.at, n, values, ALIGNED)


@triton.jit
def zero(start, n, SPEC: tl.constexpr):
    """n zeros: of padding, and of dropped rows."""
    LANES: tl.constexpr = SPEC.lanes
    VEC: tl.constexpr = SPEC.vec
    prefix = prefix_length(start, n, VEC)
    for at in range(0, n - prefix, LANES * VEC):
        store_body(start, prefix, at, n, tl.zeros((LANES, VEC), start.dtype.element_ty), True)
    ends, mask = end_classes(prefix, n, SPEC)
    tl.store(start + ends, tl.zeros((LANES, 1), start.dtype.element_ty), mask=mask)
