"""What the operators of a loss take beside the student's logits; their schemas are made from these two."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The tensors of a loss beside the student's logits, (..., V), in the order in which the operators take them."""

    teachers: list[Tensor]  # each (..., V), each of its own V and dtype
    labels: Tensor | None  # (...)
    weight: Tensor | None  # (...)
    normalizer: Tensor | None  # 0-dim
    temperatures: Tensor | None  # (...)
    teacher_temperatures: Tensor | None  # (...)


class Settings(NamedTuple):
    """The arguments of a loss that are not tensors, in the order in which the operators take them."""

    temperature: float  # the student's, where `temperatures` does not give one per row
    teacher_temperature: float
    alpha: float
    hard_weight: float
    t_squared: bool
    divergence: str
    beta: float  # the divergence's, inside (0, 1]; 0 where it has none
    target: str
    ensemble: str
    teacher_weights: list[float]  # one per teacher, their sum is 1
    vocab_size: int  # -1: all classes
    ignore_index: int
    reduction: str
    divisor: float  # the normalizer where it is a number; 0: none given
