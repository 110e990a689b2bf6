"""Numbers that change between steps: as 0-dim tensors, and as floats under torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F32, F64, batch, leaf_batch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from kdfast import KDLoss, kd_loss, linear_kd_loss, tempered_softmax
from kdfast.choice import namespace
from kdfast.options import check_inputs, check_settings

NAN = float("nan")


@pytest.mark.parametrize("name", ["temperature", "teacher_temperature", "alpha", "hard_weight"])
def test_a_0_dim_tensor_is_a_number(name: str) -> None:
    s, t, y = batch(4, 9)
    for value in (torch.tensor(0.5), torch.tensor(0.5, dtype=F64), torch.tensor(1)):
        for reduction in ("mean", "none"):
            want = kd_loss(s, t, y, reduction=reduction, **{name: value.item()})
            assert torch.equal(kd_loss(s, t, y, reduction=reduction, **{name: value}), want)
    one_row = kd_loss(s[0], t[0], y[0], **{name: torch.tensor(0.5)})
    assert torch.equal(one_row, kd_loss(s[0], t[0], y[0], **{name: 0.5}))


def test_the_other_calls_take_a_0_dim_tensor_too() -> None:
    s, t, y = batch(4, 9)
    two = torch.tensor(2.0)
    assert torch.equal(tempered_softmax(s, two), tempered_softmax(s, 2.0))
    head = torch.eye(9)
    want = linear_kd_loss(s, head, t, head, y, temperature=2.0, alpha=0.5)
    assert torch.equal(linear_kd_loss(s, head, t, head, y, temperature=two, alpha=two / 4), want)


@pytest.mark.parametrize("name", ["temperature", "teacher_temperature", "alpha", "hard_weight"])
def test_the_value_of_a_0_dim_tensor_is_checked(name: str) -> None:
    s, t, y = batch(4, 9)
    for value, error, words in (
        (-1.0, ValueError, "-1.0 must"),
        (NAN, ValueError, "nan must"),
        (True, TypeError, "Tr"),
    ):
        with pytest.raises(error, match=f"^{name}: .*{words}"):
            kd_loss(s, t, y, **{name: torch.tensor(value)})


# A 0-dim tensor on the student's device is not read there: under torch.compile a CPU tensor takes the same way.
def test_a_temperature_that_cannot_be_read_is_one_per_row() -> None:
    s, t, y = batch(4, 9)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(
        lambda s, t, y, T: kd_loss(s, t, y, temperature=T, teacher_temperature=T * 2), fullgraph=True, backend=counter
    )
    for value in (1.0, 2.0, 2.5, 3.0):
        want = kd_loss(s, t, y, temperature=value, teacher_temperature=2 * value)
        torch.testing.assert_close(call(s, t, y, torch.tensor(value)), want)
    assert counter.frame_count == 1


HEAD = torch.linspace(-1, 1, 45).view(5, 9)
# How a number that changes at each step enters a call: each is another argument, or another way through kdfast.
SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "temperature": lambda s, t, y, x: kd_loss(s, t, y, temperature=x),
    "teacher_temperature": lambda s, t, y, x: kd_loss(s, t, y, teacher_temperature=x, reduction="none"),
    "alpha": lambda s, t, y, x: kd_loss(s, t, y, alpha=x / 20),
    "hard_weight": lambda s, t, y, x: kd_loss(s, t, y, hard_weight=1 / x, backend="reference"),
    "beta": lambda s, t, y, x: kd_loss(s, t, y, divergence="jsd", beta=x / 20),
    "normalizer": lambda s, t, y, x: kd_loss(s, t, y, normalizer=x),
    "options": lambda s, t, y, x: kd_loss(
        s, t, y, z_loss=x / 100, softcap=30 + x, logit_scale=1 / x, label_smoothing=x / 30, return_metrics=True
    )[0],
    "inplace": lambda s, t, y, x: kd_loss(s * 1, t, y, temperature=x, alpha=x / 20, inplace=True),
    "linear_kd_loss": lambda s, t, y, x: linear_kd_loss(s, HEAD, t, HEAD, y % 5, temperature=x, alpha=x / 20),
}


def loss_and_gradient(call: Callable[..., Tensor], s: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    leaf = s.detach().requires_grad_()
    loss = call(leaf, *args)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_float_that_changes_compiles_twice(name: str) -> None:
    s, t, y = leaf_batch(6, 9)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(SCHEDULES[name], fullgraph=True, backend=counter)
    for step in range(5):
        args = s, t, y, 1.5 + step
        torch.testing.assert_close(loss_and_gradient(call, *args), loss_and_gradient(SCHEDULES[name], *args))
    assert counter.frame_count == 2, "for the first value, and for all others"


def test_operators_take_numbers_as_a_tensor(backend: str) -> None:
    """A compiled graph's: in place of settings that are NaN, in the order of the settings."""
    s, t, y = batch(6, 9)
    numbers = {"temperature": 2.0, "alpha": 0.25, "hard_weight": 0.5, "beta": 0.3, "z_loss": 0.0}
    options = kd_loss.__kwdefaults__ | numbers | {"divergence": "symmetric_kl", "return_metrics": True}
    inputs, settings = check_inputs(s, t, y, options, check_settings(options, True))
    ops = namespace(backend, s)
    for reduction in ("mean", "none"):
        settings = settings._replace(reduction=reduction)
        hidden = settings._replace(**dict.fromkeys(numbers, NAN))
        given = inputs._replace(dynamic_numbers=torch.tensor(list(numbers.values()), dtype=F64, device="cpu"))
        found, want = ops.stats(s, *given, *hidden), ops.stats(s, *inputs, *settings)
        torch.testing.assert_close(found, want, rtol=0, atol=0)
        assert torch.equal(
            ops.grad(s, found[1], torch.ones_like(found[0]), *given, *hidden),
            ops.grad(s, want[1], torch.ones_like(want[0]), *inputs, *settings),
        )


def test_inductor_takes_a_float_that_changes() -> None:
    s, t, y = leaf_batch(6, 9)
    call = lambda s, t, y, x: kd_loss(s, t, y, temperature=x, alpha=1 / x)  # noqa: E731
    with torch._inductor.utils.fresh_cache():
        compiled = torch.compile(call, fullgraph=True)
        for x in (2.0, 3.0, 4.5):
            torch.testing.assert_close(loss_and_gradient(compiled, s, t, y, x), loss_and_gradient(call, s, t, y, x))


def test_a_modules_schedule_compiles_twice() -> None:
    s, t, y = batch(6, 9, F32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    loss = KDLoss()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in range(5):
        loss.temperature = 1.5 + step
        torch.testing.assert_close(compiled(s, t, y), kd_loss(s, t, y, temperature=1.5 + step))
    assert counter.frame_count == 2


def test_a_value_that_is_not_allowed_raises_under_compile() -> None:
    s, t, y = batch(6, 9)
    call = torch.compile(lambda T: kd_loss(s, t, y, temperature=T), fullgraph=True, backend="aot_eager")
    for value in (2.0, 3.0, 4.0):
        call(value)
    with pytest.raises(Exception, match="must be finite and > 0"):
        call(-1.0)


def test_a_schedule_that_reaches_0_drops_its_term() -> None:
    s, t, y = batch(6, 9)
    t[0] = NAN  # of a teacher that is not read at alpha 0
    torch._dynamo.reset()
    call = torch.compile(lambda a: kd_loss(s, t, y, alpha=a, hard_weight=0.5), fullgraph=True, backend="aot_eager")
    for alpha in (0.75, 0.5, 0.25):
        assert call(alpha).isnan()
    torch.testing.assert_close(call(0.0), kd_loss(s, None, y, alpha=0, hard_weight=0.5))
