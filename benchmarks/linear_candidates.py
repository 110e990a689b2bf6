"""The candidates of `python -m benchmarks.linear`, on the same hidden states and heads.

products      the four products that are needed, each unsplit, into fresh memory: two give logits, two the gradients
              in hidden states and weight
kept products the same into memory that all calls share
fp32 products as `products` with fp32 factors, which a CPU uses for 16-bit heads too, so that no logits are rounded
kdfast        linear_kd_loss and backward
eager         two heads, the recipe of recipes.py, backward
kdfast jsd    the generalised Jensen-Shannon divergence, beta = 0.5
chunked jsd   the same in plain PyTorch as in Liger-Kernel's chunked loss: for each chunk, of as many rows as
              kdfast's, heads, loss and gradients by autograd, which are added up
liger jsd     on a GPU: Liger-Kernel's own
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from benchmarks.recipes import ALPHA, recipe, soft_terms
from kdfast import chunks

HIDDEN = 512, 1024  # the student's and the teacher's
TEMPERATURE = 2.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Data:
    """Hidden states (rows, H), heads (V, H) and labels (rows,); logits have a standard deviation of 2."""

    def __init__(
        self, rows: int, vocab: int, dtype: torch.dtype, hidden: tuple[int, int] = HIDDEN, device: str = "cpu"
    ) -> None:
        student, teacher = hidden
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape).normal_(0, scale, generator=generator).to(device, dtype)

        self.hidden, self.weight = normal(rows, student), normal(vocab, student, scale=2 * student**-0.5)
        self.teacher = normal(rows, teacher), normal(vocab, teacher, scale=2 * teacher**-0.5)
        self.labels = torch.randint(vocab, (rows,), generator=generator).to(device)
        self._factors: dict[torch.dtype, list[Tensor]] = {}

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The four factors in a dtype, cached, so that no cast is timed."""
        if dtype not in self._factors:
            self._factors[dtype] = [x.to(dtype) for x in (self.hidden, self.weight, *self.teacher)]
        return tuple(self._factors[dtype])

    @cached_property
    def kept(self) -> list[Tensor]:
        """The four products, into which others are written."""
        return four_products(self, None)

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

    def first(self, rows: int) -> "Data":
        few = object.__new__(Data)
        few.hidden, few.weight = self.hidden[:rows], self.weight
        few.teacher, few.labels = (self.teacher[0][:rows], self.teacher[1]), self.labels[:rows]
        return few


def four_products(data: Data, leaves: Any, dtype: torch.dtype | None = None, out: Any = (None,) * 4) -> list[Tensor]:
    hidden, weight, t, w = data.factors(dtype or data.weight.dtype)
    logits = torch.mm(hidden, weight.T, out=out[0])
    factors = (t, w.T), (logits, weight), (logits.T, hidden)
    return [logits, *(torch.mm(*pair, out=each) for pair, each in zip(factors, out[1:], strict=True))]


def fused(data: Data, leaves: Any, **settings: Any) -> Any:
    labels, settings = data.labels, {"temperature": TEMPERATURE, "alpha": ALPHA} | settings
    loss = kdfast.linear_kd_loss(*leaves, *data.teacher, labels, **settings)
    loss.backward()
    return loss


def eager(data: Data, leaves: Any) -> Any:
    loss = recipe(leaves[0] @ leaves[1].T, data.teacher[0] @ data.teacher[1].T, data.labels, TEMPERATURE)
    loss.backward()
    return loss


def chunked_jsd(data: Data, leaves: Any) -> Any:
    rows, at_once = len(data.labels), chunks.default_rows(len(data.weight), data.weight.device.type)
    at_once = -(-rows // -(-rows // at_once))  # as in kdfast
    grad_weight, grads, total = torch.zeros_like(data.weight), [], torch.zeros((), device=data.weight.device)
    for part in zip(*(x.split(at_once) for x in (data.hidden, data.teacher[0], data.labels)), strict=True):
        hidden, weight = part[0].detach().requires_grad_(), leaves[1]
        student, teacher = (hidden @ weight.T).float(), (part[1] @ data.teacher[1].T).float()
        soft = soft_terms("jsd", student, teacher, part[2], TEMPERATURE).sum()
        hard = F.cross_entropy(student, part[2], reduction="sum")
        loss = (ALPHA * soft + (1 - ALPHA) * hard) / rows
        hidden_grad, head_grad = torch.autograd.grad(loss, (hidden, weight))
        grads.append(hidden_grad)
        grad_weight += head_grad
        total += loss.detach()
    return total, torch.cat(grads), grad_weight


def liger_jsd(data: Data, leaves: Any) -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, temperature=TEMPERATURE)
    loss = loss_of(*leaves, *data.teacher, data.labels)
    loss.backward()
    return loss


RUNS: dict[str, Callable[..., Any]] = {
    "products": four_products,
    "kept products": lambda data, leaves: four_products(data, leaves, out=data.kept),
    "fp32 products": lambda data, leaves: four_products(data, leaves, torch.float32),
    "kdfast": fused,
    "eager": eager,
    "kdfast jsd": lambda data, leaves: fused(data, leaves, divergence="jsd"),
    "chunked jsd": chunked_jsd,
    "liger jsd": liger_jsd,
}
LOSSES = ("kdfast", "eager", "kdfast jsd", "chunked jsd", "liger jsd")
LEFT_OUT = {"cpu": ("liger jsd",), "cuda": ("fp32 products",)}
