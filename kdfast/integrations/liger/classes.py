"""Liger's loss modules with kdfast behind them: the same arguments, attributes and outputs."""

from typing import Any

from liger_kernel import chunked_loss, transformers
from liger_kernel.transformers.functional import CrossEntropyOutput
from torch import Tensor

from kdfast.integrations.liger import cross_entropy, distillation, probabilities


class LigerJSD(transformers.LigerJSD):
    """The generalized Jensen-Shannon divergence of log-probabilities, a mean over rows: Liger's LigerJSD.

    Args:
        beta: the teacher's weight in the mixture; 0 is KL(teacher, student) and 1 is KL(student, teacher).
        ignore_index: rows with this label are left out.

    `forward` takes (rows, V) log-probabilities of the student and of the teacher and, or None, (rows,) labels. Its
    gradient in the student's log-probabilities has a sum of 0 in each row. That makes no difference after log_softmax.
    Log-probabilities that do not sum to 1, as of some of the classes, get Liger's terms in PyTorch's operations.

    Examples:
        >>> log_q, log_p = torch.randn(2, 4, 100).log_softmax(-1)
        >>> LigerJSD(beta=0.1)(log_q, log_p).shape
        torch.Size([])
    """

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return probabilities.jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)


class LigerKLDIVLoss(transformers.LigerKLDIVLoss):
    """KL(y_true, y_pred) as nn.KLDivLoss has it: Liger's LigerKLDIVLoss(eps, reduction=..., log_target=...).

    `forward` takes (rows, V) log-probabilities and (rows, V) probabilities. The gradient is as LigerJSD's.
    """

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        return probabilities.kl_div(y_pred, y_true, self.reduction, self.log_target, self.eps)


class LigerTVDLoss(transformers.LigerTVDLoss):
    """0.5 sum |p - q| of (rows, V) probabilities: Liger's LigerTVDLoss(reduction, ignore_index).

    `"batchmean"`, the default, divides by the number of kept rows, and `"mean"` by that of their classes.
    """

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return probabilities.tvd(p, q, shift_labels, self.reduction, self.ignore_index)


class LigerFusedLinearJSD(transformers.LigerFusedLinearJSD):
    """jsd from hidden states and heads, without T^2: LigerFusedLinearJSD(jsd_beta, ignore_index, temperature, ...).

    Labels say which rows are kept. They are not used as classes. `accum_dtype=None` accumulates in float32.
    """

    def forward(
        self,
        student_input: Tensor,  # (rows, H)
        student_weight: Tensor,  # (V, H)
        teacher_input: Tensor,  # (rows, H')
        teacher_weight: Tensor,  # (V, H')
        shift_labels: Tensor | None = None,  # (rows,)
    ) -> Tensor:
        heads = student_input, student_weight, teacher_input, teacher_weight
        options = self.jsd_beta, self.ignore_index, self.temperature, self.accum_dtype
        return distillation.fused_linear_jsd(*heads, shift_labels, *options)


class LigerFusedLinearKLDivLoss(transformers.LigerFusedLinearKLDivLoss):
    """KL(target, q) from hidden states, a head and the teacher's probabilities, without T^2.

    Reductions are those of LigerTVDLoss, without `"none"`. The temperature is the student's.
    """

    def forward(
        self,
        student_input: Tensor,  # (rows, H)
        student_weight: Tensor,  # (V, H)
        target: Tensor,  # (rows, V)
        shift_labels: Tensor | None = None,  # (rows,)
    ) -> Tensor:
        options = self.reduction, self.ignore_index, self.temperature, self.eps, self.accum_dtype
        return distillation.fused_linear_kl_div(student_input, student_weight, target, shift_labels, *options)


class LigerFusedCETVDLoss(transformers.LigerFusedCETVDLoss):
    """Cross-entropy and total variation distance of each row of logits, (rows,) both: Liger's LigerFusedCETVDLoss."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return distillation.fused_ce_tvd(student_logits, teacher_logits, target, self.ignore_index)


class LigerFusedLinearJSDLoss(chunked_loss.LigerFusedLinearJSDLoss):
    """weight_soft_loss * jsd at the temperature + weight_hard_loss * CE at 1: Liger's chunked loss.

    `compiled` has no effect. A `chunk_size` other than 1024 is kept; kdfast chooses the rows of a chunk otherwise.
    With `return_soft_hard_loss` the two terms are returned too, detached. Classes that the teacher has beyond the
    student's are left out, with a warning; Liger gives the student logits of 0 there.
    """

    def forward(
        self,
        student_input: Tensor,  # (..., H)
        student_weight: Tensor,  # (V, H)
        teacher_input: Tensor,  # (..., H')
        teacher_weight: Tensor,  # (V', H')
        true_labels: Tensor,  # (...)
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V',)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        heads = student_input, student_weight, teacher_input, teacher_weight
        weights = self.weight_hard_loss, self.weight_soft_loss
        options = self.beta, self.ignore_index, self.temperature, self.compiled, self.chunk_size
        biases = student_bias, teacher_bias
        return distillation.chunked_jsd(*heads, true_labels, *biases, *weights, *options, self.return_soft_hard_loss)


class LigerCrossEntropyLoss(transformers.LigerCrossEntropyLoss):
    """Cross-entropy with z-loss, smoothing and softcap: Liger's LigerCrossEntropyLoss, which leaves the logits intact.

    Returns the loss or, where one of the `return_` arguments is set, a CrossEntropyOutput. Weights of classes run
    Liger's own code where there is smoothing, a z-loss or another output.
    """

    def forward(self, _input: Tensor, target: Tensor) -> Any:
        options = self.ignore_index, self.lse_square_scale, self.label_smoothing, self.reduction, self.softcap
        returns = self.return_z_loss, self.return_token_accuracy, self.return_predicted_tokens
        return _output(*cross_entropy.cross_entropy(_input, target, self.weight, *options, *returns), any(returns))


class LigerFusedLinearCrossEntropyLoss(transformers.LigerFusedLinearCrossEntropyLoss):
    """LigerCrossEntropyLoss from hidden states and a head, whose weight comes first.

    `return_predicted_tokens` runs Liger's own code, and so does `use_token_scaling` with another output.
    """

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Any:
        options = self.ignore_index, self.lse_square_scale, self.label_smoothing, self.reduction, self.softcap
        returns = self.return_token_accuracy, self.return_predicted_tokens
        outputs = cross_entropy.fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias,
            self.ce_weight,
            *options,
            self.return_z_loss,
            self.accum_dtype,
            self.use_token_scaling,
            *returns,
        )
        return _output(*outputs, self.return_z_loss or any(returns))


def _output(
    loss: Tensor, z_loss: Tensor | None, accuracy: Tensor | None, predicted: Tensor | None, has_others: bool
) -> Any:
    return CrossEntropyOutput(loss, z_loss, accuracy, predicted) if has_others else loss
