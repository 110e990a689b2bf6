"""Distills a small language model from a larger one without ever making all logits.

The text is the source code of Python's standard library on this machine, with a byte-pair encoding of 32768 tokens that
is trained first. Both models are causal transformers whose head is their embedding. The student learns from the
teacher's distribution and from the next token (Hinton et al. 2015; T = 1, alpha = 0.9), twice, from the same weights on
the same batches:

    fused      kdfast.LinearKDLoss, from the hidden states and both heads
    unfused    both heads' logits, log_softmax, kl_div and cross_entropy, as usual

and once from the next token alone. The two curves should be the same, with less time and memory for the fused loss.
Memory is by how much a step raises the peak of a fresh process, gradients included.

    python examples/distill_lm.py --out distill_lm.png
"""

import argparse
import math
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # needs no display

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from common import peak_memory
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

import kdfast

VOCAB = 32768
TEMPERATURE, ALPHA = 1.0, 0.9
LABELS_ALONE, FUSED, UNFUSED = "labels alone", "distilled, fused", "distilled, unfused"


class Size(NamedTuple):
    """The sizes of a run."""

    vocab: int = VOCAB
    characters: int = 6_000_000
    length: int = 128  # of a sequence
    batch: int = 8  # sequences
    teacher: tuple[int, int] = (160, 3)  # width, layers
    student: tuple[int, int] = (64, 1)
    teacher_steps: int = 240
    student_steps: int = 100

    @property
    def rows(self) -> int:
        return self.batch * self.length


QUICK = Size(600, 60_000, 16, 2, (16, 1), (8, 1), 4, 4)


class LanguageModel(nn.Module):
    """A causal transformer up to its hidden states; its head is `weight`, (vocab, width)."""

    def __init__(self, size: Size, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocab, width)
        self.position = nn.Parameter(torch.zeros(size.length, width))
        layer = nn.TransformerEncoderLayer(width, max(1, width // 32), 4 * width, 0.0, "gelu", 1e-5, True, True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(size.length))
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, length) tokens to (batch, length, width) hidden states."""
        x = self.embedding(tokens) * math.sqrt(self.weight.shape[1]) + self.position
        return self.layers(x, mask=self.mask, is_causal=True)


def read_sources(characters: int) -> list[str]:
    """The standard library's modules without its tests, sorted by name."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in folder.rglob("*.py") if not {"test", "tests", "site-packages"} & set(p.parts))
    texts: list[str] = []
    for file in files:
        texts.append(file.read_text(errors="ignore"))
        if sum(map(len, texts)) > characters:
            break
    return texts


def load_tokens(size: Size) -> Tensor:
    texts = read_sources(size.characters)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size.vocab, initial_alphabet=alphabet, show_progress=False)
    )
    return torch.tensor([i for each in tokenizer.encode_batch(texts) for i in each.ids])


class Batches:
    """Sequences of the text in one random order for all models; every twentieth is for validation."""

    def __init__(self, size: Size) -> None:
        tokens, step = load_tokens(size), size.length + 1
        self.size = size
        sequences = tokens[: len(tokens) // step * step].view(-1, step)
        held_out = torch.arange(len(sequences)) % 20 == 0
        self.training, self.validation = sequences[~held_out], sequences[held_out][: 4 * size.batch]

    def training_batches(self, steps: int) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(len(self.training), (steps, self.size.batch), generator=generator)
        return [(self.training[rows][:, :-1], self.training[rows][:, 1:]) for rows in chosen]

    @torch.no_grad()
    def loss(self, model: LanguageModel) -> float:
        """Nats per token of the validation text."""
        hard = kdfast.LinearKDLoss(alpha=0.0)
        x = self.validation
        return float(hard(model(x[:, :-1]), model.weight, None, None, x[:, 1:]))


def labels_alone(student: LanguageModel, teacher: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    return kdfast.linear_kd_loss(student(tokens), student.weight, None, None, labels, alpha=0.0)


def fused(student: LanguageModel, teacher: LanguageModel, tokens: Tensor, labels: Tensor) -> Tensor:
    distill = kdfast.LinearKDLoss(temperature=TEMPERATURE, alpha=ALPHA, divergence="forward_kl")
    with torch.no_grad():
        teacher_hidden = teacher(tokens)
    return distill(student(tokens), student.weight, teacher_hidden, teacher.weight, labels)


def unfused(student: LanguageModel, teacher: LanguageModel, tokens: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        teacher_logits = teacher(tokens) @ teacher.weight.T
    logits = (student(tokens) @ student.weight.T).flatten(0, 1)
    log_q = F.log_softmax(logits / TEMPERATURE, dim=-1)
    p = F.softmax(teacher_logits.flatten(0, 1) / TEMPERATURE, dim=-1)
    soft = F.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2
    return ALPHA * soft + (1 - ALPHA) * F.cross_entropy(logits, labels.flatten())


LOSSES: dict[str, Any] = {LABELS_ALONE: labels_alone, FUSED: fused, UNFUSED: unfused}


class Run(NamedTuple):
    model: LanguageModel
    curve: list[float]  # the loss of each step
    seconds: list[float]  # of each step


def train(size: Size, shape: tuple[int, int], batches: list, loss_of: Any, teacher: Any, note: Any) -> Run:
    torch.manual_seed(0)
    run = Run(LanguageModel(size, *shape), [], [])
    optimizer = torch.optim.AdamW(run.model.parameters(), 3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(batches))
    for i, (tokens, labels) in enumerate(batches):
        start = time.perf_counter()
        loss = loss_of(run.model, teacher, tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.seconds.append(time.perf_counter() - start)
        run.curve.append(loss.item())
        if i % 20 == 19 or i + 1 == len(batches):
            note(f"step {i + 1} of {len(batches)}: loss {run.curve[-1]:.3f}, {run.seconds[-1]:.2f} s")
    return run


def megabytes(name: str, quick: bool, script: str = __file__) -> float:
    """By how much a step raises the peak of a fresh process, which runs the script."""
    command = [sys.executable, script, "--peak", name] + ["--quick"] * quick
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) / 1e6


def print_peak(name: str, size: Size) -> None:
    student, teacher = LanguageModel(size, *size.student), LanguageModel(size, *size.teacher)
    tokens = torch.randint(size.vocab, (size.batch, size.length + 1))
    few = tokens[:1]
    LOSSES[name](student, teacher, few[:, :-1], few[:, 1:]).backward()  # libraries and threads allocate what they keep
    student.zero_grad()
    print(peak_memory(lambda: LOSSES[name](student, teacher, tokens[:, :-1], tokens[:, 1:]).backward()))


def print_runs(runs: dict[str, Run], nats: dict[str, float], memory: dict[str, float], size: Size) -> None:
    """memory: of the runs whose steps are compared."""
    table = Table("", title=f"{size.rows} tokens a step, V = {size.vocab}, {torch.get_num_threads()} threads")
    for column in ("validation, nats a token", "step, ms", "extra memory of a step, MB"):
        table.add_column(column, justify="right")
    for name, run in runs.items():
        cells = (f"{1e3 * statistics.median(run.seconds):.0f}", f"{memory[name]:.0f}") if name in memory else ("", "")
        table.add_row(name, f"{nats[name]:.3f}", *cells)
    Console().print(table)


def draw(
    runs: dict[str, Run], memory: dict[str, float], size: Size, out: str, names: tuple[str, str], bars_of: list[str]
) -> None:
    """names: of the run that is drawn in front, and of the one behind it; bars_of: their short names."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", width_ratios=[2, 1, 1])
    axes[0].plot(runs[names[1]].curve, color="0.7", linewidth=5, label=names[1])
    axes[0].plot(runs[names[0]].curve, color="tab:blue", linewidth=1.2, label=names[0])
    axes[0].set(title="Loss of the student", xlabel="step", ylabel="nats")
    axes[0].legend(frameon=False)
    milliseconds = [1e3 * statistics.median(runs[name].seconds) for name in names]
    panels = (
        (axes[1], "Time of a step", "ms", milliseconds),
        (axes[2], "Extra memory", "MB", [memory[n] for n in names]),
    )
    for ax, heading, unit, values in panels:
        bars = ax.bar(bars_of, values, color=["tab:blue", "0.7"])
        ax.bar_label(bars, [f"{value:.0f}" for value in values])
        ax.set(title=heading, ylabel=unit)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{size.rows} tokens a step, V = {size.vocab}, {torch.get_num_threads()} threads", fontsize="medium"
    )
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="distill_lm.png", help="the picture (distill_lm.png)")
    parser.add_argument("--quick", action="store_true", help="a run of seconds whose losses mean nothing")
    parser.add_argument("--peak", choices=LOSSES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = QUICK if args.quick else Size()
    if args.peak:
        return print_peak(args.peak, size)
    console = Console()

    def note(line: str) -> None:
        console.print(line, highlight=False)

    note(f"training a byte-pair encoding of {size.vocab} on the standard library's sources")
    data = Batches(size)
    note(f"{data.training.numel()} tokens for training, {data.validation.numel()} for validation\nteacher")
    batches = data.training_batches(size.teacher_steps)
    runs = {"teacher": train(size, size.teacher, batches, labels_alone, None, note)}
    teacher = runs["teacher"].model.eval().requires_grad_(False)
    batches = data.training_batches(size.student_steps)
    for name, loss_of in LOSSES.items():
        note(f"student, {name}")
        runs[name] = train(size, size.student, batches, loss_of, teacher, note)
    memory = {name: megabytes(name, args.quick) for name in LOSSES}
    print_runs(runs, {name: data.loss(run.model) for name, run in runs.items()}, memory, size)
    apart = max(abs(a / b - 1) for a, b in zip(runs[FUSED].curve, runs[UNFUSED].curve, strict=True))
    note(f"the two distilled curves are at most {apart:.1e} of the loss apart")
    draw(runs, memory, size, args.out, (FUSED, UNFUSED), ["fused", "unfused"])
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
