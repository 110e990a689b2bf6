"""However the logits lie in memory, and whatever their shape, the numbers are the same."""

from collections.abc import Callable

import pytest
import torch
from cases import (
    BF16,
    DIVERGENCES,
    DTYPES,
    F16,
    F32,
    F64,
    KINDS,
    THINNED,
    batch,
    combined,
    labels_for,
    name,
    takes,
    thinned_to,
)
from judge import judge, run
from torch import Tensor

import kdfast

ROWS, VOCAB = 6, 1000


def _filled(x: Tensor, *size: int, view: Callable[[Tensor], Tensor]) -> Tensor:
    """x in a view of a larger storage of NaN: whoever reads beyond the view spoils the row."""
    base = torch.full(size, torch.nan, dtype=x.dtype)
    view(base).copy_(x)
    return view(base)


LAYOUTS = {
    "contiguous": lambda x: x,
    "padded rows": lambda x: _filled(x, ROWS, VOCAB + 24, view=lambda b: b[:, :VOCAB]),  # a padded head, sliced
    "odd padding": lambda x: _filled(x, ROWS, VOCAB + 1, view=lambda b: b[:, :VOCAB]),  # each row aligned differently
    "offset by one": lambda x: _filled(x, ROWS * VOCAB + 1, view=lambda b: b[1:].view(ROWS, VOCAB)),  # unaligned
    "every second row": lambda x: _filled(x, 2 * ROWS, VOCAB, view=lambda b: b[::2]),
    "every second class": lambda x: _filled(x, ROWS, 2 * VOCAB, view=lambda b: b[:, ::2]),
    "transposed": lambda x: x.t().contiguous().t(),  # classes lie far apart
    "one row expanded": lambda x: x[:1].expand(ROWS, VOCAB),
}


def _for_triton(layout: str, teacher_layout: str, dtype: torch.dtype) -> bool:
    """Rows of 16 bits have a way of their own where the teacher's vectors lie otherwise than the student's."""
    one = "contiguous" in (layout, teacher_layout)
    aside = ("padded rows", "odd padding", "offset by one")
    return one and dtype == F32 or dtype == BF16 and (one or layout in aside and teacher_layout in aside)


@thinned_to(_for_triton)
@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=name)
@pytest.mark.parametrize("teacher_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend: str, layout: str, teacher_layout: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(ROWS, VOCAB, dtype)
    judge(LAYOUTS[layout](student), LAYOUTS[teacher_layout](teacher), labels, backend=backend, temperature=2)


def test_labels_and_weights_of_any_strides(backend: str) -> None:
    student, teacher, labels = batch(ROWS, VOCAB, F32)
    wide_labels = torch.full((2 * ROWS,), 10**6)  # not a label
    wide_labels[::2] = labels
    weight = torch.tensor(0.5).expand(ROWS)
    temperature = torch.arange(1.0, 2 * ROWS + 1)[::2]
    judge(student, teacher, wide_labels[::2], backend=backend, weight=weight, temperature=temperature)


VIEWS = {
    "padded rows": ((ROWS, VOCAB + 24), lambda base: base[:, :VOCAB]),
    "every second row": ((2 * ROWS, VOCAB), lambda base: base[::2]),
    "offset by one": ((ROWS * VOCAB + 1,), lambda base: base[1:].view(ROWS, VOCAB)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", VIEWS)
def test_inplace_writes_the_view_and_nothing_else(backend: str, layout: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(ROWS, VOCAB, dtype)
    size, view = VIEWS[layout]
    leaf = torch.full(size, 77, dtype=dtype)
    view(leaf).copy_(student)
    _, want = run(view(leaf), teacher, labels, backend=backend)  # where vectors begin decides the order of the sums
    leaf.requires_grad_()
    base = leaf.clone()
    kdfast.kd_loss(view(base), teacher, labels, inplace=True, backend=backend).backward()
    expected = torch.full(size, 77, dtype=dtype)
    view(expected).copy_(want)
    assert torch.equal(view(leaf.grad), want)
    assert torch.equal(base, expected)


def test_the_gradient_of_a_slice_reaches_the_padded_logits(backend: str) -> None:
    student, teacher, labels = batch(ROWS, VOCAB, F32)
    leaf = torch.nn.functional.pad(student, (0, 24), value=5.0).requires_grad_()
    kdfast.kd_loss(leaf[:, :VOCAB], teacher, labels, backend=backend).backward()
    _, want = run(student, teacher, labels, backend=backend)
    assert torch.equal(leaf.grad[:, :VOCAB], want)
    assert leaf.grad[:, VOCAB:].eq(0).all()


EXTRA = ((0, 0), (0, 24), (24, 0), (24, 8), (1, 0))  # classes of padding: the student's, the teacher's


@thinned_to(lambda extra, dtype: dtype in (F32, BF16) or extra == (24, 8))  # no dtype has a padding of its own
@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=name)
@pytest.mark.parametrize("extra", EXTRA)
def test_vocab_size_leaves_the_padding_out(backend: str, extra: tuple[int, int], dtype: torch.dtype) -> None:
    student, teacher, labels = batch(ROWS, VOCAB, dtype)
    # what lies in the padding is nobody's business: values that would take every softmax over
    student = torch.nn.functional.pad(student, (0, extra[0]), value=1e4)
    teacher = torch.nn.functional.pad(teacher, (0, extra[1]), value=torch.nan)
    turn, some = divmod(EXTRA.index(extra), 2)
    divergences = KINDS[some::2] if backend in THINNED else DIVERGENCES  # padding knows none of them
    for divergence, inplace in combined(backend, divergences, (False, True), turn=turn):
        settings = {"backend": backend, "divergence": divergence, "temperature": 2, "vocab_size": VOCAB}
        judge(student, teacher, labels, inplace=inplace, **settings)  # of which one promise is: exactly 0 there
    narrower = VOCAB - 3  # cut without padding, an ensemble of different widths
    others = [teacher, batch(ROWS, VOCAB + 8, F32).teacher]
    by_row = backend not in THINNED  # which would compile for each student's padding
    judge(student, others, labels.clamp_max(narrower - 1), backend=backend, by_row=by_row, vocab_size=narrower)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (2, 3, 2)])  # of the rows: 1-dim to 4-dim logits
def test_any_number_of_dimensions(backend: str, shape: tuple[int, ...], reduction: str) -> None:
    for dtype in (F32, F16):  # gradients made in forward, and in backward
        rows = torch.Size(shape).numel()
        student, teacher, labels = batch(rows, 33, dtype)
        student, teacher, labels = student.view(*shape, 33), teacher.view(*shape, 33), labels.view(shape)
        weight, T = torch.rand(shape) + 0.5, torch.rand(shape) + 1
        judge(student, teacher, labels, backend=backend, reduction=reduction, weight=weight, temperature=T)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_rows_are_no_loss(backend: str, shape: tuple[int, ...]) -> None:
    for dtype in (dtype for dtype in DTYPES if takes(backend, dtype)):
        empty = torch.empty(*shape, 33, dtype=dtype)
        for labelled in (False, True):
            for reduction in ("mean", "sum", "batchmean", "none"):
                for divergence in DIVERGENCES:
                    labels = labels_for(divergence, torch.empty(shape, dtype=torch.int64), labelled)
                    rows = torch.ones(shape, dtype=F64 if dtype == F64 else F32) if reduction == "none" else None
                    settings = {"divergence": divergence, "reduction": reduction, "backend": backend}
                    loss, grad = run(empty, empty, labels, rows, **settings)
                    assert loss.shape == (shape if reduction == "none" else ())
                    assert loss.eq(0).all()
                    assert grad.shape == empty.shape
