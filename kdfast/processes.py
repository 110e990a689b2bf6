"""What the processes of a group tell each other, with torch.distributed."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13


def gather(x: Tensor, group: Any) -> Tensor:
    """The tensors of all processes, (processes, *x.shape)."""
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    _all_gather(out.view(-1, *x.shape[1:]), x.contiguous(), group=group)
    return out
