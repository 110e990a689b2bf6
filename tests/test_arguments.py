"""Every wrong argument raises an error that says its name, its value and what it may be; the next call works."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import to_default_device
from gpu import ON_DEVICE
from torch import Tensor
from wrong_arguments import WRONG, S, T, Y

from kdfast import KDLoss, divergences, kd_loss, linear_kd_loss, products, tempered_softmax


def _id(case: tuple[Any, ...]) -> str:
    argument, value, others, *_ = case
    value = f"{value.dtype}{tuple(value.shape)}" if isinstance(value, Tensor) else str(value)[:24]
    return f"{argument}={value}" + "".join(f", {k}" for k in others)


def _bytes(x: Tensor) -> list[int]:
    return x.detach().contiguous().flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("case", WRONG, ids=_id)
def test_a_wrong_argument_raises_an_error_that_says_what_is_right(backend: str, case: tuple[Any, ...]) -> None:
    argument, value, others, error, words = to_default_device(case)
    if ON_DEVICE and backend == "triton" and "in row" in words:
        pytest.skip("values on a GPU are not checked: reading them would synchronize")
    s, t, y = to_default_device((S, T, Y))
    settings = {"teacher": t, "labels": y, "backend": backend} | others | {re.split(r"[.[]", argument)[0]: value}
    student = settings.pop("student_logits", s.clone().requires_grad_().clone())  # a non-leaf, for inplace
    given = (student, value, *others.values(), t, y)
    tensors = [x for x in given if isinstance(x, Tensor) and x.device.type != "meta" and not x.is_nested]
    before = [_bytes(x) for x in tensors]
    versions = [x._version for x in tensors]
    for inplace in (False, True):  # the error comes before anything is written
        given = {"inplace": inplace} | settings
        with pytest.raises(error, match=rf"(?s)^{re.escape(argument)}: .*{words}") as caught:
            kd_loss(student, **given)
        # no subclass, such as NotImplementedError for RuntimeError
        assert type(caught.value) is error
        for x, old, version in zip(tensors, before, versions, strict=True):
            assert _bytes(x) == old
            assert x._version == version
    torch.testing.assert_close(kd_loss(s, t, y, backend=backend), kd_loss(s, t, y, backend="reference"))


def test_options_that_change_are_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [1.0, 8.0]
    mine = divergences.Divergence(lambda p, q, log_p, log_q, beta: p, lambda p, q, log_p, log_q, beta: p)
    with monkeypatch.context() as change:
        change.setitem(divergences.DIVERGENCES, "mine", mine)
        good: list[dict[str, Any]] = [{"temperature": 1.0}, {"divergence": "dkd", "dkd_weights": weights}]
        for options in (*good, *good, {"divergence": "mine"}):
            kd_loss(S, T, Y, backend="reference", **options)
    weights[0] = -1.0
    for options in ({"temperature": True}, good[1], {"divergence": "mine"}):
        with pytest.raises((TypeError, ValueError)):
            kd_loss(S, T, Y, backend="reference", **options)


def test_unexpected_keywords_and_positions_raise_type_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'T'"):
        kd_loss(S, T, Y, T=2.0)
    with pytest.raises(TypeError, match="positional"):
        kd_loss(S, T, Y, 2.0)
    for function in (lambda **options: kd_loss(S, T, Y, **options), KDLoss):
        with pytest.raises(
            TypeError, match="unexpected keyword argument 'weight'; weights of rows are called row_weight"
        ):
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
    s, t, y = to_default_device((S, T, Y))
    want = kd_loss(s, t, y, temperature=2.0, alpha=0.5, backend=backend)
    for two, half in ((2, 0.5), (np.float32(2), np.float64(0.5)), (np.int64(2), np.float16(0.5))):
        assert torch.equal(kd_loss(s, t, y, temperature=two, alpha=half, backend=backend), want)
    assert torch.equal(kd_loss(s, t, y, temperature=2, alpha=0.5, normalizer=np.int64(3), backend=backend), want)


H, W, TH, TW = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 6), torch.randn(5, 6)
LINEAR_WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_hidden": [1.0]}, TypeError, "^student_hidden: must be a tensor, not list"),
    ({"student_hidden": H.long()}, RuntimeError, "^student_hidden: has dtype torch.int64, but it must be one of"),
    ({"student_hidden": torch.tensor(1.0)}, ValueError, r"^student_hidden: has shape \(\), but it must be \(..., H\)"),
    ({"student_weight": None}, TypeError, "^student_weight: must be a tensor, not None"),
    ({"student_weight": W.T}, ValueError, r"^student_weight: has shape \(4, 5\), .* \(3, 4\) it must be \(V, 4\)"),
    ({"student_weight": W[0]}, ValueError, r"^student_weight: has shape \(4,\), .* must be \(V, 4\) with V >= 1"),
    ({"student_hidden": H[:, :0]}, ValueError, r"^student_hidden: has shape \(3, 0\), but it must be .* with H >= 1"),
    ({"student_weight": W[:0]}, ValueError, r"^student_weight: has shape \(0, 4\), .* with V >= 1"),
    ({"student_weight": W.double()}, RuntimeError, "^student_weight: has dtype torch.float64, but student_hidden has"),
    ({"student_weight": W.to("meta")}, RuntimeError, "^student_weight: is on meta, but student_hidden is on cpu"),
    ({"student_bias": torch.zeros(4)}, ValueError, r"^student_bias: has shape \(4,\), .* it must be \(5,\)"),
    ({"student_bias": torch.zeros(5).half()}, RuntimeError, "^student_bias: has dtype torch.float16, but"),
    ({"teacher_hidden": None}, TypeError, "^teacher_hidden: must be a tensor, not None"),
    ({"teacher_hidden": [TH]}, TypeError, "^teacher_hidden: must be a tensor, not list"),
    ({"teacher_hidden": TH[:2]}, ValueError, r"^teacher: has shape \(2, 5\), .* must be \(3, V\)"),
    ({"teacher_weight": W}, ValueError, r"^teacher_weight: has shape \(5, 4\), .* must be \(V, 6\)"),
    ({"teacher_weight": TW[:4]}, ValueError, "^teacher: has 4 classes, but student_logits has 5; .*vocab_size"),
    ({"teacher_weight": TW[:4], "vocab_size": 5}, ValueError, "^vocab_size: 5 is more than the 4 classes of teacher"),
    ({"teacher_bias": torch.zeros(4)}, ValueError, r"^teacher_bias: has shape \(4,\), .* it must be \(5,\)"),
    ({"teacher_weight": None}, ValueError, r"^teacher: has 6 classes, but student_logits has 5"),
    ({"teacher_weight": None, "teacher_bias": W[:, 0]}, ValueError, "^teacher_bias: given without teacher_weight"),
    ({"target": "probs"}, ValueError, "^target: 'probs' with a teacher_weight, whose product gives 'logits'"),
    ({"labels": torch.tensor([0, 5, 1])}, IndexError, "^labels: label 5 in row 1 is out of range"),
    ({"labels": torch.tensor([0, 1, 7]), "chunk_rows": 1}, IndexError, "^labels: label 7 in row 2 is out of range"),
    ({"chunk_rows": 0}, ValueError, "^chunk_rows: 0 must be at least 1"),
    ({"chunk_rows": 2.0}, TypeError, "^chunk_rows: must be an int, not 2.0"),
    ({"accumulate_dtype": torch.int64}, ValueError, "^accumulate_dtype: torch.int64 is not one of torch.float32"),
    ({"accumulate_dtype": None}, ValueError, "^accumulate_dtype: None is not one of"),
    ({"inplace": True}, ValueError, "^inplace: must be False"),
    ({"temperature": 0}, ValueError, "^temperature: 0 must be finite and > 0"),
    ({"T": 2.0}, TypeError, r"linear_kd_loss\(\) got an unexpected keyword argument 'T'"),
    ({"backend": "gpu"}, ValueError, "^backend: 'gpu' is not one of"),
]


@pytest.mark.parametrize("case", LINEAR_WRONG, ids=lambda case: ", ".join(case[0]))
def test_a_wrong_argument_of_a_linear_loss_raises_before_any_product(
    cpu: str, case: tuple[dict[str, Any], type[Exception], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, error, words = case
    monkeypatch.setattr(products.Head, "logits", lambda *_: pytest.fail("a product was done"))
    arguments = {"student_hidden": H, "student_weight": W, "teacher_hidden": TH, "teacher_weight": TW}
    with pytest.raises(error, match=rf"(?s){words}") as caught:
        linear_kd_loss(**arguments | given)
    assert type(caught.value) is error
