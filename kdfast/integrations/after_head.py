"""What a model does to its head's product before it returns it as logits: a scale, a softcap."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.integrations.model_forward import called_once, forward_instead, logits_of, output_head
from kdfast.tensor_checks import kind

PROBES = (0.0, 2.0**-20, -1.0, 1.0, 5.0, -30.0, 200.0, -1e30)


class AfterHead(NamedTuple):
    """What a model makes of its head's product z: scale * z, or softcap * tanh(scale * z / softcap)."""

    scale: float
    softcap: float | None


def probe(model: Any, forward: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Puts PROBES in place of the head's product, to see what the model makes of them; for `kdfast`."""
    head, found = output_head(model), []

    def probes(hidden: Tensor) -> Tensor:
        found.append(hidden)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        values = torch.tensor(PROBES, dtype=dtype, device=hidden.device)
        ones = (1,) * (hidden.dim() - 1)
        return values.view(-1, *ones).repeat(*ones, head.out_features)

    with forward_instead(head, probes):
        outputs = forward(*args, **kwargs)
    called_once(model, found)
    return {"logits": logits_of(outputs)}


def after_head(model: Any, logits: Tensor) -> AfterHead:
    """Scale and softcap, from what the model has made of the PROBES.

    Measured, because models do not agree on the names: `logits_scaling` divides logits in Granite, multiplies them in
    HyperCLOVA X, and divides the head's input in MiniCPM3.
    """
    values = logits.reshape(len(PROBES), -1).double()
    z = torch.tensor(PROBES, dtype=torch.float64, device=values.device)[:, None]
    scale, largest = values[1, 0].item() / PROBES[1], -values[-1, 0].item()
    softcap = None if largest > 1e20 else largest
    if abs(scale - 1) < 1e-6:  # rounding
        scale = 1.0
    expected = scale * z if softcap is None else softcap * torch.tanh(scale * z / softcap)
    if not (scale > 0 and torch.isclose(values, expected, rtol=1e-2).all()):
        raise ValueError(
            f"linear: {kind(model)} changes its logits by more than a scale and a softcap; set linear=False"
        )
    return AfterHead(scale, softcap)


def scaled(prefix: str, options: dict[str, Any], after: AfterHead) -> dict[str, Any]:
    """kd_loss's scale and softcap from the head's product: the model's own, then the options'."""
    scale, softcap = f"{prefix}logit_scale", f"{prefix}softcap"
    if after.softcap is None:
        return {scale: after.scale * options[scale]}
    if options[scale] != 1 or options[softcap] is not None:
        raise ValueError(
            f"kd: {scale} and {softcap} apply to logits that the model has capped itself, which linear=True cannot do; "
            "set linear=False, or leave them out"
        )
    return {scale: after.scale, softcap: after.softcap}
