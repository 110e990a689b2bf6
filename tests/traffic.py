"""What kernels move, counted as their compiled PTX runs on the emulator.

Bytes are sectors of 32, per bf16 pair of logits, less 256 bytes a row for labels, statistics and ragged ends. The least
is 2 reads and 1 write: 6 bytes.
"""

from contextlib import AbstractContextManager
from typing import Any

import emulated
import gpu
import torch
from cases import BF16, batch

import kdfast

ROWS = 2


def kernels(backend: str, capability: int) -> AbstractContextManager[Any]:
    """Runs a backend's launches as on a device of this capability; gives the list of their reports."""
    return (emulated if backend == "cuda" else gpu).kernels(capability)


def traffic(
    backend: str, capability: int, vocab: int, dtype: torch.dtype = BF16, grad: bool = True, **settings: Any
) -> Any:
    """The reports of a forward pass."""
    student, teacher, labels = batch(ROWS, vocab, dtype)
    with kernels(backend, capability) as reports:
        kdfast.kd_loss(
            student.requires_grad_(grad), teacher, labels, **{"temperature": 2, "backend": backend} | settings
        )
    return reports


def asked(report: Any) -> int:
    return 32 * (report.load_sectors + report.store_sectors)


def per_pair(reports: Any, vocab: int, of: Any = asked) -> float:
    return (sum(map(of, reports)) - 256 * ROWS) / (ROWS * vocab)


def wide_share(reports: Any) -> float:
    """Of all accesses, those of 16 bytes a thread."""
    widths = [w for report in reports for w in (report.load_widths, report.store_widths)]
    return sum(w.get(16, 0) for w in widths) / sum(sum(w.values()) for w in widths)


def assert_the_same_bits_without_atomics(backend: str, capability: int, vocab: int, **settings: Any) -> None:
    student, teacher, labels = batch(ROWS, vocab, BF16)
    found = []
    with kernels(backend, capability) as reports:
        for _ in range(2):
            leaf = student.clone().requires_grad_()
            loss = kdfast.kd_loss(leaf, teacher, labels, temperature=2, backend=backend, **settings)
            loss.sum().backward()
            found.append((loss.detach(), leaf.grad))
    assert all(map(torch.equal, *found))
    assert all(array.atomics == 0 for report in reports for array in report.arrays.values())
