"""What a kernel is compiled for besides dtypes and sizes, constants of its arithmetic, and its bundles of numbers."""

from typing import Any, NamedTuple

import triton.language as tl

from kdfast.triton.divergences import NO_RUNNING_SUMS, Divergence, RunningSums

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


class Spec(NamedTuple):
    """Whatever costs something is compiled in where it is used, and nowhere else."""

    dtype: Any  # of the arithmetic
    teacher: str = "none"  # "none"; "softmaxed": one distribution or more; "given": probabilities as they are
    divergence: Divergence | None = None
    linear: bool = True  # the divergence's sums are taken in pass A, and not in a pass of their own
    target: str = "logits"  # what the teachers' tensors hold
    joint: bool = True  # "softmaxed": the weighted mean of the teachers is one distribution; else each has its own
    hard: bool = False  # exps at temperature 1 are wanted
    power: int = 1  # exps at temperature 1 are this power of those at T; 0: they are computed from the logits
    t_squared: bool = True
    running: RunningSums = NO_RUNNING_SUMS
    labelled: bool = False  # the label's term is in the loss
    difference: bool = False  # logit_mse
    dkd: bool = False
    smoothed: bool = False
    z_loss: bool = False
    softcap: bool = False
    teacher_softcap: bool = False
    standardize: bool = False
    metrics: bool = False
    members: int = 0  # how many distributions the teachers are
    counted: bool = False  # the divisor is the sum of the rows' weights, which every program takes itself
    aligned: tuple[bool, ...] = ()  # of the output, then of the teachers: their vectors lie as the student's do
    lanes: int = 0  # launch.Plan's
    vec: int = 0
    tiles: int = 0


class PerRow(NamedTuple):
    """Pointers to what there is by row, (rows,), or None; and to the divisor, 0-dim, and the metrics, (7, rows)."""

    losses: Any  # out, as are the metrics
    labels: Any
    weights: Any
    temperatures: Any
    teacher_temperatures: Any
    grad_loss: Any  # in backward
    divisor: Any  # of the sum of losses
    metrics: Any


class Numbers(NamedTuple):
    """The settings that are numbers, as per_row.number reads them; None: not wanted."""

    temperature: Any  # where there is none by row
    teacher_temperature: Any
    alpha: Any
    hard_weight: Any
    scale: Any  # of the losses, besides the divisor
    beta: Any
    rest: Any  # 1 - beta, of which the difference in fp64 is rounded
    label_smoothing: Any
    z_loss: Any
    logit_scale: Any
    teacher_logit_scale: Any
    softcap: Any
    teacher_softcap: Any
    dkd_target: Any
    dkd_others: Any
    teacher_weights: Any  # a tuple


class Caps(NamedTuple):
    """Of soft-capped logits, and logit_scale / cap."""

    student: Any
    student_inverse: Any
    teacher: Any
    teacher_inverse: Any


class Row(NamedTuple):
    """What a row's passes know beforehand."""

    exp2_scale: Any  # log2(e) / T
    teacher_exp2_scale: Any
    temperature: Any
    weights: Any  # the teachers'
    beta: Any
    rest: Any
    label: Any
    logit_scale: Any  # what logits lack of it: 1 where they are soft-capped, which takes it in
    teacher_logit_scale: Any
    caps: Any
    scalings: Any  # standardized: classifiers.Scaling of student and teachers, () while they are not known


class Factors(NamedTuple):
    """What a row's terms are multiplied by."""

    alpha: Any
    hard_weight: Any
    smoothing: Any
    z_loss: Any
    target: Any  # dkd's two
    others: Any
    gradient: Any  # a row's share of the loss


class Further(NamedTuple):
    """What each teacher but the first adds to row_math.Coefficients; 0 where it is not wanted."""

    offset: Any  # of an arithmetic ensemble's distribution
    total: Any  # what P is divided by, the teacher's weight in it
    unit: Any  # where logits are standardized
    mean: Any
