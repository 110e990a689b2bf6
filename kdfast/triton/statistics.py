"""Pass A over a row, tile by tile, and the one rule by which its sums are joined; csrc/cpu/row_sums.h has it in C++.

Per row, in base 2, with slope = log2(e) / T and an offset o near the row's largest exponent (-inf where every class is
masked, and counted as 0 then):

    y_i = slope * s_i - o        Q_i = 2^y_i        q_i = Q_i / sum Q        the teacher's likewise
    hard term: exps at temperature 1 are Q_i^T for small whole T (SPEC.power), else taken by themselves

The statistics of the student are (offset, sum Q, sum of exps at temperature 1), of each teacher that is softmaxed
(offset, sum P, running), running being the sum that a linear divergence takes over P and Q. Each lane keeps those of
its own classes and its own offset, which grows as larger logits come by. Lanes, tiles and segments of a row are joined
by one rule: to bring sums from an old to a new offset, d = old - new,

    sum' = sum * 2^d        running' = (running + phi(sum P, sum Q, d_teacher, d_student)) * 2^(d of `over`)

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
    return (nothing - INF, nothing, nothing), teachers


@triton.jit
def accumulate(statistics, s, tiles, there, row, SPEC: tl.constexpr):
    """The statistics of each lane, (lanes,), with a tile, (lanes, n), added."""
    slope, teacher_slope, temperature, weights = row
    student, teachers = statistics
    offset, total, hard = student
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
        zero, mass, running = teachers[0]
        if SPEC.linear:
            running = running + SPEC.divergence.phi(mass, total, zero, ds)
            if SPEC.divergence.over == "student":
                running = scaled(running, ds)
            running += tl.sum(SPEC.divergence.phi(p, e, log_p, y), 1)
        out = ((zero, mass + tl.sum(p, 1), running),)
    elif SPEC.teacher == "difference":
        shift, first, second = teachers[0]
        logits = teacher_logits(tiles, weights, SPEC)
        d = tl.where(there, s - logits[0] - shift[:, None], 0)
        out = ((shift, first + tl.sum(d, 1), second + tl.sum(d * d, 1)),)
    elif SPEC.teacher == "softmaxed":
        logits = teacher_logits(tiles, weights, SPEC)
        for k in tl.static_range(len(logits)):
            t = logits[k]
            teacher_offset, mass, running = teachers[k]
            teacher_higher = tl.maximum(teacher_offset, tl.max(t, 1) * teacher_slope)
            base = finite(teacher_higher)
            dt = before(teacher_offset, base) - base
            teacher_y = exponent(t, teacher_slope, base[:, None])
            p = tl.exp2(teacher_y)
            if SPEC.linear:
                running = running + SPEC.divergence.phi(mass, total, dt, ds)
                running = scaled(running, dt if SPEC.divergence.over == "teacher" else ds)
                running += tl.sum(SPEC.divergence.phi(p, e, teacher_y, y), 1)
            out = out + ((teacher_higher, mass * tl.exp2(dt) + tl.sum(p, 1), running),)
    return (higher, moved, hard), out


@triton.jit
def _largest(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _pair(a, b, c, d):
    return a + c, b + d


@triton.jit
def merge(statistics, row, SPEC: tl.constexpr):
    """Statistics of lanes, or of segments, (n,), joined to those of the row."""
    slope, teacher_slope, temperature, weights = row
    student, teachers = statistics
    offset, total, hard = student
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
        teacher_offset, mass, running = teachers[k]
        if SPEC.teacher == "softmaxed":
            teacher_highest = first_highest if k == 0 else tl.max(teacher_offset, 0)
            base = finite(teacher_highest)
            dt = before(teacher_offset, base) - base
            if SPEC.linear:
                running = running + SPEC.divergence.phi(mass, total, dt, ds)
                running = scaled(running, dt if SPEC.divergence.over == "teacher" else ds)
            mass = mass * tl.exp2(dt)
        else:
            teacher_highest = tl.max(teacher_offset, 0)
            if SPEC.teacher == "given" and SPEC.linear:
                running = running + SPEC.divergence.phi(mass, total, teacher_offset, ds)
                if SPEC.divergence.over == "student":
                    running = scaled(running, ds)
        mass_sum, running_sum = tl.reduce((mass, running), 0, _pair)
        out = out + ((teacher_highest, mass_sum, running_sum),)
    return (highest, total_sum, hard_sum), out


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
        offset = _column(row, 1 if k == 0 else 3 + 3 * k)
        mass = _column(row, 3 if k == 0 else 4 + 3 * k)
        teachers = teachers + ((offset, mass, _column(row, 5 if k == 0 else 5 + 3 * k)),)
    return (_column(row, 0), _column(row, 2), _column(row, 4)), teachers


@triton.jit
def _with_column(row, at: tl.constexpr, value):
    axis: tl.constexpr = len(row.shape) - 1
    if axis > 0:
        value = tl.expand_dims(value, axis)
    return tl.where(tl.arange(0, row.shape[axis]) == at, value, row)


@triton.jit
def table_row(statistics, psi_sum, row, SPEC: tl.constexpr):
    """The statistics laid into zeros, (..., COLUMNS). psi_sum stands for `running` where the divergence has none."""
    student, teachers = statistics
    row = _with_column(row, 0, student[0])
    row = _with_column(row, 2, student[1])
    row = _with_column(row, 4, student[2])
    for k in tl.static_range(len(teachers)):
        offset, mass, running = teachers[k]
        row = _with_column(row, 1 if k == 0 else 3 + 3 * k, offset)
        row = _with_column(row, 3 if k == 0 else 4 + 3 * k, mass)
        row = _with_column(row, 5 if k == 0 else 5 + 3 * k, running if SPEC.linear else psi_sum)
    return row
