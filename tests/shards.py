"""What the tests of split vocabularies share: a process's part of a call, and one process's results to compare with.

A check is a function of a Group that raises where a promise is broken. All checks of one number of ranks run in one set
of processes, because starting them takes seconds; a check that leaves the group unusable makes the next ones fail.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from ranks import Leave
from torch import Tensor

import kdfast

# Where shards begin, as shares of the vocabulary: uneven; one of them is of one class, one is empty.
CUTS = {1: [0.0, 1], 2: [0, 0.22, 1], 3: [0, 0.02, 0.02, 1], 4: [0, 0.3, 0.32, 0.98, 1]}


@dataclass
class Group:
    rank: int
    ranks: int

    def edges(self, vocab: int) -> list[int]:
        return [round(share * vocab) for share in CUTS[self.ranks]]

    def own(self, vocab: int) -> slice:
        edges = self.edges(vocab)
        return slice(edges[self.rank], edges[self.rank + 1])

    def all(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values


def failures(rank: int, ranks: int, checks: list[Callable[[Group], None]]) -> dict[str, str | None]:
    """What each check raised here."""
    torch.set_num_threads(1)
    found: dict[str, str | None] = {}
    for check in checks:
        try:
            check(Group(rank, ranks))
            found[check.__name__] = None
        except Exception:
            left = [later.__name__ for later in checks if later.__name__ not in found]
            raise Leave(
                {
                    **found,
                    **dict.fromkeys(left, f"not run after {check.__name__}"),
                    check.__name__: traceback.format_exc(),
                }
            ) from None
    return found


def part(teacher: Any, own: slice) -> Any:
    return (
        [t[..., own] for t in teacher] if isinstance(teacher, list) else None if teacher is None else teacher[..., own]
    )


def grad_output(loss: Tensor) -> Tensor:
    """For row losses of both signs; for a scalar not 1."""
    return (
        torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape) if loss.dim() else loss.new_tensor(0.7)
    )


Results = tuple[Tensor, Tensor, Any]


def whole_results(student: Tensor, teacher: Any, labels: Any, **options: Any) -> Results:
    """Loss, gradient and metrics of one process, by the reference."""
    leaf = student.detach().clone().requires_grad_()
    loss, metrics = as_pair(kdfast.kd_loss(leaf, teacher, labels, **options | {"backend": "reference"}))
    loss.backward(grad_output(loss))
    return loss.detach(), leaf.grad, metrics


def sharded_results(
    group: Group,
    student: Tensor,
    teacher: Any,
    labels: Any,
    own: slice | None = None,
    whole: bool = False,
    **options: Any,
) -> Results:
    """The same of this rank's classes. whole: the teacher is given whole."""
    own = group.own(student.shape[-1]) if own is None else own
    leaf = student[..., own].detach().clone().requires_grad_()
    logits = leaf * 1 if options.get("inplace") else leaf
    options = {"process_group": dist.group.WORLD, "vocab_start": own.start} | options
    loss, metrics = as_pair(kdfast.kd_loss(logits, teacher if whole else part(teacher, own), labels, **options))
    loss.backward(grad_output(loss))
    return loss.detach(), leaf.grad, metrics


def as_pair(result: Any) -> tuple[Tensor, Any]:
    return result if type(result) is tuple else (result, ())


def same(what: str, got: Any, want: Any, own: slice, tolerance: float = 1e-12) -> None:
    """Loss, this rank's part of the gradient, and metrics are the same."""
    scale = want[1].abs().max().item() if want[1].numel() else 0.0
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: loss: {m}")
    torch.testing.assert_close(
        got[1], want[1][..., own], rtol=0, atol=tolerance * max(scale, 1e-3), msg=lambda m: f"{what}: gradient: {m}"
    )
    names = getattr(got[2], "_fields", ())
    for name, x, y in zip(names, got[2], want[2], strict=True):
        torch.testing.assert_close(
            x, y, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{what}: {n}: {m}"
        )
