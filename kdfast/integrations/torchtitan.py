"""A distillation loss for torchtitan, and a mixin by which its Trainer computes the teacher's logits.

torchtitan has no teacher. In a configuration, and in place of its Trainer:

    from kdfast.integrations.torchtitan import Distill, DistillationLoss

    config.loss = DistillationLoss.Config(kd={"temperature": 2.0, "alpha": 0.9})


    class DistillTrainer(Distill, Trainer): ...  # sets self.teacher
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor, nn
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.distributed.utils import get_spmd_backend

from kdfast.losses import kd_loss
from kdfast.modules import KDLoss
from kdfast.sparse import TopKTargets

TORCHTITANS = ("reduction", "ignore_index", "dim", "return_metrics", "process_group", "vocab_start")
PLAIN_CROSS_ENTROPY = {"alpha": 0.0, "hard_weight": 1.0, "label_smoothing": 0.0, "z_loss": 0.0}


class DistillationLoss(BaseLoss):
    """kd_loss as torchtitan's trainer calls a loss: summed over tokens, and divided by global_valid_tokens.

    Args:
        config: `kd` are `KDLoss`'s keywords, but those that torchtitan decides: it sums over tokens,
            ignores labels of -100, and splits classes over the mesh dimension "tp". `alpha` is 0.9 by default.
        compile_config: torchtitan's; with the component "loss" the loss is compiled.

    Raises:
        ValueError: a keyword that torchtitan decides; as KDLoss.

    Examples:
        >>> loss_fn = DistillationLoss.Config(kd={"temperature": 2.0}).build()
        >>> student, teacher = torch.randn(2, 4, 10, requires_grad=True), torch.randn(2, 4, 10)
        >>> labels = torch.randint(10, (2, 4))
        >>> loss, metrics = loss_fn(student, labels, torch.tensor(8), teacher_logits=teacher)
        >>> loss.backward()
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        kd: dict[str, Any] = field(default_factory=dict)
        """Keywords of kdfast.KDLoss."""

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        for name in TORCHTITANS:
            if name in config.kd:
                raise ValueError(f"kd: {name!r} is torchtitan's to decide, and cannot be given")
        self.kd = KDLoss(ignore_index=IGNORE_INDEX, **config.kd).options()
        self.fn = kd_loss
        self._maybe_compile(compile_config)
        self.teacher_head: nn.Module | None = None

    def set_teacher_head(self, head: nn.Module) -> None:
        """The head for `teacher_hidden`."""
        self.teacher_head = head

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        *,
        teacher_logits: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        teacher_indices: Tensor | None = None,
        teacher_log_probs: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and no metrics.

        Args:
            pred: (B, L, V) logits, or this rank's classes of them where torchtitan splits the head over "tp".
            labels: (B, L), already shifted; -100 where a token is ignored.
            global_valid_tokens: divides the sum. None: nothing does.
            teacher_logits: (B, L, V), or of the same classes as pred.
            teacher_hidden: (B, L, H), in place of logits; the teacher's head makes logits of them. With torchtitan's
                ChunkedLossWrapper these are logits of a chunk at a time.
            teacher_indices, teacher_log_probs: (B, L, K), in place of logits: a `TopKTargets`.

        All of these names may be given to ChunkedLossWrapper too, which passes chunks of them on. Without a teacher,
        where pred needs no gradient, the loss is the cross-entropy of the labels, so that torchtitan's validation
        reports what it does with its own loss; in training that is an error, unless alpha is 0.
        """
        teacher: Any = teacher_logits
        if teacher_hidden is not None:
            teacher = self._teacher_logits(teacher_hidden)
        elif teacher_indices is not None and teacher_log_probs is not None:
            teacher = TopKTargets(teacher_indices, teacher_log_probs)
        options = self.kd
        if teacher is None and not pred.requires_grad:
            options = options | PLAIN_CROSS_ENTROPY
        if get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1:
            options = options | {"process_group": current_spmd_mesh().get_group("tp")}
        total = {"reduction": "sum"} if global_valid_tokens is None else {"normalizer": global_valid_tokens}
        with spmd.no_typecheck():
            loss = self.fn(pred, teacher, labels, **options | total)
        if spmd.is_type_checking():
            spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, {}

    def _teacher_logits(self, hidden: Tensor) -> Tensor:
        if self.teacher_head is None:
            raise ValueError("teacher_hidden: given without a head; call set_teacher_head() first")
        with torch.no_grad():
            return self.teacher_head(hidden)


class Distill:
    """A mixin for torchtitan's Trainer: before each micro-batch's forward, `self.teacher` computes its logits.

    `self.teacher` is a model of torchtitan's, made and parallelized as the student is, in eval. It is set by the
    subclass. Where its `_skip_lm_head` is set, its results are `teacher_hidden`.

    Examples:
        >>> class DistillTrainer(Distill, Trainer):  # doctest: +SKIP
        ...     def __init__(self, config):
        ...         super().__init__(config)
        ...         self.teacher = load_teacher().eval()
    """

    teacher: nn.Module
    loss_fn: Any
    train_context: Any

    def _forward_backward_body(
        self, inputs: Tensor, labels: Tensor, global_valid_tokens: Tensor, extra_kwargs: dict[str, Any]
    ) -> Tensor:
        with self.train_context(), torch.no_grad():
            result = self.teacher(inputs, **extra_kwargs)
        name = "teacher_hidden" if getattr(self.teacher, "_skip_lm_head", False) else "teacher_logits"
        loss_fn = self.loss_fn
        self.loss_fn = partial(loss_fn, **{name: result})
        try:
            return super()._forward_backward_body(  # type: ignore[misc]
                inputs, labels, global_valid_tokens, extra_kwargs
            )
        finally:
            self.loss_fn = loss_fn
