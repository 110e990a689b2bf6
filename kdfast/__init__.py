"""kdfast: fused knowledge-distillation losses for PyTorch."""

from kdfast.losses import KDLoss, kd_loss
from kdfast.ops import backends
from kdfast.softmax import tempered_softmax

__version__ = "0.1.0"
__all__ = ["KDLoss", "backends", "kd_loss", "tempered_softmax"]
