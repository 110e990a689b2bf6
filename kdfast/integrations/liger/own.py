"""Which of Liger's own code may run in kdfast's place, and what its losses share."""

from typing import Any

import triton
from liger_kernel import ops
from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction as ChunkedJSDFunction
from torch import Tensor

from kdfast.integrations.patching import warn_fallback
from kdfast.options import Reduction

EPS = 1e-10  # Liger's default: a target probability below it counts as eps inside the logarithm
OVER_ROWS: dict[str, Reduction] = {"batchmean": "mean", "mean": "mean", "sum": "sum"}  # its "mean" divides by V too

# Imported before anything is patched.
TVD = ops.LigerTVDLossFunction
LINEAR_KL_DIV = ops.LigerFusedLinearKLDivFunction
CROSS_ENTROPY = ops.LigerCrossEntropyFunction
LINEAR_CROSS_ENTROPY = ops.LigerFusedLinearCrossEntropyFunction
CHUNKED_JSD = ChunkedJSDFunction


def run(where: str, reason: str, function: Any, *arguments: Any) -> Any:
    """Liger's own code, with a warning. All but the chunked loss is in Triton, which a CPU can only interpret."""
    on_cpu = arguments[0].device.type == "cpu" and not triton.knobs.runtime.interpret
    if on_cpu and function is not CHUNKED_JSD:
        raise NotImplementedError(f"{where}: kdfast does not compute {reason}, and Liger's own kernels need a GPU")
    warn_fallback(where, reason)
    return function.apply(*arguments)


def kept_rows(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Which rows count, as row weights. Liger compares labels with ignore_index and does not index by them."""
    return None if labels is None else labels != ignore_index
