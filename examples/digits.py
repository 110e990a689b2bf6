"""scikit-learn's handwritten digits, and the networks that are trained on them.

Of the 1,797 real images of 8 x 8 pixels, 600 are always the test images. Each seed draws 300 of the other 1,197 to
train on: few, so that distillation can help. (A first setting, 897 images and a student of 16 units, gained nothing on
the test images.) Sizes, temperature, alpha, learning rates, weight decay and numbers of steps were chosen on the other
897, the validation images (--validation shows their accuracies), once for all students. The spread is the standard
deviation over seeds.
"""

import argparse
import statistics
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from common import fit, mlp, predict
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import kdfast

Loss = Callable[[Tensor, Tensor], Tensor]  # takes a batch's logits and the indices of its images


def load(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Images (n, 64) in [0, 1] and labels (n,) of the three splits."""
    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=600, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, train_size=300, stratify=labels[rest], random_state=seed)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    splits = {"train": train, "validation": validation, "test": test}
    return {name: (images[rows], labels[rows]) for name, rows in splits.items()}


def shift(images: Tensor) -> Tensor:
    """Moves each image by up to half a pixel in both directions, interpolated."""
    move = torch.eye(2, 3).repeat(len(images), 1, 1)
    move[:, :, 2] = torch.empty(len(images), 2).uniform_(-0.5, 0.5) * 2 / 8  # affine_grid's images are 2 wide
    grid = F.affine_grid(move, [len(images), 1, 8, 8], align_corners=False)
    return F.grid_sample(images.view(-1, 1, 8, 8), grid, align_corners=False).flatten(1)


class Digits:
    """One seed's images, and networks that are trained and tested on them."""

    def __init__(self, seed: int, args: argparse.Namespace, on_step: Callable[[], object]):
        data = load(seed)
        self.seed = seed
        self.images, self.labels = data["train"]
        self.unseen, self.truth = data["validation" if args.validation else "test"]
        self.training = {"steps": args.steps, "batch": 50, "on_step": on_step}

    def hard(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The loss of hard labels alone."""
        return F.cross_entropy(logits, self.labels[rows])

    def teacher(self, member: int = 0) -> nn.Sequential:
        torch.manual_seed(3 * self.seed + member)
        net = mlp(64, 256, 256, 10, dropout=0.5)
        return fit(net, self.images, self.hard, lr=2e-3, augment=shift, **self.training)

    def student(self, loss: Loss, images: Tensor | None = None) -> nn.Sequential:
        torch.manual_seed(1000 + self.seed)  # the same initial weights for all
        images = self.images if images is None else images
        return fit(mlp(64, 64, 10), images, loss, lr=1e-2, weight_decay=0.1, **self.training)

    def accuracy(self, *nets: nn.Module) -> float:
        """In per cent, for the mean of the networks' probabilities."""
        probabilities = sum(predict(net, self.unseen).softmax(-1) for net in nets)
        return 100 * (probabilities.argmax(-1) == self.truth).double().mean().item()


def progress_bars() -> Progress:
    columns = [TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.percentage:3.0f}%")]
    return Progress(*columns, TimeElapsedColumn())


def run_seeds(
    train: Callable[[int, argparse.Namespace, Callable[[], object]], dict[str, float]],
    networks: int,
    args: argparse.Namespace,
    progress: Progress,
) -> list[dict[str, float]]:
    """The results of `train`, which trains `networks` networks, for each seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these networks are too small for more
    runs = []
    for seed in range(args.seeds):
        task = progress.add_task(f"seed {seed}: {networks} networks", total=networks * args.steps)
        runs.append(train(seed, args, lambda task=task: progress.advance(task)))
    torch.set_num_threads(threads)
    return runs


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def accuracy_note(runs: int, args: argparse.Namespace) -> str:
    images = "897 validation images" if args.validation else "600 test images"
    return f"accuracy on {images}, mean ± std of {runs} seed{'s' * (runs != 1)}"


def setup_note(rows: int, vocab: int) -> str:
    threads, isa = torch.get_num_threads(), kdfast.backends()["cpu"]["isa"]
    return f"({rows}, {vocab}) fp32, {threads} thread{'s' * (threads != 1)}, kdfast: {isa or 'not compiled'}"
