"""linear_kd_loss and LinearKDLoss: kd_loss from hidden states and heads, whose logits never exist all at once."""

from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from kdfast import checks, choice, chunks
from kdfast.arguments import Heads, KDMetrics, Settings
from kdfast.autograd import linear_loss
from kdfast.losses import KDLoss, LossModule, Teacher, kd_loss
from kdfast.options import CallOptions, Options, check_inputs, check_names, check_settings

_DEFAULTS = dict(kd_loss.__kwdefaults__ or {})


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
    return_metrics: Literal[True],
    **options: Unpack[CallOptions],
) -> tuple[Tensor, KDMetrics]: ...
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
    return_metrics: bool = False,
    **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, KDMetrics]:
    r""":func:`kd_loss` of ``student_hidden @ student_weight.T`` without tensors of (rows, V).

    Logits are made for a few rows at a time and become their gradient in place, so that memory grows with rows * H and
    with chunk_rows * V. Each product is done once: two forward and two backward, one less without a teacher's head, and
    one less each for frozen hidden states or a frozen weight.

    Args:
        student_hidden: (..., H), float32, bfloat16, float16 or float64: what the head would be applied to.
        student_weight: (V, H) of the same dtype, as nn.Linear holds it. What does not require grad gets no gradient,
            nor memory for one. A weight that is tied to an embedding gets the sum of both gradients.
        teacher_hidden: (..., H'), the teacher's, which never gets a gradient; with ``teacher_weight=None`` a teacher as
            :func:`kd_loss` takes it: (..., V) logits, probabilities or log-probabilities, or an ensemble of them. May
            be None where ``alpha`` is 0.
        teacher_weight: (V', H') of the dtype of teacher_hidden. V' may differ from V where ``vocab_size`` is given;
            classes beyond that are not multiplied.
        labels: (...) int64 class indices, already shifted. Ignored rows, and rows of weight 0, take part in no product;
            on a GPU, where nobody waits to see how many they are, as zeros.
        student_bias, teacher_bias: (V,), (V',), of their weights' dtypes.
        chunk_rows: how many rows at a time. None: on a CPU 512, or as many as make 201 MB of logits if that is less,
            but 256 at least; on a GPU 1024 to 4096. The logits of a chunk take 4 * chunk_rows * V bytes, the teacher's
            head's as much again.
        accumulate_dtype: what the weight's gradient is added up in, chunk by chunk, where that is wider than the
            weight; it is rounded to the weight's dtype once, at the end. bfloat16 saves a bfloat16 weight the wider
            tensor. float16's gradients are never narrower than float32 until backward has a loss scaler's factor.
        **options: every other keyword of :func:`kd_loss`, with the same meaning, but ``inplace``.

    Logits are float32 (float64 of float64 heads) and are rounded nowhere before the softmax, whatever the device. Under
    autocast hidden states, weights and biases are cast as F.linear casts them. In messages ``student_logits`` and
    ``teacher`` are the heads' products.

    Returns:
        As kd_loss. A scalar loss computes its gradients in forward, and backward at most scales them; ``"none"``
        computes the logits once more in backward. Not twice differentiable.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as kd_loss, before any product.
    """
    check_names("linear_kd_loss", options, _DEFAULTS)
    own = {"chunk_rows": chunk_rows, "accumulate_dtype": accumulate_dtype, "return_metrics": return_metrics}
    given = {**_DEFAULTS, **options, **own}
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
    student = _check_head("student", *student_head)
    teacher_hidden, teacher_weight, teacher_bias = teacher_head
    like = teacher_hidden
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    has_head = teacher_weight is not None and not (teacher_hidden is None and options["alpha"] == 0)
    if has_head:
        if settings.target != "logits":
            raise ValueError(f"target: {settings.target!r} with a teacher_weight, whose product gives 'logits'")
        hidden, weight, bias = _check_head("teacher", *teacher_head)
        teacher = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        like = _product_like(hidden, weight)
    elif teacher_bias is not None and teacher_weight is None:
        raise ValueError("teacher_bias: given without teacher_weight")
    logits = _product_like(*student[:2])
    if options["inplace"]:
        raise ValueError("inplace: leave it out; a chunk's logits are always overwritten, and there are no others")
    inputs, settings = check_inputs(logits, like, labels, options, settings)
    if has_head:
        teacher = teacher if settings.reads_teacher else (None, None, None)
        inputs = inputs._replace(teachers=[])
    vocab = logits.shape[-1] if settings.vocab_size < 0 else settings.vocab_size
    heads = Heads(
        *student,
        *teacher,
        chunk_rows=_check_chunk_rows(options["chunk_rows"], vocab, logits.device.type),
        accumulate_dtype=_check_accumulate_dtype(options["accumulate_dtype"]),
        grad_hidden=_wants_grad(student[0]),
        grad_weight=_wants_grad(student[1]),
        grad_bias=_wants_grad(student[2]),
    )
    loss, metrics = linear_loss(heads, inputs, settings, choice.namespace(options["backend"], logits))
    return (loss, KDMetrics(*metrics.unbind())) if settings.metrics else loss


class LinearKDLoss(LossModule):
    """:func:`linear_kd_loss` as a module: its options are given and checked once, here; ``forward`` takes the tensors.

    Takes every keyword of :func:`linear_kd_loss` but biases, ``row_weight`` and ``normalizer``, which belong to a call.
    Has no parameters: the heads stay where they are, in student and teacher.
    """

    defaults: ClassVar[dict[str, Any]] = KDLoss.defaults | {"chunk_rows": None, "accumulate_dtype": torch.float32}

    def __init__(
        self,
        *,
        chunk_rows: int | None = None,
        accumulate_dtype: torch.dtype = torch.float32,
        return_metrics: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {"chunk_rows": chunk_rows, "accumulate_dtype": accumulate_dtype, "return_metrics": return_metrics}
        super().__init__(own | options)

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
    ) -> Any:  # as linear_kd_loss
        student = student_hidden, student_weight, student_bias
        teacher = teacher_hidden, teacher_weight, teacher_bias
        options = self.options() | {"row_weight": row_weight, "normalizer": normalizer}
        settings = self.checked_settings(labels is not None)
        return _checked_loss(student, teacher, labels, options, settings)


def _check_head(side: str, hidden: Any, weight: Any, bias: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """One side's tensors, which autocast may have cast."""
    tensors = {f"{side}_hidden": hidden, f"{side}_weight": weight}
    tensors |= {} if bias is None else {f"{side}_bias": bias}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: must be a tensor, not {checks.kind(tensor)}")
        checks.check_floating(name, tensor)
        if _is_distributed(tensor):
            raise TypeError(
                f"{name}: is a DTensor, a part of it on each process; call the loss inside of the forward of the "
                "module that was given to fully_shard, where its parameters are whole, or pass full_tensor()"
            )
        if tensor.device != hidden.device:
            raise RuntimeError(f"{name}: is on {tensor.device}, but {side}_hidden is on {hidden.device}")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{side}_hidden: has shape {tuple(hidden.shape)}, but it must be (..., H) with H >= 1")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}_weight: has shape {tuple(weight.shape)}, but with {side}_hidden of shape {tuple(hidden.shape)} it "
            f"must be (V, {hidden.shape[-1]}) with V >= 1"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{side}_bias: has shape {tuple(bias.shape)}, but with {side}_weight of shape {tuple(weight.shape)} it "
            f"must be ({weight.shape[0]},)"
        )
    device = hidden.device.type
    if (
        torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
        and torch.float64 not in (x.dtype for x in tensors.values())
    ):
        tensors = {name: x.to(torch.get_autocast_dtype(device)) for name, x in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype != tensors[f"{side}_hidden"].dtype:
            raise RuntimeError(f"{name}: has dtype {tensor.dtype}, but {side}_hidden has {hidden.dtype}")
    return tensors[f"{side}_hidden"], tensors[f"{side}_weight"], tensors.get(f"{side}_bias")


def _is_distributed(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, torch.nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _product_like(hidden: Tensor, weight: Tensor) -> Tensor:
    """What has the shape, dtype and device of hidden @ weight.T, and one number."""
    return hidden.new_empty(()).expand(*hidden.shape[:-1], weight.shape[0])


def _wants_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _check_chunk_rows(chunk_rows: Any, vocab: int, device: str) -> int:
    if chunk_rows is None:
        return chunks.default_rows(vocab, device)
    number = checks.as_integer("chunk_rows", chunk_rows)
    if number < 1:
        raise ValueError(f"chunk_rows: {chunk_rows!r} must be at least 1")
    return min(number, 2**62)  # what a schema's integers hold


def _check_accumulate_dtype(dtype: Any) -> torch.dtype:
    if dtype not in checks.FLOATS:
        raise ValueError(f"accumulate_dtype: {dtype!r} is not one of {', '.join(map(str, checks.FLOATS))}")
    return dtype
