"""Checks of the arguments that linear_kd_loss has beyond kd_loss's."""

from typing import Any

import torch
from torch import Tensor

from kdfast import checks, chunks, tensor_checks

# full_tensor() would give each process the gradient of its own rows alone.
_PARTS_OF_A_HEAD = (
    "call the loss inside the forward of the module that fully_shard was applied to, where its parameters are whole, "
    "or between unshard() and reshard() of that module"
)


def check_head(prefix: str, hidden: Any, weight: Any, bias: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias, cast as autocast casts F.linear's; prefix: of their names."""
    tensors = {f"{prefix}hidden": hidden, f"{prefix}weight": weight}
    tensors |= {} if bias is None else {f"{prefix}bias": bias}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: must be a tensor, not {tensor_checks.kind(tensor)}")
        tensor_checks.check_floating(name, tensor)
        tensor_checks.check_dense(name, tensor, parts=_PARTS_OF_A_HEAD)
        if tensor.device != hidden.device:
            raise RuntimeError(f"{name}: is on {tensor.device}, but {prefix}hidden is on {hidden.device}")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{prefix}hidden: has shape {tuple(hidden.shape)}, but it must be (..., H) with H >= 1")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
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
