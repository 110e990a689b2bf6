"""The report of a run: a table, which is printed and stands in a page in markdown, and a CSV."""

import csv
import io
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cases import Bound, Case

FACTS = ["machine", "driver", "threads", "isa", "torch", "triton", "liger-kernel", "kdfast"]
ABOUT = ["case", "rows", "vocab", "dtype", "temperature", "measured", "candidate", "samples"]
TIMES = ["median_ms", "min_ms", "p20_ms", "p80_ms", "max_ms", "spread", "gb_per_s", "floor_ratio", "eager_speedup"]
OTHERS = ["kdfast_ratio", "bar", "goal", "verdict", "peak_mb", "host_us", "loss_error", "gradient_error"]
COLUMNS = [*FACTS, *ABOUT, *TIMES, *OTHERS, "device_state", "note"]
_RATIOS = {"gb_per_s": "GB/s", "floor_ratio": "x floor", "eager_speedup": "x eager", "kdfast_ratio": "kdfast"}
_LIMITS = {"bar": "bar", "goal": "goal", "verdict": "met"}
_OTHERS = {"peak_mb": "peak MB", "host_us": "host us", "note": "note"}
TABLE = (
    {"case": "case", "candidate": "candidate", "median_ms": "ms", "p20_ms": "p20..p80"} | _RATIOS | _LIMITS | _OTHERS
)
TEXTS = ("case", "candidate", "verdict", "note")
COLOURS = {"goal": "green", "bar": "yellow", "missed": "red", "": "default"}  # by verdict

LEGEND = """\
T = 2 where the case says no other, alpha = 0.9 with labels, reduction "mean"; forward and backward, or forward alone
where the candidate says so. Each round shuffles the candidates; caches are flushed before each call, but on a CPU for
logits under 32 MB. A GPU's times are the device's: the host queues a call while the flush runs, so its own time only
shows where it is longer.

- ms: the median; p20..p80: percentiles. GB/s: the least bytes that the case can move (two arrays read, one written;
  without a gradient two), by the median. x floor: times the time of a loop, on a GPU a copy, that moves as many.
  x eager: times faster than eager.
- kdfast: the candidate that the case measures, compared with this one: times a floor's or cross_entropy's time, times
  faster than any other. bar, goal: limits of that ratio; met: which of them is met, by a case by all its ratios.
- peak MB: memory beyond the inputs, the gradient included; a CUDA graph has its own, which is not counted. host us: the
  host's time of a call, in microseconds, with an idle device. The CSV has a GPU's clocks, power and temperature after
  the last call on the case's logits.
- Losses and gradients of kdfast without options and of the recipe were compared with float64: a note shows a failure.
  On a GPU kdfast is called with `divergence="forward_kl"`, which has the recipe's value."""


def slug(name: str) -> str:
    """The name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", name.lower())).strip("-")


def _quantiles(samples: list[float], parts: int) -> list[Any]:
    if len(samples) > 1:
        return statistics.quantiles(samples, n=parts, method="inclusive")
    return [samples[0] if samples else None] * (parts - 1)


def _over(x: float | None, y: float | None) -> float | None:
    return x / y if x is not None and y else None


def _times(x: float | None, factor: float) -> float | None:
    return None if x is None else x * factor


@dataclass(frozen=True)
class Outcome:
    """A case and the run in which its workload was measured."""

    case: Case
    run: dict[str, Any]  # of measure.measure
    summarize: Callable[[list[float]], float] = statistics.median  # of a candidate's samples

    def seconds(self, candidate: str | None) -> float | None:
        samples = self.run["rows"][candidate]["samples"] if candidate in self.case.candidates else []
        return self.summarize(samples) if samples else None

    def value(self, against: str) -> float | None:
        """The ratio to another candidate's time, as Bound.value defines it."""
        measured, other = self.seconds(self.case.measured), self.seconds(against)
        return Bound(against, None).value(measured, other) if measured and other else None

    def verdict(self, *bounds: Bound) -> str:
        """ "goal", "bar" or "missed" for these bounds; empty where there are none, or they are for another CPU."""
        has_avx512 = self.run["facts"]["isa"].startswith("avx512")  # which the bounds of the best ISA are for
        if not any(bound.bar or bound.goal for bound in bounds) or (
            self.case.workload.isa == "best" and not has_avx512
        ):
            return ""
        values = [(bound, self.value(bound.against)) for bound in bounds]
        if not all(value and bound.meets(value, bound.bar) for bound, value in values):
            return "missed"
        return "goal" if all(bound.meets(value or 0, bound.goal) for bound, value in values) else "bar"

    def columns(self, name: str) -> dict[str, Any]:
        """The columns of the CSV for a candidate; None: not measured."""
        case, work, row = self.case, self.case.workload, self.run["rows"][name]
        seconds, floor, eager = (self.seconds(each) for each in (name, case.first("floor"), case.first("eager")))
        bound = next((bound for bound in case.bounds if bound.against == name), Bound(name, None))
        samples = [1e3 * x for x in row["samples"]]
        p20, _, _, p80 = _quantiles(samples, 5)
        low, middle, high = _quantiles(samples, 4)
        about = case.name, work.rows, work.vocab, work.dtype, work.temperature, case.measured, name, len(samples)
        times = _times(seconds, 1e3), min(samples, default=None), p20, p80, max(samples, default=None)
        ratios = _over(case.nbytes / 1e9, seconds), _over(seconds, floor), _over(eager, seconds)
        of_case = self.value(name) if name != case.measured else None, bound.bar, bound.goal, self.verdict(*case.bounds)
        memory_and_host = _times(row["peak"], 1e-6), _times(row["host"], 1e6), *(*row["errors"], None, None)[:2]
        spread = _over(high - low, 2 * middle) if samples else None
        values = *about, *times, spread, *ratios, *of_case, *memory_and_host, self.run["states"][1], row["note"]
        return dict(zip(COLUMNS, (*(self.run["facts"][name] for name in FACTS), *values), strict=True))


def _text(x: Any) -> str:
    if not isinstance(x, float):
        return "" if x is None else str(x)
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def _cells(outcome: Outcome, name: str) -> dict[str, str]:
    found, bounds = outcome.columns(name), [bound for bound in outcome.case.bounds if bound.against == name]
    verdict = outcome.verdict(*(outcome.case.bounds if name == outcome.case.measured else bounds))
    cells = {key: escape(_text(found[key])) for key in TABLE}
    for bound in bounds:
        cells |= {"bar": bound.text(bound.bar), "goal": bound.text(bound.goal)}
    cells["p20_ms"] += f"..{_text(found['p80_ms'])}" * bool(cells["p20_ms"])
    return cells | {"verdict": f"[{COLOURS[verdict]}]{verdict}[/]" if verdict else ""}


def table(outcomes: list[Outcome]) -> Table:
    """A line for each case and candidate, but for those that a case before has; empty columns are left out."""
    lines: dict[Any, dict[str, str]] = {}
    for outcome in outcomes:
        limited = [bound.against for bound in outcome.case.bounds if bound.bar]
        for name in outcome.case.candidates:
            place = outcome.case if name in limited else outcome.case.workload
            lines.setdefault((place, name), _cells(outcome, name))
    made = Table(box=box.MARKDOWN)
    keys = [key for key in TABLE if any(line[key] for line in lines.values())]
    for key in keys:
        made.add_column(TABLE[key], justify="left" if key in TEXTS else "right", no_wrap=True)
    for line in lines.values():
        made.add_row(*(line[key] for key in keys))
    return made


def show(outcomes: list[Outcome]) -> None:
    """Prints the table; what meets its goal is green, its bar yellow, neither red."""
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console.width = 240
    console.print(title(outcomes), table(outcomes), sep="\n")


def _rendered(*tables: Table) -> str:
    """The tables in markdown."""
    console = Console(file=(text := io.StringIO()), width=10_000)
    console.print(*tables)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def title(outcomes: list[Outcome]) -> str:
    facts, case = outcomes[0].run["facts"], outcomes[0].case
    threads = f", {facts['threads']} thread{'s' * (facts['threads'] != '1')}" * (case.device == "cpu")
    return "Dry run, times mean nothing: " * (case.device == "dry run") + f"kdfast on {facts['machine']}{threads}"


def page(outcomes: list[Outcome], notes: dict[str, str], command: str, picture: str) -> str:
    """The report in markdown; notes: further facts of the run."""
    facts = dict(outcomes[0].run["facts"])
    facts["isa"] = ", ".join(dict.fromkeys(o.run["facts"]["isa"] for o in outcomes))
    states = {"device before": outcomes[0].run["states"][0], "device after": outcomes[-1].run["states"][1]}
    head = Table("", "", box=box.MARKDOWN)
    for name, text in (facts | notes | states).items():
        if text:
            head.add_row(name, escape(text))
    tables, by = _rendered(head, table(outcomes)), f"By `{command}` in a checkout; for a GPU by `make gpu-check`."
    return "\n\n".join([f"# {title(outcomes)}", tables, f"![The ratios]({picture})", LEGEND, by]) + "\n"


def _exact(key: str, x: Any) -> Any:
    if not isinstance(x, float):
        return x
    return f"{x:.2e}" if key.endswith("_error") else f"{x:.6g}"


def write_csv(outcomes: list[Outcome], path: Path) -> None:
    """One line for each case and candidate."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for outcome in outcomes:
            for name in outcome.case.candidates:
                writer.writerow({key: _exact(key, x) for key, x in outcome.columns(name).items()})
