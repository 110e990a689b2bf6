"""Log-probabilities of given classes, entropy, and the log of the rest, in plain PyTorch.

Per row: z = the logits, scaled and softcapped; q = softmax(z / T); i_k the ids, of which one < 0 is absent.

    log_probs_k = log q[i_k]        -inf where absent
    entropy     = -sum q log q
    log_rest    = log of the sum of q over the classes that are no ids; -inf where there are none

Of a row whose first id is IGNORED all three are 0, and so is the gradient, whatever the row holds.
"""

import math

import torch
from torch import Tensor

from kdfast.arguments import IGNORED, TOKEN_STATS
from kdfast.divergences import times
from kdfast.reference import as_column, softcap
from kdfast.row_math import finite
from kdfast.rows import check_row_values, loss_dtype


def token_stats(
    logits: Tensor,
    ids: Tensor,  # (..., K)
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    cap: float,
    vocab_size: int,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (..., K), (...) or (0,), (...), and the table
    """Without a gradient; an id outside of [0, V) that is not < 0 is an IndexError on a CPU, and NaN on a GPU."""
    logits = logits.detach()
    check_ids(logits, ids, vocab_size, temperatures)
    ignored = ids[..., 0] == IGNORED
    z, scale = _exponents(logits, ignored, temperatures, temperature, logit_scale, cap, vocab_size)
    offset = z.amax(-1, keepdim=True)
    y = scale * (z - finite(offset))  # T may make infinities of large ones
    log_q = torch.log_softmax(y, -1)
    absent, places = (ids < 0) | (ids >= z.shape[-1]), ids.clamp(0, z.shape[-1] - 1)
    log_probs = torch.where(absent, torch.where(ids < 0, -math.inf, math.nan), log_q.gather(-1, places))
    q = log_q.exp()
    h = -(q * torch.where(q == 0, 0, log_q)).sum(-1)
    is_id = _is_id(z, places, absent)
    log_rest = _log_sum(torch.where(is_id, -math.inf, log_q))
    log_others = _log_sum(torch.where(is_id, -math.inf, y)) / math.log(2)
    of_ids = torch.where(is_id, y.exp(), 0).sum(-1)
    columns = offset.squeeze(-1), of_ids, log_others, h, torch.full_like(h, -math.inf)
    table = torch.stack(columns, -1).view(-1, TOKEN_STATS)
    log_probs = torch.where(ignored.unsqueeze(-1), 0, log_probs)
    h, log_rest = torch.where(ignored, 0, h), torch.where(ignored, 0, log_rest)
    return log_probs, h if entropy else h.new_empty(0), log_rest, table


def token_grad(
    logits: Tensor,
    ids: Tensor,
    stats: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_log_rest: Tensor | None,
    grad_elsewhere: Tensor | None,  # (rows,), the sum of the gradients of ids that other processes have
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    cap: float,
    vocab_size: int,
) -> Tensor:  # (..., V)
    """With R the sum of Q over the classes that are no ids, Z of all, and own_j what the ids equal to j have:

    own_j - q_j (sum own + grad_entropy (entropy + log q_j) + grad_log_rest) + grad_log_rest Q_j / R, the last of
    classes that are no ids.
    """
    ignored = ids[..., 0] == IGNORED
    z, scale = _exponents(logits.detach(), ignored, temperatures, temperature, logit_scale, cap, vocab_size)
    table = stats.view(*logits.shape[:-1], TOKEN_STATS)
    offset, of_ids, log_others, h, elsewhere = (column.unsqueeze(-1) for column in table.unbind(-1))
    y, log_others = scale * (z - finite(offset)), log_others * math.log(2)
    log_ids = torch.logaddexp(of_ids.log(), elsewhere * math.log(2))
    log_q = y - torch.logaddexp(log_ids, log_others)
    q, rest_of_q = log_q.exp(), -torch.expm1(log_q)
    absent, places = (ids < 0) | (ids >= z.shape[-1]), ids.clamp(0, z.shape[-1] - 1)
    own, of_all = torch.zeros_like(q), torch.zeros_like(offset)
    if grad_log_probs is not None:
        given = torch.where(absent, 0, grad_log_probs.to(z.dtype))
        own, of_all = own.scatter_add(-1, places, given), given.sum(-1, keepdim=True)
    if grad_elsewhere is not None:
        of_all = of_all + grad_elsewhere.to(z.dtype).view_as(offset)
    grad = own * rest_of_q - q * (of_all - own)
    if grad_entropy is not None:
        grad = grad - grad_entropy.to(z.dtype).unsqueeze(-1) * times(q, h + log_q)
    if grad_log_rest is not None:
        of_rest = torch.where(log_others == -math.inf, 0, grad_log_rest.to(z.dtype).unsqueeze(-1))
        of_others = torch.where(_is_id(z, places, absent), 0, (y - torch.where(of_rest == 0, 0, log_others)).exp())
        grad = grad + of_rest * (of_others - q)
    grad = grad * (scale if not cap else scale * logit_scale * torch.where(z.isinf(), 0, 1 - (z / cap).square()))
    grad = torch.where(ignored.unsqueeze(-1), 0, grad).to(logits.dtype)
    return torch.nn.functional.pad(grad, (0, logits.shape[-1] - z.shape[-1]))


def check_ids(logits: Tensor, ids: Tensor, vocab_size: int, temperatures: Tensor | None = None) -> None:
    """Raises for an id that is too large and for a bad temperature. On a GPU it does nothing: reading waits for it."""
    if logits.device.type != "cpu":
        return
    vocab = logits.shape[-1] if vocab_size < 0 else vocab_size
    flat = ids.reshape(-1, ids.shape[-1])
    bad = (flat >= vocab).nonzero()
    if len(bad):
        row, entry = bad[0].tolist()
        raise IndexError(
            f"ids: {as_given(int(flat[row, entry]))} in row {row}, entry {entry} is out of range: with V = {vocab} it "
            f"must be in [0, {vocab - 1}]"
        )
    check_row_values("temperature", temperatures, flat[:, 0] != IGNORED)


def refuse_negative(ids: Tensor) -> Tensor:
    """Makes ids < 0, which are absent ones, out of range, as ids that are far too large."""
    return ids & (2**63 - 1)


def as_given(id: int) -> int:
    """The id of which `refuse_negative` has made this one."""
    return id - 2**63 if id >= 2**62 else id


def _exponents(
    logits: Tensor, ignored: Tensor, temperatures: Tensor | None, temperature: float, logit_scale: float, cap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The logits, softcapped, in the dtype of results and 0 in ignored rows; and what makes exponents of them."""
    z = logits if vocab_size < 0 else logits[..., :vocab_size]
    z = torch.where(ignored.unsqueeze(-1), 0, z).to(loss_dtype(logits))
    scale = (1 if cap else logit_scale) / as_column(temperatures, temperature, z)
    scale = torch.where(ignored.unsqueeze(-1), 1, scale) if temperatures is not None else scale
    return softcap(logit_scale * z, cap) if cap else z, scale


def _is_id(z: Tensor, places: Tensor, absent: Tensor) -> Tensor:
    """Which classes are ids, (..., V)."""
    return torch.zeros(z.shape, dtype=torch.int32, device=z.device).scatter_add_(-1, places, (~absent).int()) > 0


def _log_sum(x: Tensor) -> Tensor:
    """log of the sum of exp x, (...); -inf where there is nothing."""
    nothing = (x == -math.inf).all(-1)
    return torch.where(nothing, -math.inf, torch.logsumexp(torch.where(nothing.unsqueeze(-1), 0, x), -1))
