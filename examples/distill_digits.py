"""Distills a small network from a large one on scikit-learn's handwritten digits, and measures the loss's cost.

Three parts, after Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network" (2015):

1. Distillation (section 3, in small): a teacher with two hidden layers of 256 units, regularized by dropout and by
   shifting its input up to half a pixel in any direction, and an ensemble of three of them; a student with one
   hidden layer of 64 units and neither dropout nor shifts, trained with hard labels alone, distilled from one
   teacher, and distilled from the mean of the ensemble's probabilities.
2. Soft targets as regularizers (section 6, table 5, in small): the same student trained on three images of each digit
   with labels alone, or with soft targets of the teacher, which was trained on all images; and trained with labels
   for these thirty and soft targets for all.
3. The cost of a step of the loss at a vocabulary's size, compared with plain PyTorch and torch.compile.

With --compare it distills the student from one teacher by each of kdfast's divergences instead. digits.py describes how
the images are split and how the settings were chosen.

    python examples/distill_digits.py --seeds 5 --out distill_digits.png
    python examples/distill_digits.py --compare
"""

import argparse
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")  # needs no display

import compare
import loss_step
import matplotlib.pyplot as plt
import torch
from common import predict
from digits import Digits, Loss, accuracy_note, mean_and_spread, progress_bars, run_seeds, setup_note
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kdfast

TEACHERS = ["teacher", "ensemble of three teachers"]
STUDENTS = ["student, hard labels", "student, distilled from one", "student, distilled from three"]
FEW = ["hard labels of 30 images", "soft targets of 30 images", "30 labels, 300 soft targets"]
STEPS = 1000  # of each network, --quick: 50
LOSS_SIZE = (512, 32000)  # a micro-batch of tokens over the vocabulary of Llama 2; --quick: (32, 1000)


def train_all(seed: int, args: argparse.Namespace, on_step: Callable[[], object]) -> dict[str, float]:
    """Trains everything with one seed; accuracies in per cent by the names in TEACHERS, STUDENTS and FEW."""
    digits = Digits(seed, args, on_step)
    labels, hard = digits.labels, digits.hard
    teachers = [digits.teacher(member) for member in range(3)]
    accuracies = {TEACHERS[0]: digits.accuracy(teachers[0]), TEACHERS[1]: digits.accuracy(*teachers)}
    targets = [predict(teacher, digits.images) for teacher in teachers]  # three times (300, 10) logits
    target = targets[0]

    def student(name: str, loss: Loss, images: Tensor | None = None) -> None:
        accuracies[name] = digits.accuracy(digits.student(loss, images))

    distill = kdfast.KDLoss(temperature=args.temperature, alpha=args.alpha)
    student(STUDENTS[0], hard)
    student(STUDENTS[1], lambda logits, rows: distill(logits, target[rows], labels[rows]))
    student(STUDENTS[2], lambda logits, rows: distill(logits, [t[rows] for t in targets], labels[rows]))

    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    few = torch.cat([shuffled[labels[shuffled] == digit][:3] for digit in range(10)])
    some = torch.full_like(labels, -100)  # ignore_index: no label
    some[few] = labels[few]
    soft = kdfast.KDLoss(temperature=args.temperature)  # without labels alpha is 1
    # The hard term of some images is a call of its own: in one call an ignored row has neither term.
    all_soft = kdfast.KDLoss(temperature=args.temperature, alpha=args.alpha, hard_weight=0.0)
    some_hard = kdfast.KDLoss(alpha=0.0, hard_weight=1 - args.alpha)  # reads no teacher
    student(FEW[0], lambda logits, rows: hard(logits, few[rows]), digits.images[few])
    student(FEW[1], lambda logits, rows: soft(logits, target[few[rows]]), digits.images[few])
    student(FEW[2], lambda logits, rows: all_soft(logits, target[rows]) + some_hard(logits, None, some[rows]))
    return accuracies


def show(runs: list[dict[str, float]], costs: dict[str, loss_step.Cost], args: argparse.Namespace) -> None:
    console = Console()
    table = Table("", "per cent", title=f"Digits: {accuracy_note(len(runs), args)}", min_width=60)
    for names in (TEACHERS, STUDENTS, FEW):
        for name in names:
            mean, spread = mean_and_spread(run[name] for run in runs)
            table.add_row(name, f"{mean:.2f} ± {spread:.2f}", end_section=name == names[-1])
    console.print(table)
    gains = [f"{run[STUDENTS[1]] - run[STUDENTS[0]]:+.1f}" for run in runs]
    console.print(f"gain of distillation from one, by seed: {', '.join(gains)}\n", highlight=False)

    table = Table("", title=f"Loss and gradient, {setup_note(*args.loss_size)}")
    for column in ("median ms", "times faster", "extra memory, MB"):
        table.add_column(column, justify="right")
    eager = costs["PyTorch"].seconds or 0.0
    notes = []
    for name, cost in costs.items():
        time = [f"{1e3 * cost.seconds:.1f}", f"{eager / cost.seconds:.1f}x"] if cost.seconds else ["-", "-"]
        table.add_row(name, *time, "-" if cost.megabytes is None else f"{cost.megabytes:.0f}")
        notes += [f"{name}: {cost.note}"] if cost.note else []
    console.print(table)
    for note in [*notes, "extra memory: by how much a step raises the peak of a fresh process"]:
        console.print(note, markup=False)


def draw(runs: list[dict[str, float]], costs: dict[str, loss_step.Cost], args: argparse.Namespace) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 6), layout="constrained")
    panels = (
        (axes[0, 0], "Distillation", {name: name for name in TEACHERS + STUDENTS}),
        (axes[0, 1], "Few labels", {name: name for name in FEW} | {STUDENTS[0]: "hard labels of 300 images"}),
    )
    for ax, heading, names in panels:
        for row, name in enumerate(names):
            mean, spread = mean_and_spread(run[name] for run in runs)
            colour = "0.5" if name in TEACHERS else "tab:orange" if "hard labels" in name else "tab:blue"
            ax.errorbar(mean, row, xerr=spread, fmt="o", capsize=4, color=colour)
            ax.annotate(f"{mean:.1f}", (mean, row), (0, 6), textcoords="offset points", ha="center")
        ax.set_yticks(range(len(names)), list(names.values()))
        ax.set_ylim(-0.7, len(names) - 0.5)
        ax.set(title=heading, xlabel="%")
    run = {name: cost for name, cost in costs.items() if cost.seconds}
    columns = (
        (axes[1, 0], "Time of a loss step", "ms", [1e3 * cost.seconds for cost in run.values()]),
        (axes[1, 1], "Extra memory of a loss step", "MB", [cost.megabytes for cost in run.values()]),
    )
    for ax, heading, unit, values in columns:
        colours = ["tab:blue" if "kdfast" in name else "0.7" for name in run]
        bars = ax.barh(list(run), [value or 0 for value in values], color=colours)
        ax.bar_label(bars, ["not measured" if value is None else f"{value:.0f}" for value in values], padding=3)
        ax.set(title=heading, xlabel=unit)
    for ax in axes.flat:
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.spines[["top", "right"]].set_visible(False)
    about_loss = f"below: loss and gradient, {setup_note(*args.loss_size)}"
    figure.suptitle(f"above: {accuracy_note(len(runs), args)}; {about_loss}", fontsize="medium")
    figure.savefig(args.out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="compare the divergences instead of the three parts")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (5)")
    parser.add_argument("--out", help="the picture (distill_digits.png, with --compare distill_digits_compare.png)")
    parser.add_argument("--temperature", type=float, default=4.0, help="of the soft targets (4)")
    parser.add_argument("--alpha", type=float, default=0.9, help="their weight (0.9)")
    parser.add_argument("--validation", action="store_true", help="test on the validation images")
    parser.add_argument("--quick", action="store_true", help="a run of seconds whose accuracies mean nothing")
    args = parser.parse_args()
    args.out = args.out or ("distill_digits_compare.png" if args.compare else "distill_digits.png")
    args.steps, args.loss_size, args.repeats, without = STEPS, LOSS_SIZE, 15, ()
    if args.quick:
        args.steps, args.loss_size, args.repeats, without = 50, (32, 1000), 3, ("torch.compile",)
    if args.compare:
        return compare.run(args)
    with progress_bars() as progress:
        runs = run_seeds(train_all, 9, args, progress)
        task = progress.add_task("time and memory", total=args.repeats + 2 * len(loss_step.LOSSES))
        costs = loss_step.costs(*args.loss_size, args.repeats, without, lambda: progress.advance(task))
    show(runs, costs, args)
    draw(runs, costs, args)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
