"""Tokens' log-probabilities under autograd, torch.func, torch.compile and torch.export.

All of it is code that the backends share, in float64, for logits and for hidden states.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F64, batch
from derivative_cases import FORWARD, HEAD_TANGENTS, HEADS, REVERSE, ROWS, STUDENT, TANGENT, TWICE, VMAP, VOCAB
from token_cases import plain
from torch import Tensor, func, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kdfast

pytestmark = pytest.mark.filterwarnings("ignore:kdfast")

IDS = torch.tensor([[0, 3], [6, -1], [-100, -100], [2, 2]])
KINDS = pytest.mark.parametrize("kind", ["logits", "hidden states"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def combined(results: Any) -> Tensor:
    """One number for each row, (...), of all results; the absent token's is left out."""
    log_probs, entropy, log_rest = results
    return log_probs.masked_fill(log_probs.isinf(), 0).sum(-1) + 2 * entropy - 3 * log_rest


def call_of(kind: str, backend: str | None = None) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Any, Any]:
    """kdfast's call, plain PyTorch's, the arguments, and their tangents."""
    settings = {"temperature": 0.7, "softcap": 3.0}
    if kind == "logits":
        ours = lambda s, **more: kdfast.token_log_probs(s, IDS, backend=backend, **settings | more)  # noqa: E731
        return (
            lambda s, **more: combined(ours(s, **more)),
            lambda s, **more: combined(plain(s, IDS, **settings | more)),
            (STUDENT,),
            (TANGENT,),
        )

    def linear(hidden: Tensor, weight: Tensor, bias: Tensor, **more: Any) -> Tensor:
        given = settings | {"bias": bias, "chunk_rows": 3, "backend": backend} | more
        return combined(kdfast.linear_token_log_probs(hidden, weight, IDS, **given))

    def by_logits(hidden: Tensor, weight: Tensor, bias: Tensor, **more: Any) -> Tensor:
        return combined(plain(hidden @ weight.T + bias, IDS, **settings | more))

    return linear, by_logits, HEADS, HEAD_TANGENTS


def gradients(call: Callable[..., Tensor], given: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    return list(torch.autograd.grad(3 * call(*leaves).sum(), leaves))


@KINDS
@pytest.mark.parametrize("transform", REVERSE)
def test_transforms_of_torch_func_give_plain_pytorchs_gradients(transform, kind):
    ours, theirs, given, _ = call_of(kind)
    torch.testing.assert_close(REVERSE[transform](ours, given, None), REVERSE[transform](theirs, given, None))


UNSUPPORTED: dict[str, tuple[Callable[..., Any], str]] = {
    "create_graph": (lambda f, x: gradient_penalty(f, x), TWICE),
    "grad of grad": (lambda f, x: func.grad(lambda y: func.grad(f)(y).square().sum())(x), TWICE),
    "hessian": (lambda f, x: func.hessian(f)(x), f"{TWICE}|forward-mode AD"),
    "vmap": (lambda f, x: func.vmap(f)(torch.stack([x, x])), VMAP),
    "jacrev": (lambda f, x: func.jacrev(f)(x), VMAP),
    **{name: (lambda f, x, make=make: make(f, (x,), (x,)), "do not support forward-mode AD")
       for name, make in FORWARD.items()},
}  # fmt: skip


def gradient_penalty(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(f(leaf), leaf, create_graph=True)[0].square().sum().backward()


@KINDS
@pytest.mark.parametrize("transform", UNSUPPORTED)
def test_what_is_not_supported_raises(transform, kind):
    make, message = UNSUPPORTED[transform]
    ours, _, (first, *others), _ = call_of(kind)
    with pytest.raises(RuntimeError, match=message):
        make(lambda x: ours(x, *others).sum(), first)


def test_an_operators_temperature_that_requires_grad_raises():
    rows = torch.ones(ROWS, dtype=F64, requires_grad=True)
    numbers, chunks = (1.0, 1.0, 0.0, -1, True), (3, F64)
    for call in (
        lambda: torch.ops.kdfast.token_stats(STUDENT, IDS, rows, *numbers),
        lambda: torch.ops.kdfast.linear_token_stats(*HEADS, IDS, rows, *numbers, *chunks),
    ):
        with pytest.raises(RuntimeError, match="^temperatures: requires grad"):
            call()


class Calls(TorchDispatchMode):
    """kdfast's operators that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "kdfast":
            self.seen.append((operator._opname, args))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("which", range(3))
def test_backward_asks_for_the_gradient_of_what_has_one(which):
    leaf = STUDENT.clone().requires_grad_()
    result = kdfast.token_log_probs(leaf, IDS.clamp_min(0))[which]
    with Calls() as calls:
        result.sum().backward()
    ((name, args),) = calls.seen
    assert name == "token_grad"
    assert [x is not None for x in args[3:6]] == [i == which for i in range(3)]


@KINDS
def test_where_no_gradient_is_wanted_none_is_computed(kind):
    ours, theirs, given, _ = call_of(kind)
    leaves = [x.clone().requires_grad_() for x in given]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, Calls() as calls:
            torch.testing.assert_close(ours(*leaves), theirs(*given))
        assert {name.removeprefix("linear_") for name, _ in calls.seen} == {"token_stats"}
    assert not ours(*given).requires_grad


@KINDS
def test_activation_checkpointing_and_tensors_of_inference_mode_give_the_same_gradients(kind):
    ours, theirs, given, _ = call_of(kind)
    want = gradients(theirs, given)
    torch.testing.assert_close(gradients(lambda *x: checkpoint(ours, *x, use_reentrant=False), given), want)
    with torch.inference_mode():
        temperature = torch.full((ROWS,), 0.7, dtype=F64)
    torch.testing.assert_close(gradients(lambda *x: ours(*x, temperature=temperature), given), want)


@KINDS
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_call_has_the_same_gradients_in_one_graph(compiler, kind):
    ours, theirs, given, _ = call_of(kind)
    rows = torch.linspace(0.5, 2, ROWS, dtype=F64)
    with torch._inductor.utils.fresh_cache():
        for temperature in (0.7, rows, torch.tensor(2.0)):
            compiled = torch.compile(
                lambda *x, T=temperature: ours(*x, temperature=T), fullgraph=True, backend=compiler
            )
            want = gradients(lambda *x, T=temperature: theirs(*x, temperature=T), given)
            torch.testing.assert_close(gradients(compiled, given), want)


@KINDS
@pytest.mark.parametrize("name", ["temperature", "logit_scale", "both"])
def test_a_number_that_changes_compiles_once_more_and_then_no_more(name, kind):
    ours, theirs, given, _ = call_of(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for value in (0.5, 0.7, 0.9, 1.1):
        settings = {"temperature": value, "logit_scale": value + 0.1} if name == "both" else {name: value}
        settings["softcap"] = None
        want = gradients(lambda *x, given=settings: theirs(*x, **given), given)
        torch.testing.assert_close(gradients(lambda *x, given=settings: compiled(*x, **given), given), want)
    assert counter.frame_count == 2


def test_sizes_that_change_compile_once_more_and_then_no_more():
    counter = CompileCounterWithBackend("aot_eager")
    for make in (
        lambda s, ids, W: kdfast.token_log_probs(s, ids),
        lambda s, ids, W: kdfast.linear_token_log_probs(s, W, ids, chunk_rows=4),
    ):
        compiled, before = torch.compile(make, fullgraph=True, backend=counter), counter.frame_count
        for rows, vocab in ((6, 11), (7, 64), (33, 12), (5, 9)):
            s, W, ids = batch(rows, vocab).student, batch(40, vocab, seed=1).student, torch.arange(rows) % vocab
            torch.testing.assert_close(compiled(s, ids, W), make(s, ids, W))
        assert counter.frame_count - before <= 3


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        _, hidden = HEADS[0].shape
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(hidden, hidden, dtype=F64), nn.Linear(hidden, VOCAB, dtype=F64)
        self.kind = kind

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        hidden, head = torch.tanh(self.trunk(x)), self.head
        if self.kind == "hidden states":
            return combined(kdfast.linear_token_log_probs(hidden, head.weight, ids, bias=head.bias, chunk_rows=3))
        return combined((kdfast.token_log_probs if self.kind == "logits" else plain)(head(hidden), ids))


def trained(model: nn.Module, call: Callable[..., Tensor]) -> list[Tensor]:
    model.zero_grad()
    (3 * call(HEADS[0], IDS)).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@KINDS
def test_an_exported_model_trains_to_the_same_gradients(kind):
    model, truth = Model(kind), Model("plain")
    for module in (
        torch.export.export(model, (HEADS[0], IDS)).module(),
        torch.export.export(model, (HEADS[0], IDS)).run_decompositions().module(),
    ):
        torch.testing.assert_close(trained(module, module), trained(truth, truth))


@KINDS
def test_compiled_autograd_traces_backward_to_one_graph(kind):
    model, truth = Model(kind), Model("plain")
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager", fullgraph=True)):
        torch.testing.assert_close(trained(model, model), trained(truth, truth))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_transform_agrees_with_plain_pytorch(compiler):
    ours, theirs, (logits,), _ = call_of("logits")
    found = torch.compile(lambda: func.grad(lambda s: ours(s).sum())(logits), backend=compiler)()
    torch.testing.assert_close(found, func.grad(lambda s: theirs(s).sum())(logits))
