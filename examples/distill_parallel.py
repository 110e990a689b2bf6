"""Distills a small language model on a 2 x 2 mesh of processes: FSDP2 over sequences, and a head split over classes.

The text, the teacher and the loss are distill_lm.py's. Two groups of processes take half of each batch (data parallel);
in each group two processes have half of the vocabulary (tensor parallel): the student's head is a ColwiseParallel
linear layer, and kdfast.LinearKDLoss takes its weight, a DTensor, with the group that it is split over. Neither logits
nor the teacher's probabilities are ever whole. The same student is trained by one process, and the curves are compared.

    torchrun --nproc-per-node 4 examples/distill_parallel.py --out distill_parallel.png
"""

import argparse
import ctypes
import os
import statistics
import time
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # needs no display

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from common import peak_memory
from distill_lm import Batches, LanguageModel, Size, labels_alone, train
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import kdfast

TOLERANCE = 1e-3  # of the loss, between the curves
FULL = Size(16384, 2_000_000, 64, 8, (96, 2), (48, 1), 120, 60)
QUICK = Size(600, 60_000, 16, 4, (16, 1), (8, 1), 4, 4)


class Student(nn.Module):
    """A trunk, a head, and the loss inside of forward, where FSDP2 has made the parameters whole."""

    def __init__(self, size: Size, mesh: DeviceMesh | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = LanguageModel(size, *size.student)
        self.head = nn.Linear(size.student[0], size.vocab, bias=False)
        group, self.start = None, 0
        if mesh is not None:
            parallelize_module(self.head, mesh["tp"], ColwiseParallel())
            group, self.start = mesh.get_group("tp"), mesh.get_local_rank("tp") * -(-size.vocab // mesh["tp"].size())
        self.loss = kdfast.LinearKDLoss(temperature=1.0, alpha=0.9, divergence="forward_kl", process_group=group)

    def forward(
        self, tokens: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor, count: Any
    ) -> Tensor:
        return self.loss(self.trunk(tokens), self.head.weight, teacher_hidden, teacher_weight, labels, normalizer=count)


class Run(NamedTuple):
    curve: list[float]  # the loss of each step
    seconds: list[float]
    megabytes: float  # by how much the head's side raises the peak of a process


def distill(size: Size, data: Batches, teacher: LanguageModel, mesh: DeviceMesh | None) -> Run:
    """Trains the student, in this process alone or in all processes of the mesh."""
    student: Any = Student(size, mesh)
    teacher_weight, rows, groups = teacher.weight.detach(), slice(None), 1
    if mesh is not None:
        groups, own = mesh["dp"].size(), -(-size.vocab // mesh["tp"].size())
        each, mine = size.batch // groups, mesh.get_local_rank("dp")
        rows = slice(mine * each, (mine + 1) * each)
        teacher_weight = teacher_weight[student.start : student.start + own].clone()
        fully_shard(student.trunk, mesh=mesh["dp"])
        fully_shard(student, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(student.parameters(), 3e-3, foreach=False)
    curve, seconds = [], []
    for tokens, labels in data.training_batches(size.student_steps):
        start = time.perf_counter()
        with torch.no_grad():
            teacher_hidden = teacher(tokens[rows])
        # FSDP2 averages gradients over data-parallel ranks: the tokens of all of them, divided by their number
        loss = student(tokens[rows], teacher_hidden, teacher_weight, labels[rows], labels.numel() / groups)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        total = loss.detach().clone()
        if mesh is not None:  # the same loss on all tensor-parallel ranks: only data-parallel ones are averaged
            dist.all_reduce(total, group=mesh.get_group("dp"))
        curve.append(float(total) / groups)
    return Run(curve, seconds, head_megabytes(size, rows, teacher_weight, mesh))


def head_megabytes(size: Size, rows: slice, teacher_weight: Tensor, mesh: DeviceMesh | None) -> float:
    """By how much loss and gradient of the head raise the peak, from hidden states on."""
    count = len(range(size.batch)[rows]) * size.length
    options = {} if mesh is None else {"process_group": mesh.get_group("tp")}
    hidden, weight = (torch.randn(n, size.student[0]).requires_grad_() for n in (count, len(teacher_weight)))
    teacher_hidden, labels = torch.randn(count, size.teacher[0]), torch.randint(size.vocab, (count,))
    if mesh is not None:
        dist.broadcast(labels, group=mesh.get_group("tp"), group_src=0)

    def step(few: int) -> None:
        loss = kdfast.linear_kd_loss(
            hidden[:few], weight, teacher_hidden[:few], teacher_weight, labels[:few], **options
        )
        loss.backward()

    step(8)  # libraries and threads allocate what they keep
    weight.grad = hidden.grad = None
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what training has freed would be taken again unseen
    return peak_memory(lambda: step(count)) / 1e6


def show(one: Run, ranks: list[Run], size: Size, out: str) -> None:
    apart = max(abs(a / b - 1) for a, b in zip(ranks[0].curve, one.curve, strict=True))
    table = Table("", title=f"{size.rows} tokens a step, V = {size.vocab}")
    for column in ("step, ms", "peak of the head's side, MB"):
        table.add_column(column, justify="right")
    for name, run in [("one process", one), *((f"rank {i}", run) for i, run in enumerate(ranks))]:
        table.add_row(name, f"{1e3 * statistics.median(run.seconds):.0f}", f"{run.megabytes:.1f}")
    console = Console()
    console.print(table)
    console.print(f"the curves are at most {apart:.1e} of the loss apart; {TOLERANCE:.0e} is allowed", highlight=False)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=[2, 1])
    axes[0].plot(one.curve, color="0.7", linewidth=5, label="one process")
    axes[0].plot(ranks[0].curve, color="tab:blue", linewidth=1.2, label="2 x 2 processes")
    axes[0].set(title="Loss of the student", xlabel="step", ylabel="nats")
    axes[0].legend(frameon=False)
    names = ["one\nprocess", *(f"rank\n{i}" for i in range(len(ranks)))]
    bars = axes[1].bar(names, [run.megabytes for run in (one, *ranks)], color=["0.7", *["tab:blue"] * len(ranks)])
    axes[1].bar_label(bars, fmt="%.0f")
    axes[1].set(title="Peak memory of the head's side", ylabel="MB")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
    print(f"picture: {out}")
    if apart > TOLERANCE:
        raise SystemExit("the curves are too far apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="distill_parallel.png", help="the picture (distill_parallel.png)")
    parser.add_argument("--quick", action="store_true", help="a run of seconds whose losses mean nothing")
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    if "RANK" not in os.environ:
        parser.error("run by torchrun --nproc-per-node 4")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))

    def note(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    shared: list[Any] = [None, None, None]
    if rank == 0:  # the others wait
        torch.set_num_threads(2)
        note(f"a byte-pair encoding of {size.vocab}, then the teacher")
        data = Batches(size)
        teacher = train(size, size.teacher, data.training_batches(size.teacher_steps), labels_alone, None, note).model
        note("the student in one process")
        one = distill(size, data, teacher.eval().requires_grad_(False), None)
        torch.set_num_threads(1)
        shared = [data, teacher.state_dict(), one]
    dist.broadcast_object_list(shared, src=0)
    data, state, one = shared
    teacher = LanguageModel(size, *size.teacher).eval().requires_grad_(False)
    teacher.load_state_dict(state)
    note("the student in all processes")
    runs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(runs, distill(size, data, teacher, mesh))
    if rank == 0:
        show(one, runs, size, args.out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
