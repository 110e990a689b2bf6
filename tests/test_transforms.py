"""Transforms of torch.func, and forward-mode AD: the derivative of plain PyTorch, or an error that names the transform.

All of it is code that the backends share, in float64.
"""

from collections.abc import Callable

import pytest
import torch
from cases import F32, F64, ON_GPU
from derivative_cases import (
    FORWARD,
    HEAD_TANGENTS,
    HEADS,
    LABELS,
    REVERSE,
    ROWS,
    STUDENT,
    TANGENT,
    TEACHER,
    TWICE,
    VMAP,
    VOCAB,
    T,
    kd,
    linear,
    plain,
    plain_linear,
)  # fmt: skip
from torch import Tensor, func
from torch.autograd import forward_ad

from kdfast import kd_loss, tempered_softmax

on_every_backend = pytest.mark.parametrize(
    "backend",
    ["reference", "cpu", *(pytest.param(name, marks=pytest.mark.full) for name in ON_GPU)],
    indirect=True,
)
by_reduction = pytest.mark.parametrize("reduction", ["mean", "none"])  # the gradient is made in forward; in backward


@on_every_backend
@by_reduction
@pytest.mark.parametrize("transform", REVERSE)
def test_transforms_of_torch_func_give_plain_pytorchs_gradients(transform, reduction, backend):
    for ours, theirs, primals in (
        (kd(reduction, backend), lambda s: plain(s, reduction), (STUDENT,)),
        (linear(reduction, backend), plain_linear(reduction), HEADS),
    ):
        expected = REVERSE[transform](theirs, primals, None)
        torch.testing.assert_close(REVERSE[transform](ours, primals, None), expected)


@by_reduction
def test_inplace_is_ignored_inside_of_a_transform(reduction):
    seen: list[Tensor] = []

    def call(student: Tensor) -> Tensor:
        seen.append(student * 1)
        return kd(reduction, inplace=True)(seen[0]).sum()

    gradient = func.grad(call)(STUDENT)
    torch.testing.assert_close(gradient, func.grad(lambda s: plain(s, reduction).sum())(STUDENT))
    assert torch.equal(seen[0] * 1, STUDENT)


@on_every_backend
@by_reduction
@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_gives_plain_pytorchs_tangents(transform, reduction, backend):
    expected = FORWARD[transform](lambda s: plain(s, reduction), (STUDENT,), (TANGENT,))
    found = FORWARD[transform](kd(reduction, backend), (STUDENT,), (TANGENT,))
    torch.testing.assert_close(found, expected)


@on_every_backend
@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_gives_plain_pytorchs_tangents_of_a_linear_loss(transform, backend):
    expected = FORWARD[transform](plain_linear("mean"), HEADS, HEAD_TANGENTS)
    torch.testing.assert_close(FORWARD[transform](linear("mean", backend), HEADS, HEAD_TANGENTS), expected)
    hidden_alone = (lambda hidden: linear("mean", backend)(hidden, *HEADS[1:])), HEADS[:1], HEAD_TANGENTS[:1]
    expected = FORWARD[transform](lambda hidden: plain_linear("mean")(hidden, *HEADS[1:]), *hidden_alone[1:])
    torch.testing.assert_close(FORWARD[transform](*hidden_alone), expected)


def test_forward_mode_of_a_linear_loss_by_row_raises():
    with pytest.raises(RuntimeError, match="reduction='none' does not support forward-mode AD"):
        func.jvp(linear("none"), HEADS, HEAD_TANGENTS)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_float16_gets_the_gradient_and_tangent_of_float32(reduction):
    half, tangent, small = STUDENT.half(), TANGENT.half(), 2.0**-20  # too small for fp16 before it is scaled back
    weight = torch.full((ROWS,), small)

    def call(s: Tensor) -> Tensor:
        return kd(reduction, row_weight=weight)(s).sum() / small

    def truth(s: Tensor) -> Tensor:
        return plain(s, "none").sum()

    gradient = func.grad(truth)(half.double())
    torch.testing.assert_close(func.grad(call)(half).double(), gradient, rtol=1e-3, atol=1e-3)
    value, found = func.jvp(call, (half,), (tangent,))
    assert value.dtype == F32
    expected = func.jvp(truth, (half.double(),), (tangent.double(),))[1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)  # the teacher is rounded to fp16


@by_reduction
def test_a_gradient_at_one_level_is_a_value_at_another(reduction):
    def value_inside(f: Callable[[Tensor], Tensor]) -> Tensor:
        one = torch.ones((), dtype=F64)
        return func.grad(lambda s: func.grad_and_value(lambda factor: f(factor * s).sum())(one)[1])(STUDENT)

    torch.testing.assert_close(value_inside(kd(reduction)), value_inside(lambda s: plain(s, reduction)))


def gradient_in_dual_level(f: Callable[[Tensor], Tensor]) -> Tensor:
    with forward_ad.dual_level():
        leaf = STUDENT.clone().requires_grad_()
        return torch.autograd.grad(f(forward_ad.make_dual(leaf, TANGENT)), leaf)[0]


def gradient_of_a_tangent(f: Callable[[Tensor], Tensor]) -> Tensor:
    with forward_ad.dual_level():
        leaf = STUDENT.clone().requires_grad_()
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(leaf, TANGENT))).tangent
        return torch.autograd.grad(tangent, leaf)[0]


def gradient_of_a_transforms_gradient(f: Callable[[Tensor], Tensor]) -> None:
    func.grad(f)(STUDENT.clone().requires_grad_()).square().sum().backward()


def batched_gradients(f: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = STUDENT.clone().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf, torch.eye(3, 1, dtype=F64)[:, 0], is_grads_batched=True)[0]


# Silent zeros before: the gradient was a constant to autograd.
SECOND = {
    "grad of grad": lambda f: func.grad(lambda s: func.grad(f)(s).square().sum())(STUDENT),
    "grad of vjp": lambda f: func.grad(lambda s: func.vjp(f, s)[1](torch.ones((), dtype=F64))[0].sum())(STUDENT),
    "jvp of grad": lambda f: func.jvp(func.grad(f), (STUDENT,), (TANGENT,)),
    "grad of jvp": lambda f: func.grad(lambda s: func.jvp(f, (s,), (TANGENT,))[1])(STUDENT),
    "jvp of jvp": lambda f: func.jvp(lambda s: func.jvp(f, (s,), (TANGENT,))[1], (STUDENT,), (TANGENT,)),
    "hessian": lambda f: func.hessian(f)(STUDENT),
    "backward in a dual level": gradient_in_dual_level,
    "backward of a tangent": gradient_of_a_tangent,
    "backward of grad": gradient_of_a_transforms_gradient,
}
BATCHED = {
    "vmap": lambda f: func.vmap(f)(STUDENT.expand(2, ROWS, VOCAB)),
    "vmap of grad": lambda f: func.vmap(func.grad(f))(STUDENT.expand(2, ROWS, VOCAB)),
    "jacrev": lambda f: func.jacrev(f)(STUDENT),
    "is_grads_batched": batched_gradients,
}


@by_reduction
@pytest.mark.parametrize("transform", [*SECOND, *BATCHED])
def test_what_is_not_supported_raises(transform, reduction):
    make, message = (SECOND[transform], TWICE) if transform in SECOND else (BATCHED[transform], VMAP)
    head = torch.eye(VOCAB, dtype=F64)
    with pytest.raises(RuntimeError, match=message):
        make(lambda s: kd(reduction)(s).sum())
    if reduction == "none":  # forward-mode AD of a linear loss by row raises by itself
        message += "|reduction='none' does not support forward-mode AD"
    with pytest.raises(RuntimeError, match=message):
        make(lambda s: linear(reduction)(s, head, head[0]).sum())


@pytest.mark.parametrize("name", ["row_weight", "temperature", "normalizer"])
def test_a_tangent_of_a_constant_raises(name):
    value = torch.ones(() if name == "normalizer" else ROWS, dtype=F64)
    with pytest.raises(RuntimeError, match=f"^{name}: has a tangent, but kdfast has no derivative"):
        func.jvp(lambda x: kd_loss(STUDENT, TEACHER, LABELS, **{name: x}), (value,), (value,))


def test_a_teachers_tangent_is_dropped_as_its_gradient_is():
    assert func.jvp(lambda t: kd_loss(STUDENT, t, LABELS), (TEACHER,), (TANGENT,))[1] == 0


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "transform",
    {
        **FORWARD,
        "jacrev": lambda f, x, v: func.jacrev(f)(*x),
        "hessian": lambda f, x, v: func.hessian(lambda s: f(s).square().sum())(*x),
        "vmap": lambda f, x, v: func.vmap(f)(*x),
    }.items(),
    ids=lambda item: item[0],
)
def test_tempered_softmax_supports_every_transform(transform, log):
    softmax = torch.log_softmax if log else torch.softmax
    make = transform[1]
    expected = make(lambda s: softmax(s / T, -1), (STUDENT,), (TANGENT,))
    torch.testing.assert_close(make(lambda s: tempered_softmax(s, T, log=log), (STUDENT,), (TANGENT,)), expected)
