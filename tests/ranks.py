"""A function on the ranks of a gloo process group, each in a process of its own."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60  # after which a collective that some rank does not take part in raises


class Leave(Exception):
    """Ends a rank at once, so that the others find its connections closed: they may wait for what never comes."""

    def __init__(self, result: Any) -> None:
        self.result = result


def _work(rank: int, folder: str, ranks: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, wait = f"file://{folder}/store", timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=wait)
    try:
        torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    except Leave as leave:
        torch.save(leave.result, f"{folder}/{rank}.pt")
        os._exit(0)
    dist.barrier()  # a rank that leaves while the other still reads from it makes that one abort
    os._exit(0)  # DDP's reducer, freed last, would join gloo's threads with the GIL held, which they may wait for


def results_of_ranks(
    folder: Path, function: Callable[..., Any], *arguments: Any, ranks: int = 2, start_method: str = "spawn"
) -> list[Any]:
    """What function(rank, *arguments) returns on each rank. start_method "fork" saves imports that take seconds."""
    work = (str(folder), ranks, function, arguments)
    torch.multiprocessing.start_processes(_work, work, nprocs=ranks, start_method=start_method)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters()]
