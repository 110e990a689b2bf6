"""Losses of image classifiers in plain PyTorch: logit_mse, decoupled KD, and standardized logits.

They are more than a sum of phi(p, q) over the classes, so they have no coefficients in row_math.py, and the reference
takes their gradients by autograd.
"""

import math

import torch
from torch import Tensor

from kdfast.divergences import times


def logit_mse(s: Tensor, t: Tensor) -> Tensor:
    """1 / (2 V) * sum (s_i - t_i)^2 on centred rows, (..., V) -> (...): the paper's limit for high T."""
    difference = s - t
    return (difference - difference.mean(-1, keepdim=True)).square().mean(-1) / 2


def standardize(z: Tensor) -> Tensor:
    """(z - mean) / (1e-7 + deviation), the sample deviation: Logit Standardization, Sun et al., CVPR 2024."""
    z = z - z[..., :1].detach()  # equal logits leave nothing for a rounded mean to differ from
    centred = z - z.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(1, z.shape[-1] - 1)
    is_flat = variance == 0  # one class, or equal logits: the deviation and its gradient are 0
    return centred / (1e-7 + torch.where(is_flat, 0, torch.where(is_flat, 1, variance).sqrt()))


def dkd(
    p: Tensor, log_p: Tensor, p_z: Tensor, log_q: Tensor, q_z: Tensor, labels: Tensor, weights: list[float]
) -> Tensor:
    """w_0 * KL of (y, not y) + w_1 * KL over the classes that are not y, (...): Decoupled KD, Zhao et al., CVPR 2022.

    The first five are (..., V); p_z and q_z are log p and log q before a constant of the row is subtracted. labels is
    (..., 1). A part adds 0 where no class is left for it: V = 1, or the teacher gives the other classes no probability.
    """
    is_label = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, labels, True)
    divergence = torch.zeros_like(p[..., 0])
    if weights[0]:
        mass = torch.where(is_label, 0, p).sum(-1)
        log_ratio = (log_p - log_q).gather(-1, labels).squeeze(-1)
        rest_ratio = _log_sum(log_p, is_label) - _log_sum(log_q, is_label)
        target = times(p.gather(-1, labels).squeeze(-1), log_ratio) + times(mass, rest_ratio.squeeze(-1))
        divergence = divergence + weights[0] * target
    if weights[1]:
        p_rest, q_rest = _log_softmax_of_rest(p_z, is_label), _log_softmax_of_rest(q_z, is_label)
        divergence = divergence + weights[1] * times(p_rest.exp(), p_rest - q_rest).sum(-1)
    return divergence


def _mask_label(z: Tensor, is_label: Tensor) -> tuple[Tensor, Tensor]:
    """z with -inf at the label, but 0 in rows without another class, and which rows these are, (..., 1)."""
    rest = torch.where(is_label, -math.inf, z)
    is_empty = (rest == -math.inf).all(-1, keepdim=True)
    return torch.where(is_empty, 0, rest), is_empty


def _log_sum(z: Tensor, is_label: Tensor) -> Tensor:
    """log of the sum of exp z over the other classes, (..., 1)."""
    rest, is_empty = _mask_label(z, is_label)
    return torch.where(is_empty, -math.inf, torch.logsumexp(rest, -1, keepdim=True))


def _log_softmax_of_rest(z: Tensor, is_label: Tensor) -> Tensor:
    """log_softmax over the other classes, (..., V); -inf at the label, and where there is no other class."""
    rest, is_empty = _mask_label(z, is_label)
    return torch.where(is_empty, -math.inf, torch.log_softmax(rest, -1))
