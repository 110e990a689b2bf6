"""verl's on-policy distillation, with the parts that read whole vocabularies computed by kdfast.

verl computes a distillation loss in two steps. The engine makes numbers of each token from the logits: the top-k loss
by `compute_forward_kl_topk`, one form for FSDP and one for Megatron; and the sampled token's log-probability. A
registered loss then makes a loss of these numbers. The first step is replaced here. The second, which reads a few
numbers a token (the estimators k1, k2, k3, abs; masks, clamps, policy gradients, means), stays verl's own.

Of a token, with q = softmax(logits) and the teacher's log p of K tokens, of mass P = sum p_k:

    forward_kl_topk        sum p_k (log p_k - log q_k), both logarithms clamped from below where that is asked for.
                           It may be negative. verl makes 0 of it then, and the token has no gradient (verl#7856).
    forward_kl_topk_tail   sum p_k (log p_k - log q_k) + (1 - P) (log(1 - P) - log(1 - Q)): never negative.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.integrations.patching import Patch
from kdfast.tokens import token_log_probs

TESTED = "0.9.1"
TAIL = "forward_kl_topk_tail"
MEGATRON_ENGINE = "verl.workers.engine.megatron.transformer_impl"


class _Registration(Patch):
    """A patch that has also added TAIL to verl's loss modes."""

    adds_tail = False

    def add_tail(self) -> None:
        from verl.trainer.distillation import losses

        self.adds_tail = TAIL not in losses.DISTILLATION_LOSS_REGISTRY
        if self.adds_tail:
            settings = losses.DistillationLossSettings(names=[TAIL], use_topk=True)
            losses.register_distillation_loss(settings)(losses.compute_forward_kl_topk)

    def undo(self) -> None:
        super().undo()
        if self.adds_tail:
            from verl.trainer.distillation import losses

            self.adds_tail = False
            del losses.DISTILLATION_LOSS_REGISTRY[TAIL], losses.DISTILLATION_SETTINGS_REGISTRY[TAIL]


def register() -> Patch:
    """Makes kdfast compute verl's top-k losses and log-probabilities of sampled tokens, in this process.

    verl's workers are other processes than the one that starts them. Set the environment's
    `VERL_USE_EXTERNAL_MODULES=kdfast.integrations.verl_plugin`, which calls this in each process that imports verl.

    It adds the loss mode `forward_kl_topk_tail`, whose clamp `log_prob_min_clamp` must be null.

    Returns:
        The patch: `undo()`, or the end of a `with` statement, puts verl's own code back and takes the mode away.

    Raises:
        AttributeError: this version of verl has other names.

    Examples:
        >>> import kdfast.integrations.verl
        >>> kdfast.integrations.verl.register()  # doctest: +SKIP
    """
    patch = _Registration("verl", TESTED)
    patch.replace("verl.utils.torch_functional", "logprobs_from_logits_v2", _sampled_tokens)
    patch.replace("verl.utils.torch_functional", "logprobs_from_logits_flash_attn", _flash_attention)
    patch.replace("verl.trainer.distillation.fsdp.losses", "compute_forward_kl_topk", _fsdp)
    importlib.import_module("verl.workers.engine")  # it imports each engine whose library is installed
    if MEGATRON_ENGINE in sys.modules:
        patch.replace("verl.trainer.distillation.megatron.losses", "compute_forward_kl_topk", _megatron)
        for module in ("verl.utils.megatron.tensor_parallel", MEGATRON_ENGINE):
            patch.replace(module, "vocab_parallel_log_probs_from_logits", _split_sampled_tokens)
    patch.add_tail()
    return patch


# --- sampled tokens: kl, k1, abs, mse, k2, low_var_kl, k3 ---------------------------------------------------------


def _sampled_tokens(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def logprobs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
        """log q of labels: logits (..., V), labels (...). float32 of narrower logits, as flash-attn's."""
        return token_log_probs(logits, labels, entropy=False).log_probs

    return logprobs_from_logits


_last_read = 0  # the address of the logits that a top-k loss has read last


def _flash_attention(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        """flash-attn's. Its gradient does not overwrite logits that a top-k loss reads again in its own backward."""
        return original(logits, labels, inplace_backward=inplace_backward and logits.data_ptr() != _last_read)

    return logprobs_from_logits


class Shard(NamedTuple):
    """The processes among which Megatron splits a vocabulary, evenly, and this process's first token."""

    group: Any
    processes: int
    start: int


def _shard(logits: Tensor) -> Shard | None:
    """None where one process has all tokens."""
    from megatron.core import parallel_state

    processes = parallel_state.get_tensor_model_parallel_world_size()
    if processes == 1:
        return None
    start = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    return Shard(parallel_state.get_tensor_model_parallel_group(), processes, start)


def _options(shard: Shard | None) -> dict[str, Any]:
    return {} if shard is None else {"process_group": shard.group, "vocab_start": shard.start}


def _split_sampled_tokens(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def vocab_parallel_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
        """log q of labels: logits (..., V of this process). Megatron's own overwrites them; this one does not."""
        return token_log_probs(logits, labels, entropy=False, **_options(_shard(logits))).log_probs

    return vocab_parallel_log_probs_from_logits


# --- top-k --------------------------------------------------------------------------------------------------------


def _fsdp(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_forward_kl_topk(
        student_logits: Tensor,  # (1, tokens, V)
        teacher_topk_log_probs: Tensor,  # nested (sequences, tokens of each, K)
        teacher_topk_ids: Tensor,
        config: Any,
        data_format: str,
    ) -> dict[str, Tensor]:
        from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor

        log_p, ids = teacher_topk_log_probs.values().unsqueeze(0), teacher_topk_ids.values().unsqueeze(0)
        if get_ulysses_sequence_parallel_world_size() > 1:
            log_p, ids = slice_input_tensor(log_p, dim=1), slice_input_tensor(ids, dim=1)
        return topk_numbers(student_logits, log_p, ids, config.distillation_loss, None, False)

    return compute_forward_kl_topk


def _megatron(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_forward_kl_topk(
        student_logits: Tensor,  # (1, tokens, V of this process); with data_format "bshd" (sequences, tokens, V)
        teacher_topk_log_probs: Tensor,  # nested (sequences, tokens of each, K)
        teacher_topk_ids: Tensor,
        config: Any,
        data_format: str,
    ) -> dict[str, Tensor]:
        from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine

        packed = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
        log_p, ids = (packed(each, pre_process=True)[0] for each in (teacher_topk_log_probs, teacher_topk_ids))
        return topk_numbers(student_logits, log_p, ids, config.distillation_loss, _shard(student_logits), True)

    return compute_forward_kl_topk


def topk_numbers(
    logits: Tensor,  # (sequences, tokens, V)
    log_p: Tensor,  # (sequences, tokens, K); padding has log p = 0 and one token K times
    ids: Tensor,  # the same shape
    config: Any,  # verl's DistillationLossConfig
    shard: Shard | None,
    masses_clamped: bool,  # Megatron's form has the masses of clamped log-probabilities
) -> dict[str, Tensor]:  # each (sequences, tokens)
    """What verl's compute_forward_kl_topk returns. The losses alone have a gradient."""
    global _last_read
    _last_read = logits.data_ptr()
    has_tail, least = config.loss_mode == TAIL, config.log_prob_min_clamp
    if has_tail and least is not None:
        raise ValueError(f"log_prob_min_clamp: must be null with loss_mode={TAIL!r}, but it is {least}")
    log_q, _, log_rest = token_log_probs(logits, ids, entropy=False, **_options(shard))
    log_p = log_p.to(log_q.dtype)
    masses = log_q, log_p
    if least is not None:
        log_q, log_p = log_q.clamp(min=least), log_p.clamp(min=least)
    if masses_clamped:
        masses = log_q, log_p
    terms = _terms(log_p, log_q)
    losses = terms.sum(-1)
    if has_tail and ids.shape[-1] < logits.shape[-1] * (shard.processes if shard else 1):  # there are others
        rest = (1 - log_p.double().exp().sum(-1)).clamp(min=0).log().to(log_p.dtype)
        losses = losses + _terms(rest, log_rest)
    if has_tail:
        losses = losses - losses.detach().clamp(max=0)  # rounding may leave less than 0
    found = (ids.unsqueeze(-1) == _students_ids(logits, ids.shape[-1], shard).unsqueeze(-2)).any(-1)
    count = found.sum(-1)
    return {
        "distillation_losses": losses,
        "student_mass": masses[0].detach().exp().sum(-1),
        "teacher_mass": masses[1].exp().sum(-1),
        "overlap_count": count,
        "overlap_token_advantage": -(terms.detach() * found).sum(-1) / count.clamp(min=1),
    }


def _terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), and 0 where p is 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0)


def _students_ids(logits: Tensor, k: int, shard: Shard | None) -> Tensor:
    """The student's k likeliest tokens, (sequences, tokens, k)."""
    values, ids = logits.detach().topk(min(k, logits.shape[-1]), -1)
    if shard is None:
        return ids
    return _of_all(ids + shard.start, shard).gather(-1, _of_all(values, shard).topk(k, -1).indices)


def _of_all(own: Tensor, shard: Shard) -> Tensor:
    """The last dimensions of all processes, one after the other."""
    parts = [torch.empty_like(own) for _ in range(shard.processes)]
    dist.all_gather(parts, own.contiguous(), group=shard.group)
    return torch.cat(parts, -1)
