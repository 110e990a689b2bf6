"""Wrong arguments of token_log_probs and linear_token_log_probs raise errors that say what is right."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import batch, to_default_device
from gpu import ON_DEVICE

from kdfast import linear_token_log_probs, products, token_log_probs

S, _, Y = batch(3, 5)  # three rows of five classes
H, W = torch.ones(3, 4), torch.ones(5, 4)
NAN, INF = float("nan"), float("inf")

# argument, its value, further arguments -> error and words of its message
SHARED: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    ("ids", [0, 1, 2], {}, TypeError, "must be a tensor, not list"),
    ("ids", None, {}, TypeError, "must be a tensor, not None"),
    ("ids", torch.nested.nested_tensor([Y[:2], Y[2:]], layout=torch.jagged), {}, TypeError, "is a nested tensor"),
    ("ids", Y.float(), {}, RuntimeError, "torch.float32, but it must be torch.int32 or torch.int64 class indices"),
    ("ids", Y.bool(), {}, RuntimeError, "torch.bool, but it must be torch.int32 or torch.int64"),
    ("ids", Y.to("meta"), {}, RuntimeError, "is on meta, but logits is on (cpu|cuda)"),
    *(
        ("ids", value, {}, ValueError, rf"has shape {re.escape(shape)}, .* it must be \(3,\), or \(3, K\) with K >= 1")
        for value, shape in (
            (Y[:2], "(2,)"),
            (Y[:2, None], "(2, 1)"),
            (Y[:0], "(0,)"),
            (Y[:, None][:, :0], "(3, 0)"),
            (Y[:, None, None], "(3, 1, 1)"),
            (Y[0], "()"),
        )
    ),
    ("ids", torch.tensor([0, 5, 1]), {}, IndexError, r"5 in row 1, entry 0 is out of range: with V = 5 .*\[0, 4\]"),
    ("ids", torch.tensor([0, 1, -1]), {}, IndexError, "-1 in row 2, entry 0 is out of range: with V = 5"),
    ("ids", torch.tensor([-100, 1, 2]), {"ignore_index": 7}, IndexError, "-100 in row 0"),
    ("ids", torch.tensor([[0, -1], [2, 9], [1, 1]]), {}, IndexError, "9 in row 1, entry 1 is out of range"),
    ("ids", torch.tensor([0, 4, 0]), {"vocab_size": 4}, IndexError, r"4 in row 1, .* V = 4 it must be in \[0, 3\]"),
    ("ids", torch.tensor([2**40, 0, 0]), {}, IndexError, f"{2**40} in row 0"),
    *(
        (argument, value, {}, ValueError, re.escape(f"{value!r} must be finite and > 0"))
        for argument in ("temperature", "logit_scale", "softcap")
        for value in (0, -0.5, NAN, INF)
    ),
    *(
        (argument, value, {}, TypeError, "must be a number.*, not " + re.escape(repr(value)))
        for argument in ("temperature", "logit_scale", "softcap")
        for value in ("2", True, [2.0], *([] if argument == "softcap" else [None]))
    ),
    ("temperature", np.array([1.0, 2.0]), {}, TypeError, "must be a number"),
    ("temperature", torch.ones(2), {}, ValueError, r"has shape \(2,\), but with logits of shape \(3, 5\) .* \(3,\)"),
    ("temperature", torch.ones(3, requires_grad=True), {}, RuntimeError, "requires grad, but .* no derivative.*detach"),
    ("temperature", torch.ones(3, device="meta"), {}, RuntimeError, "is on meta, but logits is on"),
    ("temperature", torch.tensor([1.0, 0.0, 2.0]), {}, ValueError, "0 in row 1, but it must be finite and > 0"),
    ("softcap", torch.tensor(30.0), {}, TypeError, "must be a number, not tensor"),
    ("vocab_size", 0, {}, ValueError, "0 must be at least 1"),
    ("vocab_size", 6, {}, ValueError, r"6 must lie in \[1, 5\], the classes of logits"),
    ("vocab_size", 4.0, {}, TypeError, "must be an int, not 4.0"),
    ("ignore_index", 1.0, {}, TypeError, "must be an int, not 1.0"),
    ("ignore_index", 2**70, {}, ValueError, "64 bits"),
    ("entropy", 1, {}, TypeError, "must be a bool, not 1"),
    ("backend", "gpu", {}, ValueError, "'gpu' is not one of None, 'reference', 'cpu', 'triton', 'cuda'"),
]
OF_LOGITS: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    ("logits", [1.0], {}, TypeError, "must be a tensor, not list"),
    ("logits", S.long(), {}, RuntimeError, "torch.int64, but it must be one of torch.float32"),
    ("logits", torch.tensor(1.0), {}, ValueError, r"has shape \(\), but it must be \(..., V\) with V >= 1"),
    ("logits", torch.empty(3, 0), {}, ValueError, r"has shape \(3, 0\), but it must be \(..., V\) with V >= 1"),
]
OF_HEADS: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    ("hidden", None, {}, TypeError, "must be a tensor, not None"),
    ("hidden", H.long(), {}, RuntimeError, "torch.int64, but it must be one of torch.float32"),
    ("hidden", torch.tensor(1.0), {}, ValueError, r"has shape \(\), but it must be \(..., H\) with H >= 1"),
    ("weight", W[:, :3], {}, ValueError, r"has shape \(5, 3\), but with hidden of shape \(3, 4\) it must be \(V, 4\)"),
    ("weight", W.double(), {}, RuntimeError, "has dtype torch.float64, but hidden has torch.float32"),
    ("weight", W.to("meta"), {}, RuntimeError, "is on meta, but hidden is on (cpu|cuda)"),
    ("bias", torch.zeros(4), {}, ValueError, r"has shape \(4,\), but with weight of shape \(5, 4\) it must be \(5,\)"),
    ("chunk_rows", 0, {}, ValueError, "0 must be at least 1"),
    ("chunk_rows", 2.0, {}, TypeError, "must be an int, not 2.0"),
    ("accumulate_dtype", torch.int64, {}, ValueError, "torch.int64 is not one of torch.float32"),
]


def _id(case: tuple[Any, ...]) -> str:
    argument, value, others, *_ = case
    value = f"{value.dtype}{tuple(value.shape)}" if isinstance(value, torch.Tensor) else str(value)[:24]
    return f"{argument}={value}" + "".join(f", {k}" for k in others)


@pytest.mark.parametrize("case", [*SHARED, *OF_LOGITS], ids=_id)
def test_a_wrong_argument_raises_an_error_that_says_what_is_right(backend: str, case: tuple[Any, ...]) -> None:
    argument, value, others, error, words = to_default_device(case)
    if ON_DEVICE and "in row" in words:
        pytest.skip("values on a GPU are not checked: reading them would synchronize")
    logits, ids = to_default_device((S.clone().requires_grad_(), Y))
    arguments = {"logits": logits, "ids": ids, "backend": backend} | others | {argument: value}
    with pytest.raises(error, match=rf"(?s)^{argument}: .*{words}") as caught:
        token_log_probs(**arguments)
    assert type(caught.value) is error
    torch.testing.assert_close(token_log_probs(logits, ids, backend=backend)[0].exp().shape, ids.shape)


@pytest.mark.parametrize("case", [*SHARED, *OF_HEADS], ids=_id)
def test_a_wrong_argument_of_a_head_raises_before_any_product(
    cpu: str, case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    argument, value, others, error, words = case
    monkeypatch.setattr(products.Head, "logits", lambda *_: pytest.fail("a product was done"))
    with pytest.raises(error, match=rf"(?s)^{argument}: .*{words}") as caught:
        linear_token_log_probs(**{"hidden": H, "weight": W, "ids": Y} | others | {argument: value})
    assert type(caught.value) is error


def test_unexpected_keywords_and_positions_raise_type_error() -> None:
    for function, given in ((token_log_probs, (S, Y)), (linear_token_log_probs, (H, W, Y))):
        with pytest.raises(TypeError, match="unexpected keyword argument 'T'"):
            function(*given, T=2.0)
        with pytest.raises(TypeError, match="positional"):
            function(*given, 2.0)


def test_an_id_that_is_out_of_range_is_nan_on_a_device() -> None:
    if not ON_DEVICE:
        pytest.skip("on a CPU it is an IndexError")
    logits, ids = S.cuda(), torch.tensor([0, 9, -1], device="cuda")
    assert token_log_probs(logits, ids).log_probs.isnan().tolist() == [False, True, True]
