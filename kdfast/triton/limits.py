"""Calls of more teachers or entries than the kernels take: by one teacher made of all, or by the reference."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast.row_math import MOST_TEACHERS
from kdfast.triton.many_teachers import as_one

MOST_ENTRIES = 2047  # which are, with the rest, in one program's registers


def take_any_number_of_teachers(operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator whose kernels take MOST_TEACHERS, for any number of them.

    Teachers that are each standardized by itself are no one teacher that would be: these calls go to the reference.
    """

    @functools.wraps(operator)
    def call(student: Tensor, *args: Any) -> Any:
        *tables, inputs, settings = args
        if len(inputs.teachers) <= MOST_TEACHERS:
            return operator(student, *args)
        if settings.standardize:
            return _reference(operator)(student, *tables, *inputs, *settings)
        return operator(student, *tables, *as_one(student, inputs, settings))

    return call


def take_any_number_of_entries(operator: Callable[..., Any]) -> Callable[..., Any]:
    """An operator whose kernels take MOST_ENTRIES, for any number of them."""

    @functools.wraps(operator)
    def call(student: Tensor, *args: Any) -> Any:
        *tables, inputs, settings = args
        if inputs.indices is not None and inputs.indices.shape[-1] > MOST_ENTRIES:
            return _reference(operator)(student, *tables, *inputs, *settings)
        return operator(student, *args)

    return call


def _reference(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The reference's operator of the same name."""
    return getattr(torch.ops.kdfast_reference, operator.__name__)
