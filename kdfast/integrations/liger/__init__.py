"""Liger-Kernel's losses by kdfast, also on a CPU, where Liger's Triton kernels do not run.

`patch()` puts kdfast in the place of Liger's autograd functions, so that every class and function of Liger that calls
them, and every trainer that has imported one, uses it. The classes here are Liger's own with kdfast behind them.

Examples:
    >>> with patch():
    ...     loss = liger_kernel.transformers.LigerFusedLinearJSD(jsd_beta=0.1)(hidden, head, t_hidden, t_head, labels)
    >>> loss = LigerFusedLinearJSD(jsd_beta=0.1)(hidden, head, t_hidden, t_head, labels)  # the same, without a patch
"""

from kdfast.integrations.liger.classes import (
    LigerCrossEntropyLoss,
    LigerFusedCETVDLoss,
    LigerFusedLinearCrossEntropyLoss,
    LigerFusedLinearJSD,
    LigerFusedLinearJSDLoss,
    LigerFusedLinearKLDivLoss,
    LigerJSD,
    LigerKLDIVLoss,
    LigerTVDLoss,
)
from kdfast.integrations.liger.places import patch

__all__ = [
    "LigerCrossEntropyLoss",
    "LigerFusedCETVDLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKLDivLoss",
    "LigerJSD",
    "LigerKLDIVLoss",
    "LigerTVDLoss",
    "patch",
]
