"""The operators of linear_token_log_probs: the logits of a chunk of rows at a time, through the row operators.

linear_ops.py has the products. `grad` computes a chunk's logits again, and from their gradient the heads'.
"""

from typing import Any

import torch
from torch import Tensor

from kdfast.arguments import IGNORED, NO_LOSS, TOKEN_STATS, Heads, Inputs
from kdfast.chunks import Chunks
from kdfast.linear_checks import product_like
from kdfast.linear_ops import Gradients
from kdfast.reference_tokens import check_ids
from kdfast.rows import as_matrix


def token_stats(
    ops: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,  # (..., K)
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    entropy: bool,
    chunk_rows: int,
    accumulate_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (..., K), (...) or (0,), (...), and the table of all rows
    check_ids(product_like(hidden, weight), ids, vocab_size, temperatures)
    heads = _heads(hidden, weight, bias, chunk_rows, accumulate_dtype)
    chunks = _chunks(heads, ids, temperatures, vocab_size)
    sizes = ((ids.shape[-1],), (), (), (TOKEN_STATS,))
    totals = [chunks.hidden.new_zeros((chunks.rows, *size), dtype=chunks.loss_dtype) for size in sizes]  # of dropped
    ids = as_matrix(ids)
    for chunk in chunks:
        call = chunk.inputs.temperatures, temperature, logit_scale, softcap, -1, entropy
        parts = ops.token_stats(chunk.logits, ids[chunk.rows], *call)
        for total, part in zip(totals, parts, strict=True):
            if entropy or part is not parts[1]:
                total[chunk.rows] = part
    log_probs, h, log_rest, table = totals
    rows = hidden.shape[:-1]
    h = h.view(rows) if entropy else h.new_empty(0)
    return log_probs.view(*rows, ids.shape[-1]), h, log_rest.view(rows), table


def token_grad(
    ops: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    stats: Tensor,
    grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_log_rest: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float,
    vocab_size: int,
    chunk_rows: int,
    accumulate_dtype: torch.dtype,
    *wanted: bool,  # grad_hidden, grad_weight, grad_bias
    wide_hidden: bool = False,  # whether the hidden states' gradient is not yet rounded to 16 bits
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden states, weight and bias, (0,) where not wanted."""
    heads = _heads(hidden, weight, bias, chunk_rows, accumulate_dtype, *wanted)
    chunks = _chunks(heads, ids, temperatures, vocab_size)
    gradients = Gradients(ops, heads, chunks, wide_hidden)
    ids = as_matrix(ids)
    grads = [
        None if grad_log_probs is None else as_matrix(grad_log_probs),
        *(None if grad is None else grad.flatten() for grad in (grad_entropy, grad_log_rest)),
    ]
    for chunk in chunks:
        call = chunk.inputs.temperatures, temperature, logit_scale, softcap, -1
        of_chunk = [None if grad is None else grad[chunk.rows] for grad in grads]
        args = ids[chunk.rows], stats[chunk.rows], *of_chunk, None, *call
        if gradients.narrow_dtype is None:
            grad = ops.token_grad(chunk.logits, *args)
        else:
            grad = ops.token_grad_as(chunk.logits, gradients.narrow_dtype, *args)
        gradients.add(chunk, grad)
        del grad
    return gradients.result(None)


def _heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    chunk_rows: int,
    accumulate_dtype: torch.dtype,
    *wanted: bool,
) -> Heads:
    return Heads(hidden, weight, bias, None, None, None, chunk_rows, accumulate_dtype, *(wanted or (False,) * 3))


def _chunks(heads: Heads, ids: Tensor, temperatures: Tensor | None, vocab_size: int) -> Chunks:
    """The chunks of the rows that are not ignored."""
    inputs = Inputs([], None, ids[..., 0] != IGNORED, None, temperatures, None)
    return Chunks(heads, inputs, NO_LOSS._replace(vocab_size=vocab_size))
