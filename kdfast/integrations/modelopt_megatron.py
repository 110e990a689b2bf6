"""Model-Optimizer's losses of Megatron logits, whose classes are split over the tensor-parallel processes."""

from typing import Any

import torch
from megatron.core import parallel_state
from modelopt.torch.distill.plugins import megatron
from torch import Tensor

from kdfast.losses import kd_loss
from kdfast.processes import gather
from kdfast.sharded_reference import SplitRows

Loss = tuple[Tensor, bool, bool]  # (b, s); whether the caller sums it over the group; whether s is split


class LogitsKLLoss(megatron.LogitsKLLoss):
    """Model-Optimizer's loss of this name: KL(p, q) of each token, by `kd_loss`.

    Args:
        model_config: Megatron's TransformerConfig; `tensor_model_parallel_size` is read.
        temperature: T. There is no T^2.
        reverse: KL(q, p).

    `forward` takes (s, b, V / tp) logits of student and teacher, or ColumnParallelLinear's pairs of logits and bias.
    It returns (loss, tp_reduce, is_sequence_parallel): the loss of all classes, (b, s) float32, in every process of the
    group, and False twice, because nothing is left to be summed over the group.

    Example:

        criterion = LogitsKLLoss(student.config, temperature=2.0)
        cfg = DistillationConfig(criterion={("output_layer", "output_layer"): criterion})
    """

    def forward(self, predictions: Tensor, targets: Tensor) -> Loss:
        student, teacher = self.pre_forward(predictions, targets)
        split = {}
        if self._config.tensor_model_parallel_size > 1:
            split["process_group"] = parallel_state.get_tensor_model_parallel_group()
            split["vocab_start"] = parallel_state.get_tensor_model_parallel_rank() * student.shape[-1]
        return self.post_forward(row_losses(self, student, teacher, **split))


class TopKLogitsKLLoss(megatron.TopKLogitsKLLoss):
    """Model-Optimizer's loss of this name: KL of each token over the teacher's top k classes of all processes.

    Both sides are renormalized over these classes. The gradient is one process's, whatever the number of processes;
    the original's is larger by this number.

    Args:
        model_config, temperature, reverse: as in `LogitsKLLoss`.
        top_k: k, at most the number of all classes.

    `forward` is that of `LogitsKLLoss`.
    """

    def forward(self, predictions: Tensor, targets: Tensor) -> Loss:
        student, teacher = self.pre_forward(predictions, targets)
        here, ranks = teacher.shape[-1], self._config.tensor_model_parallel_size
        if self.top_k > here * ranks:
            raise ValueError(f"top_k: {self.top_k} must be at most {here * ranks}, the number of classes")
        values, indices = teacher.topk(min(self.top_k, here), -1)
        if ranks == 1:
            return self.post_forward(row_losses(self, student.gather(-1, indices), values))
        group = parallel_state.get_tensor_model_parallel_group()
        start = parallel_state.get_tensor_model_parallel_rank() * here
        candidates, classes = (torch.cat(list(gather(x, group)), -1) for x in (values, indices + start))
        values, chosen = candidates.topk(self.top_k, -1)
        indices = classes.gather(-1, chosen) - start
        is_here = (indices >= 0) & (indices < here)
        own = torch.where(is_here, student.gather(-1, indices.clamp(0, here - 1)), 0)
        return self.post_forward(row_losses(self, SplitRows(group).add_up(own), values))


def row_losses(loss: megatron.LogitsKLLoss, student: Tensor, teacher: Tensor, **split: Any) -> Tensor:
    """(s, b), of (s, b, classes of this process)."""
    divergence = "reverse_kl" if loss._reverse else "forward_kl"
    options: dict[str, Any] = {"divergence": divergence, "temperature": loss._temperature}
    options |= {"t_squared": False, "reduction": "none"}
    return kd_loss(student, teacher, **options | split)
