"""speculators' fused losses, computed by kdfast, on a CPU too.

speculators looks its fused losses up by name, each time one is called: `losses.utils._fused_kernel(name)` imports them
from a file that needs Triton. That one function is replaced, so that everything that ends there is kdfast's: the table
of `--loss-fn`, the defaults of each drafter, and the acceptance rates of DSpark's and DFlash2's metrics. Masks, decays
and means stay speculators' own.

With q = softmax(logits), p = softmax(targets) and the acceptance rate a = sum min(p, q) = 1 - TVD(p, q), of a position:

    kl_div      KL(p, q)              rkl         KL(q, p)
    jsd         JSD(p, q)             tv          TVD(p, q) = 1 - a
    ce          -log q[argmax p]      nla         -log max(a, 1e-5)
    lk_hybrid   w KL(p, q) + (1 - w) TVD(p, q) with w = exp(-eta a), which has no gradient    (arXiv 2602.23881)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast.integrations.patching import Patch
from kdfast.losses import kd_loss

TESTED = "0.9.0"
LEAST_ACCEPTANCE = 1e-5  # speculators' own _NLA_EPS


def register() -> Patch:
    """Makes kdfast compute the losses of `--loss-implementation fused`, speculators' default, on any device.

    Call it before training. `eager` stays as it is.

    Returns:
        The patch: `undo()`, or the end of a `with` statement, puts speculators' own losses back.

    Raises:
        AttributeError: this version of speculators has other names.

    Examples:
        >>> import kdfast.integrations.speculators
        >>> kdfast.integrations.speculators.register()  # doctest: +SKIP
    """
    patch = Patch("speculators", TESTED)
    patch.replace("speculators.losses.utils", "_fused_kernel", _by_name)
    return patch


def _by_name(original: Callable[[str], Any]) -> Callable[[str], Any]:
    def fused_kernel(name: str) -> Any:
        """kdfast's loss of this name; speculators' own where it has one that kdfast does not know."""
        return LOSSES[name] if name in LOSSES else original(name)

    return fused_kernel


def _rows(
    logits: Tensor,  # (1, positions, draft vocabulary)
    targets: Tensor,  # the same shape, and no gradient
    divergence: str,
) -> Tensor:  # (1, positions)
    return kd_loss(logits, targets, divergence=divergence, reduction="none")


def kl_div(logits: Tensor, targets: Tensor) -> Tensor:
    return _rows(logits, targets, "forward_kl")


def reverse_kl(logits: Tensor, targets: Tensor) -> Tensor:
    return _rows(logits, targets, "reverse_kl")


def jsd(logits: Tensor, targets: Tensor) -> Tensor:
    return _rows(logits, targets, "jsd")


def tv(logits: Tensor, targets: Tensor) -> Tensor:
    return _rows(logits, targets, "tvd")


def ce(logits: Tensor, targets: Tensor) -> Tensor:
    return kd_loss(logits, None, targets.argmax(-1), alpha=0, reduction="none")


def negative_log_acceptance(logits: Tensor, targets: Tensor) -> Tensor:
    return -(1 - tv(logits, targets)).clamp(min=LEAST_ACCEPTANCE).log()


def lk_hybrid(logits: Tensor, targets: Tensor, eta: float = 3.0) -> Tensor:
    distance = tv(logits, targets)
    weight = torch.exp(-eta * (1 - distance.detach()))
    return weight * kl_div(logits, targets) + (1 - weight) * distance


LOSSES: dict[str, Callable[..., Tensor]] = {
    "fused_kl_div_loss": kl_div,
    "fused_reverse_kl_div_loss": reverse_kl,
    "fused_js_div_loss": jsd,
    "fused_ce_loss": ce,
    "fused_tv_loss": tv,
    "fused_nla_loss": negative_log_acceptance,
    "fused_lk_hybrid_loss": lk_hybrid,
}
