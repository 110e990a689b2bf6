"""Log-probabilities of given tokens, entropy, and the log of the rest."""

import torch
from torch import Tensor

from kdfast.torch_private import below_autograd


def row_log_probs(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (..., K)
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:  # (..., K) and (...)
    """log q of the ids and of the rest, without a gradient."""
    args = (logits, ids, temperatures, temperature, logit_scale, softcap, vocab_size, False)
    if torch.compiler.is_compiling():
        log_probs, _, log_rest, _ = torch.ops.kdfast.token_stats(*args)
        return log_probs, log_rest
    with below_autograd():
        log_probs, _, log_rest, _ = torch.ops.kdfast.token_stats(*args)
    return log_probs, log_rest
