"""Every wrong argument is an error that names it, what it was and what it may be, and the next call works."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import here
from gpu import ON_DEVICE
from torch import Tensor
from wrong_arguments import WRONG, S, T, Y

from kdfast import KDLoss, kd_loss, tempered_softmax


def _id(case: tuple[Any, ...]) -> str:
    argument, value, others, *_ = case
    value = f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else str(value)[:24]
    return f"{argument}={value}" + "".join(f", {k}" for k in others)


def _bytes(x: Tensor) -> list[int]:
    return x.detach().contiguous().flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("case", WRONG, ids=_id)
def test_a_wrong_argument_raises_an_error_that_says_what_is_right(backend: str, case: tuple[Any, ...]) -> None:
    argument, value, others, error, words = here(case)
    if ON_DEVICE and backend == "triton" and "in row" in words:
        pytest.skip("what tensors on a GPU hold is not looked at, which would mean to wait for them")
    s, t, y = here((S, T, Y))
    settings = {"teacher": t, "labels": y, "backend": backend} | others | {argument.split("[")[0]: value}
    student = settings.pop("student_logits", s.clone().requires_grad_().clone())  # a non-leaf, for inplace
    given = (student, value, *others.values(), t, y)
    tensors = [x for x in given if isinstance(x, Tensor) and x.device.type != "meta"]
    before = [_bytes(x) for x in tensors]
    versions = [x._version for x in tensors]
    for inplace in (False, True):  # an error comes before anything is written
        given = {"inplace": inplace} | settings
        with pytest.raises(error, match=rf"(?s)^{re.escape(argument)}: .*{words}") as caught:
            kd_loss(student, **given)
        # the type itself: an IndexError is no LookupError of another kind, a RuntimeError no NotImplementedError
        assert type(caught.value) is error
        for x, old, version in zip(tensors, before, versions, strict=True):
            assert _bytes(x) == old
            assert x._version == version
    torch.testing.assert_close(kd_loss(s, t, y, backend=backend), kd_loss(s, t, y, backend="reference"))


def test_unexpected_keywords_and_positions_raise_type_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'T'"):
        kd_loss(S, T, Y, T=2.0)
    with pytest.raises(TypeError, match="positional"):
        kd_loss(S, T, Y, 2.0)
    for function in (lambda **options: kd_loss(S, T, Y, **options), KDLoss):
        with pytest.raises(TypeError, match="unexpected keyword argument 'weight'; the weights of rows are row_weight"):
            function(weight=torch.ones(3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'row_weight'"):
        KDLoss(row_weight=torch.ones(3))
    with pytest.raises(TypeError, match="positional"):
        KDLoss(2.0)


SOFTMAX_WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("logits", [1.0], TypeError, "must be a tensor, not list"),
    ("logits", S.long(), RuntimeError, "torch.int64, but it must be one of torch.float32"),
    ("logits", torch.tensor(1.0), ValueError, r"has shape \(\), but it must be \(..., V\) with V >= 1"),
    ("logits", torch.empty(3, 0), ValueError, r"has shape \(3, 0\), but it must be \(..., V\) with V >= 1"),
    ("temperature", 0, ValueError, "0 must be finite and > 0"),
    ("temperature", "2", TypeError, "must be a number.*, not '2'"),
    # the logits are called so here
    ("temperature", torch.ones(2), ValueError, r"has shape \(2,\), but with logits of .*3, 5\) it must be \(3,\)"),
    ("temperature", torch.tensor([1.0, -1.0, 2.0]), ValueError, "-1 in row 1, but it must be finite and > 0"),
    ("out_dtype", torch.int64, ValueError, "torch.int64 is not one of torch.float32"),
    ("out_dtype", "float32", ValueError, "'float32' is not one of torch.float32"),
    ("log", "no", TypeError, "must be a bool, not 'no'"),
]


@pytest.mark.parametrize("case", SOFTMAX_WRONG, ids=lambda case: f"{case[0]}={str(case[1])[:24]}")
def test_a_wrong_argument_of_tempered_softmax_raises_a_named_error(case: tuple[Any, ...]) -> None:
    argument, value, error, words = case
    settings = {"logits": S.clone()} | {argument: value}
    with pytest.raises(error, match=rf"(?s)^{argument}: .*{words}"):
        tempered_softmax(**settings)
    torch.testing.assert_close(tempered_softmax(S, 2), torch.softmax(S / 2, -1))


def test_numbers_may_be_numpy_scalars_or_integers(backend: str) -> None:
    s, t, y = here((S, T, Y))
    want = kd_loss(s, t, y, temperature=2.0, alpha=0.5, backend=backend)
    for two, half in ((2, 0.5), (np.float32(2), np.float64(0.5)), (np.int64(2), np.float16(0.5))):
        assert torch.equal(kd_loss(s, t, y, temperature=two, alpha=half, backend=backend), want)
    assert torch.equal(kd_loss(s, t, y, temperature=2, alpha=0.5, normalizer=np.int64(3), backend=backend), want)
