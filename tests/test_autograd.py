"""When a gradient is made, what is allocated for it, and what autograd is told about it."""

import gc
import weakref

import pytest
import torch
from calls import ALL_OPTIONS
from cases import BACKENDS, BF16, DIVERGENCES, F16, F32, ON_GPU, batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast import kd_loss
from kdfast.options import check_inputs, check_settings

ROWS, VOCAB = 5, 1000
SCALAR = ("mean", "sum", "batchmean")

# What autograd.py decides, before or after a kernel: Triton's and CUDA's, which take a compilation, in the full tier.
whatever_the_kernels = pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=pytest.mark.full) if name in ON_GPU else name for name in BACKENDS],
    indirect=True,
)

# With options that the CUDA kernels lack.
whatever_the_kernels_of_options = pytest.mark.parametrize(
    "backend",
    ["reference", "cpu", pytest.param("triton", marks=pytest.mark.full)],
    indirect=True,
)


class Allocations(TorchDispatchMode):
    """Records every tensor of at least VOCAB elements that an operator makes, and the storage that it is in."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...], int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {storage(x) for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and x.numel() >= VOCAB and storage(x) not in known:
                self.made.append((str(func), tuple(x.shape), storage(x)))
        return out

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [shape for _, shape, _ in self.made]


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def data(dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    s, t, y = batch(ROWS, VOCAB, dtype)
    y[1] = -100
    return s.requires_grad_(), t, y


def gradient(loss: Tensor, s: Tensor, grad_loss: Tensor | None = None) -> Tensor:
    return torch.autograd.grad(loss, s, grad_loss)[0]


# reductions that make the gradient in forward, and those that make it in backward; fp16 always does the latter
@pytest.mark.parametrize(
    ("reduction", "dtype"), [("mean", F32), ("sum", BF16), ("batchmean", F32), ("none", F32), ("mean", F16)]
)
@pytest.mark.parametrize("factor", [1, 3])  # by which a gradient that is there already is scaled where it lies
@pytest.mark.parametrize("inplace", [False, True])
def test_only_the_gradient_is_allocated_and_becomes_the_leafs_grad(inplace, factor, reduction, dtype, backend):
    s, t, y = data(dtype)
    settings = {"reduction": reduction, "backend": backend}
    expected = factor * gradient(kd_loss(s, t, y, **settings).sum(), s)
    logits = s.clone() if inplace else s
    with Allocations() as allocations:
        (kd_loss(logits, t, y, inplace=inplace, **settings) * factor).sum().backward()
    assert allocations.shapes == ([] if inplace else [s.shape]), allocations.made
    assert storage(s.grad) == (storage(logits) if inplace else allocations.made[0][2])
    # of 16-bit logits both round once more where they are scaled
    torch.testing.assert_close(s.grad, expected, rtol=1e-6 if dtype == F32 else 1e-2, atol=1e-6)


@whatever_the_kernels_of_options
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_options_and_metrics_allocate_nothing_but_the_gradient(reduction, backend):
    s, t, y = data()
    settings = ALL_OPTIONS | {"reduction": reduction, "backend": backend, "return_metrics": True}
    with Allocations() as allocations:
        loss, _ = kd_loss(s, t, y, **settings)
        loss.sum().backward()
    assert allocations.shapes == [s.shape], allocations.made
    with Allocations() as allocations:
        kd_loss(s.clone(), t, y, inplace=True, **settings)[0].sum().backward()
    assert [made for made in allocations.made if "clone" not in made[0]] == []
    with Allocations() as allocations, torch.no_grad():
        kd_loss(s, t, y, **settings)
    assert allocations.shapes == [], allocations.made


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("why", ["no_grad", "inference_mode", "requires_grad=False"])
def test_without_a_gradient_nothing_of_the_logits_size_is_allocated(why, reduction, backend):
    s, t, y = data()
    expected = kd_loss(s, t, y, reduction=reduction, backend=backend).detach()
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(why, torch.enable_grad)
    student = s.detach() if why == "requires_grad=False" else s
    for inplace in (False, True):  # which has nothing to write then, and writes nothing
        with mode(), Allocations() as allocations:
            loss = kd_loss(student, t, y, reduction=reduction, inplace=inplace, backend=backend)
        assert allocations.shapes == [], allocations.made
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert torch.equal(student, data()[0])


@pytest.mark.parametrize("dtype", [F32, F16])
def test_reduction_none_saves_its_inputs_and_nothing_of_their_size(dtype, backend):
    s, t, y = data(dtype)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kd_loss(s, t, y, reduction="none", backend=backend)
    inputs = {storage(x) for x in (s, t, y)}
    assert inputs <= {storage(x) for x in saved}
    assert [x.shape for x in saved if storage(x) not in inputs and x.numel() >= VOCAB] == []


def test_a_scalar_loss_keeps_neither_logits_nor_teacher_alive(backend):
    s, t, y = data()
    logits = s * 1
    loss = kd_loss(logits, t, y, backend=backend)
    gone = weakref.ref(logits), weakref.ref(t)
    del logits, t
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    loss.backward()


@pytest.mark.parametrize("reduction", [*SCALAR, "none"])
def test_gradients_of_several_losses_accumulate(reduction, backend):
    s, t, y = data()
    first, second = (kd_loss(s, x, y, reduction=reduction, backend=backend).sum() for x in (t, t.flip(0)))
    one, other = (gradient(kd_loss(s, x, y, reduction=reduction, backend=backend).sum(), s) for x in (t, t.flip(0)))
    (first * 2).backward(retain_graph=True)
    (first * 5 + first - 0.5 * second).backward()
    torch.testing.assert_close(s.grad, 8 * one - 0.5 * other)


@pytest.mark.parametrize("reduction", [*SCALAR, "none"])
@pytest.mark.parametrize("factor", [1, 3])  # 1 hands the gradient on as it is: it must not be changed afterwards
def test_retain_graph_lets_backward_run_twice_with_equal_gradients(factor, reduction, backend):
    s, t, y = data()
    loss = kd_loss(s, t, y, reduction=reduction, backend=backend).sum() * factor
    loss.backward(retain_graph=True)
    first = s.grad.clone()
    s.grad.mul_(7)  # what an optimizer or a clipping does with its gradient is its own affair
    s.grad = None
    loss.backward()
    assert torch.equal(s.grad, first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("dtype", [F32, F16])
def test_backward_accepts_an_expanded_grad_output(dtype, backend):
    s, t, y = data(dtype)
    summed, loss = (kd_loss(s, t, y, reduction="none", backend=backend) for _ in range(2))
    assert torch.equal(gradient(summed.sum(), s), gradient(loss, s, torch.ones(ROWS)))


@whatever_the_kernels
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_double_backward_raises_a_clear_error(inplace, reduction, backend):
    s, t, y = data()
    loss = kd_loss(s * 1, t, y, reduction=reduction, inplace=inplace, backend=backend)
    grad_loss = torch.ones_like(loss)
    for coefficient in (grad_loss, grad_loss.clone().requires_grad_()):  # a constant, and one that has a graph
        with pytest.raises(RuntimeError, match="differentiable once.*create_graph"):
            torch.autograd.grad(loss, s, coefficient, create_graph=True)


@whatever_the_kernels_of_options
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_from_inference_mode_is_accepted(reduction, backend):
    s, t, y = data()
    expected = gradient(kd_loss(s, [t, t + 1], y, reduction=reduction, backend=backend).sum(), s)
    with torch.inference_mode():
        made = t.clone(), t + 1, y.clone()
    assert all(x.is_inference() for x in made)
    loss = kd_loss(s, list(made[:2]), made[2], reduction=reduction, backend=backend).sum()
    assert torch.equal(gradient(loss, s), expected)


@whatever_the_kernels
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_that_requires_grad_is_accepted_and_gets_no_grad(reduction, backend):
    s, t, y = data()
    teacher = t.clone().requires_grad_()
    temperature = torch.full((ROWS,), 2.0, requires_grad=True)
    kd_loss(s, teacher * 1, y, reduction=reduction, temperature=temperature, backend=backend).sum().backward()
    assert teacher.grad is None
    assert temperature.grad is None
    with torch.no_grad():
        unasked = kd_loss(s.detach(), teacher, y, reduction=reduction, backend=backend)
    assert not unasked.requires_grad
    assert not kd_loss(s.detach(), teacher, y, reduction=reduction, backend=backend).requires_grad


@whatever_the_kernels
@pytest.mark.parametrize("what", ["student", "teacher", "labels", "row_weight"])
def test_backward_raises_if_an_input_was_changed_after_forward(what, backend):
    s, t, y = data()
    tensors = {"student": s * 1, "teacher": t, "labels": y, "row_weight": torch.rand(ROWS)}
    loss = kd_loss(
        *list(tensors.values())[:3], row_weight=tensors["row_weight"], reduction="none", backend=backend
    ).sum()
    with torch.no_grad():
        tensors[what].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("vocab", (10, 1000, 40001))  # rows side by side in vectors, by blocks, and split
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_backward_reads_coefficients_from_the_table_of_forward(divergence, vocab, cpu):
    s, t, y = batch(3, vocab, F32)
    options = kd_loss.__kwdefaults__ | {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
    for more in ({}, {"z_loss": 0.1}, {"label_smoothing": 0.1, "softcap": 30.0, "standardize": True}):
        given = options | more
        inputs, settings = check_inputs(s, t, y, given, check_settings(given, has_labels=True))
        _, table, _ = torch.ops.kdfast.stats(s, *inputs, *settings)
        of_table, of_another = (
            torch.ops.kdfast.grad(s, x, torch.ones(3), *inputs, *settings) for x in (table, table[[1, 0, 2]])
        )
        assert torch.equal(of_another[2], of_table[2])
        assert not torch.allclose(of_another[:2], of_table[:2], rtol=1e-3)
