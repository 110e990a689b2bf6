"""kdfast: fused knowledge-distillation losses for PyTorch."""

import kdfast.ops  # noqa: F401 - defines the operators
from kdfast.arguments import KDMetrics, SparseKDMetrics
from kdfast.choice import backends
from kdfast.linear import LinearKDLoss, linear_kd_loss
from kdfast.linear_tokens import linear_token_log_probs
from kdfast.losses import kd_loss
from kdfast.modules import KDLoss
from kdfast.softmax import tempered_softmax
from kdfast.sparse import TopKTargets, topk_targets
from kdfast.tokens import TokenLogProbs, token_log_probs

__version__ = "0.2.0"
__all__ = [
    "KDLoss",
    "KDMetrics",
    "LinearKDLoss",
    "SparseKDMetrics",
    "TokenLogProbs",
    "TopKTargets",
    "backends",
    "kd_loss",
    "linear_kd_loss",
    "linear_token_log_probs",
    "tempered_softmax",
    "token_log_probs",
    "topk_targets",
]
