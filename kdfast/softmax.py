"""tempered_softmax: the paper's softened probabilities."""

from typing import Any

import torch
from torch import Tensor

from kdfast import reference
from kdfast.checks import check_bool
from kdfast.derivatives import is_transformed
from kdfast.tensor_checks import FLOATS, check_logits, check_temperature, check_temperatures
from kdfast.torch_private import below_autograd


def tempered_softmax(
    logits: Tensor, temperature: float | Tensor = 1.0, *, log: bool = False, out_dtype: torch.dtype | None = None
) -> Tensor:
    r"""softmax(logits / T) over the last dimension (Hinton, Vinyals & Dean 2015, equation 1), differentiable.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64. The sums are float32, for float64 logits float64.
        temperature: T > 0, a number, a 0-dim tensor, or one per row, (...); a tensor must not require grad.
        log: True returns its logarithm instead.
        out_dtype: the result's dtype, one of the above; None: the logits' own.

    Returns:
        (..., V) of `out_dtype`. Soft targets for `kd_loss` with `target="probs"` or `"log_probs"`.
        Twice differentiable. Under transforms of torch.func and in forward-mode AD, all of which it supports, it is
        computed by plain PyTorch.

    Raises:
        TypeError, ValueError, RuntimeError: as `kd_loss` for its arguments of these names.

    Examples:
        >>> tempered_softmax(torch.tensor([[0.0, 4.0]]), temperature=2.0)
        tensor([[0.1192, 0.8808]])
    """
    check_logits("logits", logits)
    number = check_temperature("temperature", temperature)
    rows = check_temperatures("temperature", temperature, logits.shape[:-1], logits, "logits")
    check_bool("log", log)
    dtype = logits.dtype if out_dtype is None else out_dtype
    if dtype not in FLOATS:
        raise ValueError(f"out_dtype: {out_dtype!r} is not one of torch.float32, bfloat16, float16, float64")
    if torch.compiler.is_compiling():
        return torch.ops.kdfast.tempered_softmax(logits, rows, number, log, dtype)
    if is_transformed():  # plain PyTorch, for every transform
        return reference.tempered_softmax(logits, rows, number, log, dtype)
    if logits.requires_grad and torch.is_grad_enabled():
        return TemperedSoftmax.apply(logits, rows, number, log, dtype)
    with below_autograd():
        return torch.ops.kdfast.tempered_softmax(logits, rows, number, log, dtype)


class TemperedSoftmax(torch.autograd.Function):
    """softmax(logits / T) and its logarithm; twice differentiable, as torch.softmax is."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype
    ) -> Tensor:  # (..., V)
        with below_autograd():
            output = torch.ops.kdfast.tempered_softmax(logits, temperatures, temperature, log, dtype)
        ctx.save_for_backward(output, temperatures)
        ctx.temperature, ctx.log, ctx.dtype = temperature, log, logits.dtype
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        output, temperatures = ctx.saved_tensors
        args = (grad, output, temperatures, ctx.temperature, ctx.log, ctx.dtype)
        return torch.ops.kdfast.tempered_softmax_backward(*args), None, None, None, None
