"""The metrics of sparse teachers of rows whose classes are split over processes, in plain PyTorch.

sharded_sparse.py has the losses. The entries of a row, K of its classes, may lie with any process. Each number of an
entry is a sum over the processes, of which one alone has it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from kdfast import sparse_rows
from kdfast.arguments import OTHER_SHARD, Inputs, Settings
from kdfast.divergences import times
from kdfast.exchange import refuse_missing
from kdfast.processes import all_reduce
from kdfast.rows import as_matrix
from kdfast.sharded_reference import SplitRows


def at_entries(x: Tensor, local: Tensor, split: SplitRows) -> Tensor:
    """x, (..., V of this process), at the entries of all processes, (..., K); 0 at those that nobody has."""
    if not x.shape[-1]:
        return split.add_up(x.new_zeros(local.shape) + x.sum())  # which is 0, with a graph
    return split.add_up(torch.where(local < 0, 0, x.gather(-1, local.clamp(min=0))))


def has_owner(local: Tensor, wanted: Tensor, name: str, group: Any) -> Tensor:
    """Which entries some process has, (..., K). On a CPU one that is wanted and has none is an error."""
    found = all_reduce((local >= 0).float(), group) > 0
    refuse_missing(as_matrix(wanted & ~found), name)
    return found


def log_of_rest(log_q: Tensor, local: Tensor, split: SplitRows) -> Tensor:
    """The log of the sum of q over the classes that are no entries, (...)."""
    if not log_q.shape[-1]:
        return split.log_sum(log_q)
    places, is_here = local.clamp(min=0), (local >= 0).int()
    is_entry = torch.zeros(log_q.shape, dtype=torch.int32, device=log_q.device).scatter_add_(-1, places, is_here) > 0
    return split.log_sum(torch.where(is_entry, -math.inf, log_q))


def soft_terms(
    z: Tensor, temperature: Tensor, log_q: Tensor, inputs: Inputs, settings: Settings, classes: Tensor, split: SplitRows
) -> tuple[Tensor, dict[str, Tensor]]:
    """T^2 D of each row, (...), and its metrics; z: logits / T less a number of the row; log_q: (..., V)."""
    assert inputs.indices is not None
    log_p = inputs.teachers[0].to(log_q.dtype)
    present = log_p != -math.inf
    local = torch.where(present, inputs.indices, OTHER_SHARD)
    found = has_owner(local, present, "teacher.indices", split.group)
    log_p = torch.where(present & ~found, math.nan, log_p)
    mass = log_p.exp().sum(-1)
    log_p = sparse_rows.teacher_log_probs(log_p, present, classes.unsqueeze(-1), settings)
    q_k = at_entries(log_q, local, split)
    if settings.missing == "conditional":
        log_q_k = sparse_rows.with_student_rest(at_entries(z, local, split), None, present)
    else:
        rest = log_of_rest(log_q, local, split).unsqueeze(-1)
        log_q_k = sparse_rows.with_student_rest(q_k, rest, present)
    soft = sparse_rows.soft_losses(log_p, log_q_k, temperature, settings)
    with torch.no_grad():
        p = log_p.exp()
        at = log_p[..., :-1].argmax(-1, keepdim=True)
        metrics = {
            "kl": times(p, log_p - log_q_k).sum(-1),
            "teacher_entropy": -times(p, log_p).sum(-1),
            "likeliest": local.gather(-1, at).squeeze(-1),  # in this process
            "student_mass": torch.where(present, q_k.exp(), 0).sum(-1),
            "teacher_mass": mass,
        }
    return soft, metrics
