"""Ensembles of more teachers than a GPU kernel takes: the paper's have 10 and 61."""

from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, F64, ON_GPU, as_target, batch
from judge import judge, truth_of
from judge_metrics import judge_metrics
from torch import Tensor

import kdfast

COUNT = 10
WEIGHTS = [1.0, 2.0, 0.0, 0.5, 1.0, 3.0, 1.0, 1.0, 0.25, 1.0]
VOCAB = 60
PER_ROW = torch.tensor([1.0, 2.0, 3.7, 0.5])
# Each option of a teacher, arithmetic and geometric where it matters.
CASES: dict[str, dict[str, Any]] = {
    "arithmetic": {"temperature": 2},
    "geometric": {"temperature": 2, "ensemble": "geometric"},
    "arithmetic probs": {"target": "probs", "divergence": "jsd"},
    "geometric probs": {"target": "probs", "ensemble": "geometric", "temperature": 2.5},
    "arithmetic log_probs": {"target": "log_probs", "divergence": "reverse_kl", "teacher_weights": WEIGHTS},
    "geometric log_probs": {"target": "log_probs", "ensemble": "geometric", "divergence": "forward_kl"},
    "arithmetic, capped": {"temperature": PER_ROW, "teacher_softcap": 20.0, "teacher_logit_scale": 0.7},
    "arithmetic, by row": {"teacher_temperature": PER_ROW, "teacher_logit_scale": 0.7, "divergence": "hellinger"},
    "geometric, capped": {
        "teacher_softcap": 20.0, "teacher_logit_scale": 0.7, "softcap": 30.0, "ensemble": "geometric",
        "teacher_temperature": PER_ROW, "teacher_weights": WEIGHTS, "divergence": "symmetric_kl",
    },
    "arithmetic dkd": {"divergence": "dkd", "temperature": 2, "reduction": "none"},
    "geometric dkd": {"divergence": "dkd", "temperature": 2, "ensemble": "geometric", "teacher_logit_scale": 1.5},
    "logit_mse": {"divergence": "logit_mse", "ensemble": "geometric", "teacher_softcap": 20.0},
    "arithmetic, padded": {"vocab_size": VOCAB - 7, "label_smoothing": 0.1},
    "geometric, padded": {"vocab_size": VOCAB - 7, "ensemble": "geometric", "inplace": True},
    "arithmetic, standardized": {"standardize": True, "temperature": 2},
    "geometric, standardized": {"standardize": True, "ensemble": "geometric", "divergence": "jsd"},
}  # fmt: skip
DTYPES = {"geometric": BF16, "arithmetic": F64, "arithmetic, capped": F16}  # else fp32


def ensemble(count: int, dtype: torch.dtype, settings: dict[str, Any]) -> tuple[Tensor, list[Tensor], Tensor]:
    """A student, teachers of different widths and dtypes, and labels, of which one is ignored."""
    student, _, labels = batch(4, VOCAB, dtype)
    vocab = settings.get("vocab_size", VOCAB)
    labels = labels.clamp_max(vocab - 1)
    labels[2] = -100
    teachers = []
    for i in range(count):
        given = (None, F32, BF16)[i % 3] or dtype
        t = as_target(batch(4, vocab, seed=i).teacher, settings.get("target", "logits")).to(given)
        teachers.append(torch.cat([t, t.new_full((4, i % 2 * 5), 1e4)], 1) if "vocab_size" in settings else t)
    return student, teachers, labels


@pytest.mark.beyond_cuda
@pytest.mark.parametrize("case", CASES)
def test_ten_teachers_are_right_with_every_option_of_a_teacher(backend: str, case: str, full: bool) -> None:
    settings, dtype = CASES[case], DTYPES.get(case, F32)
    student, teachers, labels = ensemble(COUNT, dtype, settings)
    by_row = full or backend not in ON_GPU or case in ("arithmetic", "geometric, capped")
    judge(student, teachers, labels, backend=backend, by_row=by_row, **settings)


@pytest.mark.beyond_cuda
@pytest.mark.parametrize(
    "case", ["arithmetic", "geometric, capped", "arithmetic log_probs", "arithmetic, standardized"]
)
def test_so_are_their_metrics(backend: str, case: str) -> None:
    settings = {k: v for k, v in CASES[case].items() if k != "inplace"}
    judge_metrics(*ensemble(COUNT, F32, settings), backend=backend, **settings)


@pytest.mark.beyond_cuda
@pytest.mark.parametrize("kind", ["arithmetic", "geometric"])
def test_sixty_one_teachers_are_as_good_as_one_where_they_agree(backend: str, kind: str) -> None:
    student, teacher, labels = batch(4, VOCAB)
    truth = truth_of(student, teacher, labels, {"temperature": 2})
    settings = {"temperature": 2, "ensemble": kind, "reduction": "none", "backend": backend}
    leaf = student.clone().requires_grad_()
    loss = kdfast.kd_loss(leaf, [teacher] * 61, labels, **settings)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach().double(), truth.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), truth.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.beyond_cuda
def test_a_bad_row_of_one_of_ten_teachers_affects_its_row_alone(backend: str) -> None:
    student, teachers, labels = ensemble(COUNT, F32, {})
    for t, row, value in ((teachers[4], 0, torch.nan), (teachers[9], 1, -torch.inf), (teachers[1], 2, torch.nan)):
        t[row] = value
    for kind in ("arithmetic", "geometric"):
        settings = {"ensemble": kind, "backend": backend, "reduction": "none"}
        loss = kdfast.kd_loss(student, teachers, labels, **settings)
        assert loss.isnan().tolist() == [True, True, False, False], "the third row is ignored"
