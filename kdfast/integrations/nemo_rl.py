"""NeMo-RL's on-policy distillation by kdfast: DistillationLossFn, which takes logits.

Of the process that sets training up:

    import kdfast.integrations.nemo_rl

    kdfast.integrations.nemo_rl.patch()

NeMo-RL gathers the student's log-probabilities of the teacher's top-k tokens before its own loss is called, from
logits as fp32, of all positions on each context-parallel rank. This loss is called with the logits themselves.
"""

import enum
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import log_softmax, pad

from kdfast import checks
from kdfast.integrations.patching import Patch
from kdfast.losses import kd_loss
from kdfast.sparse import TopKTargets
from kdfast.tensor_checks import is_dtensor
from kdfast.tokens import token_log_probs

try:
    from nemo_rl.algorithms.loss.interfaces import LossFunction, LossInputType, LossType
except ImportError:  # NeMo-RL is not on PyPI; what it asks of a loss are these attributes

    class LossType(enum.Enum):  # type: ignore[no-redef]
        TOKEN_LEVEL = "token_level"

    class LossInputType(enum.Enum):  # type: ignore[no-redef]
        LOGIT = "logit"

    LossFunction = object

TESTED = "0.7.0"
DEFAULTS = {"kl_type": "mixed", "mixed_kl_weight": 0.5, "zero_outside_topk": False}  # NeMo-RL's
DIVERGENCES = {"forward": "forward_kl", "reverse": "reverse_kl", "mixed": "symmetric_kl"}
LOG_OUTSIDE = -100.0  # a teacher's log-probability of a token outside of its top k, with zero_outside_topk
IGNORED = -100


def patch() -> Patch:
    """Puts this loss in the place of NeMo-RL's where its distillation is set up.

    Call it before `nemo_rl.algorithms.distillation.setup`. The workers, which are other processes, get the loss from
    there and need kdfast installed, and no call.

    Examples:
        >>> patch()  # doctest: +SKIP
        >>> setup(master_config, tokenizer, train_dataset, val_dataset)  # doctest: +SKIP
    """
    patches = Patch("nemo_rl", TESTED)
    patches.replace("nemo_rl.algorithms.distillation", "DistillationLossFn", lambda original: DistillationLossFn)
    return patches


class DistillationLossFn(LossFunction):
    """NeMo-RL's DistillationLossFn, from logits.

    With q the student's softmax, and p the teacher's softmax over its own K logits of a position,

        forward  sum_k p_k log(p_k / q_k)
        reverse  sum_k q_k log(q_k / p_k)
        mixed    w forward + (1 - w) reverse

    where q is normalized over the K tokens too. With zero_outside_topk, q is of the whole vocabulary, and reverse sums
    over all of it, with log p = -100 outside of the K tokens.

    Args:
        cfg: a mapping or an object with `kl_type` ("forward", "reverse", "mixed"), `mixed_kl_weight` (w, in [0, 1])
            and `zero_outside_topk`. Those that are absent are as in NeMo-RL: "mixed", 0.5, False.

    Raises:
        ValueError: a kl_type or a mixed_kl_weight that is not one of these.

    Examples:
        >>> loss_fn = DistillationLossFn({"kl_type": "reverse"})
        >>> data = {"input_ids": torch.zeros(2, 5, dtype=torch.int64), "teacher_topk_logits": torch.randn(2, 5, 3)}
        >>> data["teacher_topk_indices"] = torch.tensor([7, 0, 4]).expand(2, 5, 3)
        >>> loss, metrics = loss_fn(torch.randn(2, 5, 9, requires_grad=True), data, torch.tensor(2), torch.tensor(8))
        >>> metrics["num_valid_samples"]
        2
    """

    loss_type = LossType.TOKEN_LEVEL
    input_type = LossInputType.LOGIT

    def __init__(self, cfg: Any) -> None:
        read = cfg.get if isinstance(cfg, Mapping) else partial(getattr, cfg)
        self.kl_type, self.mixed_kl_weight, self.zero_outside_topk = (read(name, x) for name, x in DEFAULTS.items())
        if self.kl_type not in DIVERGENCES:
            raise ValueError(f"kl_type: {self.kl_type!r} is not one of {', '.join(map(repr, DIVERGENCES))}")
        if not 0 <= checks.as_number("mixed_kl_weight", self.mixed_kl_weight) <= 1:
            raise ValueError(f"mixed_kl_weight: {self.mixed_kl_weight!r} must lie in [0, 1]")

    def __call__(
        self,
        logits: Tensor,
        data: Any,
        global_valid_seqs: Any,
        global_valid_toks: Any,
        *,
        vocab_parallel_group: Any = None,
        context_parallel_group: Any = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a micro-batch, and its metrics, `loss` and `num_valid_samples`.

        Args:
            logits: (B, S, V), of any floating dtype. Position i predicts token i + 1. Of tensor-parallel processes
                (B, S, V / tp), of context-parallel ones (B, S / cp, V), in NeMo-RL's order: of 2 cp chunks of the
                sequence, the r-th from either end. Of a DTensor, as automodel's workers have, the placements say it.
            data: a mapping with `input_ids`, `teacher_topk_logits` and `teacher_topk_indices`, (B, S, K) of all
                positions; and `token_mask`, (B, S), with `sample_mask`, (B,). Without masks all positions count.
            global_valid_seqs: not used; NeMo-RL passes it to each loss.
            global_valid_toks: divides the sum of the positions' losses. None: the mask's sum.
            vocab_parallel_group, context_parallel_group: the process groups of plain logits. None: Megatron's, where
                it is initialized in this process.

        Returns:
            The loss is that of all positions on each rank. Its gradient is such that NeMo-RL's scaling of losses for
            context parallelism gives one process's gradient.
        """
        split = _split(logits, vocab_parallel_group, context_parallel_group)
        logits = logits.to_local() if is_dtensor(logits) else logits  # type: ignore[attr-defined]
        indices = data["teacher_topk_indices"].to(logits.device)
        teacher = data["teacher_topk_logits"].to(logits.device)
        is_masked = "token_mask" in data and "sample_mask" in data
        weight = _weights(data, indices, is_masked)
        total = weight.sum() if not is_masked or global_valid_toks is None else global_valid_toks
        # NeMo-RL's masked_mean adds 1e-8, which is for micro-batches without any valid token
        normalizer = torch.as_tensor(total, dtype=torch.float32, device=logits.device).reshape(()) + 1e-8
        indices, teacher, weight = (
            _own_positions(x, logits.shape[1], split.context) for x in (indices, teacher, weight)
        )
        loss = self._loss(logits, indices, teacher, weight, normalizer, split.vocab)
        if split.context is not None:
            loss = _SumOverGroup.apply(loss, split.context, split.factor)
        return loss, {"loss": float(loss.detach()), "num_valid_samples": data["input_ids"].shape[0]}

    def _loss(
        self, logits: Tensor, indices: Tensor, teacher: Tensor, weight: Tensor, normalizer: Tensor, group: Any
    ) -> Tensor:
        """logits: (B, S, V), indices and teacher: (B, S, K), weight: (B, S); of this process."""
        if not self.zero_outside_topk or self.kl_type == "forward":
            return kd_loss(
                logits,
                TopKTargets(indices, teacher),  # logits are log-probabilities up to a constant for each row
                divergence=DIVERGENCES[self.kl_type],
                beta=self.mixed_kl_weight if self.kl_type == "mixed" else None,
                missing="renormalize" if self.zero_outside_topk else "conditional",
                row_weight=weight,
                normalizer=normalizer,
                process_group=group,
            )
        kept = weight != 0
        ids = torch.where(kept.unsqueeze(-1), indices, IGNORED)
        log_q, entropy, log_rest = token_log_probs(logits, ids, ignore_index=IGNORED, process_group=group)
        log_p = log_softmax(teacher.to(log_q.dtype), -1)
        log_p = torch.where(log_p == -torch.inf, LOG_OUTSIDE, log_p)
        # sum_k q_k log(q_k / p_k) + sum_rest q (log q + 100)
        rows = -entropy - (log_q.exp() * log_p).sum(-1) - LOG_OUTSIDE * log_rest.exp()
        if self.kl_type == "mixed":
            forward = (log_p.exp() * (log_p - log_q)).sum(-1)
            rows = self.mixed_kl_weight * forward + (1 - self.mixed_kl_weight) * rows
        return torch.where(kept, rows * weight, 0).sum() / normalizer


class _Split(NamedTuple):
    """Which groups have the other classes and the other positions of the logits; None: nobody."""

    vocab: Any
    context: Any
    factor: int  # of the gradient, where positions are split


def _split(logits: Tensor, vocab: Any, context: Any) -> _Split:
    if is_dtensor(logits):
        mesh, placements = logits.device_mesh, logits.placements  # type: ignore[attr-defined]
        split = {p.dim % 3: mesh.get_group(at) for at, p in enumerate(placements) if p.is_shard()}
        if not split.keys() <= {1, 2} or any(p.is_partial() for p in placements):
            raise TypeError(
                f"logits: is a DTensor with placements {placements}; its positions and its classes may be split, over "
                "one mesh dimension each, and every other placement must be Replicate()"
            )
        vocab, context = split.get(2), split.get(1)
    elif vocab is None and context is None:
        vocab, context = _megatron_groups()
    vocab, context = (None if g is None or dist.get_world_size(g) == 1 else g for g in (vocab, context))
    if context is None or is_dtensor(logits):
        # the worker multiplies the loss by the ranks over which FSDP averages gradients, context-parallel ones too
        return _Split(vocab, context, 1)
    # the worker divides the loss by the ranks, because the backward of NeMo-RL's gather sums their gradients
    return _Split(vocab, context, dist.get_world_size(context))


def _megatron_groups() -> tuple[Any, Any]:
    """Megatron's own: NeMo-RL's Megatron workers do not tell a LOGIT loss over which groups its logits are split."""
    state: Any = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return None, None
    return state.get_tensor_model_parallel_group(), state.get_context_parallel_group()


def _weights(data: Any, indices: Tensor, is_masked: bool) -> Tensor:
    """(B, S): position i has the weight of token i + 1. The last position predicts none and has 0."""
    batch, positions = indices.shape[:2]
    if is_masked:
        weight = data["token_mask"][:, 1:positions] * data["sample_mask"].unsqueeze(-1)
    else:
        weight = torch.ones(batch, positions - 1)
    return pad(weight.to(indices.device, torch.float32), (0, 1))


def _own_positions(x: Tensor, local: int, group: Any) -> Tensor:
    """Of (B, S, ...) the positions that this process has logits of, (B, local, ...), 0 where there are none."""
    ranks = 1 if group is None else dist.get_world_size(group)
    missing = local * ranks - x.shape[1]
    if missing < 0:
        raise ValueError(f"teacher_topk_indices: has {x.shape[1]} positions, but the logits have {local * ranks}")
    x = pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    if group is None:
        return x
    chunks, rank = x.chunk(2 * ranks, 1), dist.get_rank(group)
    return torch.cat((chunks[rank], chunks[-1 - rank]), 1)


class _SumOverGroup(torch.autograd.Function):
    """The loss of all positions. The gradient stays this process's own, times the factor."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, group: Any, factor: int) -> Tensor:
        ctx.factor = factor
        total = loss.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.factor, None, None
