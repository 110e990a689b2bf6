"""Timing: the candidates take turns, so that other load of the machine affects all of them."""

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

SLOW = 0.25  # seconds; slower candidates run in every third round
_FLUSH_BYTES = 128 << 20  # several times any last-level cache's share of two cores
_flush: torch.Tensor | None = None


@dataclass(frozen=True)
class Candidate:
    """A computation to time. `prepare`, and freeing what `run` returns, are not timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    threads: int | None = None  # None: torch's default


def flush_caches() -> None:
    """Reads more than the caches hold: logits are then in memory alone, and no write-back is pending."""
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
        del result, argument, prepared  # not timed: freeing memory takes time
        return seconds
    finally:
        torch.set_num_threads(default)


def interleave(
    candidates: dict[str, Candidate], rounds: int, cold: bool, repeats: int, progress: Callable[[str], None]
) -> dict[str, list[float]]:
    """Samples of every candidate from `rounds` rounds, after a warm-up. Each round shuffles the order; slow candidates
    run in every third round."""
    slow = set()
    for name, candidate in candidates.items():
        progress(f"warming up {name}")
        sample(candidate, cold, 1)  # compiles, if needed
        if sample(candidate, cold, 1) > SLOW:
            slow.add(name)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = random.Random(0)
    for turn in range(rounds):
        progress(f"round {turn + 1} of {rounds}")
        gc.collect()  # not timed
        names = [name for name in candidates if turn % 3 == 0 or name not in slow]
        for name in order.sample(names, len(names)):
            samples[name].append(sample(candidates[name], cold, repeats))
    return samples
