"""phi and psi of each divergence for the Triton kernels; csrc/divergences.h has the same for C++.

    D = sum_i phi(p_i, q_i)       psi = q * dphi/dq       dD/ds_i = (psi_i - q_i * sum_j psi_j) / T

To add a divergence is to write these two and a row of DIVERGENCES. Its sums then take a sweep of their own over the
row, once p and q are known. A *linear* divergence spares that sweep: there phi is linear in (log p, log q) and its
terms carry one of p and q, which `over` names, so that the sum can run over unnormalised exps P, Q with sums P_sum,
Q_sum:

    D = sum phi(P, Q, log P, log Q) / over's sum  +  phi(sum p, 1, -log P_sum, -log Q_sum)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Divergence(NamedTuple):
    phi: Any  # each a function of (p, q, log p, log q); zero probabilities add 0
    psi: Any
    over: str | None = None  # "teacher" or "student" where the divergence is linear
    psi_sum: Any = None  # then: sum psi from (D, sum p)
    log_p: bool = True  # whether phi depends on log p, which a mixture of teachers has only when all sums are known
    source: str = ""  # of the functions, for Triton's cache on disk, which does not look into tuples


def divergence(phi: Any, psi: Any, **linear: Any) -> Divergence:
    functions = (phi, psi, linear.get("psi_sum"))
    # the interpreter's functions have no keys, and need none
    return Divergence(phi, psi, source="".join(getattr(f, "cache_key", "") for f in functions if f), **linear)


@triton.jit
def masked(p, x):
    """p * x, but 0 where p is 0, whatever x is there."""
    return tl.where(p == 0, 0, p * x)


@triton.jit
def cross_entropy(p, q, log_p, log_q):
    return -masked(p, log_q)


@triton.jit
def forward_kl(p, q, log_p, log_q):
    return masked(p, log_p - log_q)


@triton.jit
def forward_psi(p, q, log_p, log_q):
    return -p


@triton.jit
def forward_psi_sum(divergence, teacher_mass):
    return -teacher_mass


@triton.jit
def reverse_kl(p, q, log_p, log_q):
    return masked(q, log_q - log_p)


@triton.jit
def reverse_psi(p, q, log_p, log_q):
    return masked(q, log_q - log_p + 1)


@triton.jit
def reverse_psi_sum(divergence, teacher_mass):
    return divergence + 1


DIVERGENCES = {
    "cross_entropy": divergence(
        cross_entropy, forward_psi, over="teacher", psi_sum=forward_psi_sum, log_p=False
    ),  # -sum p log q
    "forward_kl": divergence(forward_kl, forward_psi, over="teacher", psi_sum=forward_psi_sum),  # sum p log(p / q)
    "reverse_kl": divergence(reverse_kl, reverse_psi, over="student", psi_sum=reverse_psi_sum),  # sum q log(q / p)
}
