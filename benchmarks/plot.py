"""The plot of a run: each case's time relative to the memory floor, and its speedup over peers."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file, never a window

from matplotlib import pyplot, ticker
from matplotlib.axes import Axes

from benchmarks.cases import Bound
from benchmarks.report import Outcome
from benchmarks.report import title as title_of

COLOURS = {"goal": "#3f8f5b", "bar": "#dba51f", "missed": "#c04a53", "": "#a3a8b0"}  # by verdict
BAR, GOAL = "#222222", "#3465d9"

Line = tuple[str, Bound, float, str]  # label, bound, value reached, verdict


def _lines(outcomes: list[Outcome], cost: bool) -> list[Line]:
    """One line for each bound, of costs or of speedups, of what ran, in the order of the cases."""
    lines = []
    for outcome in outcomes:
        for bound in outcome.case.bounds:
            value = outcome.value(bound.against)
            if bound.is_cost == cost and value:
                label = outcome.case.name + f" / {bound.against}" * (not cost)
                lines.append((label, bound, value, outcome.verdict(bound)))
    return lines


def _panel(axes: Axes, lines: list[Line], title: str, is_log: bool) -> None:
    """Bars with a mark for each limit; the numbers have a column of their own."""
    start, colours = float(is_log), [COLOURS[line[3]] for line in lines]
    axes.barh(range(len(lines)), [line[2] - start for line in lines], 0.6, start, color=colours)
    for place, (_, bound, value, _) in enumerate(lines):
        for limit, colour in ((bound.bar, BAR), (bound.goal, GOAL)):
            if limit is not None:
                axes.plot([limit, limit], [place - 0.42, place + 0.42], color=colour, linewidth=2.2)
        axes.text(1.01, place, f"{value:.3g}x", transform=axes.get_yaxis_transform(), va="center", size=8)
    axes.set_yticks(range(len(lines)), [line[0] for line in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e4e6ea")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())


def draw(outcomes: list[Outcome], path: Path) -> None:
    """Writes the plot to `path`."""
    costs, speedups = _lines(outcomes, cost=True), _lines(outcomes, cost=False)
    panels = [(costs, "time / time of the memory floor or of cross_entropy (shorter is better)")] * bool(costs)
    panels += [(speedups, "times faster than … (longer is better; logarithmic)")] * bool(speedups)
    if not panels:
        return
    heights = [len(lines) + 1 for lines, _ in panels]
    size = (10, 0.25 * sum(heights) + 0.5 * len(panels) + 1)
    figure, axes = pyplot.subplots(
        len(panels), figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (lines, title) in zip(axes[:, 0], panels, strict=True):
        _panel(axis, lines, title, lines is speedups)
    figure.suptitle(title_of(outcomes), fontsize=10)
    if any(line[3] for lines, _ in panels for line in lines):
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[verdict]) for verdict in ("goal", "bar", "missed")]
        handles += [pyplot.Line2D([], [], color=colour, linewidth=2.2) for colour in (BAR, GOAL)]
        names = ["meets bar and goal", "meets the bar", "misses the bar", "bar", "goal"]
        figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
