"""The operators on the CUDA kernels, which know nothing but rows; reference.py says what each computes."""

from typing import Any

import torch
from torch import Tensor

from kdfast import gpu_choice
from kdfast.arguments import Inputs, Settings
from kdfast.rows import divisor, mean_metrics, no_metrics, reduce_losses, row_weights

_kernels = torch.ops.kdfast_cuda_rows


class _Rows:
    """A call as the kernels take it: the weight of each row, and what the losses are divided by."""

    def __init__(self, student: Tensor, inputs: Inputs, settings: Settings) -> None:
        gpu_choice.check_cuda(student, inputs.teachers, settings)
        self.settings, self.weights = settings, row_weights(inputs, settings)
        number, tensor = divisor(student, self.weights, inputs, settings)
        inputs = inputs._replace(row_weight=self.weights, normalizer=tensor)
        self.arguments: tuple[Any, ...] = (*inputs, *settings._replace(divisor=number))

    def metrics(self, metrics: Tensor) -> Tensor:
        return mean_metrics(metrics, self.weights, self.settings) if self.settings.metrics else no_metrics(metrics)


def loss_grad(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    return loss_grad_as(student, student.dtype, inputs, settings)


def loss_grad_(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    rows = _Rows(student, inputs, settings)
    losses, metrics = _kernels.loss_grad_(student, *rows.arguments)
    return reduce_losses(losses, settings), rows.metrics(metrics)


def loss_grad_as(
    student: Tensor, dtype: torch.dtype, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _Rows(student, inputs, settings)
    losses, grad, metrics = _kernels.loss_grad_as(student, dtype, *rows.arguments)
    return reduce_losses(losses, settings), grad, rows.metrics(metrics)


def stats(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    rows = _Rows(student, inputs, settings)
    losses, table, metrics = _kernels.stats(student, *rows.arguments)
    return reduce_losses(losses, settings), table, rows.metrics(metrics)


def grad(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    return grad_as(student, student.dtype, stats, grad_loss, inputs, settings)


def grad_(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> None:
    _kernels.grad_(student, stats, grad_loss, *_Rows(student, inputs, settings).arguments)


def grad_as(
    student: Tensor, dtype: torch.dtype, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings
) -> Tensor:
    return _kernels.grad_as(student, dtype, stats, grad_loss, *_Rows(student, inputs, settings).arguments)


def scale_(grad: Tensor, factor: Tensor) -> None:
    _kernels.scale_(grad, factor)
