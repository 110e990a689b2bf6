"""The arguments of a loss's operators next to the student's logits, from which their schemas are made."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Heads(NamedTuple):
    """The arguments of linear_ops.py's operators in place of the student's logits, in the operators' order."""

    student_hidden: Tensor  # (..., H)
    student_weight: Tensor  # (V, H), of the same dtype, as is the bias
    student_bias: Tensor | None  # (V,)
    teacher_hidden: Tensor | None  # (..., H'); None: kd_loss's kinds of teacher, or none is read
    teacher_weight: Tensor | None  # (V', H')
    teacher_bias: Tensor | None  # (V',)
    chunk_rows: int  # the most rows of a chunk
    accumulate_dtype: torch.dtype  # of the weight's gradient while chunks are added to it
    grad_hidden: bool  # which gradients are wanted
    grad_weight: bool
    grad_bias: bool


class Inputs(NamedTuple):
    """The tensors of a loss next to the student's logits, (..., V), in the operators' order."""

    teachers: list[Tensor]  # each (..., V), each of its own V and dtype; a sparse one: log-probabilities (..., K)
    labels: Tensor | None  # (...)
    row_weight: Tensor | None  # (...)
    normalizer: Tensor | None  # 0-dim
    temperatures: Tensor | None  # (...)
    teacher_temperatures: Tensor | None  # (...)
    indices: Tensor | None = None  # (..., K) int32 or int64: the classes of a sparse teacher's log-probabilities
    dynamic_numbers: Tensor | None = None  # (n,), on the CPU: for settings that are NaN; see hide_dynamic


class Settings(NamedTuple):
    """The arguments of a loss that are not tensors, in the operators' order."""

    temperature: float  # the student's, where `temperatures` does not give one per row
    teacher_temperature: float
    alpha: float
    hard_weight: float
    t_squared: bool
    divergence: str
    beta: float  # the divergence's, inside (0, 1]; 0 where it has none
    target: str
    missing: str  # what a sparse teacher's other classes have; "": the teacher is not sparse
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
    dkd_weights: list[float]  # of label against rest, and of the classes of the rest
    metrics: bool  # False: the operators' third result is empty

    @property
    def reads_teacher(self) -> bool:
        return self.alpha != 0 or self.metrics


# Settings of what has no loss: no term, no teacher, no metrics.
NO_LOSS = Settings(*(kind() for kind in Settings.__annotations__.values()))._replace(reduction="none", vocab_size=-1)

# In place of a label that is in another shard of the vocabulary.
OTHER_SHARD = -(2**63)

# In place of a row's first id where its token is ignored: the operators do not read that row.
IGNORED = -(2**63)

# The columns of token_stats' table, with Q = exp((z - offset) / T): the offset, the sum of Q over the ids' classes,
# log2 of the others' sum, the entropy, and log2 of the sum over ids that other processes have.
TOKEN_STATS = 5


def drop_unused(inputs: Inputs, settings: Settings) -> tuple[Inputs, Settings]:
    """Clears what neither the loss nor the metrics read, so that no backend has to ask which terms have a weight."""
    if not settings.reads_teacher:
        inputs = inputs._replace(teachers=[], temperatures=None, teacher_temperatures=None, indices=None)
        settings = settings._replace(
            temperature=1.0, teacher_temperature=1.0, missing="", teacher_weights=[], teacher_logit_scale=1.0,
            teacher_softcap=0.0, standardize=False,
        )  # fmt: skip
    if settings.label_smoothing and not (settings.hard_weight or settings.metrics):
        settings = settings._replace(label_smoothing=0.0)
    return inputs, settings


_NUMBERS = [name for name, kind in Settings.__annotations__.items() if kind is float]


def hide_dynamic(inputs: Inputs, settings: Settings) -> tuple[Inputs, Settings]:
    """Under torch.compile: moves the floats that change between calls from the settings into a tensor.

    An operator's argument that is a float is a constant of the graph, so each new value of it would compile again.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value

    names = [name for name in _NUMBERS if not has_static_value(getattr(settings, name))]
    if not names:
        return inputs, settings
    one = torch.ones((), dtype=torch.float64, device="cpu")
    numbers = torch.stack([one * getattr(settings, name) for name in names])
    hidden: dict[str, Any] = dict.fromkeys(names, math.nan)
    return inputs._replace(dynamic_numbers=numbers), settings._replace(**hidden)


def with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of (..., inputs, settings) take the numbers of hide_dynamic; reading them needs no sync."""

    def call(*args: Any) -> Any:
        *first, inputs, settings = args
        if inputs.dynamic_numbers is not None:
            names = [name for name in _NUMBERS if math.isnan(getattr(settings, name))]
            settings = settings._replace(**dict(zip(names, inputs.dynamic_numbers.tolist(), strict=True)))
            inputs = inputs._replace(dynamic_numbers=None)
        return function(*first, inputs, settings)

    return call


def metrics_of_unweighted_terms(
    ops: Any, student: Tensor, inputs: Inputs, settings: Settings
) -> tuple[Inputs, Settings, Tensor | None]:
    """Computes metrics of terms of weight 0 in a pass of their own, so that their NaN or inf cannot reach the loss.

    Returns the arguments of the loss's pass, and these metrics; None where the loss's pass computes them.
    """
    if not settings.metrics:
        return inputs, settings, None
    if settings.missing and not getattr(ops, "is_sharded", False):
        from kdfast.sparse_metrics import reduced_metrics

        return *drop_unused(inputs, settings._replace(metrics=False)), reduced_metrics(ops, student, inputs, settings)
    is_soft = inputs.teachers or settings.standardize or inputs.temperatures is not None or settings.temperature != 1
    if not ((settings.alpha == 0 and is_soft) or (settings.hard_weight == 0 and settings.label_smoothing != 0)):
        return inputs, settings, None
    metrics = ops.stats(student.detach(), *inputs, *settings)[2]
    return *drop_unused(inputs, settings._replace(metrics=False)), metrics


def take_flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function of (..., inputs, settings) one of an operator's flat arguments."""
    tensors, numbers = len(Inputs._fields), len(Settings._fields)

    def call(*args: Any) -> Any:
        *first, inputs, settings = *args[: -tensors - numbers], args[-tensors - numbers : -numbers], args[-numbers:]
        return function(*first, Inputs(*inputs), Settings(*settings))

    return call


def take_flat_heads(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a function of (heads, ..., inputs, settings)."""
    count = len(Heads._fields)
    return take_flat(lambda *args: function(Heads(*args[:count]), *args[count:]))


class KDMetrics(NamedTuple):
    """The detached metrics that `return_metrics` adds: weighted means over the rows kept, or (...), unweighted.

    NaN where there is nothing to measure: no labels, no teacher, no row.

    Attributes:
        soft: the soft term without alpha: T^2 * D, or D where t_squared is False.
        hard: the labels' cross-entropy, smoothed as the loss's, without its weight.
        kl: KL(p, q) at T, in nats, without T^2.
        student_entropy: of q, at T, in nats.
        teacher_entropy: of p.
        agreement: the share of rows whose argmax is the same in student and teacher; the first of equal maxima.
        accuracy: the share of rows whose student's argmax is the label.
    """

    soft: Tensor
    hard: Tensor
    kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    accuracy: Tensor


class SparseKDMetrics(NamedTuple):
    """KDMetrics with a sparse teacher, and what its entries have of both distributions.

    The classes of p and q in soft, kl and teacher_entropy are the entries and, where it is one, their rest.

    Attributes:
        soft: as in KDMetrics, and so are hard, kl, student_entropy, teacher_entropy and accuracy.
        agreement: as in KDMetrics; the teacher's argmax is its most probable entry.
        student_mass: the sum of q over the entries, at T.
        teacher_mass: the sum of p, as the log-probabilities have it.
    """

    soft: Tensor
    hard: Tensor
    kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    agreement: Tensor
    accuracy: Tensor
    student_mass: Tensor
    teacher_mass: Tensor


METRICS = len(KDMetrics._fields)


def metrics_count(inputs: Inputs) -> int:
    """How many metrics a call has."""
    return METRICS if inputs.indices is None else len(SparseKDMetrics._fields)


def as_metrics(table: Tensor) -> KDMetrics | SparseKDMetrics:
    """Of (7, ...) or (9, ...)."""
    return (KDMetrics if len(table) == METRICS else SparseKDMetrics)(*table.unbind())
