"""What the operators of a loss take beside the student's logits; their schemas are made from these."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """What the operators of linear_ops.py take in place of the student's logits, in their order."""

    student_hidden: Tensor  # (..., H)
    student_weight: Tensor  # (V, H), of the same dtype, as is the bias
    student_bias: Tensor | None  # (V,)
    teacher_hidden: Tensor | None  # (..., H'); None: the teachers are given as kd_loss takes them, or not read
    teacher_weight: Tensor | None  # (V', H')
    teacher_bias: Tensor | None  # (V',)
    chunk_rows: int  # at most so many rows at a time
    accumulate_dtype: torch.dtype  # of the weight's gradient until all chunks are in it
    grad_hidden: bool  # which gradients are wanted
    grad_weight: bool
    grad_bias: bool


class Inputs(NamedTuple):
    """The tensors of a loss beside the student's logits, (..., V), in the order in which the operators take them."""

    teachers: list[Tensor]  # each (..., V), each of its own V and dtype
    labels: Tensor | None  # (...)
    row_weight: Tensor | None  # (...)
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
    label_smoothing: float
    z_loss: float
    logit_scale: float  # the student's
    teacher_logit_scale: float
    softcap: float  # 0: none
    teacher_softcap: float
    standardize: bool
    dkd_weights: list[float]  # of the target's divergence and of that of the other classes
    metrics: bool  # whether they are wanted; else the operators' third result is empty

    @property
    def reads_teacher(self) -> bool:
        return self.alpha != 0 or self.metrics


# In place of a label that another shard of the vocabulary has.
ELSEWHERE = -(2**63)


def relevant(inputs: Inputs, settings: Settings) -> tuple[Inputs, Settings]:
    """Without what neither the loss nor the metrics look at, so that no backend has to ask what has a weight."""
    if not settings.reads_teacher:
        inputs = inputs._replace(teachers=[], temperatures=None, teacher_temperatures=None)
        settings = settings._replace(
            temperature=1.0, teacher_temperature=1.0, teacher_weights=[], teacher_logit_scale=1.0, teacher_softcap=0.0,
            standardize=False,
        )
    if settings.label_smoothing and not (settings.hard_weight or settings.metrics):
        settings = settings._replace(label_smoothing=0.0)
    return inputs, settings


def measured_apart(
    ops: Any, student: Tensor, inputs: Inputs, settings: Settings
) -> tuple[Inputs, Settings, Tensor | None]:
    """Metrics of what has no weight in the loss are made by themselves: what spoils them must not spoil the loss.

    Returns what is left to do, and these metrics; None where the loss's own pass makes them.
    """
    if not settings.metrics:
        return inputs, settings, None
    of_soft = inputs.teachers or settings.standardize or inputs.temperatures is not None or settings.temperature != 1
    if not ((settings.alpha == 0 and of_soft) or (settings.hard_weight == 0 and settings.label_smoothing != 0)):
        return inputs, settings, None
    metrics = ops.stats(student.detach(), *inputs, *settings)[2]
    return *relevant(inputs, settings._replace(metrics=False)), metrics


class KDMetrics(NamedTuple):
    """What `return_metrics` adds, detached: means over the rows kept, with the loss's weights; or (...), unweighted.

    NaN where there is nothing to measure: no labels, no teacher, no row.
    """

    soft: Tensor  # the soft term without alpha: T^2 * D, or D where t_squared is False
    hard: Tensor  # the labels' cross-entropy, smoothed as the loss's, without its weight
    kl: Tensor  # KL(p, q) at T, in nats, without T^2
    student_entropy: Tensor  # of q, at T, in nats
    teacher_entropy: Tensor
    agreement: Tensor  # the share of rows whose largest logits, the first of equals, are student's and teacher's alike
    accuracy: Tensor  # the share of rows whose student's largest logit is the label's
