"""What a kernel is compiled for beside dtypes and sizes, and the constants of its arithmetic."""

from typing import Any, NamedTuple

import triton.language as tl

from kdfast.triton.divergences import Divergence

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


class Spec(NamedTuple):
    dtype: Any  # of the arithmetic
    # "none"; "softmaxed": one distribution or more; "given": probabilities as they are; "difference": logit_mse
    teacher: str = "none"
    divergence: Divergence | None = None
    linear: bool = True  # the divergence's sums are taken along with the statistics, and not in a pass of their own
    target: str = "logits"  # what the teachers' tensors hold
    joint: bool = True  # "softmaxed": the weighted mean of the teachers is one distribution; else each has its own
    hard: bool = False
    power: int = 1  # exps at temperature 1 are this power of those at T; 0: they are taken by themselves
    t_squared: bool = True
    aligned: tuple[bool, ...] = ()  # of the output, then of the teachers: their vectors lie as the student's do
