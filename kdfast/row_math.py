"""A row's numbers between the passes over its classes: sums go up, coefficients come down.

In base 2, with Q_i = 2^(s_i log2(e) / T - student_offset), P_i = 2^(t_i log2(e) / T' - teacher_offset) and
E_i = 2^(s_i log2(e) - hard_offset), or P_i a probability as it is given. An offset is any number near the largest
exponent, -inf where every class is masked.
"""

from typing import Any, NamedTuple


class Sums(NamedTuple):
    """Of some classes of a row, each (rows,): the columns of what `sums` returns. Sums of shards can be merged."""

    student_offset: Any
    student_total: Any  # sum Q
    teacher_offset: Any  # 0 where probabilities are given
    teacher_total: Any  # sum P
    hard_offset: Any
    hard_total: Any  # sum E
    over_teacher: Any  # sum of the divergence's over_teacher(P, log2 Q, log2(Q / P)), where it is linear
    over_student: Any  # sum of its over_student(Q, log2(Q / P))
    label: Any  # log2 E of the label; -inf where it is not among these classes
    exponents: Any  # sum of log2 E, for label smoothing
    classes: Any  # how many
    phi: Any  # sum of phi(p, q), where the divergence is not linear: known once the other sums are merged
    psi: Any


class Coefficients(NamedTuple):
    """What the gradient is a function of beside the logits, each (rows,): the columns of what `stats` returns.

        q = Q / student_total        p = P / teacher_total        q1 = E / hard_total

        q (level + slope ln(q / p)) - teacher p + hard q1 - uniform - [i = y] label         of a linear divergence
        soft (psi(p, q) - q psi_sum) + hard q1 - uniform - [i = y] label                    of the others
    """

    student_offset: Any
    student_total: Any
    teacher_offset: Any
    teacher_total: Any  # what P is divided by: 1 for probabilities as they are given
    hard_offset: Any
    hard_total: Any
    level: Any
    slope: Any
    teacher: Any
    soft: Any
    psi_sum: Any
    hard: Any
    label: Any
    uniform: Any
    # logit_mse: soft * (s - t - shift)
    shift: Any
    # standardized logits: s * student_unit and t * teacher_unit are what T divides; tilt * (s - mean) is added
    mean: Any
    tilt: Any
    student_unit: Any
    teacher_unit: Any
    teacher_mean: Any
    # dkd, whose totals leave the label out: the whole gradient at the label
    at_label: Any
