"""The cases of `python -m benchmarks` for pytest-benchmark.

    pytest benchmarks/test_speed.py -k "1024x32000-bf16 and floor"
    KDFAST_CPU_ISA=avx2 pytest benchmarks/test_speed.py -k avx2

Speed is not asserted, since a busy machine would fail. Cases of another instruction set than this process has are
skipped, since it cannot change.
"""

import functools
import os
from typing import Any

import pytest
import torch

from benchmarks.candidates import Data, candidate
from benchmarks.cases import CASES, Workload
from benchmarks.timing import flush_caches

ROUNDS = 5
PAIRS = dict.fromkeys((case.workload, name) for case in CASES if case.device == "cpu" for name in case.candidates)
BY_WORKLOAD = sorted(PAIRS, key=lambda pair: pair[0].name)  # so that each workload's arrays are made once

_data = functools.lru_cache(maxsize=1)(Data)  # one workload's arrays at a time


@pytest.mark.parametrize(
    ("workload", "name"), [pytest.param(*pair, id=f"{pair[0].name}: {pair[1]}") for pair in BY_WORKLOAD]
)
def test_a_candidate_runs_and_is_timed(benchmark: Any, workload: Workload, name: str) -> None:
    isa = os.environ.get("KDFAST_CPU_ISA", "best")
    if workload.isa not in ("best", isa):
        pytest.skip(f"needs KDFAST_CPU_ISA={workload.isa}")
    measured = candidate(name, _data(workload))

    def prepare() -> tuple[tuple[Any], dict[str, Any]]:
        argument = measured.prepare()
        if workload.cold:
            flush_caches()
        return (argument,), {}

    default = torch.get_num_threads()
    torch.set_num_threads(measured.threads or default)
    try:
        benchmark.group = workload.name
        rounds = ROUNDS * workload.repeats
        benchmark.pedantic(measured.run, setup=prepare, rounds=rounds, iterations=1, warmup_rounds=1)
    finally:
        torch.set_num_threads(default)
