"""The divergences: phi and psi of each in plain PyTorch, and their parameters.

    D(p, q) = sum_i phi(p_i, q_i)       psi = q * dphi/dq       dD/ds_i = (psi_i - q_i * sum_j psi_j) / T

csrc/divergences.h and triton/divergences.py have the same functions for the kernels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Divergence(NamedTuple):
    """Two elementwise functions of (p, q, log p, log q, beta); zero probabilities add 0.

    phi leaves out first_order(beta) * (p - q), which would round the rest away near p = q; over all classes it is
    first_order(beta) * (sum p - 1). psi may leave out a multiple of q, which cancels in the gradient.
    """

    phi: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    psi: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    beta: float | None = None  # the default; None: it has no parameter
    at_0: str | None = None  # the divergence that it is at beta = 0, infinities included
    at_1: str | None = None
    first_order: Callable[[float], float] = lambda beta: 0.0
    # psi less a multiple of q, for rows that have so little in common that psi's digits cancel
    psi_apart: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor] | None = None


def times(p: Tensor, x: Tensor) -> Tensor:
    """p * x, but 0 where p is 0, whatever x is there; so is its gradient."""
    return p * torch.where(p == 0, 0, x)


def _log(x: Tensor) -> Tensor:
    """log x; 0 where x is 0: `times` leaves these terms out."""
    return torch.where(x == 0, 1, x).log()


def _mixture(p: Tensor, q: Tensor, beta: float) -> Tensor:
    return beta * p + (1 - beta) * q


def _log_to_mixture(p: Tensor, q: Tensor, log_p: Tensor, own: float, other: float) -> Tensor:
    """log(p / m) for m = own p + other q, own + other = 1, with the digits of p - m where p and m are close."""
    difference = other * (q - p)
    is_near = difference.abs() < p / 2
    near = -torch.log1p(torch.where(is_near, difference, 0) / torch.where(is_near, p, 1))
    return torch.where(is_near, near, torch.where(is_near, 0, log_p - _log(own * p + other * q)))


def _excess(p: Tensor, q: Tensor, log_p: Tensor, own: float, other: float) -> Tensor:
    """p log(p / m) - (p - m), whose first-order terms cancel: in fp32 by its series where p and m are close."""
    difference = other * (q - p)
    excess = times(p, _log_to_mixture(p, q, log_p, own, other)) + difference
    if p.dtype == torch.float64:
        return excess
    is_near = difference.abs() < p / 32
    u = torch.where(is_near, difference, 0) / torch.where(is_near, p, 1)
    series = 1 / 2 - u * (1 / 3 - u * (1 / 4 - u * (1 / 5 - u / 6)))
    return torch.where(is_near, p * (u * u * series), torch.where(is_near, 0, excess))


def _excess_of_teacher(p: Tensor, q: Tensor, log_p: Tensor, own: float, other: float) -> Tensor:
    """_excess with the gradient of p log(p / m): the sum of q is 1, whose derivative is 0, and which would cancel."""
    x = times(p, _log_to_mixture(p, q, log_p, own, other))
    return _excess(p, q.detach(), log_p, own, other) + (x - x.detach())


def _log_excess(p: Tensor, q: Tensor, log_p: Tensor, own: float, other: float) -> Tensor:
    """log(p / m) - own (p - m) / m, likewise."""
    difference, m = other * (q - p), own * p + other * q
    excess = _log_to_mixture(p, q, log_p, own, other) + own * _share(difference, m)
    if p.dtype == torch.float64:
        return excess
    is_near = difference.abs() < p / 32
    u = torch.where(is_near, difference, 0) / torch.where(is_near, p, 1)
    series = -1 / 2 + u * (2 / 3 - u * (3 / 4 - u * (4 / 5 - u * (5 / 6))))
    return torch.where(is_near, u * u * series - other * _share(difference, m), excess)


def _share(p: Tensor, m: Tensor) -> Tensor:
    """p / m; 0 where both are 0, or so small that the derivative of p / m overflows."""
    return p / torch.where(m < torch.finfo(m.dtype).tiny, 1, m)


def _sign(x: Tensor) -> Tensor:
    """torch.sign, but NaN for NaN."""
    x = x.detach()
    return torch.where(x == 0, x, x / x.abs())


DIVERGENCES = {
    # -sum p log q, the paper's
    "cross_entropy": Divergence(
        phi=lambda p, q, log_p, log_q, beta: -times(p, log_q),
        psi=lambda p, q, log_p, log_q, beta: -p,
    ),
    # KL(p, q)
    "forward_kl": Divergence(
        phi=lambda p, q, log_p, log_q, beta: times(p, log_p - log_q),
        psi=lambda p, q, log_p, log_q, beta: -p,
    ),
    # KL(q, p)
    "reverse_kl": Divergence(
        phi=lambda p, q, log_p, log_q, beta: times(q, log_q - log_p),
        psi=lambda p, q, log_p, log_q, beta: times(q, log_q - log_p + 1),
    ),
    # beta KL(p, q) + (1 - beta) KL(q, p)
    "symmetric_kl": Divergence(
        phi=lambda p, q, log_p, log_q, beta: beta * times(p, log_p - log_q) + (1 - beta) * times(q, log_q - log_p),
        psi=lambda p, q, log_p, log_q, beta: (1 - beta) * times(q, log_q - log_p + 1) - beta * p,
        beta=0.5,
        at_0="reverse_kl",
        at_1="forward_kl",
    ),
    # beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q
    "jsd": Divergence(
        phi=lambda p, q, log_p, log_q, beta: (
            beta * _excess(p, q, log_p, beta, 1 - beta) + (1 - beta) * _excess(q, p, log_q, 1 - beta, beta)
        ),
        psi=lambda p, q, log_p, log_q, beta: (1 - beta) * times(q, _log_to_mixture(q, p, log_q, 1 - beta, beta)),
        beta=0.5,
        at_0="forward_kl",
        at_1="reverse_kl",
    ),
    # KL(p, beta p + (1 - beta) q)
    "skew_forward_kl": Divergence(
        phi=lambda p, q, log_p, log_q, beta: _excess_of_teacher(p, q, log_p, beta, 1 - beta),
        psi=lambda p, q, log_p, log_q, beta: (1 - beta) ** 2 * q * _share(q - p, _mixture(p, q, beta)),
        psi_apart=lambda p, q, log_p, log_q, beta: -(1 - beta) * q * _share(p, _mixture(p, q, beta)),
        beta=0.1,
        at_0="forward_kl",
        first_order=lambda beta: 1 - beta,
    ),
    # KL(q, beta q + (1 - beta) p)
    "skew_reverse_kl": Divergence(
        phi=lambda p, q, log_p, log_q, beta: _excess(q, p, log_q, beta, 1 - beta),
        psi=lambda p, q, log_p, log_q, beta: times(q, _log_excess(q, p, log_q, beta, 1 - beta)),
        beta=0.1,
        at_0="reverse_kl",
        first_order=lambda beta: beta - 1,
    ),
    # half the L1 distance of p and q
    "tvd": Divergence(
        phi=lambda p, q, log_p, log_q, beta: 0.5 * (q - p) * _sign(q - p),
        psi=lambda p, q, log_p, log_q, beta: 0.5 * q * _sign(q - p),
    ),
    # 1 - sum sqrt(p q)
    "hellinger": Divergence(
        phi=lambda p, q, log_p, log_q, beta: (p + q.detach()) / 2 - ((log_p + log_q) / 2).exp(),
        psi=lambda p, q, log_p, log_q, beta: -0.5 * ((log_p + log_q) / 2).exp(),
        first_order=lambda beta: -0.5,
    ),
}
OTHERS = ("logit_mse", "dkd")  # not sums of phi over the classes; see classifiers.py


def names() -> tuple[str, ...]:
    """All names, with those that a program has added to the table."""
    return (*DIVERGENCES, *OTHERS)


def resolve_beta(name: str, beta: float | None) -> tuple[str, float]:
    """The divergence that `name` is at `beta`, and its beta; 0 where it has none."""
    entry = DIVERGENCES.get(name)
    if entry is None or entry.beta is None:
        return name, 0.0
    beta = entry.beta if beta is None else beta
    end = entry.at_0 if beta == 0 else entry.at_1 if beta == 1 else None
    return resolve_beta(end, None) if end else (name, beta)
