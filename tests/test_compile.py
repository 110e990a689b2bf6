"""torch.compile, torch.export and opcheck: a compiled call is one graph that gives what eager gives."""

import itertools
from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch
from cases import here
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs

import kdfast
from kdfast.arguments import Heads, Inputs, Settings
from kdfast.choice import namespace
from kdfast.ops import SCHEMAS

pytestmark = pytest.mark.filterwarnings("ignore:kdfast")

EVERY_OPTION = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 20.0, "teacher_softcap": 30.0, "standardize": True}


def loss_and_metrics(*args: object, **settings: object) -> Tensor:
    """Their sum, so that each counts; the gradient is the loss's."""
    loss, metrics = kdfast.kd_loss(*args, return_metrics=True, **settings)
    return loss + torch.stack(metrics).nan_to_num(0).sum(0)  # NaN: those of dropped rows


# Every kind of call: loss, gradient in forward or in backward, each optional tensor, each kind of teacher.
# A call gets student and teacher (rows, vocab), labels and row values (rows,), and the backend.
CALLS: dict[str, Callable[..., Tensor]] = {
    "default": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, temperature=2.0, backend=b),
    "soft alone": lambda s, t, y, w, b: kdfast.kd_loss(s, t, divergence="forward_kl", backend=b),
    "hard alone": lambda s, t, y, w, b: kdfast.kd_loss(s, None, y, alpha=0, backend=b),
    "none": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, reduction="none", backend=b) * w,
    "batchmean": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, reduction="batchmean", backend=b),
    "sum of weighted rows": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, weight=w, reduction="sum", backend=b),
    "normalizer tensor": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, normalizer=(y >= 0).sum(), backend=b),
    "inplace": lambda s, t, y, w, b: kdfast.kd_loss(s * 1, t, y, inplace=True, backend=b) * 3,
    "inplace none": lambda s, t, y, w, b: kdfast.kd_loss(s * 1, t, y, reduction="none", inplace=True, backend=b) * w,
    "float16": lambda s, t, y, w, b: kdfast.kd_loss(s.half(), t.half(), y, backend=b) * 1024,
    "bfloat16": lambda s, t, y, w, b: kdfast.kd_loss(s.bfloat16(), t, y, backend=b),
    "arithmetic ensemble": lambda s, t, y, w, b: kdfast.kd_loss(
        s, [t, t.flip(0).half()], y, teacher_weights=[1, 3], temperature=3.0, backend=b
    ),
    "geometric ensemble": lambda s, t, y, w, b: kdfast.kd_loss(
        s, [t, t.flip(0)], y, ensemble="geometric", divergence="reverse_kl", reduction="none", backend=b
    ),
    "temperature per row": lambda s, t, y, w, b: kdfast.kd_loss(
        s, t, y, temperature=1 + w, teacher_temperature=2 + w, reduction="none", backend=b
    ),
    "probs": lambda s, t, y, w, b: kdfast.kd_loss(s, t.softmax(-1), y, target="probs", backend=b),
    "log_probs": lambda s, t, y, w, b: kdfast.kd_loss(s, t.log_softmax(-1), y, target="log_probs", backend=b),
    "logit_mse": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, divergence="logit_mse", backend=b),
    "vocab_size": lambda s, t, y, w, b: kdfast.kd_loss(s, t[:, :-1], y, vocab_size=8, t_squared=False, backend=b),
    "dkd": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, divergence="dkd", dkd_weights=(1.0, 2.0), backend=b),
    "every option": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, backend=b, **EVERY_OPTION),
    "metrics": lambda s, t, y, w, b: loss_and_metrics(s, t, y, weight=w, backend=b),
    "metrics none": lambda s, t, y, w, b: loss_and_metrics(s, t, y, reduction="none", backend=b) * w,
    "metrics inplace": lambda s, t, y, w, b: loss_and_metrics(s * 1, t, y, inplace=True, backend=b) * 3,
    "KDLoss": lambda s, t, y, w, b: kdfast.KDLoss(temperature=3.0, alpha=0.5, backend=b)(s, t, y, weight=w),
}
SOFTMAX_CALLS: dict[str, Callable[..., Tensor]] = {
    "tempered_softmax": lambda s, t, y, w, b: kdfast.tempered_softmax(s, 2.0) * t,
    "its logarithm, per row": lambda s, t, y, w, b: kdfast.tempered_softmax(
        s, 1 + w, log=True, out_dtype=torch.float64
    ),
}


def tiers(fast: Collection[str], names: Iterable[str]) -> list[Any]:
    """The names as parameters, all but `fast` of the full tier alone."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(rows: int = 6, vocab: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = {"generator": torch.Generator("cpu").manual_seed(rows * 1000 + vocab), "device": "cpu"}
    s, t = torch.randn(2, rows, vocab, **made) * 3
    y = torch.randint(min(vocab, 8), (rows,), **made)  # of few classes, for "vocab_size"
    y[rows // 2] = -100
    return here((s, t, y, torch.rand(rows, **made) + 0.5))


def value_and_gradient(call: Callable[..., Tensor], s: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    leaf = s.clone().requires_grad_()
    loss = call(leaf, *rest)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def check_compiled(call: Callable[..., Tensor], compiler: str, backend: str | None) -> None:
    s, t, y, w = batch()
    expected = value_and_gradient(call, s, t, y, w, backend)
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    torch.testing.assert_close(value_and_gradient(compiled, s, t, y, w, backend), expected)


# rows, vocab: each new shape differs from all before it in both, and the last has fewer of both than the first
SHAPES = [(6, 11), (7, 64), (33, 12), (5, 9)]


def check_compiled_once_for_all_shapes(call: Callable[..., Tensor], backend: str | None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for shape in SHAPES:
        tensors = batch(*shape)
        for tensor in tensors:
            for dimension in range(tensor.dim()):
                torch._dynamo.mark_dynamic(tensor, dimension)
        s, *rest = tensors
        leaf = s.clone().requires_grad_()
        for dimension in (0, 1):
            torch._dynamo.mark_dynamic(leaf, dimension)
        loss = compiled(leaf, *rest, backend)
        loss.sum().backward()
        torch.testing.assert_close((loss.detach(), leaf.grad), value_and_gradient(call, s, *rest, backend))
    assert counter.frame_count == 1


# Dynamo sees one opaque operator, and nothing of a backend but its namespace: so calls are compiled on what the device
# gets. In the full tier alone are those whose way through kdfast's own Python another one goes as well.
THE_SAME_WAY = (
    "soft alone",  # as "default", with no labels
    "sum of weighted rows",  # as "KDLoss", which has weights too
    "bfloat16",  # Python asks for float16 alone
    "log_probs",  # as "probs"
    "logit_mse",  # as any other divergence but dkd
    "batchmean",  # which has a test of its own with dynamic=True
    "inplace",  # which is one of Inductor's
    "metrics none",  # as "none", and as "metrics"
    "metrics inplace",  # as "inplace none", and as "metrics"
)
EVERY_CALL = CALLS | SOFTMAX_CALLS


@pytest.mark.parametrize("name", tiers(EVERY_CALL.keys() - set(THE_SAME_WAY), EVERY_CALL))
def test_a_call_of_marked_dynamic_sizes_is_one_graph_for_all_shapes_with_eager_loss_and_gradient(name):
    check_compiled_once_for_all_shapes(EVERY_CALL[name], None)


# of a backend by name its namespace is traced, and its own check of whether it is usable
@pytest.mark.parametrize("name", tiers(["default"], ["default", "inplace none"]))
def test_it_is_so_on_every_backend(name, backend):
    check_compiled_once_for_all_shapes(CALLS[name], backend)


@pytest.mark.full  # what is known of sizes leaves less to go wrong; it is known in Inductor's tests too
@pytest.mark.parametrize("name", EVERY_CALL)
def test_a_call_of_known_sizes_is_one_graph_with_eager_loss_and_gradient(name):
    check_compiled(EVERY_CALL[name], "aot_eager", None)


# one with the gradient in forward, one whose clone Inductor itself has to take out or keep, and one in backward
@pytest.mark.parametrize("name", tiers(["default", "inplace"], ["default", "inplace", "temperature per row"]))
def test_inductor_agrees_with_eager(name):
    # its cache knows the graph but not kdfast's version: what an older one left there would be run
    with torch._inductor.utils.fresh_cache():
        check_compiled(CALLS[name], "inductor", None)


@pytest.mark.full  # Inductor, as Dynamo, sees no more of a backend than its namespace
def test_inductor_agrees_with_eager_on_every_backend(backend):
    with torch._inductor.utils.fresh_cache():
        check_compiled(CALLS["default"], "inductor", backend)


# whose gradient would come in forward, in backward, there for its dtype, into the logits; and metrics; then all others
@pytest.mark.parametrize("name", tiers(["default", "none", "float16", "inplace", "metrics"], CALLS))
def test_compiled_under_no_grad_makes_no_gradient(name):
    s, t, y, w = batch()
    s.requires_grad_()
    recorder = EagerAndRecordGraphs()
    with torch.no_grad():
        expected = CALLS[name](s, t, y, w, None)
        loss = torch.compile(CALLS[name], fullgraph=True, backend=recorder)(s, t, y, w, None)
    torch.testing.assert_close(loss, expected)
    (graph,) = recorder.graphs
    called = [str(node.target) for node in graph.graph.nodes if str(node.target).startswith("kdfast")]
    assert [name.split(".")[1] for name in called] == ["stats"], called


def test_a_compiled_training_step_calls_one_kernel_and_saves_its_gradient_alone():
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph

    s, t, y, w = batch()
    compiled = torch.compile(CALLS["default"], fullgraph=True, backend=aot_autograd(fw_compiler=record))
    value_and_gradient(compiled, s, t, y, w, None)
    forward, backward = graphs
    called = [str(node.target) for node in forward.graph.nodes if node.op == "call_function"]
    computed = [name for name in called if "getitem" not in name and "detach" not in name]
    assert computed == ["kdfast.loss_grad.default"], called
    shapes = [tuple(node.meta["val"].shape) for node in backward.graph.nodes if node.op == "placeholder"]
    assert sorted(shapes) == [(), s.shape], "backward takes the finished gradient and grad_output, and no logits"


# the first divides by a size in Python; then one of each kind of gradient, and a list of tensors
@pytest.mark.parametrize(
    "name", tiers(["batchmean"], ["batchmean", "default", "none", "inplace none", "arithmetic ensemble"])
)
def test_dynamic_true_never_compiles_again_after_the_first_shape(name):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for shape in SHAPES:
        s, *rest = batch(*shape)
        expected = value_and_gradient(CALLS[name], s, *rest, None)
        torch.testing.assert_close(value_and_gradient(compiled, s, *rest, None), expected)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * len(SHAPES)


def test_inplace_on_a_leaf_is_an_error_under_compile_too():
    s, t, y, _ = batch()
    compiled = torch.compile(lambda s: kdfast.kd_loss(s, t, y, inplace=True), fullgraph=True, backend="aot_eager")
    before = s.clone()
    with pytest.raises(Exception, match="inplace: student_logits is a leaf"):
        compiled(s.requires_grad_())
    assert torch.equal(s.detach(), before)


def test_an_exported_loss_gives_the_loss():
    s, t, y, _ = batch()
    loss = kdfast.KDLoss(temperature=2.0)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(loss, (s, t, y)).module()(s, t, y), loss(s, t, y))


def plain(**changes: object) -> Settings:
    defaults = Settings(
        temperature=2.0,
        teacher_temperature=2.0,
        alpha=0.9,
        hard_weight=0.1,
        t_squared=True,
        divergence="cross_entropy",
        beta=0.0,
        target="logits",
        ensemble="arithmetic",
        teacher_weights=[1.0],
        vocab_size=-1,
        ignore_index=-100,
        reduction="mean",
        divisor=0.0,
        label_smoothing=0.0,
        z_loss=0.0,
        softcap=0.0,
        teacher_softcap=0.0,
        standardize=False,
        dkd_weights=[1.0, 8.0],
        metrics=False,
    )
    return defaults._replace(**changes)


def op_arguments(kind: str) -> tuple[Tensor, Inputs, Settings]:
    s, t, y, w = batch(6, 11)
    if kind == "mean":
        return s, Inputs([t], y, None, None, None, None), plain()
    if kind == "rows, with all there is":
        inputs = Inputs([t, t.half()], y, w, None, 1 + w, 2 + w)
        return s, inputs, plain(teacher_weights=[0.5, 0.5], ensemble="geometric", reduction="none")
    if kind == "every option and metrics":
        return s, Inputs([t], y, w, None, None, None), plain(divergence="dkd", metrics=True, **EVERY_OPTION)
    if kind == "padded bfloat16":
        inputs = Inputs([t[:, :9]], y, None, torch.tensor(7), None, None)
        return s.bfloat16(), inputs, plain(divergence="reverse_kl", vocab_size=9)
    if kind == "transposed float64":
        inputs = Inputs([], y[:4], None, None, None, None)
        return s.double()[:4].T.contiguous().T, inputs, plain(alpha=0.0, hard_weight=1.0, teacher_weights=[])
    return s[:0], Inputs([t[:0]], None, None, None, None, None), plain(hard_weight=0.0, reduction="sum")


def heads_for(logits: Tensor, inputs: Inputs, of_teacher: bool) -> tuple[Heads, Inputs]:
    """Heads whose products have the logits' shape and dtype."""
    made = {"dtype": logits.dtype, "device": logits.device}
    hidden, weight = torch.ones(*logits.shape[:-1], 3, **made), torch.ones(logits.shape[-1], 3, **made)
    teacher = (hidden.clone(), weight.clone(), None) if of_teacher else (None, None, None)
    heads = Heads(hidden, weight, weight[:, 0].clone(), *teacher, 2, torch.float32, True, not of_teacher, True)
    return heads, inputs._replace(teachers=[]) if of_teacher else inputs


KINDS = (
    "mean",
    "rows, with all there is",  # no reduction, and each tensor that may be None
    "every option and metrics",
    "padded bfloat16",
    "transposed float64",  # whose gradient is laid out otherwise
    "no rows",
)


def check_operator(name: str, backend: str | None, kind: str, *checks: str) -> None:
    s, inputs, settings = op_arguments(kind)
    ops = namespace(backend, s)
    if "loss_grad" in name and settings.reduction == "none":
        settings = settings._replace(reduction="sum")  # these are for scalar losses
    loss, stats, _ = ops.stats(s, *inputs, *settings)
    heads, their_inputs = heads_for(s, inputs, of_teacher=kind in ("mean", "every option and metrics"))
    if name == "linear_grad":
        settings = settings._replace(reduction="none")
    arguments = {
        "linear_loss_grad": (*heads, *their_inputs, *settings),
        "linear_stats": (*heads, *their_inputs, *settings),
        "linear_grad": (*heads, stats, s[..., 0].to(loss.dtype), *their_inputs, *settings),
        "scale_": (s, torch.tensor(0.5)),
        "tempered_softmax": (s, inputs.temperatures, 2.0, inputs.weight is None, torch.float32),
        "tempered_softmax_backward": (s, s.float(), inputs.temperatures, 2.0, inputs.weight is None, s.dtype),
        "grad": (s, stats, torch.ones_like(loss), *inputs, *settings),
        "grad_": (s, stats, torch.ones_like(loss), *inputs, *settings),
    }.get(name, (s, *inputs, *settings))
    torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=checks)


# What a backend's own code decides on: what it writes to and returns, and the shapes, dtypes and strides of that. Two
# kinds show it of Triton, which compiles some five kernels for each and makes all outputs in the same lines.
@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        *itertools.product(("reference", "cpu"), KINDS),
        *(("triton", kind) for kind in ("mean", "no rows")),
        *(pytest.param("triton", kind, marks=pytest.mark.full) for kind in KINDS if kind not in ("mean", "no rows")),
    ],
    indirect=["backend"],
)
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_backends_operators_do_as_their_schemas_and_fakes_say(name, backend, kind):
    check_operator(name, backend, kind, "test_schema", "test_faketensor")


# What is one code for all backends: no operator has a derivative of its own, and AOTAutograd makes of it at sizes it
# does not know what eager does; with one reduction and the other, in the full tier with the other kinds of arguments.
@pytest.mark.parametrize("kind", tiers(["mean", "rows, with all there is"], KINDS))
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck_finds_nothing_in_any_operator(name, kind):
    check_operator(name, None, kind, "test_autograd_registration", "test_aot_dispatch_dynamic")
