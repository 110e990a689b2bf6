"""How many threads and programs a row gets.

Registers. A program that keeps a row and its teachers' in registers has up to 512 threads, and each of them up to 256
bytes of rows, half of the 128 registers that are then its share; at V = 32768 in bf16 that is 8 tiles of 8 classes.
Arithmetic that takes more than the other half gets 256 threads, each with twice the registers and half of those bytes;
an option that takes some of it, half of the bytes, several of them or the metrics both, and standardized rows, which
are read twice more, a quarter. fp64's rows are not kept, and 128 threads share what 256 have otherwise.
Threads are counted, not warps, of which AMD's have 64. Fewer threads with 4 tiles each come first, so that short rows
leave room for other programs. Measured by ptxas (registers, no spills): tests/test_triton_static.py.

Tiny rows, of at most 128 classes, are lanes themselves: a program has 4 or 8 of them, 4 or 8 numbers a thread. A row of
10 in a program of its own takes 850 instructions of a warp, of which few threads have a class; so it takes 140.

Sweeps. Longer rows are read twice, by two programs on each multiprocessor, which is what the registers of 256 threads
with 96 to 128 each allow, and what it takes to have enough bytes in flight: sweep.py. The second sweep finds in the L2
what of the rows in flight fits into it; the last half of each row, which is read again first, mostly does.

Rows are split where whole ones would leave much of the device without work: few rows, or some more than the programs
that it holds, of which the last are then alone.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.gpu_choice import are_split, busy_share
from kdfast.triton.spec import Spec

LONG_LANES = 256
TINY_CLASSES = 128  # of which a program takes several rows: a warp's lanes have vectors for 256 bf16 classes
TINY_NUMBERS = 8  # of a tensor that a thread then has
MOST_SPLIT_TEACHERS = 4  # pass B of more teachers' segments spills: it has the totals of all of them to merge
SEGMENTS = 64  # at most; a row's sums are merged by one tile
LEAST_TILES = 3  # in a segment: its sums cost some 200 bytes, a hundredth of the traffic of so many classes


class Gpu(NamedTuple):
    backend: str  # Triton's: "cuda" or "hip"
    warp: int  # threads
    multiprocessors: int


class RegisterBudget(NamedTuple):
    """How much of a row and its teachers' a program may keep in registers."""

    lanes: int
    bytes: int  # in each
    registers: int  # of each
    sweeping: int = LONG_LANES  # threads for rows of which nothing is kept


FULL_BUDGET = RegisterBudget(512, 256, 128)
ARITHMETIC_BUDGET = RegisterBudget(256, 128, 255)
OPTIONS_BUDGET = RegisterBudget(512, 128, 128)
MOMENTS_BUDGET = RegisterBudget(256, 64, 255)
LEAST_BUDGET = RegisterBudget(256, 64, 255, 128)
FP64_BUDGET = RegisterBudget(0, 0, 0, 128)  # fp64: two registers for each number


class Plan(NamedTuple):
    lanes: int
    vec: int  # classes in a 16-byte vector of the smallest dtype
    tiles: int  # in registers; 0: rows are read once per pass
    warps: int
    registers: int  # of a thread

    def options(self, gpu: Gpu) -> dict[str, int]:
        """Triton's own. ptxas spills to fit more programs than it is told are wanted, so it is told."""
        options = {"num_warps": self.warps}
        if gpu.backend == "cuda":  # others have no such option
            options["maxnreg"] = self.registers
        return options


def interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def gpu_properties(device: torch.device) -> Gpu:
    if interpreted():
        return Gpu("cuda", 32, 1)
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    return _cached_properties(device, driver.get_current_device(), target.backend, target.warp_size, driver)


@lru_cache
def _cached_properties(device: torch.device, number: int, backend: str, warp: int, driver: Any) -> Gpu:
    if device.type == "cuda":
        return Gpu(backend, warp, torch.cuda.get_device_properties(device).multi_processor_count)
    return Gpu(backend, warp, driver.utils.get_device_properties(number)["multiprocessor_count"])


def register_budget(spec: Spec, tensors: list[Tensor]) -> RegisterBudget:
    """What the arithmetic leaves."""
    much = (spec.metrics, spec.standardize)
    more = (spec.softcap, spec.teacher_softcap, spec.dkd, not (spec.linear or spec.standardize), len(tensors) > 2)
    least = any(much) and sum((*much, *more)) > 1
    if spec.dtype == tl.float64:
        return FP64_BUDGET
    if least:
        return LEAST_BUDGET
    if spec.standardize:
        return MOMENTS_BUDGET
    plain = spec.teacher != "given" and len(tensors) <= 2 and tensors[0].dtype == tensors[-1].dtype
    carries_p = spec.divergence is None or (spec.linear and spec.divergence.over_student is None)
    if not (plain and carries_p) or spec.metrics:
        return ARITHMETIC_BUDGET
    terms = sum((spec.smoothed, spec.dkd, spec.softcap or spec.teacher_softcap))
    return (FULL_BUDGET, OPTIONS_BUDGET, ARITHMETIC_BUDGET, ARITHMETIC_BUDGET)[terms]


def vector_classes(tensors: list[Tensor]) -> int:
    return 16 // min(t.element_size() for t in tensors)


def _sweeping_lanes(tensors: list[Tensor], budget: RegisterBudget) -> int:
    few = len(tensors) <= 4  # else more registers for each, and more of them to load
    return min(budget.sweeping, LONG_LANES if few else LONG_LANES // 2)


def plan(vocab: int, tensors: list[Tensor], warp: int, budget: RegisterBudget) -> Plan:
    """For rows of `vocab` classes in each of these tensors."""
    vec = vector_classes(tensors)
    vectors = triton.next_power_of_2(triton.cdiv(vocab, vec))
    most = budget.bytes // (vec * sum(t.element_size() for t in tensors))
    most = 1 << most.bit_length() >> 1  # a power of 2, as threads are
    if vectors > budget.lanes * most:
        return _sweeping_plan(_sweeping_lanes(tensors, budget), vec, warp)
    lanes = min(budget.lanes, max(warp, vectors // min(4, most)))
    return Plan(lanes, vec, triton.cdiv(vectors, lanes), lanes // warp, budget.registers)


def _sweeping_plan(lanes: int, vec: int, warp: int) -> Plan:
    return Plan(lanes, vec, 0, lanes // warp, min(255, 65536 // (2 * lanes)))  # for two programs a multiprocessor


def sweep_plan(vocab: int, tensors: list[Tensor], warp: int, budget: RegisterBudget) -> Plan:
    """For rows, or segments, of which nothing is kept."""
    vec = vector_classes(tensors)
    lanes = min(_sweeping_lanes(tensors, budget), max(warp, triton.next_power_of_2(triton.cdiv(vocab, vec)) // 4))
    return _sweeping_plan(lanes, vec, warp)


def tiny_plan(width: int, warp: int) -> tuple[Plan, int]:
    """For tiny rows, which are its lanes, and for how many classes each has room."""
    classes = max(16, triton.next_power_of_2(width))
    rows = max(4, 128 // classes)
    return Plan(rows, 1, 1, max(1, rows * classes // (TINY_NUMBERS * warp)), 255), classes


def merging_plan(vec: int, warp: int) -> Plan:
    """For the sums of a row's segments, which a program has in registers."""
    return Plan(LONG_LANES, vec, 0, LONG_LANES // warp, 255)


def candidates(
    rows: int, vocab: int, tensors: list[Tensor], gpu: Gpu, budget: RegisterBudget
) -> Iterator[tuple[Plan, int]]:
    """Plans and numbers of programs for a sweep over whole rows: the one that is taken, then others worth measuring."""
    first = plan(vocab, tensors, gpu.warp, budget)
    yield first, rows if first.tiles else program_count(rows, gpu)
    if first.tiles:
        for lanes, tiles in ((first.lanes // 2, first.tiles * 2), (first.lanes * 2, first.tiles // 2)):
            if tiles and gpu.warp <= lanes <= 1024:
                registers = min(255, first.registers * first.lanes // lanes)
                yield Plan(lanes, first.vec, tiles, lanes // gpu.warp, registers), rows
    for lanes in (128, 256, 512):
        for each in (1, 2, 4):
            yield _sweeping_plan(lanes, first.vec, gpu.warp), min(rows, each * gpu.multiprocessors)


def program_count(rows: int, gpu: Gpu) -> int:
    """For rows that are read twice."""
    return min(rows, 2 * gpu.multiprocessors)


def may_be_split(spec: Spec) -> bool:
    return not (spec.standardize or spec.metrics) and spec.members <= MOST_SPLIT_TEACHERS


def split_row(rows: int, vocab: int, tile: int, gpu: Gpu) -> tuple[int, int]:
    """Into how many segments of how many classes, whole tiles, a row is split: (1, vocab) where it is not."""
    if not are_split(rows, vocab, gpu.multiprocessors):
        return 1, vocab
    tiles = triton.cdiv(vocab, tile)
    in_segment = _tiles_in_segment(rows, tiles, gpu)
    return triton.cdiv(tiles, in_segment), in_segment * tile


@lru_cache(1024)
def _tiles_in_segment(rows: int, tiles: int, gpu: Gpu) -> int:
    """The most that keep nine tenths of the device busy, or as much of it as can be."""
    least = max(LEAST_TILES, triton.cdiv(tiles, SEGMENTS))
    segments = {n: rows * triton.cdiv(tiles, n) for n in range(triton.cdiv(tiles, 2), least - 1, -1)}
    shares = {n: busy_share(programs, gpu.multiprocessors) for n, programs in segments.items()}
    return next((n for n, share in shares.items() if share >= 0.9), max(shares, key=shares.__getitem__))
