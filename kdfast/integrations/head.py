"""A student with its head and its loss in one module, so that the fused loss runs inside of a forward."""

from typing import Any

import torch
from torch import Tensor, nn

from kdfast.linear import LinearKDLoss
from kdfast.losses import Teacher
from kdfast.tensor_checks import kind


class StudentWithLoss(nn.Module):
    """A student's trunk, its head and its loss. `forward` returns the loss.

    `linear_kd_loss` reads the head's weight itself. Where the head belongs to a module that a wrapper has
    changed, it must do so inside of that module's forward: DistributedDataParallel reduces only the gradients of
    parameters that its forward has used, `fully_shard` has whole parameters only there, and accelerate's autocast is
    on only there. Wrap this module, and all three hold.

    Trunk and head stay the student's own modules, which may share parameters (tied weights), so that the student itself
    generates, and saves its state, as before.

    Args:
        trunk: returns hidden states (..., H), or an output that has `last_hidden_state`, or a tuple that begins with
            them.
        head: the nn.Linear from H to V, with or without a bias. An adapter around it is an error, since its weight is
            not the head's.
        loss: the options of the loss; by default `LinearKDLoss()`. Its reduction says what `forward` returns.

    With `fully_shard` and a MixedPrecisionPolicy set `cast_forward_inputs=False`. Otherwise FSDP2 rounds all
    floating-point inputs: a normalizer, which is an error here, and also the log-probabilities of a TopKTargets.

    Examples:
        >>> trunk = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 16), nn.GELU())
        >>> student = StudentWithLoss(trunk, nn.Linear(16, 100), LinearKDLoss(temperature=2.0))
        >>> tokens, labels = torch.randint(100, (2, 2, 8)).unbind()
        >>> teacher_hidden, teacher_head = torch.randn(2, 8, 32), nn.Linear(32, 100, bias=False)
        >>> loss = student(tokens, teacher=teacher_hidden, teacher_weight=teacher_head.weight, labels=labels)
        >>> loss.backward()
        >>> student.head.weight.grad.shape
        torch.Size([100, 16])
    """

    def __init__(self, trunk: nn.Module, head: nn.Linear, loss: LinearKDLoss | None = None) -> None:
        super().__init__()
        check_linear("head", head)
        if loss is not None and not isinstance(loss, LinearKDLoss):
            raise TypeError(f"loss: must be a LinearKDLoss, not {kind(loss)}")
        self.trunk = trunk
        self.head = head
        self.loss = LinearKDLoss() if loss is None else loss

    def forward(
        self,
        *inputs: Any,
        teacher: Teacher,
        teacher_weight: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        labels: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        **trunk_inputs: Any,
    ) -> Any:  # as linear_kd_loss
        """The loss of the student's hidden states for `trunk(*inputs, **trunk_inputs)`.

        Args:
            teacher: (..., H') hidden states, with `teacher_weight`; else a teacher as `kd_loss` takes
                it: (..., V) logits, an ensemble of them, or `TopKTargets`.
            teacher_weight, teacher_bias: (V', H') and (V'), the teacher's head.
            labels: (...) int64, already shifted.
            row_weight: (...), as in kd_loss.
            normalizer: as in kd_loss. Under DDP and FSDP2, which average gradients over the processes: the number of
                kept tokens of all processes / the number of processes.
        """
        if isinstance(normalizer, Tensor) and normalizer.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"normalizer: has dtype {normalizer.dtype}, in which counts are rounded. Under fully_shard set "
                "MixedPrecisionPolicy(cast_forward_inputs=False), or pass a number"
            )
        hidden = hidden_states(self.trunk(*inputs, **trunk_inputs))
        return self.loss(
            hidden,
            self.head.weight,
            teacher,
            teacher_weight,
            labels,
            student_bias=self.head.bias,
            teacher_bias=teacher_bias,
            row_weight=row_weight,
            normalizer=normalizer,
        )


def hidden_states(output: Any) -> Tensor:
    """The hidden states in a trunk's output."""
    found = getattr(output, "last_hidden_state", output)
    found = found[0] if isinstance(found, tuple) and found else found
    if not isinstance(found, Tensor):
        raise TypeError(
            f"trunk: must return hidden states or an output that has last_hidden_state, and returned {kind(output)}"
        )
    return found


def check_linear(name: str, head: Any) -> None:
    """Raises an error unless the head is an nn.Linear, whose weight is all that there is to it."""
    if isinstance(head, nn.Linear):
        return
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise TypeError(
            f"{name}: is wrapped by PEFT ({type(head).__name__}). The fused loss multiplies with one weight, and would "
            "neither see nor train the adapter. Leave the head out of target_modules and modules_to_save, or compute "
            "the loss from logits"
        )
    raise TypeError(f"{name}: must be an nn.Linear, not {kind(head)}")
