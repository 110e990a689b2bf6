"""Timing: the candidates take turns, so that other load of the machine affects all of them."""

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

SLOW = 0.25  # seconds; slower candidates run in every third round
_FLUSH_BYTES = 128 << 20  # several times any last-level cache's share of two cores
_flush: torch.Tensor | None = None
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Candidate:
    """A computation to time. `prepare`, and freeing what `run` returns, are not timed."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    threads: int | None = None  # None: torch's default
    divergence: str | None = (
        None  # run returns the loss with it, and gives what prepare returned, a tensor, its gradient
    )


def flush_caches() -> None:
    """Reads more than the caches hold: logits are then in memory alone, and no write-back is pending.

    Gives memory that malloc keeps free back to the system, so that what a call allocates is fresh. Large tensors are
    as a rule, but not where earlier candidates have left a gap that is large enough.
    """
    global _flush
    if _flush is None:
        _flush = torch.ones(_FLUSH_BYTES // 4)
    _flush.sum()
    if hasattr(_libc, "malloc_trim"):  # glibc's
        _libc.malloc_trim(0)


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


def turns(names: list[str], slow: Collection[str], rounds: int) -> Iterator[str]:
    """The names in the order of measuring. Each round shuffles it, so that a changing clock favours none; slow ones run
    in every third round."""
    order = random.Random(0)
    for turn in range(rounds):
        gc.collect()  # not timed
        ready = [name for name in names if turn % 3 == 0 or name not in slow]
        yield from order.sample(ready, len(ready))


def interleave(
    candidates: dict[str, Candidate],
    rounds: int,
    cold: bool = True,
    repeats: int = 1,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, list[float]]:
    """Samples of every candidate, after a warm-up."""
    slow = set()
    for name, candidate in candidates.items():
        progress(f"warming up {name}")
        sample(candidate, cold, 1)  # compiles, if needed
        if sample(candidate, cold, 1) > SLOW:
            slow.add(name)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for name in turns(list(candidates), slow, rounds):
        progress(f"{name}, {len(samples[name]) + 1} of at most {rounds}")
        samples[name].append(sample(candidates[name], cold, repeats))
    return samples


def medians(candidates: dict[str, Candidate], rounds: int, **settings: Any) -> dict[str, float]:
    """Median seconds of every candidate."""
    return {name: statistics.median(each) for name, each in interleave(candidates, rounds, **settings).items()}
