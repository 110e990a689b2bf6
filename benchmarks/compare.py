"""`python -m benchmarks.compare TREE`: how long this checkout's calls take beside those of another one.

TREE is a folder with a built kdfast, such as a git worktree of an earlier commit. Each kdfast runs in a process of its
own, both under the benchmarks of this checkout. They take turns call by call, and each ratio is of two calls that
follow one another, so that other load of the machine affects both.

Examples:
    python -m benchmarks.compare ../before --case bf16-inplace
    python -m benchmarks.compare ../before --case fp32-jsd --case fp32-tvd --isa avx2
    python -m benchmarks.compare .                            the machine's noise
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, Workload

HERE = Path(__file__).parents[1]
ROUNDS = 15
PAUSE = 0.03  # seconds before a call, spent spinning: by then the other process's threads no longer spin
# The tree's kdfast, then this checkout's benchmarks
_WORKER = """
import sys
sys.path[0] = sys.argv[1]
import kdfast
sys.path[0] = sys.argv[2]
from benchmarks import compare
compare.serve()
"""


def serve() -> None:
    """Times the candidates whose names come from standard input, a line each."""
    from benchmarks import timing
    from benchmarks.candidates import Data, candidate

    replies = os.fdopen(os.dup(1), "w")  # what libraries print goes to standard error
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    workload = Workload(**job["workload"])
    data = Data(workload)
    candidates = {name: candidate(name, data) for name in job["names"]}
    for line in sys.stdin:
        ready = time.perf_counter() + PAUSE
        while time.perf_counter() < ready:  # asleep, this thread might wake where the next one wakes too
            pass
        seconds = timing.sample(candidates[line.strip()], workload.cold, workload.repeats)
        print(seconds, file=replies, flush=True)


class _Worker:
    def __init__(self, tree: Path, workload: Workload, names: list[str], isa: str | None) -> None:
        command = [sys.executable, "-c", _WORKER, str(tree), str(HERE)]
        environment = os.environ | ({"KDFAST_CPU_ISA": isa} if isa else {})
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)
        self._say(json.dumps({"workload": asdict(workload), "names": names}))

    def _say(self, line: str) -> None:
        assert self.process.stdin
        print(line, file=self.process.stdin, flush=True)

    def seconds(self, name: str) -> float:
        assert self.process.stdout
        self._say(name)
        return float(self.process.stdout.readline() or "nan")  # NaN: the process failed and has said why

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def _compare(trees: list[Path], workload: Workload, names: list[str], isa: str | None, rounds: int) -> dict[str, Any]:
    """For each name, the seconds of both trees, round by round; the first round warms up."""
    workers = [_Worker(tree, workload, names, isa) for tree in trees]
    pairs: dict[str, list[list[float]]] = {name: [] for name in names}
    order = random.Random(0)
    for turn in range(-1, rounds):
        for name in names:
            found = [0.0, 0.0]
            for which in order.sample((0, 1), 2):
                found[which] = workers[which].seconds(name)
            if turn >= 0:
                pairs[name].append(found)
    for worker in workers:
        worker.close()
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", type=Path, help="the other checkout, with kdfast built in it")
    parser.add_argument("--case", action="append", metavar="TEXT", help="cases with TEXT in their name; repeatable")
    parser.add_argument("--isa", help="the instruction set of all cases, a value of KDFAST_CPU_ISA")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    options = parser.parse_args()
    workloads: dict[Workload, dict[str, None]] = {}
    for case in CASES:
        if case.device == "cpu" and (not options.case or any(text in case.name for text in options.case)):
            workloads.setdefault(case.workload, {})[case.measured] = None
    if not workloads:
        parser.error("these options select no case; python -m benchmarks --list shows the names")
    print(f"{'':52}{'other ms':>9}{'this ms':>9}   this / other (quartiles)")
    for workload, names in workloads.items():
        isa = options.isa or (workload.isa if workload.isa != "best" else None)
        pairs = _compare([options.tree.resolve(), HERE], workload, list(names), isa, options.rounds)
        for name, found in pairs.items():
            other, this = (statistics.median(each) * 1e3 for each in zip(*found, strict=True))
            low, middle, high = statistics.quantiles([b / a for a, b in found], n=4)
            title = f"{workload.name}  {name}" + f"  ({options.isa})" * bool(options.isa)
            print(f"{title:52}{other:9.3f}{this:9.3f}   {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
