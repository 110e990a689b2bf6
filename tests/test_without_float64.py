"""Devices without float64, as Apple's MPS and some of Intel's are, get the reference, which makes none there."""

from typing import Any

import pytest
import torch
from cases import batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast import kd_loss, reference, reference_sums
from kdfast.options import check_inputs, check_settings
from kdfast.rows import loss_dtype


class RefuseFloat64(TorchDispatchMode):
    """A device without float64."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            assert not (isinstance(x, Tensor) and x.dtype == torch.float64), function
        return result


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "skew_reverse_kl", "dkd", "logit_mse"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_reference_makes_no_float64_of_float32(
    monkeypatch: pytest.MonkeyPatch, divergence: str, reduction: str
) -> None:
    for module in (reference, reference_sums):
        monkeypatch.setattr(module, "check_values", lambda *_: None)  # of CPU tensors alone
    monkeypatch.setattr(reference_sums, "wide_dtype", loss_dtype)
    s, t, y = batch(4, 7)
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0])
    per_row = torch.linspace(1, 2, 4)
    every = kd_loss.__kwdefaults__ | {
        "divergence": divergence, "reduction": reduction, "temperature": per_row, "row_weight": weight, "z_loss": 0.1,
        "label_smoothing": 0.1, "return_metrics": True,
    }  # fmt: skip
    inputs, settings = check_inputs(s, t, y, every, check_settings(every, True))
    with RefuseFloat64():
        _, table, _ = reference_sums.stats(s, inputs, settings)
        reference_sums.grad(s, table, torch.ones(4 if reduction == "none" else ()), inputs, settings)
        if reduction != "none":
            reference.loss_grad(s, inputs, settings)
            reference.loss_grad_(s.clone(), inputs, settings)
        if divergence in ("forward_kl", "jsd", "skew_reverse_kl"):
            sums = reference_sums.pointwise_sums(s, reference_sums.sums(s, inputs, settings), inputs, settings)
            reference_sums.losses_and_coefficients(s, sums, inputs, settings)
        probabilities = reference.tempered_softmax(s, per_row, 1.0, False, torch.float32)
        reference.tempered_softmax_backward(s, probabilities, per_row, 1.0, False, torch.float32)
        reference.scale_(s.clone(), torch.tensor(2.0))
