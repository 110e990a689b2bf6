"""phi and psi of each divergence for the Triton kernels; csrc/divergences.h has the same for C++, and says more.

    D = sum_i phi(p_i, q_i)       psi = q * dphi/dq       dD/ds_i = (psi_i - q_i * sum_j psi_j) / T

To add a divergence is to write these two, functions of (p, q, beta, rest), and a row of DIVERGENCES. rest is 1 - beta,
rounded once; psi may lack a multiple of q. A mixture is a sum of numbers >= 0: p + rest (q - p) would cancel. Both
sums take a pass of their own over the row, once p and q are known; `constant` of (sum p, beta, rest) is what phi lacks.

A *linear* divergence spares that pass: there phi is linear in (log p, log q), each of its terms carries p or q, and it
is given as these two parts, functions of (p or q, log p, log q, beta), whose sums run over unnormalised ones, and their
shares of D, functions of (beta, rest). But for a multiple of q its psi is student_share q log(q / p) - teacher_share p.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language import target_info
from triton.language.extra import libdevice


class Divergence(NamedTuple):
    psi: Any = None
    phi: Any = None
    psi_apart: Any = None  # another psi, for rows with little in common; csrc/divergences.h says when
    constant: Any = None
    over_teacher: Any = None  # the parts of a linear one's phi, and their shares
    over_student: Any = None
    teacher_share: Any = None
    student_share: Any = None
    log_p: bool = True  # whether phi depends on log p, which a mixture of teachers has only when all sums are known
    source: str = ""  # of the functions, for Triton's cache on disk, which does not look into tuples


def divergence(psi: Any = None, **others: Any) -> Divergence:
    functions = (psi, *others.values())
    # the interpreter's functions have no keys, and need none
    return Divergence(psi, source="".join(getattr(f, "cache_key", "") for f in functions), **others)


class RunningSums(NamedTuple):
    """Functions of (p or q, log p, log q, beta) whose sums run along with pass A; metrics' come last."""

    over_teacher: tuple[Any, ...] = ()
    over_student: tuple[Any, ...] = ()
    source: str = ""


NO_RUNNING_SUMS = RunningSums()


def running_sums(divergence: Divergence | None, metrics: bool, joint: bool) -> RunningSums:
    """divergence: a linear one; joint: there is one p, and it is known beforehand."""
    over_teacher, over_student = [], []
    if divergence is not None:
        over_teacher = [f for f in (divergence.over_teacher,) if f is not None]
        over_student = [f for f in (divergence.over_student,) if f is not None]
    if metrics:
        over_teacher += [forward_kl, teacher_log] if joint else []
        over_student += [student_log]
    source = "".join(getattr(f, "cache_key", "") for f in (*over_teacher, *over_student))
    return RunningSums(tuple(over_teacher), tuple(over_student), source)


@triton.jit
def masked(p, x):
    """p * x, but 0 where p is 0, whatever x is there."""
    return tl.where(p == 0, p, p * x)


@triton.jit
def quotient(a, b):
    """a / b, where b is not denormal. On AMD's devices a product with the reciprocal, within 2 ulp, which NVIDIA's `/`
    is anyway: theirs is rounded exactly, in ten instructions."""
    if target_info.is_hip() and a.dtype == tl.float32:
        return libdevice.fast_dividef(a, b)
    else:
        return a / b


@triton.jit
def ratio(a, b):
    """a / b, and next to nothing where b underflows and a may not."""
    TINY: tl.constexpr = 1e-300 if a.dtype == tl.float64 else 1.2e-38
    return quotient(a, tl.maximum(b, TINY))


@triton.jit
def split_log_ratio(a, b, difference):
    """w and a series with log(a / b) = 2 w (1 + series) for |w| < 1/8, and that logarithm for others."""
    TERMS: tl.constexpr = 9 if a.dtype == tl.float64 else 4  # what the first left out adds is rounded away
    w = quotient(difference, a + b)
    series = w * w * (1.0 / (2 * TERMS + 1))
    for k in tl.static_range(1, TERMS):
        series = w * w * (series + 1.0 / (2 * (TERMS - k) + 1))
    return w, series, tl.log2(quotient(a, b)) * 0.6931471805599453


@triton.jit
def select(w, near, far, a, b):
    """By whether a and b are close; 0 where b, and with it a, is next to nothing."""
    NOTHING: tl.constexpr = 1e-300 if a.dtype == tl.float64 else 1e-37
    return tl.where(b < NOTHING, 0, tl.where(tl.abs(w) < 0.125, near, far))


@triton.jit
def log_ratio(a, b, difference):
    """log(a / b) from a - b too, whose digits it has near equality."""
    w, series, far = split_log_ratio(a, b, difference)
    return select(w, 2 * (w + w * series), far, a, b)


@triton.jit
def kl_term(a, b, difference):
    """a log(a / b) - (a - b), whose first-order terms cancel."""
    w, series, far = split_log_ratio(a, b, difference)
    return select(w, difference * w + 2 * a * w * series, masked(a, far) - difference, a, b)


# ---- linear ones ----


@triton.jit
def cross_entropy(p, log_p, log_q, beta):
    return -masked(p, log_q)


@triton.jit
def forward_kl(p, log_p, log_q, beta):
    return masked(p, log_p - log_q)


@triton.jit
def reverse_kl(q, log_p, log_q, beta):
    return masked(q, log_q - log_p)


@triton.jit
def full_share(beta, rest):
    return beta * 0 + 1


@triton.jit
def forward_share(beta, rest):
    return beta


@triton.jit
def reverse_share(beta, rest):
    return rest


@triton.jit
def teacher_log(p, log_p, log_q, beta):
    return masked(p, log_p)


@triton.jit
def student_log(q, log_p, log_q, beta):
    return masked(q, log_q)


# ---- those with a pass of their own ----


@triton.jit
def jsd(p, q, beta, rest):
    m, d = beta * p + rest * q, q - p
    of_p = masked(p, log_ratio(p, m, -rest * d))
    return beta * of_p + rest * masked(q, log_ratio(q, m, beta * d))


@triton.jit
def jsd_psi(p, q, beta, rest):
    return rest * masked(q, log_ratio(q, beta * p + rest * q, beta * (q - p)))


@triton.jit
def skew_forward_kl(p, q, beta, rest):
    return kl_term(p, beta * p + rest * q, rest * (p - q))


@triton.jit
def skew_forward_psi(p, q, beta, rest):
    return ratio(rest * q, beta * p + rest * q) * (rest * (q - p))


@triton.jit
def skew_forward_psi_apart(p, q, beta, rest):
    return -ratio(rest * q, beta * p + rest * q) * p


@triton.jit
def skew_forward_constant(mass, beta, rest):
    return rest * (mass - 1)


@triton.jit
def skew_reverse_kl(p, q, beta, rest):
    return kl_term(q, beta * q + rest * p, rest * (q - p))


@triton.jit
def skew_reverse_psi(p, q, beta, rest):
    d, m = rest * (q - p), beta * q + rest * p
    w, series, far = split_log_ratio(q, m, d)
    u = ratio(d, m)  # log(q / m) - beta u, near equality without its first-order terms; u may be as large as 1 / beta
    return masked(q, select(w, 2 * w * series - w * u + rest * u, far - beta * u, q, m))


@triton.jit
def skew_reverse_constant(mass, beta, rest):
    return rest * (1 - mass)


@triton.jit
def tvd(p, q, beta, rest):
    return tl.where(p == q, 0, tl.abs(q - p) / 2)


@triton.jit
def tvd_psi(p, q, beta, rest):
    far = tl.where(p > q, -q / 2, tl.where(p < q, q / 2, p - q))  # the last is NaN
    return tl.where(p == q, 0, far)


@triton.jit
def hellinger(p, q, beta, rest):
    d = tl.where(p == q, 0, tl.sqrt(q) - tl.sqrt(p))
    return d * d / 2


@triton.jit
def hellinger_psi(p, q, beta, rest):
    return tl.where(p == q, q, tl.sqrt(q) * tl.sqrt(p)) / -2


@triton.jit
def hellinger_constant(mass, beta, rest):
    return (1 - mass) / 2


DIVERGENCES = {
    "cross_entropy": divergence(over_teacher=cross_entropy, teacher_share=full_share)._replace(log_p=False),
    "forward_kl": divergence(over_teacher=forward_kl, teacher_share=full_share),
    "reverse_kl": divergence(over_student=reverse_kl, student_share=full_share),
    "symmetric_kl": divergence(
        over_teacher=forward_kl, over_student=reverse_kl, teacher_share=forward_share, student_share=reverse_share
    ),
    "jsd": divergence(jsd_psi, phi=jsd),
    "skew_forward_kl": divergence(
        skew_forward_psi, phi=skew_forward_kl, psi_apart=skew_forward_psi_apart, constant=skew_forward_constant
    ),
    "skew_reverse_kl": divergence(skew_reverse_psi, phi=skew_reverse_kl, constant=skew_reverse_constant),
    "tvd": divergence(tvd_psi, phi=tvd),
    "dkd": divergence(over_teacher=forward_kl, teacher_share=full_share),  # of the others; see classifiers.py
    "hellinger": divergence(hellinger_psi, phi=hellinger, constant=hellinger_constant),
}
