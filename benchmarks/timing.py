"""Taking times: round-robin over the candidates, so that what else the machine does falls on all of them."""

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SLOW = 0.25  # seconds; what takes longer than this takes part in every third round
_FLUSH_BYTES = 128 << 20  # several times any last-level cache's share of two cores
_flush: torch.Tensor | None = None


@dataclass(frozen=True)
class Candidate:
    """One way of computing the thing. `prepare`, and freeing what `run` returns, are not timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    threads: int | None = None  # None: as many as everything else


def flush_caches() -> None:
    """Reads more than the caches hold.

    Every candidate then finds the logits in memory, and no line of its preparation still to be written there.
    """
    global _flush
    if _flush is None:
        _flush = torch.ones(_FLUSH_BYTES // 4)
    _flush.sum()


def sample(candidate: Candidate, cold: bool, repeats: int) -> float:
    """Seconds of one call."""
    default = torch.get_num_threads()
    if candidate.threads is not None:
        torch.set_num_threads(candidate.threads)
    try:
        prepared = [candidate.prepare() for _ in range(repeats)]
        if cold:
            flush_caches()
        start = time.perf_counter()
        for argument in prepared:
            result = candidate.run(argument)
        seconds = (time.perf_counter() - start) / repeats
        del result, argument, prepared  # after the clock: giving memory back takes time
        return seconds
    finally:
        torch.set_num_threads(default)


def interleave(
    candidates: dict[str, Candidate], rounds: int, cold: bool, repeats: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Samples of every candidate, after a warm-up each, from `rounds` rounds.

    The order is shuffled every time, so that none always follows the same one. Those that take long are left out
    of two rounds in three.
    """
    slow = set()
    for name, candidate in candidates.items():
        progress(f"warming up {name}")
        sample(candidate, cold, 1)  # compiles where there is something to compile
        if sample(candidate, cold, 1) > SLOW:
            slow.add(name)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    for turn in range(rounds):
        progress(f"round {turn + 1} of {rounds}")
        gc.collect()  # outside of the samples
        names = [name for name in candidates if turn % 3 == 0 or name not in slow]
        for name in order.sample(names, len(names)):
            samples[name].append(sample(candidates[name], cold, repeats))
    return samples
