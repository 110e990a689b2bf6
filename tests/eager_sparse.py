"""eager.py for sparse teachers: a dense pair of K + 1 classes, the entries and the rest, and the errors of both.

An absent entry, and a rest that a form does not have, are classes of log-probability -1000 on both sides.
"""

from typing import Any

import torch
import torch.nn.functional as F
from eager import Logits, Pair, mean, temperatures, terms_of
from torch import Tensor

NOTHING = -1000.0  # its exp is 0, and it is no infinity


def sparse_pair(student: Logits, log_probs: Tensor, o: dict[str, Any]) -> tuple[Pair, Tensor, Tensor]:
    """The pair, each (..., K + 1), T, and which classes, (..., V), are entries. o["indices"]: (..., K)."""
    T, _ = temperatures(student.z, o)
    z = student.z / T
    off = student.off / T + torch.zeros_like(z).detach()
    absent = log_probs == -torch.inf
    places = torch.where(absent, 0, o["indices"].long())
    is_entry = torch.zeros(z.shape, dtype=torch.int32).scatter_add_(-1, places, (~absent).int()) > 0
    nobody, everybody = absent.all(-1, True), is_entry.all(-1, True)
    if o["missing"] == "conditional":
        z = z.masked_fill(~is_entry, -torch.inf).masked_fill(nobody, 0)
    log_q = F.log_softmax(z, -1)
    q = log_q.detach().exp()

    rest = log_q.masked_fill(is_entry, NOTHING).logsumexp(-1, True)
    no_rest = everybody if o["missing"] != "conditional" else ~nobody
    log_q_k = torch.cat([log_q.gather(-1, places).masked_fill(absent, NOTHING), rest], -1)
    log_q_k = _without_rest(log_q_k, no_rest)
    # the rest's logit is off by the mean of its classes' errors, whose own logarithms are larger than the rest's
    own = (off + log_q.detach().abs()).nan_to_num(0, posinf=0)
    of_rest = mean(q.masked_fill(is_entry, 0) / rest.detach().exp(), own) - rest.detach().abs()
    q_shift = torch.cat(
        [off.gather(-1, places).masked_fill(absent, 0), of_rest.clamp(min=0).masked_fill(no_rest, 0)], -1
    )

    log_p = _teacher(log_probs.masked_fill(absent, -torch.inf), nobody, everybody, o)
    return Pair(log_p.exp(), log_q_k.exp(), log_p, log_q_k, torch.zeros_like(log_p), q_shift, o), T, is_entry


def _without_rest(x: Tensor, no_rest: Tensor) -> Tensor:
    return torch.cat([x[..., :-1], x[..., -1:].masked_fill(no_rest, NOTHING)], -1)


def _teacher(log_p: Tensor, nobody: Tensor, everybody: Tensor, o: dict[str, Any]) -> Tensor:
    """log p, (..., K + 1). 1 - P is formed in fp64, whose digits are left where P is near 1."""
    wide = log_p.double()
    if o["missing"] in ("conditional", "renormalize"):
        wide = torch.where(nobody, wide, F.log_softmax(wide.masked_fill(nobody, 0), -1))
    rest = torch.full_like(wide[..., :1], -torch.inf)
    if o["missing"] == "tail":
        rest = (1 - wide.exp().sum(-1, True)).clamp(min=0).log().masked_fill(everybody, -torch.inf)
    wide = torch.cat([wide, rest.masked_fill(nobody, 0)], -1)
    return wide.masked_fill(wide == -torch.inf, NOTHING).to(log_p.dtype)


def soft_sparse(student: Logits, log_probs: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The soft term and A, (...), and A_i, (..., V)."""
    x, T, is_entry = sparse_pair(student, log_probs, o)
    phi, phi_off, psi_size, psi_off = terms_of(x)
    entries_off = psi_off + x.q_off * psi_size.sum(-1, True)
    # another class has the share q / q_rest of the rest's psi, and the row's own multiple of q
    log_q = F.log_softmax(student.z.detach() / T, -1)
    share = (log_q - x.log_q[..., -1:].detach()).exp().masked_fill(is_entry, 0)
    share_off = share * (8 + log_q.abs() + student.off / T).nan_to_num(0, posinf=0)
    grad_off = share * entries_off[..., -1:] + share_off * psi_size[..., -1:]
    grad_off = grad_off + share_off * x.q[..., -1:].detach() * psi_size.sum(-1, True) + o["smallest"]
    if o["missing"] == "conditional":
        grad_off = torch.zeros_like(grad_off)
    places = torch.where(x.log_q[..., :-1] == NOTHING, 0, o["indices"].long())
    spread = torch.zeros_like(grad_off).scatter_add(-1, places, entries_off[..., :-1])
    grad_off = torch.where(is_entry, spread, grad_off)
    factor = T * T if o["t_squared"] else torch.ones_like(T)
    loss, loss_off = phi.sum(-1, True), phi_off.sum(-1, True)
    return (factor * loss).squeeze(-1), (factor * loss_off).squeeze(-1), factor / T * grad_off
