"""Rounding of log-probabilities to the dtype of a cache."""

import math

import torch
from torch import Tensor

LEAST = -65504.0  # of float16; what lies below is absent


def round_down_to_a_distribution(log_probs: Tensor, dtype: torch.dtype, all_present: bool = False) -> Tensor:
    """Log-probabilities, (rows, K), in a narrower dtype, to nearest, but a row's sum of p never becomes more than 1.

    Where it would, the first entries that were rounded up are rounded down, as many as it takes. A row whose sum is
    more than 1 as it is given holds no probabilities, and is rounded to nearest.
    """
    near = (log_probs if all_present else log_probs.masked_fill(log_probs < LEAST, -math.inf)).to(dtype)
    at_risk = (near.float().exp().sum(-1) > 1 - 1e-5).nonzero().squeeze(-1)
    if not len(at_risk):
        return near
    exact, part = log_probs[at_risk].double(), near[at_risk]
    p = part.double().exp()
    below = torch.where(part == -math.inf, part, torch.nextafter(part, torch.full_like(part, -math.inf)))
    gain = (p - below.double().exp()).masked_fill(p <= exact.exp(), 0)  # of those that were rounded up
    is_too_much = p.sum(-1, keepdim=True) - (gain.cumsum(-1) - gain) > 1  # before this entry is rounded down
    is_distribution = exact.exp().sum(-1, keepdim=True) <= 1 + 1e-6
    near[at_risk] = torch.where(is_too_much & is_distribution & (gain > 0), below, part)
    return near
