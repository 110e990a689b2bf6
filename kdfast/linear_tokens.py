"""linear_token_log_probs: token_log_probs from hidden states and a head, without materializing the logits."""

from typing import Any

import torch
from torch import Tensor

from kdfast import checks, choice
from kdfast.linear_checks import check_accumulate_dtype, check_chunk_rows, check_head, product_like
from kdfast.options import Backend
from kdfast.token_autograd import linear_token_values
from kdfast.tokens import TokenLogProbs, as_results, check_ids, check_numbers, hide_dynamic


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    accumulate_dtype: torch.dtype = torch.float32,
    temperature: float | Tensor = 1.0,
    entropy: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    process_group: Any = None,
    vocab_start: int | None = None,
    reduce_hidden: bool = True,
    backend: Backend | None = None,
) -> TokenLogProbs:
    r"""`token_log_probs` of `hidden @ weight.T`, without tensors of (rows, V).

    The logits of a few rows at a time are computed, and in backward once more, so memory grows with rows * H and with
    chunk_rows * V. Forward has one matrix product and backward three, one less each for frozen hidden states and for a
    frozen weight. Ignored rows are skipped in the products; on a GPU they are zeroed instead, to avoid a sync.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64: the head's input.
        weight: (V, H) of the same dtype, as in nn.Linear.
        ids: as `token_log_probs`, of rows (...).
        bias: (V,), of the same dtype.
        chunk_rows, accumulate_dtype: as in `linear_kd_loss`. Two tensors of a chunk's logits are there at
            a time in backward, and one in forward.
        temperature, entropy, logit_scale, softcap, vocab_size, ignore_index, backend: as in `token_log_probs`.
        process_group, vocab_start, reduce_hidden: as in `linear_kd_loss`.

    Logits are float32 (float64 for a float64 head) and are not rounded before the softmax, on any device. Autocast
    casts hidden states, weight and bias as it does for F.linear. Errors call the product `logits`.

    Returns:
        TokenLogProbs, as `token_log_probs`, differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as `token_log_probs`, before any matrix product.

    Examples:
        >>> hidden, head = torch.randn(6, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
        >>> log_probs, entropy, _ = linear_token_log_probs(hidden, head, torch.randint(100, (6,)), temperature=0.7)
        >>> (log_probs + 0.01 * entropy).mean().backward()
        >>> head.grad.shape
        torch.Size([100, 16])
    """
    is_split = process_group is not None or vocab_start is not None
    head = check_head("", hidden, weight, bias, least=0 if is_split else 1)
    logits = product_like(*head[:2])
    rows, numbers = check_numbers(logits, "logits", temperature, logit_scale, softcap, vocab_size, entropy, is_split)
    entries = check_ids(ids, logits, ignore_index)
    checks.check_choice("backend", backend)
    if is_split:
        from kdfast.parallel import check_group
        from kdfast.sharded_tokens import split_linear_values

        shard = check_group({"process_group": process_group, "vocab_start": vocab_start})
        # the same in all processes
        chunk_rows = 512 if chunk_rows is None else check_chunk_rows(chunk_rows, 1, "cpu")
        chunks = chunk_rows, check_accumulate_dtype(accumulate_dtype)
        results = split_linear_values(head, entries, rows, numbers, shard, chunks, reduce_hidden, backend)
        return as_results(results, ids, entropy)
    rows, numbers = hide_dynamic(head[0], rows, numbers)
    vocab = logits.shape[-1] if numbers.vocab_size < 0 else numbers.vocab_size
    chunk_rows = check_chunk_rows(chunk_rows, vocab, logits.device.type)
    chunks = chunk_rows, check_accumulate_dtype(accumulate_dtype)
    results = linear_token_values(head, entries, rows, numbers, chunks, choice.namespace(backend, logits))
    return as_results(results, ids, entropy)
