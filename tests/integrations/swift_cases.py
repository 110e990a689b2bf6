"""What the tests of ms-swift share: its own loss, which no patch reaches, and a batch."""

import math
import runpy
from collections.abc import Callable
from typing import Any

import swift_stubs  # noqa: F401, before ms-swift
import torch
from swift.rlhf_trainers import gkd_loss as library
from torch import Tensor

VOCAB, K = 24, 6
OWN = runpy.run_path(library.__file__, run_name="swift_unpatched")  # a second copy
GKD, JSD = OWN["gkd_loss"], OWN["jsd_loss"]


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def batch(vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher, and labels of which some are masked."""
    labels = torch.arange(14).view(2, 7) % VOCAB
    labels[0, :3], labels[1, :1], labels[:, -1] = -100, -100, -100
    return logits(2, 7, VOCAB), logits(2, 7, vocab, seed=1), labels


def dense(teacher: Tensor, labels: Tensor) -> Any:
    return library.TeacherOutput(full_logits=teacher, labels=labels)


def top_k(teacher: Tensor, labels: Tensor, k: int = K) -> Any:
    values, indices = teacher.log_softmax(-1).topk(k)
    return library.TeacherOutput(topk_logprobs=values, topk_indices=indices, labels=labels)


def with_gradient(loss: Callable[..., Any], student: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    """The loss, its gradient, and what else there is."""
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *arguments, **named)
    first, *rest = value if isinstance(value, tuple) else (value,)
    first.backward()
    return first.detach(), leaf.grad, *rest


def assert_same(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def with_absent_entries(teacher: Tensor, labels: Tensor) -> Any:
    """Rows of K, K - 1 and so on to 1 entries, as where a server sends fewer; and one row without any."""
    made = top_k(teacher, labels)
    present = K - torch.arange(14).view(2, 7) % K
    present[1, 2] = 0
    made.topk_logprobs = made.topk_logprobs.masked_fill(torch.arange(K) >= present.unsqueeze(-1), -math.inf)
    made.topk_indices = made.topk_indices.masked_fill(made.topk_logprobs == -math.inf, 0)
    return made
