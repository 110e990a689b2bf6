"""Every wrong argument of a linear loss is a named error, before any product."""

from typing import Any

import pytest
import torch

import kdfast
from kdfast import products

H, W, TH, TW = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 6), torch.randn(5, 6)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
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
    ({"inplace": True}, ValueError, "^inplace: leave it out"),
    ({"temperature": 0}, ValueError, "^temperature: 0 must be finite and > 0"),
    ({"T": 2.0}, TypeError, r"linear_kd_loss\(\) got an unexpected keyword argument 'T'"),
    ({"backend": "gpu"}, ValueError, "^backend: 'gpu' is not one of"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: ", ".join(case[0]))
def test_a_wrong_argument_raises_a_named_error_before_any_product(
    cpu: str, case: tuple[dict[str, Any], type[Exception], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, error, words = case
    monkeypatch.setattr(products.Head, "logits", lambda *_: pytest.fail("a product was done"))
    arguments = {"student_hidden": H, "student_weight": W, "teacher_hidden": TH, "teacher_weight": TW}
    with pytest.raises(error, match=rf"(?s){words}") as caught:
        kdfast.linear_kd_loss(**arguments | given)
    assert type(caught.value) is error
