"""The time of a loss whose vocabulary is split over gloo processes, against one process with as many threads.

    python -m benchmarks.parallel [--rows 1024] [--vocab 128000] [--ranks 2] [--rounds 15] [--divergence jsd]

Loss and gradient, fp32, T = 2. Each process has one thread. The two are interleaved, and medians are printed, with the
load of the machine; a round's time over processes is that of the slowest.
"""

import argparse
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import kdfast


def logits(rows: int, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    made = torch.randn(2, rows, vocab, generator=torch.Generator().manual_seed(seed))
    return made[0].requires_grad_(), made[1]


def seconds(student: Tensor, teacher: Tensor, **options: Any) -> float:
    student.grad = None
    start = time.perf_counter()
    kdfast.kd_loss(student, teacher, temperature=2.0, **options).backward()
    return time.perf_counter() - start


def work(rank: int, folder: str, args: argparse.Namespace, pipe: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.ranks)
    each = args.vocab // args.ranks
    student, teacher = logits(args.rows, each, rank)
    options = {"divergence": args.divergence, "process_group": dist.group.WORLD, "vocab_start": rank * each}
    while pipe.recv():
        dist.barrier()
        pipe.send(seconds(student, teacher, **options))
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1024), ("vocab", 128000), ("ranks", 2), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--divergence", default="cross_entropy")
    args = parser.parse_args()
    torch.set_num_threads(args.ranks)
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, others = zip(*(context.Pipe() for _ in range(args.ranks)), strict=True)
        for rank, pipe in enumerate(others):
            context.Process(target=work, args=(rank, folder, args, pipe), daemon=True).start()
        student, teacher = logits(args.rows, args.vocab, 0)
        found: dict[str, list[float]] = {"one process": [], f"{args.ranks} processes": []}
        for round_ in range(args.rounds + 2):
            one = seconds(student, teacher, divergence=args.divergence)
            for pipe in pipes:
                pipe.send(True)
            several = max(pipe.recv() for pipe in pipes)
            if round_ >= 2:
                for times, value in zip(found.values(), (one, several), strict=True):
                    times.append(value)
        for pipe in pipes:
            pipe.send(False)
    for name, times in found.items():
        print(f"{name}: median {1e3 * statistics.median(times):.1f} ms, least {1e3 * min(times):.1f} ms")
    one, several = found.values()
    pairs = statistics.median(b / a for a, b in zip(one, several, strict=True))
    print(f"processes / one: {pairs:.2f} by median of rounds, {min(several) / min(one):.2f} by the least")
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
