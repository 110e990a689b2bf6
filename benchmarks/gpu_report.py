"""The report of benchmarks.gpu: a page in markdown, a CSV and a plot of the ratios to the roofline."""

from __future__ import annotations

import csv
import importlib.metadata
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, never a window

import torch
from matplotlib import pyplot, ticker

import kdfast
from benchmarks.gpu_cases import Case
from benchmarks.gpu_device import first_line
from benchmarks.report import slug

TABLE = ["case", "candidate", "median ms", "p20..p80", "GB/s", "x roofline", "x eager", "peak MB", "host us", "note"]
_NUMBERS = [
    "repeats",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "gb_per_s",
    "roofline_ratio",
    "eager_speedup",
    "peak_mb",
    "host_us",
]
_ERRORS = ["loss_error", "gradient_error"]
CSV = ["case", "rows", "vocab", "dtype", "gradient", "candidate", *_NUMBERS, *_ERRORS, "device_state", "note"]
COLOURS = {  # all others are grey
    "kdfast cuda": "#3f8f5b",
    "kdfast cuda inplace": "#2f6f47",
    "kdfast cuda graph": "#1f5f37",
    "kdfast triton": "#74b48b",
    "kdfast triton inplace": "#5d9c75",
    "kdfast triton graph": "#4d8c65",
}
WRONG, OTHER, ROOFLINE = "#c04a53", "#a3a8b0", "#3465d9"

LEGEND = """\
T = 2, alpha = 0.9 with labels, reduction "mean"; forward and backward, or forward alone where the case says so. The L2
is flushed before every call, every round shuffles the candidates, and times are measured on the device. The host queues
a call while the flush runs: its own time only shows where it is longer, in the smallest case.

- roofline: a copy on the device of the minimum number of bytes (two arrays read, one written; without a gradient two
  read).
- GB/s: these bytes divided by the median. x roofline: times the roofline's time; 1 is as fast as a copy. x eager: times
  faster than eager.
- peak MB: memory beyond the inputs, the gradient included; a graph has its own, which is not counted.
- host us: the host's time of a call, in microseconds, with an idle device.
- The CSV has clocks, power and temperature after each case's last call.
- kdfast is called with `divergence="forward_kl"`, which has the recipe's value; eager is the recipe in plain functions
  and the logits' dtype; liger is the recipe with Liger-Kernel's divergence.
- Each candidate's loss and gradient were compared with the recipe in float64; a note shows a failure."""


@dataclass
class Row:
    """A line of the table: one candidate on one case."""

    case: Case
    candidate: str
    samples: list[float] = field(default_factory=list)  # milliseconds
    peak: int | None = None  # bytes beyond the inputs
    host: float | None = None  # microseconds of the host
    errors: tuple[float, float] | None = None  # of the loss and the gradient, relative
    state: str = ""  # of the device, after the case
    note: str = ""  # why there are no samples, or why they mean nothing

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The 20th and the 80th percentile."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        cuts = statistics.quantiles(self.samples, n=5, method="inclusive")
        return cuts[0], cuts[-1]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """The version of NVIDIA's or AMD's kernel driver."""
    amd = Path("/sys/module/amdgpu/version")
    nvidia = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return nvidia or (amd.read_text().strip() if amd.exists() else "unknown")


def facts(device: str, tests: str, sanitizer: str, states: tuple[str, str]) -> dict[str, str]:
    """The head of the report; states: of the device before and after."""
    commit = first_line("git", "describe", "--always", "--dirty", "--exclude", "*")
    platform = f", CUDA {torch.version.cuda}" * bool(torch.version.cuda) + f", ROCm {torch.version.hip}" * bool(
        torch.version.hip
    )
    return {
        "device": device,
        "driver": _driver(),
        "torch": torch.__version__ + platform,
        "triton": _version("triton"),
        "liger-kernel": _version("liger-kernel"),
        "kdfast": kdfast.__version__ + f", commit {commit}" * bool(commit),
        "tests": tests,
        "compute-sanitizer": sanitizer,
        **{f"device {when}": state for when, state in zip(("before", "after"), states, strict=True) if state},
    }


def _format(x: float) -> str:
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def _table(rows: list[list[str]]) -> str:
    """A table in markdown with aligned columns; numbers are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [1 < place < len(TABLE) - 1 for place in range(len(widths))] if rows[0] == TABLE else [False] * len(widths)
    rows = [rows[0], ["-" * (width - r) + ":" * r for width, r in zip(widths, right, strict=True)], *rows[1:]]
    lines = []
    for row in rows:
        cells = [f"{cell:>{w}}" if r else f"{cell:<{w}}" for cell, w, r in zip(row, widths, right, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    rows: list[Row]
    facts: dict[str, str]
    command: str
    is_dry: bool

    @property
    def stem(self) -> str:
        return "dry-run" if self.is_dry else slug(self.facts["device"])

    def _median(self, row: Row, name: str) -> float | None:
        """Another candidate's median on the row's case."""
        found = [r for r in self.rows if r.case == row.case and r.candidate == name and r.samples]
        return found[0].median if found else None

    def _numbers(self, row: Row) -> list[float | None]:
        """The values of _NUMBERS."""
        if not row.samples:
            return [0] + [None] * (len(_NUMBERS) - 1)
        roofline, eager = self._median(row, "roofline"), self._median(row, "eager")
        return [
            len(row.samples),
            row.median,
            *row.spread,
            row.case.nbytes / row.median / 1e6,
            row.median / roofline if roofline else None,
            eager / row.median if eager else None,
            None if row.peak is None else row.peak / 1e6,
            row.host,
        ]

    def _line(self, row: Row) -> list[str]:
        """The cells of TABLE."""
        _, median, low, high, *others = self._numbers(row)
        texts = ["" if x is None else _format(x) for x in others]
        spread = [f"{median:.4g}", f"{low:.4g}..{high:.4g}"] if row.samples else ["", ""]
        return [row.case.name, row.candidate, *spread, *texts, row.note]

    def markdown(self) -> str:
        title = f"kdfast on {self.facts['device']}"
        if self.is_dry:
            title = f"Dry run, times mean nothing: {title}"
        return "\n".join(
            [
                f"# {title}\n",
                _table([["", ""], *([name, text] for name, text in self.facts.items())]) + "\n",
                _table([TABLE, *map(self._line, self.rows)]) + "\n",
                f"![Time over the roofline's]({self.stem}.png)\n",
                LEGEND + "\n",
                "## To reproduce\n",
                "In a checkout, on a machine with a GPU and its driver: `make gpu-check`. It makes its own environment",
                "in `.venv-gpu`, runs the tests, and then the command that wrote this page:\n",
                f"    {self.command}",
            ]
        )

    def write(self, folder: Path) -> None:
        (folder / f"{self.stem}.md").write_text(self.markdown() + "\n")
        with (folder / f"{self.stem}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*self.facts, *CSV])
            for row in self.rows:
                case, work = row.case, row.case.workload
                about = [case.name, work.rows, work.vocab, work.dtype, case.with_grad, row.candidate]
                numbers = ["" if x is None else f"{x:.6g}" for x in self._numbers(row)]
                errors = [f"{error:.2e}" for error in row.errors] if row.errors else ["", ""]
                writer.writerow([*self.facts.values(), *about, *numbers, *errors, row.state, row.note])
        self._draw(folder / f"{self.stem}.png")

    def _draw(self, path: Path) -> None:
        """A panel for each case, a bar for each candidate: from the roofline's time to the candidate's."""
        cases = list(dict.fromkeys(row.case for row in self.rows))
        panels = [[row for row in self.rows if row.case == case and row.candidate != "roofline"] for case in cases]
        heights = [len(panel) + 1 for panel in panels]
        figure, axes = pyplot.subplots(
            len(cases),
            figsize=(9, 0.24 * sum(heights) + 1.2),
            height_ratios=heights,
            sharex=True,
            squeeze=False,
            layout="constrained",
        )
        for axis, case, panel in zip(axes[:, 0], cases, panels, strict=True):
            for place, row in enumerate(panel):
                ratio = self._numbers(row)[_NUMBERS.index("roofline_ratio")]
                colour = WRONG if row.note else COLOURS.get(row.candidate, OTHER)
                if ratio is not None:
                    axis.barh(place, ratio - 1, left=1, height=0.7, color=colour)
                text = row.note.split(":")[0] if ratio is None or row.note else f"{_format(ratio)}x"
                axis.text(1.01, place, text, transform=axis.get_yaxis_transform(), va="center", size=8)
            axis.axvline(1, color=ROOFLINE, linewidth=1.5)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(ticker.NullLocator())
            axis.set_yticks(range(len(panel)), [row.candidate for row in panel], fontsize=8)
            axis.set_ylim(len(panel) - 0.4, -0.6)
            axis.tick_params(axis="y", length=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(case.name, fontsize=9, loc="left")
        axes[-1, 0].set_xlabel("time / time of a copy of the same bytes (shorter is better; logarithmic)", fontsize=9)
        figure.suptitle(self.markdown().splitlines()[0].lstrip("# "), fontsize=10)
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
