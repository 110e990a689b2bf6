"""Losses of sparse teachers whose entries may lie with any process of a group that the classes are split over.

The soft term is a loss of the student's log-probabilities at the entries and of what all other classes have together,
which are the tokens' numbers: one all_gather of K + 3 numbers a row has them. The hard term and z_loss have the rows'
sums, as they have without a teacher.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast import rows, sparse_rows
from kdfast.arguments import IGNORED, TOKEN_STATS, Inputs, Settings, drop_unused
from kdfast.reference import as_column
from kdfast.sharded_token_ops import ELSEWHERE, ShardedTokens
from kdfast.token_autograd import Numbers
from kdfast.torch_private import enable_autograd


class Parts(NamedTuple):
    """A call of a sparse teacher: its other terms as a call without a teacher, and its soft term as one of tokens."""

    inputs: Inputs
    settings: Settings
    ids: Tensor  # (..., K)
    numbers: Numbers

    def has_other_terms(self) -> bool:
        return self.settings.hard_weight != 0 or self.settings.z_loss != 0


def parts_of(student: Tensor, inputs: Inputs, settings: Settings) -> Parts:
    assert inputs.indices is not None
    present = inputs.teachers[0] != -math.inf
    here = torch.where(inputs.indices < 0, ELSEWHERE, inputs.indices.long())
    ids = torch.where(present, here, -1)
    ids[..., 0] = torch.where(rows.kept_rows(student, inputs, settings), ids[..., 0], IGNORED)
    numbers = Numbers(settings.temperature, settings.logit_scale, settings.softcap, settings.vocab_size, False)
    other = settings._replace(alpha=0.0, missing="", metrics=False)
    return Parts(*drop_unused(inputs._replace(teachers=[], indices=None), other), ids, numbers)


def soft_stats(
    tokens: ShardedTokens, student: Tensor, inputs: Inputs, settings: Settings, classes: Tensor, parts: Parts
) -> tuple[Tensor, Tensor]:
    """alpha T^2 D of each row, (...), and what soft_grad goes on from. classes: of all processes, 0-dim."""
    call = parts.ids, inputs.temperatures, *parts.numbers
    log_probs, _, log_rest, table = tokens.token_stats(student, *call)
    log_p = inputs.teachers[0].to(log_rest.dtype)
    present = log_p != -math.inf
    log_p = sparse_rows.teacher_log_probs(log_p, present, classes, settings)
    temperature = as_column(inputs.temperatures, settings.temperature, log_p)
    with torch.enable_grad(), enable_autograd():
        leaf = torch.cat([log_probs, log_rest.unsqueeze(-1)], -1).detach().requires_grad_()
        rest = None if settings.missing == "conditional" else leaf[..., -1:]
        log_q = sparse_rows.with_student_rest(leaf[..., :-1], rest, present)
        losses = settings.alpha * sparse_rows.soft_losses(log_p, log_q, temperature, settings)
        kept = rows.kept_rows(student, inputs, settings)
        (grad,) = torch.autograd.grad(torch.where(kept, losses, 0).sum(), leaf)
    return losses.detach(), torch.cat([grad.reshape(len(table), -1), table], -1)


def soft_grad(
    tokens: ShardedTokens, student: Tensor, table: Tensor, factor: Tensor, temperatures: Tensor | None, parts: Parts
) -> Tensor:
    """factor: (...), what each row's loss is multiplied by."""
    own, of_tokens = table[:, :-TOKEN_STATS], table[:, -TOKEN_STATS:].contiguous()
    own = torch.where(own == 0, 0, own * factor.reshape(-1, 1)).view(*student.shape[:-1], -1)
    grads = own[..., :-1].contiguous(), None, own[..., -1].contiguous()
    return tokens.token_grad(student, parts.ids, of_tokens, *grads, None, temperatures, *parts.numbers[:-1])
