"""A function on two ranks of a gloo process group, each in a process of its own."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _work(rank: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves while the other still reads from it makes that one abort
    os._exit(0)  # DDP's reducer, freed last, would join gloo's threads with the GIL held, which they may wait for


def results_of_ranks(folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(rank, *arguments) returns on each rank."""
    torch.multiprocessing.spawn(_work, (str(folder), function, arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters()]
