"""Where Liger looks its autograd functions up: kdfast's functions are put there."""

from collections.abc import Callable
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

from kdfast.integrations.liger import cross_entropy, distillation, probabilities
from kdfast.integrations.patching import Patch

# By autograd function: the module of its class in liger_kernel.transformers, and what stands in its place.
FUNCTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "LigerJSDFunction": ("jsd", probabilities.jsd),
    "LigerKLDivLossFunction": ("kl_div", probabilities.kl_div),
    "LigerTVDLossFunction": ("tvd", probabilities.tvd),
    "LigerFusedLinearJSDFunction": ("fused_linear_jsd", distillation.fused_linear_jsd),
    "LigerFusedLinearKLDivFunction": ("fused_linear_kl_div", distillation.fused_linear_kl_div),
    "LigerFusedCETVDFunction": ("fused_ce_tvd", distillation.fused_ce_tvd),
    "LigerCrossEntropyFunction": ("cross_entropy", cross_entropy.cross_entropy),
    "LigerFusedLinearCrossEntropyFunction": ("fused_linear_cross_entropy", cross_entropy.fused_linear_cross_entropy),
}
WITHOUT_A_FUNCTION = ("LigerFusedCETVDFunction",)  # liger_kernel.transformers.functional has none for it
DISPATCHED: dict[str, Callable[..., Any]] = {
    "jsd": probabilities.jsd,
    "kl_div": probabilities.kl_div,
    "fused_linear_jsd": distillation.fused_linear_jsd,
    "cross_entropy": cross_entropy.cross_entropy,
    "fused_linear_cross_entropy": cross_entropy.fused_linear_cross_entropy,
}


def patch() -> Patch:
    """Puts kdfast in the place of Liger's losses, until `undo()` or the end of a `with` statement.

    It replaces what the classes of `liger_kernel.transformers` and `liger_kernel.chunked_loss`, the functions of
    `liger_kernel.transformers.functional` and `liger_kernel.chunked_loss.functional`, and the dispatched ones of
    `liger_kernel.functional` call. The classes and functions stay, so that it does not matter when, or from where, a
    trainer imported them, and modules that exist already use kdfast too. Models that Liger patched itself, as by
    `TrainingArguments(use_liger_kernel=True)`, do so for their cross-entropy.

    What kdfast does not compute runs Liger's own code, with a `FallbackWarning`. An implementation that a call
    of `liger_kernel.functional` names by `impl=` runs as named.

    Raises:
        AttributeError: this version of Liger has no such function. Nothing is patched then.

    Examples:
        >>> with kdfast.integrations.liger.patch():
        ...     trainer.train()
    """
    patch = Patch("liger_kernel", "0.8.5")
    for name, (module, function) in FUNCTIONS.items():
        patch.replace(f"liger_kernel.transformers.{module}", name, partial(_with_apply, function))
        if name not in WITHOUT_A_FUNCTION:
            patch.replace("liger_kernel.transformers.functional", name, partial(_with_apply, function))
    for module in ("liger_kernel.functional", "liger_kernel.transformers.cross_entropy"):
        patch.replace(module, "dispatch", _dispatch)
    chunked: Callable[..., Any] = distillation.chunked_jsd
    patch.replace("liger_kernel.chunked_loss.jsd_loss", "LigerFusedLinearJSDFunction", partial(_with_apply, chunked))
    patch.replace("liger_kernel.chunked_loss.functional", "liger_fused_linear_jsd", lambda own: partial(chunked))
    return patch


def _with_apply(replacement: Callable[..., Any], own: Any) -> SimpleNamespace:
    return SimpleNamespace(apply=replacement)


def _dispatch(own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def dispatch(op: str, *arguments: Any, **options: Any) -> Any:
        if op in DISPATCHED and not any(options.values()):  # impl= and mode= name one of Liger's implementations
            return DISPATCHED[op](*arguments)
        return own(op, *arguments, **options)

    return dispatch
