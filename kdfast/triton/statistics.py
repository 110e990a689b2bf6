"""Pass A over a row, tile by tile, and the one rule by which its sums are joined; csrc/cpu/row_sums.h has it in C++.

Per row, in base 2, with slope = log2(e) / T and an offset o near the row's largest exponent (-inf where every class is
masked, and counted as 0 then):

    y_i = slope * s_i - o        Q_i = 2^y_i        q_i = Q_i / sum Q        the teacher's likewise
    hard term: exps at temperature 1 are Q_i^T for small whole T (SPEC.power), else taken by themselves

The statistics of the student are (offset, sum Q, sum of exps at temperature 1, over_student), of each teacher that is
softmaxed (offset, sum P, over_teacher), the last of each being a linear divergence's running sums. Each lane keeps
those of its own classes and its own offset, which grows as larger logits come by. Lanes, tiles and segments of a row
are joined by one rule: to bring sums from an old to a new offset, d = old - new,

    sum' = sum * 2^d            over_teacher' = (over_teacher + phi's part(sum P, d_teacher, d_student)) * 2^d_teacher

`logit_mse` has other sums: of d_i = s_i - t_i - k and of d_i^2, with k the first class's difference: (k, sum, sum).
A teacher's probabilities given as such have the offset 0.
"""

import triton
import triton.language as tl

from kdfast.triton.spec import INF, LOG2E
from kdfast.triton.teachers import teacher_logits, teacher_probabilities


@triton.jit
def finite(offset):
    """The offset that is subtracted: 0 where every class so far is masked."""
    return tl.where(offset == -INF, 0, offset)


@triton.jit
def before(offset, new):
    """The offset that sums had, as it is subtracted; the new one where they are sums of nothing."""
    return tl.where(offset == -INF, new, offset)


@triton.jit
def exponent(x, slope, offset):
    """x * slope - offset, rounded once: offset and x * slope may be large and alike."""
    return tl.fma(x, slope, -offset)


@triton.jit
def scaled(total, d):
    """total * 2^d for a sum that may be infinite already, also where 2^d underflows."""
    return tl.where(tl.abs(total) == INF, total, total * tl.exp2(d))


@triton.jit
def hard_offset(offset, temperature):
    return offset * temperature


@triton.jit
def hard_scaled(total, old, new, temperature, SPEC: tl.constexpr):
    """The sum of exps at temperature 1, from one offset to another."""
    POWER: tl.constexpr = SPEC.power
    if POWER == 0:
        factor = tl.exp2(hard_offset(old, temperature) - hard_offset(new, temperature))
    else:
        factor = tl.exp2(old - new)
        once = factor
        for _ in tl.static_range(1, POWER):
            factor = factor * once
    return total * factor


@triton.jit
def hard_exponent(s, offset, temperature, SPEC: tl.constexpr):
    """Where exps at temperature 1 are taken by themselves: log2 of one."""
    return exponent(s, tl.full((), LOG2E, SPEC.dtype), hard_offset(offset, temperature))


@triton.jit
def hard_exps(s, y, e, offset, temperature, SPEC: tl.constexpr):
    """Exps at temperature 1, from the logits or from the exps at T."""
    POWER: tl.constexpr = SPEC.power
    if POWER == 0:
        return tl.exp2(hard_exponent(s, offset, temperature, SPEC))
    else:
        power = e
        for _ in tl.static_range(1, POWER):
            power = power * e
        return power


@triton.jit
def no_statistics(members: tl.constexpr, shift, LANES: tl.constexpr, SPEC: tl.constexpr):
    """The statistics of no class at all."""
    nothing = tl.zeros((LANES,), SPEC.dtype)
    offset = nothing if SPEC.teacher == "given" else nothing + shift if SPEC.teacher == "difference" else nothing - INF
    teachers = ()
    for _ in tl.static_range(members):
        teachers = teachers + ((offset, nothing, nothing),)
    return (nothing - INF, nothing, nothing, nothing), teachers


@triton.constexpr_function
def has_over_student(spec):
    """Whether there is a running sum over the student's exps."""
    return spec.teacher in ("softmaxed", "given") and spec.linear and spec.divergence.over_student is not None


@triton.jit
def moved_running(over_teacher, over_student, mass, total, dt, ds, beta, SPEC: tl.constexpr):
    """The running sums, from one pair of offsets to another."""
    if SPEC.linear:
        if SPEC.divergence.over_teacher is not None:
            over_teacher = scaled(over_teacher + SPEC.divergence.over_teacher(mass, dt, ds, beta), dt)
        if SPEC.divergence.over_student is not None:
            over_student = scaled(over_student + SPEC.divergence.over_student(total, dt, ds, beta), ds)
    return over_teacher, over_student


@triton.jit
def add_running(over_teacher, over_student, p, e, teacher_y, y, beta, SPEC: tl.constexpr):
    if SPEC.linear:
        if SPEC.divergence.over_teacher is not None:
            over_teacher += tl.sum(SPEC.divergence.over_teacher(p, teacher_y, y, beta), 1)
        if SPEC.divergence.over_student is not None:
            over_student += tl.sum(SPEC.divergence.over_student(e, teacher_y, y, beta), 1)
    return over_teacher, over_student


@triton.jit
def accumulate(statistics, s, tiles, there, row, SPEC: tl.constexpr):
    """The statistics of each lane, (lanes,), with a tile, (lanes, n), added."""
    slope, teacher_slope, temperature, weights, beta = row
    student, teachers = statistics
    offset, total, hard, over_student = student
    higher = tl.maximum(offset, tl.max(s, 1) * slope)
    new = finite(higher)
    old = before(offset, new)
    ds = old - new
    y = exponent(s, slope, new[:, None])
    e = tl.exp2(y)
    moved = total * tl.exp2(ds) + tl.sum(e, 1)
    if SPEC.hard:
        hard = hard_scaled(hard, old, new, temperature, SPEC)
        hard += tl.sum(hard_exps(s, y, e, new[:, None], temperature, SPEC), 1)
    out = ()
    if SPEC.teacher == "given":
        p, log_p = teacher_probabilities(tiles, weights, SPEC)
        zero, mass, over_teacher = teachers[0]
        over_teacher, over_student = moved_running(over_teacher, over_student, mass, total, zero, ds, beta, SPEC)
        over_teacher, over_student = add_running(over_teacher, over_student, p, e, log_p, y, beta, SPEC)
        out = ((zero, mass + tl.sum(p, 1), over_teacher),)
    elif SPEC.teacher == "difference":
        shift, first, second = teachers[0]
        logits = teacher_logits(tiles, weights, SPEC)
        d = tl.where(there, s - logits[0] - shift[:, None], 0)
        out = ((shift, first + tl.sum(d, 1), second + tl.sum(d * d, 1)),)
    elif SPEC.teacher == "softmaxed":
        logits = teacher_logits(tiles, weights, SPEC)
        for k in tl.static_range(len(logits)):
            t = logits[k]
            teacher_offset, mass, over_teacher = teachers[k]
            teacher_higher = tl.maximum(teacher_offset, tl.max(t, 1) * teacher_slope)
            base = finite(teacher_higher)
            dt = before(teacher_offset, base) - base
            teacher_y = exponent(t, teacher_slope, base[:, None])
            p = tl.exp2(teacher_y)
            over_teacher, over_student = moved_running(over_teacher, over_student, mass, total, dt, ds, beta, SPEC)
            over_teacher, over_student = add_running(over_teacher, over_student, p, e, teacher_y, y, beta, SPEC)
            out = out + ((teacher_higher, mass * tl.exp2(dt) + tl.sum(p, 1), over_teacher),)
    return (higher, moved, hard, over_student), out


@triton.jit
def _largest(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _pair(a, b, c, d):
    return a + c, b + d


@triton.jit
def merge(statistics, row, SPEC: tl.constexpr):
    """Statistics of lanes, or of segments, (n,), joined to those of the row."""
    slope, teacher_slope, temperature, weights, beta = row
    student, teachers = statistics
    offset, total, hard, over_student = student
    out = ()
    if SPEC.teacher == "softmaxed":
        highest, first_highest = tl.reduce((offset, teachers[0][0]), 0, _largest)
    else:
        highest = tl.max(offset, 0)
    new = finite(highest)
    old = before(offset, new)
    ds = old - new
    if SPEC.hard:
        hard = hard_scaled(hard, old, new, temperature, SPEC)
    total_sum, hard_sum = tl.reduce((total * tl.exp2(ds), hard), 0, _pair)
    for k in tl.static_range(len(teachers)):
        teacher_offset, mass, over_teacher = teachers[k]
        if SPEC.teacher == "softmaxed":
            teacher_highest = first_highest if k == 0 else tl.max(teacher_offset, 0)
            base = finite(teacher_highest)
            dt = before(teacher_offset, base) - base
            over_teacher, over_student = moved_running(over_teacher, over_student, mass, total, dt, ds, beta, SPEC)
            mass = mass * tl.exp2(dt)
        else:
            teacher_highest = tl.max(teacher_offset, 0)
            if SPEC.teacher == "given":
                over_teacher, over_student = moved_running(
                    over_teacher, over_student, mass, total, teacher_offset, ds, beta, SPEC
                )
        mass_sum, running_sum = tl.reduce((mass, over_teacher), 0, _pair)
        out = out + ((teacher_highest, mass_sum, running_sum),)
    over_student = tl.sum(over_student, 0) if has_over_student(SPEC) else total_sum * 0
    return (highest, total_sum, hard_sum, over_student), out


# ---- statistics in memory: a row of a table, in the order of reference.STATS, then the further teachers' ----


@triton.jit
def _column(row, at: tl.constexpr):
    """A column of (..., COLUMNS) numbers."""
    axis: tl.constexpr = len(row.shape) - 1
    return tl.sum(tl.where(tl.arange(0, row.shape[axis]) == at, row, 0), axis)


@triton.jit
def statistics_in(row, members: tl.constexpr):
    teachers = ()
    for k in tl.static_range(members):
        offset = _column(row, 1 if k == 0 else 4 + 3 * k)
        mass = _column(row, 3 if k == 0 else 5 + 3 * k)
        teachers = teachers + ((offset, mass, _column(row, 5 if k == 0 else 6 + 3 * k)),)
    return (_column(row, 0), _column(row, 2), _column(row, 4), _column(row, 6)), teachers


@triton.jit
def _with_column(row, at: tl.constexpr, value):
    axis: tl.constexpr = len(row.shape) - 1
    if axis > 0:
        value = tl.expand_dims(value, axis)
    return tl.where(tl.arange(0, row.shape[axis]) == at, value, row)


@triton.jit
def table_row(statistics, psi_sum, row, SPEC: tl.constexpr):
    """The statistics laid into zeros, (..., COLUMNS). psi_sum stands where the divergence has no running sums."""
    student, teachers = statistics
    row = _with_column(row, 0, student[0])
    row = _with_column(row, 2, student[1])
    row = _with_column(row, 4, student[2])
    row = _with_column(row, 6, student[3] if SPEC.linear else psi_sum)
    for k in tl.static_range(len(teachers)):
        offset, mass, over_teacher = teachers[k]
        row = _with_column(row, 1 if k == 0 else 4 + 3 * k, offset)
        row = _with_column(row, 3 if k == 0 else 5 + 3 * k, mass)
        row = _with_column(row, 5 if k == 0 else 6 + 3 * k, over_teacher)
    return row
