"""Tensors and numbers as the kernels take them."""

import contextlib
import struct
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def arithmetic_dtype(student: Tensor) -> Any:
    return tl.float64 if student.dtype == torch.float64 else tl.float32


def row_count(tensor: Tensor) -> int:
    return tensor.shape[:-1].numel()


@lru_cache(1024)
def layout(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, int, int] | None:
    """(inner, outer_stride, stride) of the rows of a (..., V) tensor; None where they do not lie so."""
    if shape[-1] > 1 and strides[-1] != 1:
        return None
    dims: list[tuple[int, int]] = []  # (size, stride), innermost first, dimensions that lie as one merged
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return None
    inner, stride = dims[0] if dims else (1 << 29, 0)
    return inner, dims[1][1] if len(dims) == 2 else 0, stride


def make_readable(tensor: Tensor) -> Tensor:
    readable = tensor.is_contiguous() or layout(tensor.shape, tensor.stride()) is not None
    return tensor if readable else tensor.contiguous()


def matrix(tensor: Tensor) -> tuple[Tensor, int, int, int]:
    """(data, inner, outer_stride, stride), the numbers as 2 x + 3, which tiles.row_start takes back.

    Triton compiles once more for a 1 and for a multiple of 16, and in a tuple it cannot be told not to.
    """
    found = layout(tensor.shape, tensor.stride())
    assert found is not None
    inner, outer, stride = found
    return tensor, 2 * inner + 3, 2 * outer + 3, 2 * stride + 3


def alignments(student: Tensor, others: list[Tensor], vec: int) -> tuple[bool, ...]:
    """Which of them, all of the student's leading dimensions, have the vectors of all their rows where it has them."""

    def vector_offsets(tensor: Tensor) -> list[int]:
        rows = zip(tensor.shape[:-1], tensor.stride(), strict=False)
        strides = [stride % vec for size, stride in rows if size > 1]
        return [tensor.data_ptr() // tensor.element_size() % vec, *strides]

    return tuple(vector_offsets(student) == vector_offsets(other) for other in others)


def flatten_rows(values: Tensor) -> Tensor:
    return values.reshape(-1).contiguous()


@lru_cache(256)
def bits(number: float) -> int:
    """A number >= 0 as the kernels take it, in an odd 64-bit integer: a double's bits, of which the sign is left out.

    Triton would hand a float over as fp32. A 0 is never used as such, and would be a 1 here (see `matrix`).
    """
    (raw,) = struct.unpack("Q", struct.pack("d", number or 1e-300))
    (signed,) = struct.unpack("q", struct.pack("Q", (raw << 1 | 1) & (1 << 64) - 1))
    return signed
