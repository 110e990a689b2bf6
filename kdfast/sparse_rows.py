"""The rows of a sparse teacher: K classes, its entries, and what all other classes, the rest, have.

Over the K classes and the rest, p and q are distributions of K + 1 classes, so every divergence has its usual form:

    missing          p_k                  p_rest              q_k              q_rest
    "tail"           exp(log_probs)       max(0, 1 - sum)     q[i_k]           sum of the others
    "renormalize"    softmax(log_probs)   0                   q[i_k]           sum of the others
    "truncate"       exp(log_probs)       0                   q[i_k]           sum of the others
    "conditional"    softmax(log_probs)   none                softmax of s_k   none

D is sum phi(p, q) as of any p and q. A divergence of degree 1 has "renormalize" as sum phi(p_k, q_k) + phi(0, q_rest).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.arguments import Inputs, Settings
from kdfast.divergences import DIVERGENCES
from kdfast.rows import loss_dtype


class Entries(NamedTuple):
    """A sparse teacher's rows, with its rest as a last class; K + 1 is its columns."""

    indices: Tensor  # (..., K) int64, -1 where absent
    log_p: Tensor  # (..., K + 1), to be softmaxed unless it is given


def entries_of(student: Tensor, inputs: Inputs, settings: Settings) -> Entries:
    """On any device without a sync; an index out of range makes its row NaN."""
    assert inputs.indices is not None
    vocab = student.shape[-1] if settings.vocab_size < 0 else settings.vocab_size
    wide = loss_dtype(student)
    log_p, indices = inputs.teachers[0].to(wide), inputs.indices.long()
    present, inside = log_p != -math.inf, (indices >= 0) & (indices < vocab)
    log_p = torch.where(present & ~inside, math.nan, log_p)
    return Entries(torch.where(present & inside, indices, -1), with_rest(log_p, present, vocab, settings))


def with_rest(log_p: Tensor, present: Tensor, vocab: int | Tensor, settings: Settings) -> Tensor:
    """log p of the entries, (..., K), and after them of their rest. vocab: all classes; a tensor is (..., 1)."""
    count = present.sum(-1, keepdim=True)
    rest = torch.full_like(log_p[..., :1], -math.inf)
    if settings.missing == "tail":
        precise = log_p.double() if log_p.device.type in ("cpu", "cuda") else log_p
        of_all = (1 - precise.exp().sum(-1, keepdim=True)).clamp(min=0).log().to(log_p.dtype)
        rest = torch.where(count == vocab, rest, of_all)
    rest = torch.where(count == 0, 0, rest)  # no entries: all is rest, on both sides
    return torch.cat([log_p, rest], -1)


def teacher_log_probs(log_p: Tensor, present: Tensor, vocab: int | Tensor, settings: Settings) -> Tensor:
    """with_rest, softmaxed where a form takes log p up to a constant of the row."""
    log_p = with_rest(log_p, present, vocab, settings)
    return log_p if is_given(settings) else torch.log_softmax(log_p, -1)


def with_student_rest(log_q: Tensor, log_rest: Tensor | None, present: Tensor) -> Tensor:
    """log q of the entries and their rest, (..., K + 1).

    log_q: (..., K), with "conditional" up to a constant of the row; log_rest: (..., 1), which "conditional" has not.
    """
    empty, log_q = ~present.any(-1, keepdim=True), torch.where(present, log_q, -math.inf)
    if log_rest is None:
        rest = torch.where(empty, 0, -math.inf).to(log_q.dtype)
        return torch.log_softmax(torch.cat([log_q, rest], -1), -1)
    return torch.cat([log_q, torch.where(empty, 0, log_rest)], -1)


def soft_losses(log_p: Tensor, log_q: Tensor, temperature: Tensor, settings: Settings) -> Tensor:
    """T^2 D of rows of K + 1 classes, (...); temperature: 0-dim, or one of each row, (..., 1)."""
    p, of = log_p.exp(), DIVERGENCES[settings.divergence]
    losses = of.phi(p, log_q.exp(), log_p, log_q, settings.beta).sum(-1)
    losses = losses + of.first_order(settings.beta) * (p.sum(-1) - 1)
    if settings.missing != "truncate":  # rounding may leave less than 0
        losses = losses - losses.detach().clamp(max=0)
    if not settings.t_squared:
        return losses
    return losses * (temperature.squeeze(-1) if temperature.dim() else temperature).square()


def is_given(settings: Settings) -> bool:
    """Whether the log-probabilities of a sparse teacher are taken as they are, and not softmaxed over its entries."""
    return settings.missing in ("tail", "truncate")


def logits_read(logits: Tensor, entries: Entries, settings: Settings) -> Tensor:
    """The student's logits that a form reads: with "conditional" the entries', (..., K), -inf where absent."""
    if settings.missing != "conditional":
        return logits
    return torch.where(entries.indices < 0, -math.inf, logits.gather(-1, entries.indices.clamp(min=0)))


def student_log_probs(z: Tensor, entries: Entries, settings: Settings) -> Tensor:
    """log q of the entries and their rest, (..., K + 1), in plain PyTorch; z: logits_read / T."""
    present, places = entries.indices >= 0, entries.indices.clamp(min=0)
    if settings.missing == "conditional":
        return with_student_rest(z, None, present)
    log_q = torch.log_softmax(z, -1)
    there = torch.zeros(z.shape, dtype=torch.int32, device=z.device).scatter_add_(-1, places, present.int()) > 0
    others = torch.where(there, -math.inf, log_q)
    nothing = (others == -math.inf).all(-1, keepdim=True)
    rest = torch.logsumexp(torch.where(nothing, 0, others), -1, keepdim=True)
    return with_student_rest(log_q.gather(-1, places), torch.where(nothing, -math.inf, rest), present)
