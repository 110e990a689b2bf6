"""When the gradient is computed, what is allocated for it, and what autograd knows of it."""

import gc
import weakref

import pytest
import torch
from calls import ALL_OPTIONS
from cases import BACKENDS, BF16, F16, F32, ON_GPU, leaf_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast import kd_loss

ROWS, VOCAB = 5, 1000
SCALAR = ("mean", "sum", "batchmean")

# For what autograd.py does before or after a kernel: GPU kernels, which have to be compiled, only in the full tier.
on_every_backend = pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=pytest.mark.full) if name in ON_GPU else name for name in BACKENDS],
    indirect=True,
)

# With options that the CUDA kernels do not support.
on_every_backend_but_cuda = pytest.mark.parametrize(
    "backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.full)], indirect=True
)


class Allocations(TorchDispatchMode):
    """Records every tensor of at least VOCAB elements that an operator allocates, and its storage."""

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
    return leaf_batch(ROWS, VOCAB, dtype)


def gradient(loss: Tensor, s: Tensor, grad_loss: Tensor | None = None) -> Tensor:
    return torch.autograd.grad(loss, s, grad_loss)[0]


# gradients computed in forward, and in backward: of reduction "none" and of fp16
@pytest.mark.parametrize(
    ("reduction", "dtype"), [("mean", F32), ("sum", BF16), ("batchmean", F32), ("none", F32), ("mean", F16)]
)
@pytest.mark.parametrize("factor", [1, 3])  # scales a finished gradient in-place
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
    # scaling rounds 16-bit gradients once more
    torch.testing.assert_close(s.grad, expected, rtol=1e-6 if dtype == F32 else 1e-2, atol=1e-6)


@on_every_backend_but_cuda
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
    for inplace in (False, True):  # there is no gradient to write
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
@pytest.mark.parametrize("factor", [1, 3])  # 1 returns the saved gradient itself
def test_retain_graph_lets_backward_run_twice_with_equal_gradients(factor, reduction, backend):
    s, t, y = data()
    loss = kd_loss(s, t, y, reduction=reduction, backend=backend).sum() * factor
    loss.backward(retain_graph=True)
    first = s.grad.clone()
    s.grad.mul_(7)  # as an optimizer or clipping may do
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


@on_every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_double_backward_raises_a_clear_error(inplace, reduction, backend):
    s, t, y = data()
    loss = kd_loss(s * 1, t, y, reduction=reduction, inplace=inplace, backend=backend)
    grad_loss = torch.ones_like(loss)
    for coefficient in (grad_loss, grad_loss.clone().requires_grad_()):  # without and with a graph
        with pytest.raises(RuntimeError, match="differentiable once.*create_graph"):
            torch.autograd.grad(loss, s, coefficient, create_graph=True)


@on_every_backend_but_cuda
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_from_inference_mode_is_accepted(reduction, backend):
    s, t, y = data()
    expected = gradient(kd_loss(s, [t, t + 1], y, reduction=reduction, backend=backend).sum(), s)
    with torch.inference_mode():
        made = t.clone(), t + 1, y.clone()
    assert all(x.is_inference() for x in made)
    loss = kd_loss(s, list(made[:2]), made[2], reduction=reduction, backend=backend).sum()
    assert torch.equal(gradient(loss, s), expected)


@on_every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_that_requires_grad_is_accepted_and_gets_no_grad(reduction, backend):
    s, t, y = data()
    teacher = t.clone().requires_grad_()
    kd_loss(s, teacher * 1, y, reduction=reduction, temperature=2.0, backend=backend).sum().backward()
    assert teacher.grad is None
    with torch.no_grad():
        unasked = kd_loss(s.detach(), teacher, y, reduction=reduction, backend=backend)
    assert not unasked.requires_grad
    assert not kd_loss(s.detach(), teacher, y, reduction=reduction, backend=backend).requires_grad


@on_every_backend
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
