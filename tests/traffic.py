"""The bytes that kernels read and write, counted as their compiled PTX runs on the emulator.

Bytes are sectors of 32, per bf16 pair of logits, less 256 bytes a row for labels, statistics and unaligned ends. The
minimum is 2 reads and 1 write: 6 bytes.
"""

from typing import Any

import emulated
import gpu
import torch
from cases import BF16, batch
from torch import Tensor

import kdfast

ROWS = 2


def launches(
    backend: str,
    capability: int,
    vocab: int,
    dtype: torch.dtype = BF16,
    grad: bool = True,
    factor: float | None = None,
    **settings: Any,
) -> tuple[list[Any], list[Any], list[Tensor]]:
    """The reports of a forward pass and, where a factor is given, of a backward pass by it; loss and gradient.

    The emulated device has this capability.
    """
    student, teacher, labels = batch(ROWS, vocab, dtype)
    with (emulated if backend == "cuda" else gpu).kernels(capability) as reports:
        settings = {"temperature": 2, "backend": backend} | settings
        loss = kdfast.kd_loss(student.requires_grad_(grad), teacher, labels, **settings)
        forward = len(reports)
        if factor is None:
            return reports, [], []
        loss.backward(torch.full_like(loss, factor))
    return reports[:forward], reports[forward:], [loss.detach(), student.grad]


def traffic(backend: str, capability: int, vocab: int, *others: Any, **settings: Any) -> list[Any]:
    """The reports of a forward pass."""
    return launches(backend, capability, vocab, *others, **settings)[0]


def asked(report: Any) -> int:
    return 32 * (report.load_sectors + report.store_sectors)


def per_pair(reports: Any, vocab: int, of: Any = asked) -> float:
    return (sum(map(of, reports)) - 256 * ROWS) / (ROWS * vocab)


def wide_share(reports: Any) -> float:
    """The share of accesses of 16 bytes a thread."""
    widths = [w for report in reports for w in (report.load_widths, report.store_widths)]
    return sum(w.get(16, 0) for w in widths) / sum(sum(w.values()) for w in widths)


def assert_the_same_bits_without_atomics(backend: str, capability: int, vocab: int, **settings: Any) -> None:
    forward, backward, first = launches(backend, capability, vocab, factor=1.0, **settings)
    *_, second = launches(backend, capability, vocab, factor=1.0, **settings)
    assert all(map(torch.equal, first, second))
    assert all(array.atomics == 0 for report in forward + backward for array in report.arrays.values())


def scaling(backend: str, capability: int, vocab: int) -> Any:
    """The launch of a backward pass with grad_output 1, which writes nothing; one with 3 scales the gradient."""
    (_, (by_1,), _), (_, (by_3,), _) = (launches(backend, capability, vocab, factor=k) for k in (1.0, 3.0))
    assert by_3.store_sectors > 0
    assert by_1.store_sectors == 0
    return by_1
