"""The report of a run: a table in the terminal and a CSV."""

import csv
import platform
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.cases import Bound, Case

_ABOUT = ["cpu", "threads", "isa", "torch", "kdfast", "case", "rows", "vocab", "dtype", "temperature", "measured"]
_TIMES = ["candidate", "samples", "median_ms", "min_ms", "max_ms", "spread", "kdfast_ratio"]
COLUMNS = [*_ABOUT, *_TIMES, "bar", "goal", "verdict"]

COLOURS = {"goal": "green", "bar": "yellow", "missed": "red", "": "default"}  # by verdict


@dataclass(frozen=True)
class Outcome:
    """A case and the run in which its workload was measured."""

    case: Case
    run: dict[str, Any]
    summarize: Callable[[list[float]], float] = statistics.median  # of a candidate's samples

    def milliseconds(self, candidate: str) -> float:
        return 1e3 * self.summarize(self.run["samples"][candidate])

    def spread(self, candidate: str) -> float:
        """Half the distance between the quartiles, relative to the median."""
        samples = self.run["samples"][candidate]
        if len(samples) < 2:
            return 0.0
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return (high - low) / 2 / middle

    def value(self, against: str) -> float:
        """The ratio to another candidate's time, as Bound.value defines it."""
        bound = Bound(against, None)
        return bound.value(self.milliseconds(self.case.measured), self.milliseconds(against))

    def verdict(self, *bounds: Bound) -> str:
        """ "goal", "bar" or "missed" for these bounds; empty where there are none, or they are for another CPU."""
        has_avx512 = str(self.run["isa"]).startswith("avx512")  # which the bounds of the best ISA are for
        if not bounds or (self.case.workload.isa == "best" and not has_avx512):
            return ""
        values = [(bound, self.value(bound.against)) for bound in bounds]
        if not all(bound.meets(value, bound.bar) for bound, value in values):
            return "missed"
        return "goal" if all(bound.meets(value, bound.goal) for bound, value in values) else "bar"


def cpu_name() -> str:
    """The CPU's model name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """The name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", name.lower())).strip("-")


def _ratio(outcome: Outcome, against: str) -> str:
    """A ratio, coloured by its bound's verdict."""
    if against not in outcome.run["samples"] or against not in outcome.case.candidates:
        return ""
    verdict = outcome.verdict(*(bound for bound in outcome.case.bounds if bound.against == against))
    return f"[{COLOURS[verdict]}]{outcome.value(against):.3g}x[/]"


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _row(outcome: Outcome) -> list[str]:
    case = outcome.case
    floor = next((name for name in case.candidates if name.startswith("floor")), None)
    shown = {floor, "eager", "torch.compile"}
    others = [f"{name} {_ratio(outcome, name)}" for name in case.candidates[1:] if name not in shown]
    verdict = outcome.verdict(*case.bounds)
    return [
        case.name,
        f"{_time(outcome.milliseconds(case.measured))} ±{100 * outcome.spread(case.measured):.0f}%",
        _time(outcome.milliseconds(floor)) if floor else "",
        _ratio(outcome, floor) if floor else "",
        _ratio(outcome, "eager"),
        _ratio(outcome, "torch.compile"),
        "\n".join(others),
        "\n".join(bound.text(bound.bar) for bound in case.bounds if bound.bar is not None),
        "\n".join(bound.text(bound.goal) for bound in case.bounds if bound.goal is not None),
        f"[{COLOURS[verdict]}]{verdict or '-'}[/]",
    ]


def heading(outcomes: list[Outcome]) -> str:
    run = outcomes[0].run
    isas = ", ".join(sorted({o.run["isa"] or "plain PyTorch reference, not compiled" for o in outcomes}))
    threads = f"{run['threads']} thread{'s' * (run['threads'] != 1)}"
    return f"{cpu_name()}, {threads}; kdfast {run['kdfast']} ({isas}), torch {run['torch']}"


def show(outcomes: list[Outcome]) -> None:
    """Prints the table; a ratio that meets its goal is green, its bar yellow, neither red."""
    table = Table(title=heading(outcomes), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("case", no_wrap=True)
    for column in ("kdfast ms", "floor ms", "x floor", "x eager", "x compile"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("others", "bar", "goal", "met"):
        table.add_column(column)
    for outcome in outcomes:
        table.add_row(*_row(outcome))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console.width = 180
    console.print(table)
    console.print("x floor: times the floor's time; x eager, x compile, others: times faster than these.")


def write_csv(outcomes: list[Outcome], path: Path) -> None:
    """One line for each case and candidate."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for outcome in outcomes:
            run, case, work = outcome.run, outcome.case, outcome.case.workload
            about = [cpu_name(), run["threads"], run["isa"], run["torch"], run["kdfast"]]
            about += [case.name, work.rows, work.vocab, work.dtype, work.temperature, case.measured]
            bounds = {bound.against: bound for bound in case.bounds}
            for name in case.candidates:
                samples = run["samples"][name]
                times = [outcome.milliseconds(name), 1e3 * min(samples), 1e3 * max(samples)]
                numbers = [*(f"{time:.6g}" for time in times), f"{outcome.spread(name):.3f}"]
                ratio = "" if name == case.measured else f"{outcome.value(name):.4g}"
                bound = bounds.get(name, Bound(name, None))
                writer.writerow(
                    [*about, name, len(samples), *numbers, ratio, bound.bar, bound.goal, outcome.verdict(*case.bounds)]
                )
