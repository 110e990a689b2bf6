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

from kdfast.arguments import IGNORED
from kdfast.reference import as_column, softcap
from kdfast.rows import check_row_values, loss_dtype
from kdfast.torch_private import enable_autograd

# (rows, columns), what token_grad goes on from: the offset, sum Q of the ids' classes, of the others, the entropy; with
# Q = exp((z - offset) / T)
TOKEN_STATS = 4


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
    log_probs, h, log_rest = _values(logits, ids, temperatures, temperature, logit_scale, cap, vocab_size)
    table = log_rest.new_zeros((log_rest.numel(), TOKEN_STATS))  # the gradient is autograd's
    return log_probs, h if entropy else h.new_empty(0), log_rest, table


def token_grad(
    logits: Tensor,
    ids: Tensor,
    stats: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_log_rest: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    cap: float,
    vocab_size: int,
) -> Tensor:  # (..., V)
    if temperatures is not None and temperatures.is_inference():
        temperatures = temperatures.clone()  # autograd saves none of inference mode
    with torch.enable_grad(), enable_autograd():
        leaf = logits.detach().requires_grad_()
        values = _values(leaf, ids, temperatures, temperature, logit_scale, cap, vocab_size)
        pairs = zip(values, (grad_log_probs, grad_entropy, grad_log_rest), strict=True)
        given = [(value, grad) for value, grad in pairs if grad is not None]
        if not given:
            return torch.zeros_like(logits, memory_format=torch.contiguous_format)
        (grad,) = torch.autograd.grad([value for value, _ in given], leaf, [grad for _, grad in given])
    return grad.contiguous()


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


def _values(
    logits: Tensor, ids: Tensor, temperatures: Tensor | None, temperature: float, logit_scale: float, cap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    ignored = ids[..., 0] == IGNORED
    z = logits if vocab_size < 0 else logits[..., :vocab_size]
    z = torch.where(ignored.unsqueeze(-1), 0, z)
    z = softcap(logit_scale * z.to(loss_dtype(logits)), cap)
    z = z - z.detach().amax(-1, keepdim=True)  # T may make infinities of large ones
    log_q = torch.log_softmax(z / as_column(temperatures, temperature, z), -1)
    absent, places = (ids < 0) | (ids >= z.shape[-1]), ids.clamp(0, z.shape[-1] - 1)
    log_probs = torch.where(absent, torch.where(ids < 0, -math.inf, math.nan), log_q.gather(-1, places))
    q = log_q.exp()
    entropy = -(q * torch.where(q == 0, 0, log_q)).sum(-1)
    is_id = torch.zeros(z.shape, dtype=torch.int32, device=z.device).scatter_add_(-1, places, (~absent).int()) > 0
    others = torch.where(is_id, -math.inf, log_q)
    nothing = (others == -math.inf).all(-1)
    rest = torch.logsumexp(torch.where(nothing.unsqueeze(-1), 0, others), -1)
    rest = torch.where(nothing, -math.inf, rest)
    log_probs = torch.where(ignored.unsqueeze(-1), 0, log_probs)
    return log_probs, torch.where(ignored, 0, entropy), torch.where(ignored, 0, rest)
