"""inplace=True: the gradient overwrites the logits, and an operator that still needs them raises an error."""

from collections.abc import Callable

import pytest
import torch
from cases import BACKENDS, BF16, F16, F32, leaf_batch
from torch import Tensor

from kdfast import kd_loss

ROWS, VOCAB = 6, 100

# gradient written in forward, and in backward
EITHER = pytest.mark.parametrize(("reduction", "dtype"), [("mean", F32), ("sum", BF16), ("none", F32), ("mean", F16)])


def data(dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    return leaf_batch(ROWS, VOCAB, dtype)


@EITHER
def test_an_operator_that_saved_the_logits_raises_in_its_backward(reduction, dtype, backend):
    s, t, y = data(dtype)
    logits = s.clone()
    other = logits.square().sum()  # needs the logits themselves for its gradient
    version = logits._version
    loss = kd_loss(logits, t, y, reduction=reduction, inplace=True, backend=backend).sum()
    if reduction == "none" or dtype == F16:
        assert logits._version == version, "forward only reads"
        loss.backward(retain_graph=True)
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@EITHER
def test_backward_raises_if_the_logits_were_changed_after_forward(reduction, dtype, backend):
    s, t, y = data(dtype)
    logits = s.clone()
    loss = kd_loss(logits, t, y, reduction=reduction, inplace=True, backend=backend).sum()
    with torch.no_grad():
        logits.zero_()  # the gradient, or what it is computed from
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@EITHER
def test_a_second_backward_raises_and_keeps_the_first_gradient(reduction, dtype, backend):
    s, t, y = data(dtype)
    loss = kd_loss(s.clone(), t, y, reduction=reduction, inplace=True, backend=backend).sum()
    loss.backward(retain_graph=True)
    first = s.grad.clone()
    with pytest.raises(RuntimeError, match="backpropagated through once|modified by an inplace operation"):
        loss.backward()
    assert torch.equal(s.grad, first)


A_LEAF = r"student_logits is a leaf \(or a view of one\) that requires grad"
OVERLAPPED = r"more than one element of student_logits refers to a single memory location; clone\(\) it first"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("view", "why"),
    [
        (lambda x: x, A_LEAF),
        (lambda x: x.view(2, 3, VOCAB), A_LEAF),
        (lambda x: x[1:, 2:], A_LEAF),
        (lambda x: x.detach().requires_grad_(), A_LEAF),  # a leaf that shares the leaf's storage
        (lambda x: (x * 1)[:1].expand(ROWS, VOCAB), OVERLAPPED),
        (lambda x: (x * 1)[:1].expand(ROWS, VOCAB)[1:], OVERLAPPED),
    ],
    ids=["the leaf", "a view", "a slice", "a detached leaf", "expanded", "a slice of expanded"],
)
def test_a_leaf_or_expanded_logits_raise_before_anything_is_written(view, why, reduction, backend):
    student = view(data()[0])
    before = student.detach().clone()
    with pytest.raises(RuntimeError, match=f"^inplace: {why}"):
        kd_loss(student, student.detach() + 1, reduction=reduction, inplace=True, backend=backend)
    assert torch.equal(student.detach(), before)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_row_expanded_to_one_row_can_be_overwritten(reduction, backend):
    row = data()[0][:1] * 1
    kd_loss(row.expand(1, VOCAB), torch.zeros(1, VOCAB), reduction=reduction, inplace=True, backend=backend)


# name: the shape of a larger tensor, and (ROWS, VOCAB) logits as a view of it
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "an offset": ((ROWS + 2, VOCAB), lambda x: x[2:]),
    "an offset that no vector is aligned to": ((ROWS * VOCAB + 1,), lambda x: x[1:].view(ROWS, VOCAB)),
    "rows apart": ((ROWS, VOCAB + 3), lambda x: x[:, 3:]),
    "every other row": ((2 * ROWS, VOCAB), lambda x: x[::2]),
    "transposed": ((VOCAB, ROWS), lambda x: x.T),
    "every other class": ((ROWS, 2 * VOCAB), lambda x: x[:, 1::2]),
    "a shifted sequence": ((2, ROWS // 2 + 1, VOCAB), lambda x: x[:, :-1]),
}


# Reductions and dtypes choose the kernel. Triton compiles for each alignment: in the fast tier each layout is tested in
# fp32 and in 16 bits. Layouts of logits that are not overwritten are an axis of calls.py.
KERNELS = (("mean", F32), ("none", F32), ("mean", BF16), ("mean", F16))
VIEWS = [
    pytest.param(*view, marks=pytest.mark.full if view[0] == "triton" and view[-1] == F16 else ())
    for view in ((backend, layout, *kernel) for backend in BACKENDS for layout in LAYOUTS for kernel in KERNELS)
]


@pytest.mark.parametrize(("backend", "layout", "reduction", "dtype"), VIEWS, indirect=["backend"])
def test_a_view_of_any_layout_becomes_its_gradient_and_nothing_else(layout, reduction, dtype, backend):
    s, t, y = data(dtype)
    shape, view = LAYOUTS[layout]
    whole, teacher = (torch.full(shape, 7.0, dtype=dtype) for _ in range(2))
    student_shape = view(whole).shape
    view(whole).copy_(s.detach().view(student_shape))
    view(teacher).copy_(t.view(student_shape))
    whole.requires_grad_()
    kd_loss(s, t, y, reduction=reduction, backend=backend).sum().backward()

    big = whole.clone()
    labels = y.view(student_shape[:-1])
    loss = kd_loss(view(big), view(teacher), labels, reduction=reduction, inplace=True, backend=backend)
    assert loss.shape == (labels.shape if reduction == "none" else ())
    loss.sum().backward()
    torch.testing.assert_close(view(whole.grad), s.grad.view(student_shape))
    torch.testing.assert_close(view(big.detach()), s.grad.view(student_shape))
    untouched = torch.ones(shape, dtype=torch.bool)
    view(untouched).fill_(False)
    assert whole.grad[untouched].eq(0).all()
    assert big.detach()[untouched].eq(7).all()
    assert torch.equal(view(teacher), t.view(student_shape)), "the teacher is only read"


# both gradient paths; a vector's tail; a second block, whose classes another pass reads again
@pytest.mark.parametrize(("reduction", "dtype"), [("mean", F32), ("none", F32), ("mean", F16)])
@pytest.mark.parametrize("vocab", [100, 2049])
def test_a_teacher_in_the_students_memory_is_read_before_it_is_overwritten(reduction, dtype, vocab, backend):
    s, _, y = leaf_batch(ROWS, vocab, dtype)
    options = {"teacher_temperature": 2.0, "divergence": "jsd", "reduction": reduction, "backend": backend}
    kd_loss(s, s.detach().clone(), y, **options).sum().backward()
    expected, s.grad = s.grad, None
    logits = s.clone()
    kd_loss(logits, logits.detach(), y, inplace=True, **options).sum().backward()
    torch.testing.assert_close(s.grad, expected)
    torch.testing.assert_close(logits.detach(), expected)
