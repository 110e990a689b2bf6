"""torch.compile, torch.export and opcheck: a compiled call is one graph with the values of eager mode."""

import functools
import itertools
from collections.abc import Callable
from math import nan

import pytest
import torch
from calls import ALL_OPTIONS
from cases import batch as logits_batch
from token_cases import token_arguments
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs

import kdfast
from kdfast.arguments import Heads, Inputs, Settings
from kdfast.choice import namespace
from kdfast.ops import SCHEMAS
from kdfast.options import check_inputs, check_settings
from kdfast.row_math import Sums

pytestmark = pytest.mark.filterwarnings("ignore:kdfast")


def loss_and_metrics(*args: object, **settings: object) -> Tensor:
    """Their sum, so that each has an effect; the gradient is the loss's."""
    loss, metrics = kdfast.kd_loss(*args, return_metrics=True, **settings)
    given = [metric for metric in metrics if metric is not None]
    return loss + torch.stack(given).nan_to_num(0).sum(0)  # NaN: those of dropped rows


def entries(t: Tensor) -> kdfast.TopKTargets:
    values, indices = t.topk(3)
    return kdfast.TopKTargets(indices, values.log_softmax(-1) - 0.1)


# Each path of a call through kdfast's Python: loss, gradient in forward or in backward, each optional tensor, each kind
# of teacher. Arguments: student and teacher (rows, vocab), labels and row values (rows,), the backend.
CALLS: dict[str, Callable[..., Tensor]] = {
    "default": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, temperature=2.0, backend=b),
    "hard alone": lambda s, t, y, w, b: kdfast.kd_loss(s, None, y, alpha=0, backend=b),
    "none": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, reduction="none", backend=b) * w,
    "batchmean": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, reduction="batchmean", backend=b),
    "normalizer tensor": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, normalizer=(y >= 0).sum(), backend=b),
    "inplace": lambda s, t, y, w, b: kdfast.kd_loss(s * 1, t, y, inplace=True, backend=b) * 3,
    "inplace none": lambda s, t, y, w, b: kdfast.kd_loss(s * 1, t, y, reduction="none", inplace=True, backend=b) * w,
    "float16": lambda s, t, y, w, b: kdfast.kd_loss(s.half(), t.half(), y, backend=b) * 1024,
    "arithmetic ensemble": lambda s, t, y, w, b: kdfast.kd_loss(s, [t, t.half()], y, teacher_weights=[1, 3], backend=b),
    "geometric ensemble": lambda s, t, y, w, b: kdfast.kd_loss(s, [t, t.half()], y, ensemble="geometric", backend=b),
    "temperature per row": lambda s, t, y, w, b: kdfast.kd_loss(
        s, t, y, temperature=1 + w, teacher_temperature=2 + w, reduction="none", backend=b
    ),
    "probs without labels": lambda s, t, y, w, b: kdfast.kd_loss(s, t.softmax(-1), target="probs", backend=b),
    "vocab_size": lambda s, t, y, w, b: kdfast.kd_loss(s, t[:, :-1], y, vocab_size=8, t_squared=False, backend=b),
    "dkd": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, divergence="dkd", dkd_weights=(1.0, 2.0), backend=b),
    "every option": lambda s, t, y, w, b: kdfast.kd_loss(s, t, y, backend=b, **ALL_OPTIONS),
    "metrics": lambda s, t, y, w, b: loss_and_metrics(s, t, y, row_weight=w, backend=b),
    "metrics none": lambda s, t, y, w, b: loss_and_metrics(s, t, y, reduction="none", backend=b) * w,
    "sparse": lambda s, t, y, w, b: loss_and_metrics(s, entries(t), y, temperature=2.0, backend=b),
    "sparse none": lambda s, t, y, w, b: (
        kdfast.kd_loss(s, entries(t), missing="conditional", divergence="jsd", reduction="none", backend=b) * w
    ),
    "topk_targets": lambda s, t, y, w, b: kdfast.kd_loss(s, kdfast.topk_targets(t, 4, 2.0), temperature=2.0, backend=b),
    "KDLoss": lambda s, t, y, w, b: kdfast.KDLoss(temperature=3.0, reduction="sum", backend=b)(s, t, y, row_weight=w),
    "tempered_softmax": lambda s, t, y, w, b: kdfast.tempered_softmax(s, 2.0) * t,
    "its logarithm, per row": lambda s, t, y, w, b: kdfast.tempered_softmax(
        s, 1 + w, log=True, out_dtype=torch.float64
    ),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(rows: int = 6, vocab: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s, t, y = logits_batch(rows, vocab)
    y = y % 8  # few classes, for "vocab_size"
    y[rows // 2] = -100
    return s, t, y, torch.linspace(0.5, 1.5, rows)


def value_and_gradient(call: Callable[..., Tensor], *tensors: Tensor, marked: bool = False) -> tuple[Tensor, Tensor]:
    """With `marked` all sizes of the tensors are dynamic."""
    leaf = tensors[0].clone().requires_grad_()
    for tensor in (leaf, *tensors[1:]) if marked else ():
        for dimension in range(tensor.dim()):
            torch._dynamo.mark_dynamic(tensor, dimension)
    loss = call(leaf, *tensors[1:])
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


# rows, vocab: each shape differs from the earlier ones in both; the last is smaller than the first
SHAPES = [(6, 11), (7, 64), (33, 12), (5, 9)]


def graphs_after_each_shape(name: str, backend: str | None, marked: bool, dynamic: bool | None = None) -> list[int]:
    """How many graphs there are after each of SHAPES; losses and gradients must equal eager's."""
    counter = CompileCounterWithBackend("aot_eager")
    call = functools.partial(CALLS[name], b=backend)
    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=dynamic)
    counts = []
    for shape in SHAPES:
        expected = value_and_gradient(call, *batch(*shape))
        torch.testing.assert_close(value_and_gradient(compiled, *batch(*shape), marked=marked), expected)
        counts.append(counter.frame_count)
    return counts


# Dynamo traces one operator, whatever the backend: so these calls use the device's default backend.
@pytest.mark.parametrize("name", CALLS)
def test_a_call_with_dynamic_sizes_compiles_to_one_graph(name):
    assert graphs_after_each_shape(name, None, marked=True) == [1] * len(SHAPES)


# with a backend's name Dynamo traces the check of whether it is usable
def test_every_backend_compiles_to_one_graph_with_dynamic_sizes(backend):
    assert graphs_after_each_shape("default", backend, marked=True) == [1] * len(SHAPES)


def test_dynamic_true_never_recompiles_after_the_first_shape():
    counts = graphs_after_each_shape("batchmean", None, marked=False, dynamic=True)  # it divides by a size in Python
    assert counts == [counts[0]] * len(SHAPES)


# gradient in forward; a clone that Inductor must keep; gradient in backward
@pytest.mark.parametrize("name", ["default", "inplace", pytest.param("temperature per row", marks=pytest.mark.full)])
def test_inductor_agrees_with_eager(name):
    call = functools.partial(CALLS[name], b=None)
    # Inductor's cache does not know kdfast's version, and would run an older one's code
    with torch._inductor.utils.fresh_cache():
        compiled = torch.compile(call, fullgraph=True)
        torch.testing.assert_close(value_and_gradient(compiled, *batch()), value_and_gradient(call, *batch()))


# gradient in forward, in backward, in backward because of fp16, in-place; metrics
@pytest.mark.parametrize("name", ["default", "none", "float16", "inplace", "metrics"])
def test_a_compiled_call_under_no_grad_computes_no_gradient(name):
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


def test_a_compiled_step_calls_one_operator_and_saves_its_gradient():
    from torch._dynamo.backends.common import aot_autograd

    graphs = []
    compiler = aot_autograd(fw_compiler=lambda graph, inputs: graphs.append(graph) or graph)
    s, *rest = batch()
    call = functools.partial(CALLS["default"], b=None)
    value_and_gradient(torch.compile(call, fullgraph=True, backend=compiler), s, *rest)
    forward, backward = graphs
    called = [str(node.target) for node in forward.graph.nodes if node.op == "call_function"]
    computed = [name for name in called if "getitem" not in name and "detach" not in name]
    assert computed == ["kdfast.loss_grad.default"], called
    shapes = [tuple(node.meta["val"].shape) for node in backward.graph.nodes if node.op == "placeholder"]
    assert sorted(shapes) == [(), s.shape], "backward gets the finished gradient and grad_output, no logits"


def test_inplace_on_a_leaf_raises_under_compile_too():
    s, t, y, _ = batch()
    compiled = torch.compile(lambda s: kdfast.kd_loss(s, t, y, inplace=True), fullgraph=True, backend="aot_eager")
    before = s.clone()
    with pytest.raises(Exception, match="inplace: student_logits is a leaf"):
        compiled(s.requires_grad_())
    assert torch.equal(s.detach(), before)


def test_an_exported_loss_gives_the_same_value():
    s, t, y, _ = batch()
    loss = kdfast.KDLoss(temperature=2.0)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(loss, (s, t, y)).module()(s, t, y), loss(s, t, y))


KINDS = (
    "mean",
    "every tensor by row",  # reduction "none", and each tensor that may be None
    "every option and metrics",
    "padded bfloat16",
    "transposed float64",  # the gradient has another layout
    "no rows",
    "dynamic numbers",  # a CPU tensor in place of settings
    "sparse",
    "sparse by row",
)
NOT_SPARSE = ("sums", "pointwise_sums", "losses_and_coefficients")  # the operators of shards


def op_arguments(kind: str) -> tuple[Tensor, Inputs, Settings]:
    s, t, y, w = batch()
    # no row is dropped: its metrics would be NaN, which opcheck takes for a difference
    by_row = {"row_weight": w, "temperature": 1 + w, "teacher_temperature": 2 + w, "reduction": "none"}
    padded = {"divergence": "reverse_kl", "vocab_size": 9, "normalizer": torch.tensor(7)}
    student, teacher, labels, settings = {
        "mean": (s, t, y, {"temperature": 2.0}),
        "every tensor by row": (s, [t, t.half()], y.clamp_min(0), by_row | {"return_metrics": True}),
        "every option and metrics": (s, t, y, ALL_OPTIONS | {"divergence": "dkd", "return_metrics": True}),
        "padded bfloat16": (s.bfloat16(), t[:, :9], y, padded),
        "transposed float64": (s.double()[:4].T.contiguous().T, None, y[:4], {"alpha": 0}),
        "no rows": (s[:0], t[:0], None, {"reduction": "sum"}),
        "dynamic numbers": (s, t, y, {"temperature": 2.0}),
        "sparse": (s, entries(t), y, {"temperature": 2.0}),
        "sparse by row": (s, entries(t), None, by_row | {"missing": "conditional", "teacher_temperature": None}),
    }[kind]
    options = kdfast.kd_loss.__kwdefaults__ | settings
    inputs, settings = check_inputs(student, teacher, labels, options, check_settings(options, labels is not None))
    if kind == "dynamic numbers":
        numbers = torch.tensor([settings.temperature, settings.alpha], dtype=torch.float64, device="cpu")
        inputs, settings = inputs._replace(dynamic_numbers=numbers), settings._replace(temperature=nan, alpha=nan)
    return student, inputs, settings


def heads_for(logits: Tensor, inputs: Inputs, of_teacher: bool) -> tuple[Heads, Inputs]:
    """Heads whose logits have this shape and dtype."""
    made = {"dtype": logits.dtype, "device": logits.device}
    hidden, weight = torch.ones(*logits.shape[:-1], 3, **made), torch.ones(logits.shape[-1], 3, **made)
    teacher = (hidden.clone(), weight.clone(), None) if of_teacher else (None, None, None)
    heads = Heads(hidden, weight, weight[:, 0].clone(), *teacher, 2, torch.float32, True, not of_teacher, True)
    return heads, inputs._replace(teachers=[]) if of_teacher else inputs


def check_operator(name: str, backend: str | None, kind: str, *checks: str) -> None:
    s, inputs, settings = op_arguments(kind)
    if inputs.indices is not None and name in NOT_SPARSE:
        pytest.skip("they take no sparse teacher")
    ops = namespace(backend, s)
    if "loss_grad" in name and settings.reduction == "none":
        settings = settings._replace(reduction="sum")  # these are for scalar losses
    loss, stats, _ = ops.stats(s, *inputs, *settings)
    sums = s.new_ones(s.shape[:-1].numel(), len(Sums._fields), dtype=loss.dtype)
    heads, their_inputs = heads_for(s, inputs, of_teacher=kind in ("mean", "every option and metrics"))
    if name == "linear_grad":
        settings = settings._replace(reduction="none")
        stats = ops.linear_stats(*heads, *their_inputs, *settings)[1]
    arguments = {
        "linear_loss_grad": (*heads, *their_inputs, *settings),
        "linear_stats": (*heads, *their_inputs, *settings),
        "linear_grad": (*heads, stats, s[..., 0].to(loss.dtype), *their_inputs, *settings),
        "scale_": (s, torch.tensor(0.5)),
        **token_arguments(s, heads, inputs, settings),
        "tempered_softmax": (s, inputs.temperatures, 2.0, inputs.row_weight is None, torch.float32),
        "tempered_softmax_backward": (s, s.float(), inputs.temperatures, 2.0, inputs.row_weight is None, s.dtype),
        "pointwise_sums": (s, sums, *inputs, *settings),
        "losses_and_coefficients": (s, sums, *inputs, *settings),
        "grad": (s, stats, torch.ones_like(loss), *inputs, *settings),
        "grad_": (s, stats, torch.ones_like(loss), *inputs, *settings),
        "grad_as": (s, torch.bfloat16, stats, torch.ones_like(loss), *inputs, *settings),
        "loss_grad_as": (s, torch.bfloat16, *inputs, *settings),
    }.get(name, (s, *inputs, *settings))
    torch.library.opcheck(getattr(ops, name).default, arguments, test_utils=checks)


# What a backend's code decides: what it writes and returns, with which shapes, dtypes and strides. For Triton, which
# compiles some five kernels for each kind and makes all outputs in the same lines, two kinds are enough.
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
def test_every_operator_matches_its_schema_and_fake_on_every_backend(name, backend, kind):
    check_operator(name, backend, kind, "test_schema", "test_faketensor")


# Code that all backends share: the operators' kernels for autograd, and AOTAutograd with dynamic sizes.
@pytest.mark.parametrize("kind", [*KINDS[:2], *(pytest.param(kind, marks=pytest.mark.full) for kind in KINDS[2:])])
@pytest.mark.parametrize("name", [*SCHEMAS, "stats_for_inplace"])
def test_every_operator_passes_opcheck_at_dynamic_sizes(name, kind):
    check_operator(name, None, kind, "test_autograd_registration", "test_aot_dispatch_dynamic")
