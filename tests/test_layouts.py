"""The numbers are the same for any shape of the logits, and any memory layout of labels and weights.

Memory layouts of logits are an axis of calls.py.
"""

import pytest
import torch
from cases import F16, F32, F64, REDUCTIONS, batch, divergences_for, dtypes_for, labels_for
from judge import judge, run

ROWS, VOCAB = 6, 1000


@pytest.mark.parametrize("expanded", [False, True])
def test_labels_and_row_values_may_have_any_strides(backend: str, expanded: bool) -> None:
    student, teacher, labels = batch(ROWS, VOCAB)
    wide_labels = torch.full((2 * ROWS,), 10**6)  # not a label
    wide_labels[::2] = labels
    labels, temperature = wide_labels[::2], torch.arange(1.0, 2 * ROWS + 1)[::2]
    if expanded:
        labels, temperature = (x[1].expand(ROWS) for x in (labels, temperature))
    settings = {"row_weight": torch.tensor(0.5).expand(ROWS), "temperature": temperature}
    judge(student, teacher, labels, backend=backend, reduction="none" if expanded else "mean", **settings)


@pytest.mark.parametrize("shape", [(), (2, 1, 3), (2, 3, 2)])  # of the rows: 1-dim and 4-dim logits
def test_logits_may_have_any_number_of_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    for dtype in (F32, F16):  # gradients computed in forward, and in backward
        student, teacher, labels = batch(torch.Size(shape).numel(), 33, dtype)
        student, teacher, labels = student.view(*shape, 33), teacher.view(*shape, 33), labels.view(shape)
        weight, T = torch.rand(shape) + 0.5, torch.rand(shape) + 1
        for reduction in ("batchmean", "none"):
            judge(student, teacher, labels, backend=backend, reduction=reduction, row_weight=weight, temperature=T)


def test_four_dimensional_slices_give_the_right_numbers(backend: str) -> None:
    """No matrix of rows has their strides: sequences without their last position, of a few heads."""
    student, teacher, labels = batch(2 * 4 * 5, 33)
    student, teacher = (x.view(2, 4, 5, 33)[:, :3, :-1] for x in (student, teacher))
    judge(student, teacher, labels.view(2, 4, 5)[:, :3, :-1], backend=backend, temperature=2)


@pytest.mark.parametrize("vocab", [7, 100])  # short rows; others
def test_the_gradient_of_a_single_padded_class_is_0(cpu: str, vocab: int) -> None:
    student, teacher, labels = batch(ROWS, vocab + 1)
    for dtype in dtypes_for(cpu):
        for reduction in ("mean", "none"):
            settings = {"vocab_size": vocab, "inplace": True, "reduction": reduction}
            judge(student.to(dtype), teacher.to(dtype), labels % vocab, backend=cpu, **settings)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_an_empty_batch_has_loss_0(backend: str, shape: tuple[int, ...]) -> None:
    for dtype in dtypes_for(backend):
        empty = torch.empty(*shape, 33, dtype=dtype)
        for labelled in (False, True):
            for i, divergence in enumerate(divergences_for(backend)):
                reduction = REDUCTIONS[(i + labelled) % 4]  # each with some divergences
                labels = labels_for(divergence, torch.empty(shape, dtype=torch.int64), labelled)
                rows = torch.ones(shape, dtype=F64 if dtype == F64 else F32) if reduction == "none" else None
                settings = {"divergence": divergence, "reduction": reduction, "backend": backend}
                loss, grad = run(empty, empty, labels, rows, **settings)
                assert loss.shape == (shape if reduction == "none" else ())
                assert loss.eq(0).all()
                assert grad.shape == empty.shape
