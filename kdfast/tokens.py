"""token_log_probs: log-probabilities of given tokens, entropy, and the log of the rest.

linear_tokens.py has the same from hidden states and a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast import checks, choice
from kdfast.arguments import IGNORED
from kdfast.options import Backend
from kdfast.reference_tokens import refuse_negative
from kdfast.rows import loss_dtype
from kdfast.tensor_checks import check_dense, check_logits, check_temperature, check_temperatures, kind
from kdfast.token_autograd import Numbers, token_values


class TokenLogProbs(NamedTuple):
    """What `token_log_probs` returns: float32, for float64 logits float64, each differentiable.

    Attributes:
        log_probs: log q of the ids, in their shape; -inf where absent.
        entropy: (...), -sum q log q in nats. None with `entropy=False`.
        log_rest: (...), the log of what all other classes have together; -inf where there are none.

    Examples:
        >>> token_log_probs(torch.zeros(1, 4), torch.tensor([2])).log_rest.exp()
        tensor([0.7500])
    """

    log_probs: Tensor
    entropy: Any
    log_rest: Tensor


def token_log_probs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = True,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    process_group: Any = None,
    vocab_start: int | None = None,
    backend: Backend | None = None,
) -> TokenLogProbs:
    r"""log q of given tokens, the entropy of q and the log of the rest, of q = softmax(logits / T), in one pass.

    For a row with logits s, token y and q = softmax(s / T)

        log q_y = s_y / T - logsumexp(s / T)        d log q_y / ds_j = ([j = y] - q_j) / T
        H       = -sum q log q                      d H / ds_j       = -q_j (log q_j + H) / T

    which is what policy-gradient and on-policy distillation losses are made of. With log p of a teacher at the same
    tokens and r = log p - log q, the estimators of KL(q, p) are k1 = -r, k2 = r^2 / 2 and k3 = e^r - 1 - r (Schulman,
    "Approximating KL Divergence", 2020); docs/tokens.md says whose gradient each has.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64.
        ids: (...) int64 or int32, one class for each row; or (..., K), several, any of them more than once.
        temperature: T > 0: a number, a 0-dim tensor, or one per row, (...). A tensor must not require grad.
        entropy: whether the entropy is computed; False leaves out a sum, and the entropy is None.
        logit_scale, softcap, vocab_size: as in `kd_loss`.
        ignore_index: a row is ignored where its id, or each of its K, is ignore_index. All of its results are 0, its
            gradient is 0, and it may hold anything. With (..., K), any other id < 0 is absent: its log-probability is
            -inf, and it has no gradient.
        process_group, vocab_start: as in `kd_loss`; ids count from the first class of all. One
            all_gather of K + 4 numbers a row, and none in backward.
        backend: as in `kd_loss`.

    Returns:
        TokenLogProbs(log_probs, entropy, log_rest). Nothing of size V is written before backward, which reads the
        logits once more, for those of the three that have a gradient, and writes one gradient in their dtype, rounded
        once. Differentiable once: by backward, `torch.func.grad` and `vjp`; all else raises an error.

    Under `torch.compile` a temperature that changes between calls compiles once more for its second value, and so
    does a logit_scale without softcap. Other numbers are constants of the graph.

    Raises:
        TypeError, ValueError, RuntimeError: as `kd_loss` for its arguments of these names.
        IndexError: an id is out of range. On a GPU its log-probability is NaN instead.

    Examples:
        >>> logits = torch.tensor([[0.0, 4.0, 0.0], [0.0, 4.0, 0.0]], requires_grad=True)
        >>> log_probs, entropy, _ = token_log_probs(logits, torch.tensor([1, -100]))
        >>> log_probs.detach()
        tensor([-0.0360,  0.0000])
        >>> (log_probs + 0.01 * entropy).sum().backward()
    """
    is_split = process_group is not None or vocab_start is not None
    check_logits("logits", logits, least=0 if is_split else 1)
    rows, numbers = check_numbers(logits, "logits", temperature, logit_scale, softcap, vocab_size, entropy, is_split)
    entries = check_ids(ids, logits, ignore_index)
    checks.check_choice("backend", backend)
    if is_split:
        from kdfast.parallel import check_group
        from kdfast.sharded_tokens import split_values

        shard = check_group({"process_group": process_group, "vocab_start": vocab_start})
        return as_results(split_values(logits, entries, rows, numbers, shard, backend), ids, entropy)
    rows, numbers = hide_dynamic(logits, rows, numbers)
    results = token_values(logits, entries, rows, numbers, choice.namespace(backend, logits))
    return as_results(results, ids, entropy)


def as_results(results: Sequence[Tensor], ids: Tensor, entropy: bool) -> TokenLogProbs:
    return TokenLogProbs(results[0].view(ids.shape), results[1] if entropy else None, results[2])


def check_numbers(
    logits: Tensor,
    of: str,  # the logits' name
    temperature: float | Tensor,
    logit_scale: float,
    softcap: float | None,
    vocab_size: int | None,
    entropy: bool,
    is_split: bool = False,
) -> tuple[Tensor | None, Numbers]:
    """The temperatures of rows, and the operators' numbers. is_split: the logits have some of all classes."""
    rows = check_temperatures("temperature", temperature, logits.shape[:-1], logits, of)
    numbers = Numbers(
        check_temperature("temperature", temperature),
        checks.check_positive("logit_scale", logit_scale),
        checks.check_cap("softcap", softcap),
        checks.check_vocab(vocab_size),
        checks.check_bool("entropy", entropy),
    )
    if numbers.vocab_size > logits.shape[-1] and not is_split:
        raise ValueError(f"vocab_size: {vocab_size} must lie in [1, {logits.shape[-1]}], the classes of {of}")
    return rows, numbers


def check_ids(ids: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """The ids as operators take them: (..., K) int64, IGNORED in ignored rows."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: must be a tensor, not {kind(ids)}")
    check_dense("ids", ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"ids: has dtype {ids.dtype}, but it must be torch.int32 or torch.int64 class indices")
    rows = logits.shape[:-1]
    is_single = ids.shape == rows
    if not is_single and (ids.dim() != logits.dim() or ids.shape[:-1] != rows or ids.shape[-1] == 0):
        several = f"({', '.join([*map(str, rows), 'K'])})"
        raise ValueError(
            f"ids: has shape {tuple(ids.shape)}, but with logits of shape {tuple(logits.shape)} it must be "
            f"{tuple(rows)}, or {several} with K >= 1"
        )
    if ids.device != logits.device:
        raise RuntimeError(f"ids: is on {ids.device}, but logits is on {logits.device}")
    ignore_index = checks.check_ignore_index(ignore_index)
    entries = ids.detach().long()
    if is_single:
        return torch.where(entries == ignore_index, IGNORED, refuse_negative(entries)).unsqueeze(-1)
    return torch.where((entries == ignore_index).all(-1, keepdim=True), IGNORED, entries)


def hide_dynamic(logits: Tensor, rows: Tensor | None, numbers: Numbers) -> tuple[Tensor | None, Numbers]:
    """Under torch.compile: makes temperatures of rows of a temperature or scale that changes between calls.

    An operator's argument that is a float is a constant of the graph, so each new value of it would compile again.
    """
    if not torch.compiler.is_compiling():
        return rows, numbers
    from torch.fx.experimental.symbolic_shapes import has_static_value

    can_merge = has_static_value(numbers.softcap) and numbers.softcap == 0
    moves_scale = can_merge and not has_static_value(numbers.logit_scale)
    if not moves_scale and (rows is not None or has_static_value(numbers.temperature)):
        return rows, numbers
    one = torch.ones((), dtype=loss_dtype(logits), device=logits.device)
    rows = (one * numbers.temperature).expand(logits.shape[:-1]) if rows is None else rows
    if moves_scale:
        rows, numbers = rows / numbers.logit_scale, numbers._replace(logit_scale=1.0)
    return rows, numbers._replace(temperature=1.0)
