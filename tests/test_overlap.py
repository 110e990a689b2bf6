"""inplace=True never writes over what it has yet to read: arguments that share memory with the student's logits.

The check looks at addresses and strides alone, so the device's default backend tests it for all.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import leaf_batch
from torch import Tensor

from kdfast import kd_loss, overlap

ROWS, VOCAB = 4, 10
SHARED = r"^inplace: some elements of student_logits and {} refer to a single memory location; clone\(\) one of them"


def memory(numbers: int = 200) -> Tensor:
    """A leaf's values, of which views are taken: a leaf itself cannot be overwritten."""
    return torch.linspace(-1, 1, numbers).requires_grad_() * 1


def rows(x: Tensor, begin: int) -> Tensor:
    return x[begin : begin + ROWS * VOCAB].view(ROWS, VOCAB)


def labels_within(x: Tensor) -> Tensor:
    return x.detach().view(torch.int64)[:ROWS]


# Arguments that share some of the memory of rows(x, 0)
SHARING: dict[str, tuple[str, Callable[[Tensor], dict[str, Any]]]] = {
    "a teacher one class on": ("teacher", lambda x: {"teacher": rows(x, 1)}),
    "a teacher one row on": ("teacher", lambda x: {"teacher": rows(x, VOCAB)}),
    "a teacher before it": ("teacher", lambda x: {"teacher": rows(x, VOCAB + 3), "student": rows(x, 2 * VOCAB)}),
    "one of two": ("teacher", lambda x: {"teacher": [torch.zeros(ROWS, VOCAB), rows(x, 1)]}),
    "a transposed teacher": ("teacher", lambda x: {"teacher": rows(x, 0).view(VOCAB, ROWS).t()}),
    "a teacher of 16 bits": ("teacher", lambda x: {"teacher": rows(x.view(torch.bfloat16), 0)}),
    "an expanded row": ("teacher", lambda x: {"teacher": rows(x, 0)[:1].expand(ROWS, VOCAB)}),
    "labels": ("labels", lambda x: {"labels": labels_within(x)}),
    "a column of weights": ("row_weight", lambda x: {"row_weight": rows(x, 0)[:, 0].detach()}),
    "temperatures": ("temperature", lambda x: {"temperature": rows(x, 0)[0, :ROWS].detach()}),
    "the teacher's temperatures": (
        "teacher_temperature",
        lambda x: {"teacher_temperature": rows(x, 0)[-1, -ROWS:].detach()},
    ),
    "a normalizer": ("normalizer", lambda x: {"normalizer": rows(x, 0)[2, 3].detach()}),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", SHARING)
def test_arguments_that_share_some_of_the_students_memory_raise(name: str, reduction: str) -> None:
    argument, make = SHARING[name]
    reduction = "mean" if argument == "normalizer" else reduction
    x = memory()
    given = {"student": rows(x, 0), "teacher": torch.zeros(ROWS, VOCAB), "labels": None} | make(x)
    before = x.detach().clone()
    with pytest.raises(RuntimeError, match=SHARED.format(argument)):
        kd_loss(given.pop("student"), given.pop("teacher"), inplace=True, reduction=reduction, **given)
    assert torch.equal(x.detach(), before)


# Student and teacher in one tensor, without a common element
APART: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "one after the other": lambda x: (rows(x, 0), rows(x, ROWS * VOCAB)),
    "side by side": lambda x: x[: 2 * ROWS * VOCAB].view(ROWS, 2 * VOCAB).chunk(2, 1),
    "alternating rows": lambda x: (y := x[: 2 * ROWS * VOCAB].view(2 * ROWS, VOCAB)) is not None and (y[::2], y[1::2]),
    "alternating classes": lambda x: x[: 2 * ROWS * VOCAB].view(ROWS, VOCAB, 2).unbind(2),
    "transposed": lambda x: (rows(x, 0), x[ROWS * VOCAB : 2 * ROWS * VOCAB].view(VOCAB, ROWS).t()),
}


@pytest.mark.parametrize("name", APART)
def test_views_of_one_tensor_that_share_no_element_are_taken(name: str) -> None:
    x = memory()
    student, teacher = APART[name](x)
    leaf, target = student.detach().clone().requires_grad_(), teacher.detach().clone()
    want = kd_loss(leaf, target)
    want.backward()
    loss = kd_loss(student, teacher, inplace=True)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(student.detach(), leaf.grad)
    assert torch.equal(teacher.detach(), target)


def test_the_whole_teacher_of_a_padded_student_may_be_the_students_memory() -> None:
    """Each class is at the student's place: both are read before it is overwritten."""
    s, _, y = leaf_batch(ROWS, VOCAB)
    y %= 7
    want = kd_loss(s, s.detach().clone()[:, :8], y, teacher_temperature=2.0, vocab_size=7)
    want.backward()
    expected, s.grad = s.grad, None
    logits = s * 1
    torch.testing.assert_close(
        kd_loss(logits, logits[:, :8], y, teacher_temperature=2.0, vocab_size=7, inplace=True), want
    )
    torch.testing.assert_close(logits.detach(), expected)


def test_logits_that_overlap_themselves_raise() -> None:
    x = memory()
    for student in (x.unfold(0, VOCAB, 1)[:ROWS], x.as_strided((2, 3, VOCAB), (VOCAB, VOCAB, 1)), x[:1].expand(4, 5)):
        with pytest.raises(RuntimeError, match="^inplace: more than one element of student_logits"):
            kd_loss(student, torch.zeros(student.shape), inplace=True)
    student = x.unfold(0, VOCAB, VOCAB)[:ROWS]  # rows that only touch
    kd_loss(student, torch.zeros(student.shape), inplace=True)


def test_a_compiled_call_takes_a_view_of_any_layout_and_refuses_an_expanded_one() -> None:
    def transposed(x: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss((x * 1).transpose(1, 2)[:, :, ::2], teacher, inplace=True)

    compiled = torch.compile(transposed, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (4, 5):
        x, teacher = torch.randn(n, 12, n + 2, requires_grad=True), torch.randn(n, n + 2, 6)
        torch.testing.assert_close(compiled(x, teacher), transposed(x, teacher))
    expanded = torch.compile(
        lambda x, teacher: kd_loss((x * 1).expand(3, 12), teacher, inplace=True), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="inplace: more than one element of student_logits"):
        expanded(torch.randn(1, 12, requires_grad=True), torch.randn(3, 12))


def test_without_a_gradient_nothing_is_written_and_nothing_raises() -> None:
    x = memory()
    before = x.detach().clone()
    with torch.no_grad():
        kd_loss(rows(x, 0), rows(x, 1), inplace=True)
    kd_loss(rows(x.detach(), 0), rows(x, 1), inplace=True)
    assert torch.equal(x.detach(), before)


def test_meta_tensors_have_no_memory_to_share() -> None:
    with torch.device("meta"):
        student, teacher = torch.empty(3, 4, requires_grad=True) * 1, torch.empty(3, 4)
    assert overlap.storage_of(student) is None
    overlap.check_inplace(student, overlap.Inputs([teacher], None, None, None, None, None))


# by size: strides that nest, transposed ones, gaps, three dimensions, one place
LAYOUTS = {(3, 4): (5, 1), (4, 3): (1, 5), (2, 5): (11, 2), (2, 2, 3): (13, 6, 2), (7,): (0,)}


def test_the_search_finds_what_a_list_of_all_bytes_finds() -> None:
    x = torch.zeros(300, dtype=torch.uint8)
    views = [
        x[at : at + 200].view(dtype).as_strided(size, stride)
        for dtype, at in ((torch.int16, 0), (torch.int16, 6), (torch.uint8, 3), (torch.int32, 40))
        for size, stride in LAYOUTS.items()
    ]

    def bytes_of(view: Tensor) -> set[int]:
        strides, width = view.stride(), view.element_size()
        starts = (
            sum(i * s for i, s in zip(index, strides, strict=True)) * width
            for index in itertools.product(*map(range, view.shape))
        )
        return {view.data_ptr() + start + byte for start in starts for byte in range(width)}

    found = [overlap.overlap(a, b) == bool(bytes_of(a) & bytes_of(b)) for a in views for b in views]
    assert len(found) == 400
    assert all(found)
