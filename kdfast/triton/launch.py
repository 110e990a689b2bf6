"""How many threads and programs a row gets.

Registers. A program that keeps a row and its teachers' in registers has up to 512 threads, and each of them up to 256
bytes of rows, half of the 128 registers that are then its share; at V = 32768 in bf16 that is 8 tiles of 8 classes.
Threads are counted, not warps, of which AMD's have 64. Fewer threads with 4 tiles each come first, so that short rows
leave room for other programs beside them. Measured by ptxas (registers, no spills): tests/test_triton_static.py.

Caches. Longer rows are read twice, and the second sweep finds them in the L2 only if all rows in flight fit into it. So
there are as many programs as rows fit into three quarters of it, but not fewer than one for each multiprocessor and not
more than two, which is what the registers of 256 threads with 96 to 128 each allow. On an H100 (50 MB, 132
multiprocessors) rows of V = 50257 in bf16 take 201 KB with their teacher's: 186 programs; of V = 151,936 608 KB: 132
programs, whose 80 MB do not fit any more, but the last half of each row, which is read again first, mostly does.

Few and long rows are split, so that every multiprocessor has a part of one.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.triton.spec import Spec

LONG_LANES = 256
SHORT_LANES = 512
HELD_BYTES = 256  # of a row and its teachers', in the registers of a thread, where the arithmetic leaves room
SPLIT_ROWS = 64  # with fewer rows than this
SPLIT_CLASSES = 32768  # and more classes than this
SEGMENTS = 64  # at most; a row's statistics are joined by one tile of (SEGMENTS, rows)
LEAST_TILES = 2  # in a segment: it costs 200 bytes of labels and statistics


class Facts(NamedTuple):
    warp: int  # threads
    multiprocessors: int
    cache: int  # bytes of L2


class Plan(NamedTuple):
    lanes: int
    vec: int  # classes in a 16-byte vector of the smallest dtype
    tiles: int  # in registers; 0: rows are read once per pass
    warps: int

    def options(self) -> dict[str, int]:
        """Triton's own. ptxas spills to fit more programs than it is told are wanted, so it is told."""
        options = {"num_warps": self.warps}
        if self.lanes == 32 * self.warps:  # NVIDIA's
            options["maxnreg"] = min(255, 65536 // self.lanes) if self.tiles else 128
        return options


def interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def facts(device: torch.device) -> Facts:
    if interpreted():
        return Facts(32, 1, 1 << 25)
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    return _facts(device, driver.get_current_device(), target.warp_size, driver)


@lru_cache
def _facts(device: torch.device, number: int, warp: int, driver: Any) -> Facts:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Facts(warp, properties.multi_processor_count, properties.L2_cache_size)
    return Facts(warp, driver.utils.get_device_properties(number)["multiprocessor_count"], 40 << 20)


def held_bytes(spec: Spec, tensors: list[Tensor]) -> int:
    """How much of a row a thread may keep beside what its arithmetic takes."""
    if spec.dtype == tl.float64:
        return 0
    if spec.teacher == "given":
        return HELD_BYTES // 4
    plain = len(tensors) <= 2 and tensors[0].dtype == tensors[-1].dtype
    carries_p = spec.divergence is None or spec.divergence.over == "teacher"
    return HELD_BYTES if plain and carries_p else HELD_BYTES // 2


def vector(tensors: list[Tensor]) -> int:
    return 16 // min(t.element_size() for t in tensors)


def plan(vocab: int, tensors: list[Tensor], warp: int, held_bytes: int) -> Plan:
    """For rows of `vocab` classes in each of these tensors, `held_bytes` of which a thread may keep."""
    vec = vector(tensors)
    vectors = triton.next_power_of_2(triton.cdiv(vocab, vec))
    most = held_bytes // (vec * sum(t.element_size() for t in tensors))
    most = 1 << most.bit_length() >> 1  # a power of 2, as threads are
    if vectors > SHORT_LANES * most:
        lanes, tiles = LONG_LANES, 0
    else:
        lanes = min(SHORT_LANES, max(warp, vectors // min(4, most)))
        tiles = triton.cdiv(vectors, lanes)
    return Plan(lanes, vec, tiles, lanes // warp)


def sweep(vocab: int, tensors: list[Tensor], warp: int) -> Plan:
    """For rows, or segments, of which nothing is kept."""
    vec = vector(tensors)
    lanes = min(LONG_LANES, max(warp, triton.next_power_of_2(triton.cdiv(vocab, vec)) // 4))
    return Plan(lanes, vec, 0, lanes // warp)


def reducing_lanes(rows: int, warp: int) -> int:
    """For the kernels that make one number of a number per row."""
    return warp if rows <= 256 else 1024


def choices(rows: int, vocab: int, tensors: list[Tensor], of: Facts, held: int) -> Iterator[tuple[Plan, int]]:
    """Plans and numbers of programs for a sweep over whole rows: the one that is taken, then others worth measuring."""
    first = plan(vocab, tensors, of.warp, held)
    yield first, rows if first.tiles else programs(rows, vocab, tensors, of)
    if first.tiles:
        for lanes, tiles in ((first.lanes // 2, first.tiles * 2), (first.lanes * 2, first.tiles // 2)):
            if tiles and of.warp <= lanes <= 1024:
                yield Plan(lanes, first.vec, tiles, lanes // of.warp), rows
    for lanes in (128, 256, 512):
        for each in (1, 2, 4):
            yield Plan(lanes, first.vec, 0, lanes // of.warp), min(rows, each * of.multiprocessors)


def programs(rows: int, vocab: int, tensors: list[Tensor], of: Facts) -> int:
    """For rows that are read twice."""
    row = vocab * sum(t.element_size() for t in tensors)
    fitting = of.cache * 3 // 4 // row
    return max(1, min(rows, max(of.multiprocessors, min(2 * of.multiprocessors, fitting))))


def segments(rows: int, vocab: int, tile: int, of: Facts) -> tuple[int, int]:
    """Into how many segments of how many classes, whole tiles, a row is split: (1, vocab) where it is not."""
    if rows == 0 or rows > SPLIT_ROWS or vocab <= SPLIT_CLASSES:
        return 1, vocab
    wanted = min(SEGMENTS, triton.cdiv(2 * of.multiprocessors, rows), vocab // (LEAST_TILES * tile))
    segment = triton.cdiv(triton.cdiv(vocab, wanted), tile) * tile
    return triton.cdiv(vocab, segment), segment
