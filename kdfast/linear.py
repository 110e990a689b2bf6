"""linear_kd_loss and LinearKDLoss: kd_loss from hidden states and heads, without materializing the logits."""

from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from kdfast import choice
from kdfast.arguments import KDMetrics, Settings, SparseKDMetrics, as_metrics
from kdfast.linear_autograd import linear_loss
from kdfast.linear_checks import check_chunk_rows, check_head, check_teacher_head, make_heads, product_like
from kdfast.losses import Teacher, kd_loss
from kdfast.modules import KDLoss, LossModule
from kdfast.options import CallOptions, Options, check_inputs, check_names, check_settings
from kdfast.tensor_checks import is_dtensor

_DEFAULTS = dict(kd_loss.__kwdefaults__ or {})
del _DEFAULTS["dim"]  # the logits are the heads'


@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Teacher,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_rows: int | None = None,
    accumulate_dtype: torch.dtype = torch.float32,
    reduce_hidden: bool = True,
    return_metrics: Literal[False] = False,
    **options: Unpack[CallOptions],
) -> Tensor: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Teacher,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_rows: int | None = None,
    accumulate_dtype: torch.dtype = torch.float32,
    reduce_hidden: bool = True,
    return_metrics: Literal[True],
    **options: Unpack[CallOptions],
) -> tuple[Tensor, KDMetrics | SparseKDMetrics]: ...
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Teacher,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_rows: int | None = None,
    accumulate_dtype: torch.dtype = torch.float32,
    reduce_hidden: bool = True,
    return_metrics: bool = False,
    **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, KDMetrics | SparseKDMetrics]:
    r"""`kd_loss` of `student_hidden @ student_weight.T` without tensors of (rows, V).

    The logits of a few rows at a time are computed and overwritten with their gradient, so memory grows with rows * H
    and with chunk_rows * V. Each matrix product runs once: two for logits and two for gradients, one less without a
    teacher's head, and one less each for frozen hidden states and for a frozen weight.

    Args:
        student_hidden: (..., H), float32, bfloat16, float16 or float64: the head's input.
        student_weight: (V, H) of the same dtype, as in nn.Linear. A tensor that does not require grad gets no gradient
            and no memory for one. A weight that is tied to an embedding accumulates both gradients.
        teacher_hidden: (..., H'), the teacher's, which never gets a gradient; with `teacher_weight=None` a teacher as
            `kd_loss` takes it: (..., V) logits, probabilities or log-probabilities, an ensemble of them, or
            `TopKTargets`. May be None where `alpha` is 0.
        teacher_weight: (V', H') of the dtype of teacher_hidden. V' may differ from V where `vocab_size` is given;
            classes beyond it are skipped.
        labels: (...) int64 class indices, already shifted. Ignored rows and rows of weight 0 are skipped in the matrix
            products; on a GPU they are zeroed instead, to avoid a sync.
        student_bias, teacher_bias: (V,), (V',), of their weights' dtypes.
        chunk_rows: the most rows of a chunk. None: on a CPU 512, or fewer where their logits would take more than
            134 MB, but at least 256; on a GPU 1024 to 4096. The logits of a chunk take 4 * chunk_rows * V bytes, those
            of the teacher's head as much again.
        accumulate_dtype: the dtype in which the weight's gradient is summed over chunks, where it is wider than the
            weight's. The sum is rounded to the weight's dtype once, at the end. bfloat16 avoids the wider tensor for a
            bfloat16 weight. float16 gradients stay float32 until backward applies a loss scaler's factor.
        reduce_hidden: with a `process_group`, sum up the gradient of student_hidden over it. False leaves each
            process its own part, for a layer before that sums it, as the input of Megatron's ColumnParallelLinear does.
            With a group each process has some rows of the weights (or DTensors, Shard(0) on the group's mesh
            dimension), and hidden states are the same in all of them. See docs/parallel.md.
        return_metrics: as in `kd_loss`.
        **options: every other keyword of `kd_loss`, with the same meaning, but `inplace` and `dim`.

    A sparse teacher with `missing="conditional"`, without a hard term and z-loss, needs the head's rows of its
    entries alone: K products of length H a row, no chunks, and no memory of size V but the weight's gradient.

    Logits are float32 (float64 for float64 heads) and are not rounded before the softmax, on any device. Autocast casts
    hidden states, weights and biases as it does for F.linear. Errors call the heads' products `student_logits` and
    `teacher`.

    Returns:
        As kd_loss. A scalar loss computes its gradients in forward, and backward at most scales them. Reduction
        `"none"` computes the logits again in backward. Differentiable once, as kd_loss, but forward-mode AD does
        not support reduction `"none"`.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as kd_loss, before any matrix product.

    Examples:
        >>> hidden, head = torch.randn(6, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
        >>> teacher_hidden, teacher_head = torch.randn(6, 32), torch.randn(100, 32)
        >>> labels = torch.randint(100, (6,))
        >>> loss = linear_kd_loss(hidden, head, teacher_hidden, teacher_head, labels, temperature=2.0, alpha=0.7)
        >>> loss.backward()
        >>> head.grad.shape
        torch.Size([100, 16])
    """
    check_names("linear_kd_loss", options, _DEFAULTS)
    own = {"chunk_rows": chunk_rows, "accumulate_dtype": accumulate_dtype, "reduce_hidden": reduce_hidden}
    given = {**_DEFAULTS, **options, **own, "return_metrics": return_metrics}
    settings = check_settings(given, labels is not None)
    student = student_hidden, student_weight, student_bias
    teacher = teacher_hidden, teacher_weight, teacher_bias
    return _checked_loss(student, teacher, labels, given, settings)


def _checked_loss(
    student_head: tuple[Any, Any, Any],
    teacher_head: tuple[Any, Any, Any],
    labels: Tensor | None,
    options: dict[str, Any],
    settings: Settings,
) -> Any:
    """linear_kd_loss with the settings that check_settings made of the options."""
    if is_dtensor(student_head[0]) or is_dtensor(student_head[1]):
        from kdfast.dtensors import local_heads

        student_head, teacher_head, labels, options = local_heads(student_head, teacher_head, labels, options)
    if options["process_group"] is not None or options["vocab_start"] is not None:
        from kdfast.sharded_linear import sharded_linear_loss

        return sharded_linear_loss(student_head, teacher_head, labels, options, settings)
    student = check_head("student_", *student_head)
    teacher, like = check_teacher_head(teacher_head, settings)
    logits = product_like(*student[:2])
    inputs, settings = check_inputs(logits, like, labels, options, settings)
    vocab = logits.shape[-1] if settings.vocab_size < 0 else settings.vocab_size
    chunk_rows = check_chunk_rows(options["chunk_rows"], vocab, logits.device.type)
    heads, inputs = make_heads(student, teacher, chunk_rows, inputs, settings, options)
    loss, metrics = linear_loss(heads, inputs, settings, choice.namespace(options["backend"], logits))
    return (loss, as_metrics(metrics)) if settings.metrics else loss


class LinearKDLoss(LossModule):
    """`linear_kd_loss` as a module. It takes and checks the options once; `forward` takes the tensors.

    Takes every keyword of `linear_kd_loss` except biases, `row_weight` and `normalizer`, which `forward`
    takes. It has no parameters: the heads stay in student and teacher.

    Examples:
        >>> hidden, head, teacher_hidden, teacher_head = torch.randn(4, 100, 16).unbind()
        >>> loss = LinearKDLoss(temperature=2.0, chunk_rows=64)
        >>> loss(hidden, head, teacher_hidden, teacher_head, torch.randint(100, (100,))).shape
        torch.Size([])
    """

    defaults: ClassVar[dict[str, Any]] = KDLoss.defaults | {"chunk_rows": None, "accumulate_dtype": torch.float32}
    defaults["reduce_hidden"] = True
    del defaults["dim"]

    def __init__(
        self,
        *,
        chunk_rows: int | None = None,
        accumulate_dtype: torch.dtype = torch.float32,
        reduce_hidden: bool = True,
        return_metrics: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {"chunk_rows": chunk_rows, "accumulate_dtype": accumulate_dtype, "reduce_hidden": reduce_hidden}
        super().__init__(own | {"return_metrics": return_metrics} | options)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Teacher,
        teacher_weight: Tensor | None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        """The loss of a batch, and with `return_metrics` its metrics: `linear_kd_loss` of these tensors."""
        student = student_hidden, student_weight, student_bias
        teacher = teacher_hidden, teacher_weight, teacher_bias
        options, settings = self.checked(labels is not None)
        options = options | {"row_weight": row_weight, "normalizer": normalizer}
        return _checked_loss(student, teacher, labels, options, settings)
