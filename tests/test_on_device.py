"""What a call asks of a GPU: it waits for nothing, and takes the current stream and the device of its tensors.

Without a GPU meta tensors pass for those of a device: where a value is read they raise, and `NothingFromTheHost` raises
where one is copied there. The other tests need a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import gpu  # before anything that imports Triton
import pytest
import torch
from cases import BF16, F16, ON_GPU, batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kdfast
from kdfast import cuda_ops, linear_ops, reference, reference_sums
from kdfast.arguments import Heads
from kdfast.options import check_inputs, check_settings

ROWS, VOCAB, HIDDEN = (2, 3), 4099, 16


class Data(NamedTuple):
    student: Tensor  # (*ROWS, VOCAB)
    teacher: Tensor  # without a view as a matrix
    labels: Tensor
    row_weight: Tensor
    normalizer: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor


def make_data(dtype: torch.dtype = BF16) -> Data:
    """On the default device."""
    student, teacher, labels = (x.view(2, 4, *x.shape[1:]) for x in batch(8, VOCAB, dtype))
    hidden, weight, bias = torch.randn(*ROWS, HIDDEN), torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB)
    heads = (x.to(dtype) for x in (hidden, weight, bias))
    row_weight = torch.full(ROWS, 0.5)
    return Data(student[:, 1:].clone(), teacher[:, :-1], labels[:, 1:].clone(), row_weight, torch.full((), 2.0), *heads)


def run(data: Data, backend: str | None) -> list[Tensor]:
    """Losses, gradients and metrics, forward and backward."""
    results: list[Tensor] = []
    rows = {"row_weight": data.row_weight, "temperature": 1 + data.row_weight}
    for options in ({}, {"reduction": "none"}, {"normalizer": data.normalizer, "return_metrics": True}):
        settings: dict[str, Any] = {"label_smoothing": 0.1, "backend": backend, **rows, **options}
        logits = data.student.detach().requires_grad_()
        hidden, weight, bias = (x.detach().requires_grad_() for x in (data.hidden, data.weight, data.bias))
        whole = kdfast.kd_loss(logits, data.teacher, data.labels, **settings)
        teacher = data.hidden.flip(0), data.weight
        if options:  # bfloat16 logits beside chunks of float32 ones, which the CUDA kernels do not take
            teacher, settings["backend"] = (data.teacher, None), None
        linear = kdfast.linear_kd_loss(
            hidden, weight, *teacher, data.labels, student_bias=bias, chunk_rows=4, **settings
        )
        for found, leaves in ((whole, (logits,)), (linear, (hidden, weight, bias))):
            loss, metrics = found if isinstance(found, tuple) else (found, ())
            results += [loss.detach(), *metrics, *torch.autograd.grad(2 * loss.sum(), leaves)]
    logits = data.student.detach().requires_grad_()
    soft = kdfast.tempered_softmax(logits, 2.0)
    return results + [soft.detach(), *torch.autograd.grad(soft, logits, soft.detach())]


class NothingFromTheHost(TorchDispatchMode):
    """Refuses tensors of the host: on their way to the device the host waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        assert all(x.is_meta for x in tensors), f"{func}: a tensor of the host"
        return result


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "numbers": {"temperature": 3.0, "row_weight": None, "normalizer": 7.0, "vocab_size": 4000},
    "terms": {"z_loss": 0.1, "softcap": 20.0, "teacher_softcap": 30.0, "return_metrics": True},
    "pointwise": {"divergence": "jsd", "reduction": "none", "return_metrics": True},
    "dkd": {"divergence": "dkd", "standardize": True, "reduction": "batchmean"},
    "logit_mse": {"divergence": "logit_mse", "reduction": "sum"},
}
IN_CUDA = ("plain", "numbers", "pointwise")


@pytest.mark.parametrize("name", CALLS)
def test_no_operator_reads_a_value_or_copies_one_to_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a tensor made of numbers on the host")

    dtype = F16 if name == "numbers" else BF16  # a linear loss's divisor waits until the end in float16
    made = make_data(dtype)
    data = Data(*(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in made))
    losses, table = torch.empty(6, device="meta"), torch.empty(6, 20, device="meta")
    metrics = torch.empty(7, *ROWS, device="meta")
    kernels = {"loss_grad_as": (losses, data.student, metrics), "loss_grad_": (losses, metrics)}
    kernels |= {"stats": (losses, table, metrics), "grad_as": data.student, "grad_": None}
    stub = SimpleNamespace(**{name: lambda *_, result=result: result for name, result in kernels.items()})
    monkeypatch.setattr(cuda_ops, "_kernels", stub)
    for function in ("tensor", "as_tensor", "asarray"):
        monkeypatch.setattr(torch, function, refuse)
    given = {"temperature": data.row_weight, "row_weight": data.row_weight, "normalizer": None, **CALLS[name]}
    options = {**kdfast.kd_loss.__kwdefaults__, **given}
    settings = check_settings(options, has_labels=True)
    inputs, settings = check_inputs(data.student, data.teacher, data.labels, options, settings)
    heads = Heads(data.hidden, data.weight, data.bias, None, None, None, 4, torch.float32, True, True, True)
    row_losses = losses.view(ROWS) if settings.reduction == "none" else torch.empty((), device="meta")
    with NothingFromTheHost():
        if name == "plain":
            run(data, None)
        in_cuda = [cuda_ops] if name in IN_CUDA else []
        for backend in [reference, *in_cuda] if settings.reduction != "none" else []:
            backend.loss_grad(data.student, inputs, settings)
            backend.loss_grad_(data.student, inputs, settings)
        for backend in (reference_sums, *in_cuda):
            table = backend.stats(data.student, inputs, settings)[1]
            backend.grad(data.student, table, row_losses, inputs, settings)
        if settings.divergence not in ("dkd", "logit_mse"):
            sums = reference_sums.sums(data.student, inputs, settings)
            reference_sums.pointwise_sums(data.student, sums, inputs, settings)
        for each in (heads, heads._replace(teacher_hidden=data.hidden, teacher_weight=data.weight)):
            linear_ops.loss_grad(torch.ops.kdfast, each, inputs, settings)
            linear_ops.stats(torch.ops.kdfast, each, inputs, settings)
            linear_ops.grad(torch.ops.kdfast, each, table, row_losses, inputs, settings._replace(metrics=False))
        soft = reference.tempered_softmax(data.student, None, 2.0, False, dtype)
        reference.tempered_softmax_backward(soft, soft, data.row_weight, 2.0, True, dtype)


@pytest.mark.skipif(not gpu.EMULATED, reason=gpu.NEEDS_EMULATOR)
def test_triton_is_asked_for_a_stream_only_where_the_tensors_device_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels' stub runtime, tests/cpp/cuda_stub.cpp, refuses the launches of another device or stream."""
    from triton.runtime import driver

    from kdfast.triton import matrices

    guarded: list[Tensor] = []
    asked: list[bool] = []

    @contextmanager
    def device_guard(tensor: Tensor) -> Iterator[None]:
        guarded.append(tensor)
        yield
        guarded.pop()

    monkeypatch.setattr(matrices, "device_guard", device_guard)
    with gpu.kernels() as reports:
        ask = driver.active.get_current_stream
        monkeypatch.setattr(
            driver.active, "get_current_stream", lambda device: asked.append(bool(guarded)) or ask(device)
        )
        run(make_data(), "triton")
    assert len(asked) == len(reports) > 0
    assert all(asked)


# -- on a GPU ----------------------------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not gpu.ON_DEVICE, reason="needs a GPU")
for_its_backends = pytest.mark.parametrize("backend", ON_GPU, indirect=True)


@on_a_gpu
@for_its_backends
def test_a_call_never_waits_for_the_device(backend: str) -> None:
    data = make_data()
    run(data, backend)  # the first calls compile and load
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(data, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@for_its_backends
def test_a_call_runs_on_the_current_stream(backend: str) -> None:
    data = make_data()
    want = run(data, backend)
    late = Data(*map(torch.zeros_like, data))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second in which any other stream would find zeros
        for x, value in zip(late, data, strict=True):
            x.copy_(value)
        got = run(late, backend)
    side.synchronize()
    torch.testing.assert_close(got, want)


@on_a_gpu
@for_its_backends
def test_a_call_runs_on_its_tensors_device_whichever_is_current(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU alone")
    data = make_data()
    want = run(data, backend)
    got = run(Data(*(x.to("cuda:1") for x in data)), backend)
    assert torch.cuda.current_device() == 0
    assert {x.device.index for x in got} == {1}
    torch.testing.assert_close([x.to("cuda:0") for x in got], want)


@on_a_gpu
@for_its_backends
def test_a_graph_captures_a_call_and_replays_it_on_other_values(backend: str) -> None:
    data = make_data()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the first calls compile and load, which a capture does not allow
        run(data, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(data, backend)
    data.student.copy_(data.teacher.flip(0))
    data.labels.copy_(data.labels.flip(0))
    data.hidden.neg_()
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(got, run(data, backend))
