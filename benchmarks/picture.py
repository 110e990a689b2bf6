"""The picture at the top of README: time and memory of a distillation loss and its gradient, kdfast beside others.

    python -m benchmarks.picture [--rounds 15] [--out benchmarks/results]

(1024, 32000) logits in bf16, T = 2, alpha = 0.9 with labels, on a CPU. Time: the median of rounds in turn. Memory: the
peak of one call in a process of its own, beyond the logits. candidates.py says what each candidate is.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, never a window

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks import candidates
from benchmarks.cases import LLM, Workload
from benchmarks.devices import cpu_name
from benchmarks.memory import added, printed_by
from benchmarks.report import slug
from benchmarks.timing import medians

WORKLOAD = Workload(*LLM, "bf16")
FEW = Workload(8, WORKLOAD.vocab, WORKLOAD.dtype)
LABELS = {
    "eager": "PyTorch: log_softmax,\nkl_div, cross_entropy",
    "trl": "TRL's formula",
    "liger": "Liger's formula,\ncompiled",
    "torch.compile": "PyTorch, torch.compile",
    "kdfast": "kdfast",
    "kdfast inplace": "kdfast, inplace=True",
}
OURS, OTHERS = "#2f6f47", "#a3a8b0"


def seconds(rounds: int) -> dict[str, float]:
    data = candidates.Data(WORKLOAD)
    table = {name: candidates.candidate(name, data) for name in LABELS}
    return medians(table, rounds)


def peak(name: str) -> int:
    """The bytes that one call adds to this process at its peak."""
    few, data = (candidates.Data(workload) for workload in (FEW, WORKLOAD))
    warm, measured = (candidates.candidate(name, x) for x in (few, data))
    if name in ("torch.compile", "liger"):
        warm = measured  # each shape is compiled
    warm.run(warm.prepare())
    argument = measured.prepare()
    return added(lambda: measured.run(argument))


def peaks() -> dict[str, int]:
    return {name: printed_by("benchmarks.picture", "--peak", name) for name in LABELS}


def _panel(axes: Axes, values: list[float], title: str, unit: str) -> None:
    places = range(len(values))
    axes.barh(places, values, height=0.66, color=[OURS if name.startswith("kdfast") else OTHERS for name in LABELS])
    for place, value in enumerate(values):
        text = f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"
        axes.annotate(text, (value, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.18 * max(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")


def draw(milliseconds: list[float], megabytes: list[float], path: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    _panel(left, milliseconds, "time of loss and gradient", "ms")
    _panel(right, megabytes, "memory beyond the logits", "MB")
    left.set_yticks(range(len(LABELS)), LABELS.values(), fontsize=9)
    threads = torch.get_num_threads()
    figure.suptitle(
        f"1024 rows of 32,000 classes, bf16, {threads} threads of a CPU: {cpu_name()}, torch {torch.__version__}",
        fontsize=9,
        color="#555555",
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--peak", choices=LABELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak(args.peak))
        return
    times, memory = seconds(args.rounds), peaks()
    stem = f"picture-{slug(cpu_name())}"
    with (args.out / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cpu", "threads", "torch", "candidate", "median_ms", "peak_mb"])
        about = [cpu_name(), torch.get_num_threads(), torch.__version__]
        for name in LABELS:
            row = [name, f"{1e3 * times[name]:.4g}", f"{memory[name] / 1e6:.4g}"]
            writer.writerow([*about, *row])
            print(*row)
    draw([1e3 * x for x in times.values()], [x / 1e6 for x in memory.values()], args.out / f"{stem}.png")


if __name__ == "__main__":
    main()
