"""Checks of the arguments that linear_kd_loss has beyond kd_loss's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdfast import checks, chunks, tensor_checks
from kdfast.arguments import Heads, Inputs, Settings

# full_tensor() would give each process the gradient of its own rows alone.
PARTS_OF_A_HEAD = (
    "call the loss inside the forward of the module that fully_shard was applied to, where its parameters are whole, "
    "or between unshard() and reshard() of that module"
)


def check_head(
    prefix: str, hidden: Any, weight: Any, bias: Any, least: int = 1
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias, cast as autocast casts F.linear's; prefix: of their names, least: of classes."""
    tensors = {f"{prefix}hidden": hidden, f"{prefix}weight": weight}
    tensors |= {} if bias is None else {f"{prefix}bias": bias}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: must be a tensor, not {tensor_checks.kind(tensor)}")
        tensor_checks.check_floating(name, tensor)
        tensor_checks.check_dense(name, tensor, parts=PARTS_OF_A_HEAD)
        if tensor.device != hidden.device:
            raise RuntimeError(f"{name}: is on {tensor.device}, but {prefix}hidden is on {hidden.device}")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{prefix}hidden: has shape {tuple(hidden.shape)}, but it must be (..., H) with H >= 1")
    if weight.dim() != 2 or weight.shape[0] < least or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight: has shape {tuple(weight.shape)}, but with {prefix}hidden of shape {tuple(hidden.shape)} "
            f"it must be (V, {hidden.shape[-1]}) with V >= 1"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias: has shape {tuple(bias.shape)}, but with {prefix}weight of shape {tuple(weight.shape)} it "
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
        if tensor.dtype != tensors[f"{prefix}hidden"].dtype:
            raise RuntimeError(f"{name}: has dtype {tensor.dtype}, but {prefix}hidden has {hidden.dtype}")
    return tensors[f"{prefix}hidden"], tensors[f"{prefix}weight"], tensors.get(f"{prefix}bias")


Side = tuple[Tensor | None, Tensor | None, Tensor | None]  # hidden states, weight, bias


def check_teacher_head(head: tuple[Any, Any, Any], settings: Settings, least: int = 1) -> tuple[Side, Any]:
    """The teacher's head, (None, None, None) where it has none, and its logits' likeness, or what is given for them."""
    hidden, weight, bias = head
    if weight is None or (hidden is None and settings.alpha == 0):
        if bias is not None and weight is None:
            raise ValueError("teacher_bias: given without teacher_weight")
        return (None, None, None), hidden
    if settings.target != "logits":
        raise ValueError(f"target: {settings.target!r} with a teacher_weight, whose product gives 'logits'")
    hidden, weight, bias = check_head("teacher_", *head, least)
    side = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return side, product_like(hidden, weight)


def make_heads(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: Side,
    chunk_rows: int,
    inputs: Inputs,
    settings: Settings,
    options: Mapping[str, Any],
) -> tuple[Heads, Inputs]:
    """The operators' arguments, of which a teacher with a head has no logits."""
    if options["inplace"]:
        raise ValueError("inplace: must be False; linear_kd_loss always overwrites the logits of a chunk")
    if teacher[1] is not None:
        teacher = teacher if settings.reads_teacher else (None, None, None)
        inputs = inputs._replace(teachers=[])
    checks.check_bool("reduce_hidden", options["reduce_hidden"])
    heads = Heads(
        *student,
        *teacher,
        chunk_rows=chunk_rows,
        accumulate_dtype=check_accumulate_dtype(options["accumulate_dtype"]),
        grad_hidden=_wants_grad(student[0]),
        grad_weight=_wants_grad(student[1]),
        grad_bias=_wants_grad(student[2]),
    )
    return heads, inputs


def _wants_grad(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def product_like(hidden: Tensor, weight: Tensor) -> Tensor:
    """A tensor with the shape, dtype and device of hidden @ weight.T, but memory for one number."""
    return hidden.new_empty(()).expand(*hidden.shape[:-1], weight.shape[0])


def check_chunk_rows(chunk_rows: Any, vocab: int, device: str) -> int:
    if chunk_rows is None:
        return chunks.default_rows(vocab, device)
    number = checks.as_integer("chunk_rows", chunk_rows)
    if number < 1:
        raise ValueError(f"chunk_rows: {chunk_rows!r} must be at least 1")
    return min(number, 2**62)  # an operator's integers have 64 bits


def check_accumulate_dtype(dtype: Any) -> torch.dtype:
    if dtype not in tensor_checks.FLOATS:
        raise ValueError(f"accumulate_dtype: {dtype!r} is not one of {', '.join(map(str, tensor_checks.FLOATS))}")
    return dtype
