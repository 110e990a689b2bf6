"""Distills a small language model from a cache: the teacher runs once, and is gone when the student trains.

Text, tokens and models are those of distill_lm.py. The teacher writes its 64 most probable next tokens over the
training sequences to disk (kdfast.cache), is interrupted half-way, and resumes. Then the student trains twice, from the
same weights on the same batches:

    cache    kdfast.linear_kd_loss of the cached top 64, whose rest counts as one more class, read by a DataLoader's
             workers
    live     kdfast.linear_kd_loss of the whole distribution, with the teacher's forward pass in each step

The curves' objectives differ by what the rest of the classes is, so it is the validation that they are compared by.

    python examples/distill_offline.py --out distill_offline.png
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import peak_memory
from distill_lm import (
    ALPHA,
    QUICK,
    TEMPERATURE,
    Batches,
    LanguageModel,
    Run,
    Size,
    draw,
    labels_alone,
    megabytes,
    print_runs,
    train,
)  # fmt: skip
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import kdfast
from kdfast.cache import TopKCache, TopKWriter

ENTRIES = 64
CACHE, LIVE = "from the cache", "from the live teacher"


def from_cache(student: LanguageModel, targets: kdfast.TopKTargets, tokens: Tensor, labels: Tensor) -> Tensor:
    return kdfast.linear_kd_loss(
        student(tokens), student.weight, targets, None, labels, temperature=TEMPERATURE, alpha=ALPHA,
        divergence="forward_kl",
    )  # fmt: skip


def from_teacher(student: LanguageModel, teacher: LanguageModel, tokens: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = teacher(tokens)
    return kdfast.linear_kd_loss(
        student(tokens), student.weight, hidden, teacher.weight, labels, temperature=TEMPERATURE, alpha=ALPHA,
        divergence="forward_kl",
    )  # fmt: skip


@torch.no_grad()
def write_cache(path: Path, teacher: LanguageModel, tokens: Tensor, size: Size, stop_after: int | None = None) -> float:
    """Writes (sequences, length) tokens from where the cache ends; returns tokens a second. stop_after: sequences."""
    entries = min(ENTRIES, size.vocab)
    options: dict[str, Any] = {"metadata": {"teacher": "distill_lm.py's"}, "rows_per_shard": 16 * size.rows}
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn()
    with (
        TopKWriter(path, k=entries, vocab_size=size.vocab, temperature=TEMPERATURE, resume=True, **options) as writer,
        Progress(*columns) as progress,
    ):
        start, first = time.perf_counter(), writer.sequences_done
        task = progress.add_task("the teacher writes", total=len(tokens), completed=first, speed="")
        for at in range(first, len(tokens), size.batch):
            batch = tokens[at : at + size.batch]
            writer.write(teacher(batch) @ teacher.weight.T, batch)
            speed = (at + len(batch) - first) * size.length / (time.perf_counter() - start)
            progress.update(task, completed=at + len(batch), speed=f"{speed:,.0f} tokens/s")
            if stop_after is not None and at + len(batch) >= stop_after:
                raise KeyboardInterrupt
    return speed


class Sequences(Dataset[tuple[int, Tensor]]):
    """The places of sequences in the cache, with their tokens, which the cache checks."""

    def __init__(self, places: Tensor, sequences: Tensor) -> None:
        self.places, self.sequences = places, sequences

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return int(self.places[index]), self.sequences[index]


def train_from_cache(size: Size, cache: TopKCache, dataset: Sequences, labels: Tensor, note: Any) -> Run:
    loader = DataLoader(
        dataset, size.batch, num_workers=2, collate_fn=cache.collate, pin_memory=torch.cuda.is_available()
    )
    batches = iter(loader)

    def loss_of(student: LanguageModel, teacher: Any, tokens: Tensor, labels: Tensor) -> Tensor:
        own_tokens, targets = next(batches)
        return from_cache(student, targets, own_tokens, labels)

    pairs = list(zip(dataset.sequences.split(size.batch), labels.split(size.batch), strict=True))
    return train(size, size.student, pairs, loss_of, None, note)


def print_peak(name: str, size: Size) -> None:
    student, teacher = LanguageModel(size, *size.student), LanguageModel(size, *size.teacher)
    tokens = torch.randint(size.vocab, (size.batch, size.length + 1))

    def step(tokens: Tensor) -> None:
        x, labels = tokens[:, :-1], tokens[:, 1:]
        if name == LIVE:
            return from_teacher(student, teacher, x, labels).backward()
        k = min(ENTRIES, size.vocab)
        entries = torch.arange(k).expand(*x.shape, k)
        log_probs = torch.full(entries.shape, -5.0, dtype=torch.float16)
        from_cache(student, kdfast.TopKTargets(entries.int(), log_probs), x, labels).backward()

    step(tokens[:1])  # libraries and threads allocate what they keep
    student.zero_grad()
    print(peak_memory(lambda: step(tokens)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="distill_offline.png", help="the picture (distill_offline.png)")
    parser.add_argument("--quick", action="store_true", help="a run of seconds whose losses mean nothing")
    parser.add_argument("--peak", choices=(CACHE, LIVE), help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = QUICK if args.quick else Size()
    if args.peak:
        return print_peak(args.peak, size)
    console = Console()

    def note(line: str) -> None:
        console.print(line, highlight=False)

    note(f"training a byte-pair encoding of {size.vocab} on the standard library's sources")
    data = Batches(size)
    note("teacher")
    runs = {"teacher": train(size, size.teacher, data.training_batches(size.teacher_steps), labels_alone, None, note)}
    teacher = runs["teacher"].model.eval().requires_grad_(False)
    batches = data.training_batches(size.student_steps)
    tokens, labels = (torch.cat([batch[part] for batch in batches]) for part in (0, 1))
    folder = Path(tempfile.mkdtemp())
    try:
        try:
            write_cache(folder, teacher, tokens, size, stop_after=len(tokens) // 2)
        except KeyboardInterrupt:
            note("interrupted, and resumed")
        speed = write_cache(folder, teacher, tokens, size)
        cache = TopKCache(folder, verify="sha256")
        note(f"{cache.manifest.rows:,} tokens on disk, {speed:,.0f} tokens a second\nstudent, {CACHE}")
        dataset = Sequences(torch.arange(len(tokens)), tokens)
        runs[CACHE] = train_from_cache(size, cache, dataset, labels, note)
        note(f"student, {LIVE}")
        runs[LIVE] = train(size, size.student, batches, from_teacher, teacher, note)
        memory = {name: megabytes(name, args.quick, __file__) for name in (CACHE, LIVE)}
        print_runs(runs, {name: data.loss(run.model) for name, run in runs.items()}, memory, size)
        size_on_disk = sum(shard.bytes for shard in cache.manifest.shards) / cache.manifest.rows
        note(f"the cache takes {size_on_disk:.0f} bytes a token")
    finally:
        shutil.rmtree(folder)
    draw(runs, memory, size, args.out, (CACHE, LIVE), ["cache", "live"])
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
