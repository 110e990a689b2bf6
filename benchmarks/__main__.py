"""`python -m benchmarks`: measures the cases of cases.py and writes a table, a CSV and a plot.

Examples:
    python -m benchmarks                                     everything, some minutes
    python -m benchmarks --quick                             the main cases, under a minute
    python -m benchmarks --case bf16-inplace                 cases whose name contains that
    python -m benchmarks --case fp32-inplace --only floor    without peers: seconds, to tune a kernel
    python -m benchmarks --case avx2 --minima                on a busy machine
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import plot, report
from benchmarks.cases import CASES, Case, Workload

RESULTS = Path(__file__).with_name("results")
ROUNDS, QUICK_ROUNDS = 21, 5

Results = dict[Workload, dict[str, Any]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the main cases, under a minute")
    parser.add_argument("--case", action="append", metavar="TEXT", help="cases with TEXT in their name; repeatable")
    parser.add_argument("--only", metavar="TEXT", help="besides kdfast, only candidates with TEXT in their name")
    parser.add_argument("--isa", help="the instruction set of all cases, a value of KDFAST_CPU_ISA")
    parser.add_argument("--threads", type=int, help="threads of every candidate (torch's default)")
    parser.add_argument("--rounds", type=int, help=f"default {ROUNDS}, with --quick {QUICK_ROUNDS}")
    parser.add_argument("--minima", action="store_true", help="compare shortest times, not medians; writes no files")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for CSV and PNG (whole runs: benchmarks/results)")
    parser.add_argument("--list", action="store_true", help="show all cases and their reasons")
    return parser.parse_args()


def _can_run(isa: str) -> bool:
    """Whether this CPU has the instruction set."""
    info = Path("/proc/cpuinfo")
    flag = {"avx512": "avx512f"}.get(isa, isa)
    return isa in ("best", "baseline") or (info.exists() and flag in info.read_text().split())


def _selected(options: argparse.Namespace) -> list[Case]:
    """The cases that the options select, with the candidates that they select."""
    cases = []
    for case in CASES:
        if options.case and not any(text in case.name for text in options.case):
            continue
        if options.quick and not (case.quick or options.case):
            continue
        if options.isa and case.workload.isa not in ("best", options.isa):
            continue
        if not _can_run(case.workload.isa):
            print(f"benchmarks: skipped {case.name}: this CPU has no {case.workload.isa}", file=sys.stderr)
            continue
        if options.quick:
            case = replace(case, also=())
        if options.only:
            bounds = tuple(bound for bound in case.bounds if options.only in bound.against)
            also = tuple(name for name in case.also if options.only in name)
            case = replace(case, bounds=bounds, also=also)
        cases.append(case)
    return cases


def _tasks(cases: list[Case]) -> dict[str, dict[Workload, list[str]]]:
    """The workloads of each instruction set, each with the candidates of all its cases."""
    tasks: dict[str, dict[Workload, list[str]]] = {}
    for case in cases:
        names = tasks.setdefault(case.workload.isa, {}).setdefault(case.workload, [])
        names += [name for name in case.candidates if name not in names]
    return tasks


def _run(cases: list[Case], rounds: int, threads: int | None, isa: str | None) -> Results:
    """Measures every workload, one process per instruction set."""
    results: Results = {}
    tasks = _tasks(cases)
    total = sum(len(workloads) for workloads in tasks.values())
    number = 0
    for wanted, workloads in tasks.items():
        todo = []
        for workload, names in workloads.items():
            number += 1
            title = f"[{number}/{total}] {workload.name}"
            todo.append({"workload": asdict(workload), "candidates": names, "title": title})
        job = {"tasks": todo, "rounds": rounds, "threads": threads}
        chosen = isa if wanted == "best" else wanted
        environment = os.environ | ({"KDFAST_CPU_ISA": chosen} if chosen else {})
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.worker"],
            input=json.dumps(job),
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for line in process.stdout.splitlines():
            result = json.loads(line)
            results[Workload(**result["workload"])] = result
        if process.returncode != 0:
            print(f"benchmarks: a worker exited with status {process.returncode}, see above", file=sys.stderr)
    return results


def _list() -> None:
    for case in CASES:
        print(f"{case.name}: {case.measured} on {case.workload.name}\n    {case.reason}")
        for bound in case.bounds:
            print(f"    bar {bound.text(bound.bar) or 'none'}, goal {bound.text(bound.goal) or 'none'}")


def main() -> int:
    options = _arguments()
    if options.list:
        _list()
        return 0
    cases = _selected(options)
    if not cases:
        print("benchmarks: these options select no case; --list shows the names", file=sys.stderr)
        return 2
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    results = _run(cases, rounds, options.threads, options.isa)
    summarize = min if options.minima else statistics.median
    outcomes = [report.Outcome(case, results[case.workload], summarize) for case in cases if case.workload in results]
    if outcomes:
        report.show(outcomes)
    is_whole = not (options.case or options.only or options.isa or options.threads)
    if outcomes and (options.out or is_whole) and not options.minima:
        folder = options.out or RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        stem = report.slug(report.cpu_name()) + "-quick" * options.quick
        report.write_csv(outcomes, folder / f"{stem}.csv")
        plot.draw(outcomes, folder / f"{stem}.png")
        print(f"written: {folder / stem}.csv and .png")
    return 0 if len(outcomes) == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
