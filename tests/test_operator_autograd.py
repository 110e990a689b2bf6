"""Autograd of the operators themselves, which graphs of torch.compile and torch.export run."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F64
from derivative_cases import (
    FORWARD,
    HEADS,
    HIDDEN,
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
    plain,
)  # fmt: skip
from torch import Tensor, func, nn
from torch._dynamo import compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from kdfast import kd_loss, linear_kd_loss, tempered_softmax
from kdfast.arguments import Inputs, Settings
from kdfast.options import check_inputs, check_settings


def operator_arguments(reduction: str) -> tuple[Inputs, Settings]:
    options = kd_loss.__kwdefaults__ | {"temperature": T, "reduction": reduction}
    return check_inputs(STUDENT, TEACHER, LABELS, options, check_settings(options, True))


def operator(name: str, reduction: str) -> Callable[[Tensor], Tensor]:
    """The operator's loss as a function of the student."""
    inputs, settings = operator_arguments(reduction)
    return lambda s: getattr(torch.ops.kdfast, name)(s, *inputs, *settings)[0]


# what operators return that must not look like a constant, as functions of the student
def results_without_a_derivative() -> dict[str, Callable[[Tensor], Tensor]]:
    inputs, settings = operator_arguments("mean")
    table = torch.ops.kdfast.stats(STUDENT, *inputs, *settings)[1]
    one, ops = torch.ones((), dtype=F64), torch.ops.kdfast
    return {
        "loss_grad": lambda s: ops.loss_grad(s, *inputs, *settings)[1],
        "stats": lambda s: ops.stats(s, *inputs, *settings)[1],
        "grad": lambda s: ops.grad(s, table, one, *inputs, *settings),
        "sums": lambda s: ops.sums(s, *inputs, *settings),
    }


@pytest.mark.parametrize(("name", "reduction"), [("loss_grad", "mean"), ("stats", "mean"), ("stats", "none")])
def test_an_operators_loss_is_differentiable(name, reduction):
    call = operator(name, reduction)
    for transform in (*REVERSE.values(), *FORWARD.values()):
        if transform is not FORWARD["linearize"]:  # its tracer runs the operator on symbols
            expected = transform(lambda s: plain(s, reduction), (STUDENT,), (TANGENT,))
            torch.testing.assert_close(transform(call, (STUDENT,), (TANGENT,)), expected)
    leaf = STUDENT.clone().requires_grad_()
    (3 * call(leaf)).sum().backward()
    torch.testing.assert_close(leaf.grad, func.grad(lambda s: 3 * plain(s, reduction).sum())(STUDENT))


@pytest.mark.parametrize("name", ["loss_grad", "stats", "grad", "sums"])
def test_an_operators_other_results_raise_in_backward(name):
    call = results_without_a_derivative()[name]
    leaf = STUDENT.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=TWICE):
        call(leaf).sum().backward()
    with pytest.raises(RuntimeError, match=TWICE):
        func.grad(lambda s: call(s).sum())(STUDENT)


def test_what_an_operator_has_overwritten_raises_in_backward():
    scaled = STUDENT.clone().requires_grad_() * 1
    torch.ops.kdfast.scale_(scaled, torch.full((), 2, dtype=F64))
    assert torch.equal(scaled.detach(), 2 * STUDENT)
    with pytest.raises(RuntimeError, match=TWICE):
        scaled.sum().backward()


def test_an_operators_constant_that_requires_grad_raises():
    inputs, settings = operator_arguments("mean")
    inputs = inputs._replace(row_weight=torch.ones(ROWS, dtype=F64, requires_grad=True))
    with pytest.raises(RuntimeError, match="row_weight: requires grad"):
        torch.ops.kdfast.stats(STUDENT.clone().requires_grad_(), *inputs, *settings)


def test_vmap_of_an_operator_raises():
    with pytest.raises(RuntimeError, match=VMAP):
        func.vmap(operator("stats", "mean"))(STUDENT.expand(2, ROWS, VOCAB))


class Model(nn.Module):
    """A trunk, a head and a loss of some kind."""

    def __init__(self, kind: str, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(HIDDEN, HIDDEN, dtype=F64), nn.Linear(HIDDEN, VOCAB, dtype=F64)
        self.kind, self.settings = kind, {"temperature": T} | settings

    def forward(self, x: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        hidden, head = torch.tanh(self.trunk(x)), self.head
        if self.kind == "linear":
            return linear_kd_loss(hidden, head.weight, teacher, None, labels, student_bias=head.bias, **self.settings)
        if self.kind == "softmax":
            return (tempered_softmax(head(hidden), T) * teacher).sum()
        if self.kind == "plain":
            return plain(head(hidden), self.settings["reduction"])
        return kd_loss(head(hidden), teacher, labels, **self.settings)


BATCH = HEADS[0], TEACHER, LABELS
MODELS = {  # kind, settings; the gradient is made in forward and in backward
    "mean": ("kd", {"reduction": "mean"}),
    "none": ("kd", {"reduction": "none"}),
    "inplace": ("kd", {"reduction": "mean", "inplace": True}),
    "inplace none": ("kd", {"reduction": "none", "inplace": True}),
    "linear mean": ("linear", {"reduction": "mean", "chunk_rows": 3}),
    "linear none": ("linear", {"reduction": "none", "chunk_rows": 3}),
    "softmax": ("softmax", {}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def trained(model: nn.Module, call: Callable[..., Tensor]) -> list[Tensor]:
    """The gradients of 3 times the loss; backward scales those of forward."""
    model.zero_grad()
    (3 * call(*BATCH)).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def expected_gradients(name: str) -> list[Tensor]:
    """Of plain PyTorch; of tempered_softmax, which test_tempered_softmax.py holds to it, of eager mode."""
    kind, settings = MODELS[name]
    model = Model("softmax" if kind == "softmax" else "plain", **settings)
    return trained(model, model)


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


EXPORTS: dict[str, Callable[[nn.Module], torch.export.ExportedProgram]] = {
    "not strict": lambda model: torch.export.export(model, BATCH),
    "strict": lambda model: torch.export.export(model, BATCH, strict=True),
    "decomposed": lambda model: torch.export.export(model, BATCH).run_decompositions(),
    "saved and loaded": lambda model: saved_and_loaded(torch.export.export(model, BATCH)),
    "without gradients": torch.no_grad()(lambda model: torch.export.export(model, BATCH)),
}


@every_model
@pytest.mark.parametrize("how", EXPORTS)
def test_an_exported_model_trains_to_the_same_gradients(how, name):
    kind, settings = MODELS[name]
    module = EXPORTS[how](Model(kind, **settings)).module()
    torch.testing.assert_close(trained(module, module), expected_gradients(name))


def test_an_exported_linear_loss_whose_head_was_frozen_raises_instead_of_giving_none():
    model = Model("linear", reduction="mean")
    model.head.requires_grad_(False)
    module = torch.export.export(model, BATCH).module()
    assert [gradient is None for gradient in trained(module, module)] == [False, False, True, True]
    module.head.requires_grad_()
    with pytest.raises(RuntimeError, match="gradient of the student's weight was not asked for in forward"):
        trained(module, module)


@every_model
def test_a_training_step_traced_by_make_fx_gives_the_same_gradients(name):
    kind, settings = MODELS[name]
    model = Model(kind, **settings)
    parameters = list(model.parameters())

    def step(*batch: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((3 * model(*batch)).sum(), parameters)

    torch.testing.assert_close(list(make_fx(step)(*BATCH)(*BATCH)), expected_gradients(name))


# "eager" runs Dynamo's graph with autograd; AOTAutograd raises when the gradient is differentiated, in its own words
@pytest.mark.parametrize(
    ("compiler", "message"), [("eager", TWICE), ("aot_eager", "does not.*support double backward")]
)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "softmax"])
def test_a_penalty_of_a_compiled_losss_gradient_raises(name, compiler, message):
    torch._dynamo.reset()
    kind, settings = MODELS[name]
    call = torch.compile(Model(kind, **settings), backend=compiler, fullgraph=True)
    x = BATCH[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=message):
        loss = call(x, *BATCH[1:]).sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_inplace_loss_overwrites_the_logits_and_counts_it(reduction, compiler):
    torch._dynamo.reset()
    leaf = STUDENT.clone().requires_grad_()
    logits = leaf * 1
    call = torch.compile(
        lambda s: kd_loss(s, TEACHER, LABELS, temperature=T, reduction=reduction, inplace=True), backend=compiler
    )
    call(logits).sum().backward()
    assert logits._version > 0
    torch.testing.assert_close(logits.detach(), func.grad(lambda s: plain(s, reduction).sum())(STUDENT))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: func.grad(lambda s: f(s).sum())(STUDENT),
        lambda f: func.jvp(f, (STUDENT,), (TANGENT,)),
    ],
    ids=["grad", "jvp"],
)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_transform_agrees_with_plain_pytorch(compiler, transform, reduction):
    torch._dynamo.reset()

    def ours(s: Tensor) -> Tensor:
        return kd_loss(s, TEACHER, LABELS, temperature=T, reduction=reduction)

    found = torch.compile(lambda: transform(ours), backend=compiler)()
    torch.testing.assert_close(found, transform(lambda s: plain(s, reduction)))


@pytest.mark.parametrize("name", ["mean", "none", "inplace none", "linear mean", "linear none"])
def test_compiled_autograd_traces_backward_to_one_graph_with_the_same_gradients(name):
    torch._dynamo.reset()
    kind, settings = MODELS[name]
    model = Model(kind, **settings)
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager", fullgraph=True)):
        torch.testing.assert_close(trained(model, model), expected_gradients(name))
