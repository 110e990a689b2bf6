"""distill_digits.py --compare: one student distilled from one teacher by each of kdfast's divergences.

Temperature, alpha, initial weights and the order of the images are the same for all, and each divergence has its
default parameters, so that nothing else differs. (Other settings may suit a divergence better: dkd was published with
another alpha, and bounded divergences have smaller gradients.) Accuracies depend more on a seed's 300 images than on
the divergence, so the gain over hard labels is computed for each seed.
"""

import argparse
from collections.abc import Callable

import loss_step
import matplotlib.pyplot as plt
from common import predict
from digits import Digits, accuracy_note, mean_and_spread, progress_bars, run_seeds, setup_note
from rich.console import Console
from rich.table import Table

import kdfast
from kdfast.divergences import names

TEACHER, HARD = "teacher", "hard labels alone"


def train_all(seed: int, args: argparse.Namespace, on_step: Callable[[], object]) -> dict[str, float]:
    """Accuracies in per cent: of the teacher, of the student with hard labels, and by divergence."""
    digits = Digits(seed, args, on_step)
    teacher = digits.teacher()
    target = predict(teacher, digits.images)  # (300, 10) logits
    accuracies = {TEACHER: digits.accuracy(teacher), HARD: digits.accuracy(digits.student(digits.hard))}
    for name in names():
        distill = kdfast.KDLoss(temperature=args.temperature, alpha=args.alpha, divergence=name)
        student = digits.student(lambda logits, rows, loss=distill: loss(logits, target[rows], digits.labels[rows]))
        accuracies[name] = digits.accuracy(student)
    return accuracies


def run(args: argparse.Namespace) -> None:
    settings = {"temperature": loss_step.TEMPERATURE, "alpha": loss_step.ALPHA}
    losses = {name: kdfast.KDLoss(divergence=name, **settings) for name in names()}
    with progress_bars() as progress:
        runs = run_seeds(train_all, 2 + len(losses), args, progress)
        task = progress.add_task("time", total=args.repeats)
        batch = loss_step.Batch(*args.loss_size)
        for loss in losses.values():
            batch.step(loss)
        seconds = batch.medians(losses, args.repeats, lambda: progress.advance(task))
    show(runs, seconds, args)
    draw(runs, seconds, args)
    print(f"picture: {args.out}")


def show(runs: list[dict[str, float]], seconds: dict[str, float], args: argparse.Namespace) -> None:
    console = Console()
    table = Table("divergence", title=f"Digits: {accuracy_note(len(runs), args)}")
    for column in ("per cent", "gain over hard labels", "loss step, ms"):
        table.add_column(column, justify="right")
    for name in runs[0]:
        mean, spread = mean_and_spread(run[name] for run in runs)
        gain, gain_spread = mean_and_spread(run[name] - run[HARD] for run in runs)
        cells = (f"{gain:+.2f} ± {gain_spread:.2f}", f"{1e3 * seconds[name]:.1f}") if name in seconds else ("", "")
        table.add_row(name, f"{mean:.2f} ± {spread:.2f}", *cells, end_section=name == HARD)
    console.print(table)
    console.print(f"loss step: {setup_note(*args.loss_size)}", highlight=False)


def draw(runs: list[dict[str, float]], seconds: dict[str, float], args: argparse.Namespace) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for row, name in enumerate(seconds):
        gains = [run[name] - run[HARD] for run in runs]
        gain, spread = mean_and_spread(gains)
        left.plot(gains, [row + 0.25] * len(gains), "o", color="0.7", markersize=4)
        left.errorbar(gain, row, xerr=spread, fmt="o", capsize=4, color="tab:blue")
        left.annotate(f"{gain:+.1f}", (gain, row), (0, 6), textcoords="offset points", ha="center")
    left.axvline(0, color="tab:orange")
    left.set_yticks(range(len(seconds)), list(seconds))
    left.set(title="Gain over hard labels alone", xlabel="percentage points; grey: each seed")
    milliseconds = [1e3 * value for value in seconds.values()]
    bars = right.barh(list(seconds), milliseconds, color="tab:blue")
    right.bar_label(bars, [f"{value:.1f}" for value in milliseconds], padding=3)
    right.set(title="Time of a loss step", xlabel=f"ms; {setup_note(*args.loss_size)}")
    right.margins(x=0.12)
    left.invert_yaxis()
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    means = [f"{name} {mean_and_spread(run[name] for run in runs)[0]:.1f} %" for name in (TEACHER, HARD)]
    figure.suptitle(f"{accuracy_note(len(runs), args)}; {', '.join(means)}", fontsize="medium")
    figure.savefig(args.out, dpi=150)
