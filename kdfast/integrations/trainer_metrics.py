"""Means of the loss's metrics between two logs of a Trainer."""

from typing import Any

import torch
from torch import Tensor


class Metrics:
    """Sums over rows, apart for training and evaluation, on the device: adding needs no sync."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.sums: dict[bool, Tensor] = {}  # by whether it is training: metrics * rows, then rows

    def add(self, metrics: Any, rows: Tensor, training: bool) -> None:
        """The metrics (a named tuple of 0-dim tensors) of so many rows."""
        self.names = metrics._fields
        values = torch.stack([x.float() for x in metrics])
        values = torch.where(rows > 0, values * rows, 0)  # NaN where there are no rows
        sums = torch.cat((values, rows.to(values.dtype)[None]))
        self.sums[training] = self.sums[training] + sums if training in self.sums else sums

    def take(self, training: bool, accelerator: Any) -> dict[str, float]:
        """The means over the rows of all processes since the last call, by the names that are logged."""
        if training not in self.sums:
            return {}
        *values, rows = accelerator.reduce(self.sums.pop(training), reduction="sum").tolist()
        prefix = "kd_" if training else "eval_kd_"
        return {prefix + name: x / rows for name, x in zip(self.names, values, strict=True) if rows and x == x}
