"""`python -m benchmarks`: measures the cases of cases.py on a CPU or on a GPU.

It prints a table, and writes it as a page in markdown, a CSV and a plot, named after the machine.

Examples:
    python -m benchmarks                                     a CPU: everything, some minutes
    python -m benchmarks --quick                             the main cases, about a minute
    python -m benchmarks --case bf16-inplace                 cases whose name contains that
    python -m benchmarks --case fp32-inplace --only floor    without peers: seconds, to tune a kernel
    python -m benchmarks --case avx2 --minima                on a busy machine
    python -m benchmarks --device cuda                       a GPU: some minutes, most of them torch.compile's
    python -m benchmarks --device cuda --case 128256         prints its page only
    python -m benchmarks --dry-run --out build               the code for a GPU on tiny logits, without one
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import plot, report
from benchmarks.cases import CASES, Case, Workload

RESULTS = Path(__file__).with_name("results")
ROUNDS = {"cpu": 21, "cuda": 50, "dry run": 2}
QUICK_ROUNDS, LEAST_GPU_ROUNDS = 5, 30  # fewer are too few for percentiles
PEERS = ("floor", "eager", "torch.compile", "liger", "trl")  # whose failures are only noted

Results = dict[Workload, dict[str, Any]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU of NVIDIA or AMD")
    parser.add_argument("--dry-run", action="store_true", help="of a GPU's cases, on the CPU: times mean nothing")
    parser.add_argument("--quick", action="store_true", help="the main cases")
    parser.add_argument("--case", action="append", metavar="TEXT", help="cases with TEXT in their name; repeatable")
    parser.add_argument("--only", metavar="TEXT", help="besides kdfast, only candidates with TEXT in their name")
    parser.add_argument("--isa", help="the instruction set of all cases, a value of KDFAST_CPU_ISA")
    parser.add_argument("--threads", type=int, help="threads of every candidate (torch's default)")
    rounds = ", ".join(f"{name} {number}" for name, number in ROUNDS.items())
    parser.add_argument("--rounds", "--repeats", type=int, help=f"default: {rounds}; cpu --quick {QUICK_ROUNDS}")
    parser.add_argument("--minima", action="store_true", help="compare shortest times, not medians; writes no files")
    parser.add_argument("--tests", type=Path, metavar="FILE", help="pytest's output, whose summary the page quotes")
    parser.add_argument("--sanitizer", type=Path, metavar="FILE", help="compute-sanitizer's output, also quoted")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the files (whole runs: benchmarks/results)")
    parser.add_argument("--list", action="store_true", help="show all cases and their reasons")
    options = parser.parse_args()
    if options.dry_run:
        options.device = "dry run"
    if options.rounds is not None and options.rounds < (LEAST_GPU_ROUNDS if options.device == "cuda" else 1):
        parser.error(f"--rounds: {options.rounds} are too few for percentiles")
    if options.dry_run and options.out and options.out.resolve() == RESULTS.resolve():
        parser.error("--out: a dry run is no result; use another folder")
    return options


def _can_run(isa: str) -> bool:
    """Whether this CPU has the instruction set."""
    info = Path("/proc/cpuinfo")
    flag = {"avx512": "avx512f"}.get(isa, isa)
    return isa in ("best", "baseline") or (info.exists() and flag in info.read_text().split())


def _selected(options: argparse.Namespace) -> list[Case]:
    """The cases that the options select, with the candidates that they select."""
    cases = []
    for case in CASES:
        if case.device != options.device or (options.case and not any(text in case.name for text in options.case)):
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
            case = replace(case, bounds=bounds, also=tuple(name for name in case.also if options.only in name))
        cases.append(case)
    return cases


def _run(cases: list[Case], options: argparse.Namespace) -> Results:
    """Measures every workload with the candidates of all its cases, each in a process of its own."""
    workloads: dict[Workload, dict[str, None]] = {}
    for case in cases:
        workloads.setdefault(case.workload, {}).update(dict.fromkeys(case.candidates))
    is_short = options.quick and options.device == "cpu"
    job = {"device": options.device, "threads": options.threads}
    job["rounds"] = options.rounds or (QUICK_ROUNDS if is_short else ROUNDS[options.device])
    results: Results = {}
    for number, (workload, names) in enumerate(workloads.items(), 1):
        job["title"] = f"[{number}/{len(workloads)}] {workload.name}"
        job |= {"workload": asdict(workload), "names": list(names)}
        isa = options.isa if workload.isa == "best" else workload.isa
        environment = os.environ | ({"KDFAST_CPU_ISA": isa} if isa else {})
        command = [sys.executable, "-m", "benchmarks.worker"]
        done = subprocess.run(command, input=json.dumps(job), stdout=subprocess.PIPE, env=environment, text=True)
        if done.returncode == 0:
            results[workload] = json.loads(done.stdout)
        else:
            print(f"benchmarks: a worker exited with status {done.returncode}, see above", file=sys.stderr)
    return results


def _list() -> None:
    for case in CASES:
        print(f"{case.name} ({case.device}): {case.measured} on {case.workload.name}\n    {case.reason}")
        for bound in case.bounds:
            limits = f"bar {bound.text(bound.bar) or 'none'}, goal {bound.text(bound.goal) or 'none'}"
            print(f"    {bound.against}: {limits}")


def _summary(output: Path) -> str:
    """The last line of pytest's output, such as 12 passed, 3 skipped in 4.56s, or compute-sanitizer's summary."""
    lines = output.read_text(errors="replace").splitlines()
    ends = [line.strip("= ") for line in lines if re.search(r"\b(passed|failed|skipped|errors?)\b.* in [\d.]+s", line)]
    found = [line.strip("=* ") for line in lines if re.search(r"SUMMARY: |NOT INSTALLED", line)]
    return (ends[-1] if ends else "; ".join(found)) or "no summary: the run did not finish"


def _write(outcomes: list[report.Outcome], page: str, folder: Path, stem: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.md").write_text(page)
    report.write_csv(outcomes, folder / f"{stem}.csv")
    plot.draw(outcomes, folder / f"{stem}.png")
    print(f"written: {folder / stem}.md, .csv and .png")


def main() -> int:
    options = _arguments()
    if options.list:
        _list()
        return 0
    cases = _selected(options)
    if not cases:
        print("benchmarks: these options select no case; --list shows the names", file=sys.stderr)
        return 2
    results = _run(cases, options)
    summarize = min if options.minima else statistics.median
    outcomes = [report.Outcome(case, results[case.workload], summarize) for case in cases if case.workload in results]
    if not outcomes:
        return 1
    stem = "dry-run" if options.dry_run else report.slug(outcomes[0].run["facts"]["machine"]) + "-quick" * options.quick
    files = {"tests": options.tests, "compute-sanitizer": options.sanitizer} if options.device != "cpu" else {}
    notes = {name: _summary(file) if file else "not run" for name, file in files.items()}
    page = report.page(outcomes, notes, shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]), f"{stem}.png")
    report.show(outcomes) if options.device == "cpu" else print(page)
    is_whole = not (options.case or options.only or options.isa or options.threads)
    if (options.out or options.dry_run or is_whole) and not options.minima:
        folder = options.out or (Path(tempfile.mkdtemp(prefix="kdfast-")) if options.dry_run else RESULTS)
        _write(outcomes, page, folder, stem)
    unsound = [
        f"benchmarks: {name} on {workload.name}: {row['note']}"
        for workload, result in results.items()
        for name, row in result["rows"].items()
        if row["note"] and not row["note"].startswith("left out") and not name.startswith(PEERS)
    ]
    print("\n".join(unsound), end="\n" * bool(unsound), file=sys.stderr)
    return 1 if unsound or len(outcomes) < len(cases) else 0


if __name__ == "__main__":
    sys.exit(main())
