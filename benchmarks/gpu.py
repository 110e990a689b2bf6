"""`python -m benchmarks.gpu`: kdfast's CUDA and Triton kernels and their peers on a GPU, in one report.

The report is a table in markdown, a CSV and a plot, named after the device, in benchmarks/results. `make gpu-check`
runs the tests first and puts their summary into it.

Examples:
    python -m benchmarks.gpu                           everything, some minutes, most of them torch.compile's
    python -m benchmarks.gpu --case 128256             cases whose name contains that; prints the report only
    python -m benchmarks.gpu --dry-run --out build     the same code on tiny logits, without a GPU
"""

import argparse
import importlib.util
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_cases import CASES, DRY_CASES

RESULTS = Path(__file__).with_name("results")
TOOLS = Path(__file__).parents[1] / "tools"
REPEATS, LEAST_REPEATS, DRY_REPEATS = 50, 30, 2


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", metavar="TEXT", help="cases with TEXT in their name; repeatable")
    parser.add_argument("--repeats", type=int, help=f"default {REPEATS}, at least {LEAST_REPEATS} (dry: {DRY_REPEATS})")
    parser.add_argument("--tests", type=Path, metavar="FILE", help="pytest's output, whose summary the report quotes")
    parser.add_argument("--sanitizer", type=Path, metavar="FILE", help="compute-sanitizer's output, also quoted")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the report (whole runs: benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true", help="tiny logits on the CPU: times mean nothing")
    options = parser.parse_args()
    if options.repeats is not None and options.repeats < (1 if options.dry_run else LEAST_REPEATS):
        parser.error(f"--repeats: {options.repeats} are too few for percentiles")
    if options.dry_run and options.out and options.out.resolve() == RESULTS.resolve():
        parser.error("--out: a dry run is no result; use another folder")
    return options


def _replace_gpu() -> str:
    """Before Triton is imported, makes its kernels run on CPU tensors; returns what runs them."""
    if not ((TOOLS / "ptxemu").is_dir() and importlib.util.find_spec("numpy")):
        os.environ["TRITON_INTERPRET"] = "1"
        return "Triton's interpreter"
    os.environ.pop("TRITON_INTERPRET", None)
    if importlib.util.find_spec("triton"):  # else kdfast says what is missing
        os.environ.setdefault("PTXEMU_CACHE", str(TOOLS.with_name("build") / "ptxemu"))
        sys.path.insert(0, str(TOOLS))
        from ptxemu import triton_driver  # an emulator of GPU kernels

        triton_driver.activate(cap=90)
    return "an emulator of GPU kernels"


def _summary(output: Path) -> str:
    """The last line of pytest's output, such as 12 passed, 3 skipped in 4.56s, or compute-sanitizer's summary."""
    lines = output.read_text(errors="replace").splitlines()
    ends = [line.strip("= ") for line in lines if re.search(r"\b(passed|failed|skipped|errors?)\b.* in [\d.]+s", line)]
    found = [line.strip("=* ") for line in lines if re.search(r"SUMMARY: |NOT INSTALLED", line)]
    return (ends[-1] if ends else "; ".join(found)) or "no summary: the run did not finish"


def main() -> int:
    options = _arguments()
    replacement = _replace_gpu() if options.dry_run else None

    import torch  # not earlier: it may import Triton

    from benchmarks import gpu_device, gpu_measure, gpu_report
    from benchmarks.report import cpu_name

    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no GPU here; --dry-run needs none", file=sys.stderr)
        return 2
    cases = DRY_CASES if options.dry_run else CASES
    cases = [case for case in cases if not options.case or any(text in case.name for text in options.case)]
    if not cases:
        print("benchmarks.gpu: no case has this text in its name", file=sys.stderr)
        return 2
    device = gpu_device.Host() if options.dry_run else gpu_device.Gpu()
    repeats = options.repeats or (DRY_REPEATS if options.dry_run else REPEATS)
    rows, before = [], device.state()
    for number, case in enumerate(cases, 1):
        rows += gpu_measure.measure(case, device, repeats, f"[{number}/{len(cases)}] {case.name}")

    name = f"{cpu_name()}, kernels by {replacement}" if options.dry_run else torch.cuda.get_device_name()
    tests, sanitizer = (_summary(file) if file else "not run" for file in (options.tests, options.sanitizer))
    facts = gpu_report.facts(name, tests, sanitizer, (before, device.state()))
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    report = gpu_report.Report(rows, facts, command, options.dry_run)
    print(report.markdown())
    folder = options.out or (Path(tempfile.mkdtemp(prefix="kdfast-gpu-")) if options.dry_run else RESULTS)
    if options.out or options.dry_run or not options.case:
        folder.mkdir(parents=True, exist_ok=True)
        report.write(folder)
        print(f"written: {folder / report.stem}.md, .csv and .png")
    ours = [row for row in rows if row.candidate in gpu_measure.KDFAST]
    unsound = [row for row in ours if row.note and not row.note.startswith("left out")]
    for row in unsound:
        print(f"benchmarks.gpu: {row.candidate} on {row.case.name}: {row.note}", file=sys.stderr)
    return 1 if unsound else 0


if __name__ == "__main__":
    sys.exit(main())
