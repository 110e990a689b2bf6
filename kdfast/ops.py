"""The operators: their schemas, their fake tensors, and which implementation a device gets.

Every operator is defined here, once, in four namespaces: `torch.ops.kdfast.*`, where the dispatcher picks by device
(the C++ kernels register themselves for the CPU when their library is loaded; of CUDA and ROCm tensors gpu_choice.py
says whose kernels they get), and `torch.ops.kdfast_reference.*`, `torch.ops.kdfast_triton.*` and
`torch.ops.kdfast_cuda.*`, which are that backend on every device that it knows. `kdfast_cuda_rows` has the CUDA kernels
themselves, which know rows alone; cuda_ops.py calls them. A device without kernels of its own gets the reference, with
one warning.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from kdfast import choice, cuda_ops, gpu_choice, linear_ops, reference
from kdfast.arguments import Heads, Inputs, KDMetrics, Settings
from kdfast.row_math import Coefficients, Sums, table_columns
from kdfast.rows import loss_dtype

_TYPES = {
    list[Tensor]: "Tensor[]",
    Tensor | None: "Tensor?",
    float: "float",
    bool: "bool",
    str: "str",
    int: "SymInt",
    list[float]: "float[]",
    Tensor: "Tensor",
    torch.dtype: "ScalarType",
}


def _arguments(kinds: dict[str, Any]) -> str:
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in kinds.items())


_FIELDS = Inputs.__annotations__ | Settings.__annotations__
_ARGS = _arguments(_FIELDS)
_HEADS = _arguments(Heads.__annotations__)
_HEAD_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"

# What each operator computes stands beside its reference, in reference.py, and for those of the linear losses in
# linear_ops.py; a name with a trailing underscore writes the gradient into the student's storage.
SCHEMAS = {
    "loss_grad": f"(Tensor student, {_ARGS}) -> (Tensor loss, Tensor grad, Tensor metrics)",
    "loss_grad_": f"(Tensor(a!) student, {_ARGS}) -> (Tensor loss, Tensor metrics)",
    "stats": f"(Tensor student, {_ARGS}) -> (Tensor loss, Tensor stats, Tensor metrics)",
    "sums": f"(Tensor student, {_ARGS}) -> Tensor",
    "pointwise_sums": f"(Tensor student, Tensor sums, {_ARGS}) -> Tensor",
    "losses_and_coefficients": f"(Tensor student, Tensor sums, {_ARGS}) -> (Tensor losses, Tensor coefficients)",
    "grad": f"(Tensor student, Tensor stats, Tensor grad_loss, {_ARGS}) -> Tensor",
    "grad_": f"(Tensor(a!) student, Tensor stats, Tensor grad_loss, {_ARGS}) -> ()",
    "linear_loss_grad": f"({_HEADS}, {_ARGS}) -> (Tensor loss, {_HEAD_GRADIENTS}, Tensor metrics)",
    "linear_stats": f"({_HEADS}, {_ARGS}) -> (Tensor loss, Tensor stats, Tensor metrics)",
    "linear_grad": f"({_HEADS}, Tensor stats, Tensor grad_loss, {_ARGS}) -> ({_HEAD_GRADIENTS})",
    "scale_": "(Tensor(a!) grad, Tensor factor) -> ()",
    "tempered_softmax": "(Tensor logits, Tensor? temperatures, float temperature, bool log, ScalarType dtype) "
    "-> Tensor",
    "tempered_softmax_backward": "(Tensor grad, Tensor output, Tensor? temperatures, float temperature, bool log, "
    "ScalarType dtype) -> Tensor",
}


def _new_loss(student: Tensor, settings: Settings) -> Tensor:
    shape = student.shape[:-1] if settings.reduction == "none" else ()
    return student.new_empty(shape, dtype=loss_dtype(student))


def _new_metrics(student: Tensor, settings: Settings) -> Tensor:
    """For KDMetrics, (7,) or (7, ...); (0,) where they are not wanted."""
    shape = (0,)
    if settings.metrics:
        shape = (len(KDMetrics._fields), *(student.shape[:-1] if settings.reduction == "none" else ()))
    return student.new_empty(shape, dtype=loss_dtype(student))


def _new_grad(student: Tensor) -> Tensor:
    return student.new_empty(student.shape)


def _new_table(student: Tensor, columns: int) -> Tensor:
    rows = math.prod(student.shape[:-1])  # .numel() would fix a symbolic size
    return student.new_empty((rows, columns), dtype=loss_dtype(student))


def _new_head_gradients(heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = heads.student_hidden, heads.student_weight
    wanted = (heads.grad_hidden, hidden.shape), (heads.grad_weight, weight.shape), (heads.grad_bias, weight.shape[:1])
    of_hidden, of_weight, of_bias = (
        hidden.new_empty(shape if want else (0,), dtype=linear_ops.grad_dtype(hidden.dtype)) for want, shape in wanted
    )
    return of_hidden, of_weight, of_bias


def _bundled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (student, ..., inputs, settings) as one of the operator's flat arguments."""

    def call(*args: Any) -> Any:
        split = len(args) - len(_FIELDS)
        flat = args[split:]
        return function(*args[:split], Inputs(*flat[: len(Inputs._fields)]), Settings(*flat[len(Inputs._fields) :]))

    return call


def _headed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (heads, ..., inputs, settings) likewise."""
    count = len(Heads._fields)
    return _bundled(lambda *args: function(Heads(*args[:count]), *args[count:]))


# Shapes and dtypes alone, for torch.compile.
_FAKES: dict[str, Callable[..., Any]] = {
    "loss_grad": _bundled(
        lambda student, inputs, settings: (
            _new_loss(student, settings),
            _new_grad(student),
            _new_metrics(student, settings),
        )
    ),
    "loss_grad_": _bundled(
        lambda student, inputs, settings: (_new_loss(student, settings), _new_metrics(student, settings))
    ),
    "sums": _bundled(lambda student, inputs, settings: _new_table(student, len(Sums._fields))),
    "pointwise_sums": _bundled(lambda student, sums, inputs, settings: _new_table(student, len(Sums._fields))),
    "losses_and_coefficients": _bundled(
        lambda student, sums, inputs, settings: (
            sums.new_empty(sums.shape[:1]),
            _new_table(student, len(Coefficients._fields)),
        )
    ),
    "grad": _bundled(lambda student, stats, grad_loss, inputs, settings: _new_grad(student)),
    "grad_": _bundled(lambda student, stats, grad_loss, inputs, settings: None),
    "linear_loss_grad": _headed(
        lambda heads, inputs, settings: (
            _new_loss(heads.student_hidden, settings),
            *_new_head_gradients(heads),
            _new_metrics(heads.student_hidden, settings),
        )
    ),
    "linear_grad": _headed(lambda heads, stats, grad_loss, inputs, settings: _new_head_gradients(heads)),
    "scale_": lambda grad, factor: None,
    "tempered_softmax": lambda logits, temperatures, temperature, log, dtype: logits.new_empty(
        logits.shape, dtype=dtype
    ),
    "tempered_softmax_backward": lambda grad, output, temperatures, temperature, log, dtype: output.new_empty(
        output.shape, dtype=dtype
    ),
}


def _fake(name: str, namespace: str) -> Callable[..., Any]:
    if not name.endswith("stats"):
        return _FAKES[name]

    def stats(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
        table = _new_table(student, table_columns(namespace, student.device.type, len(inputs.teachers)))
        return _new_loss(student, settings), table, _new_metrics(student, settings)

    if name == "stats":
        return _bundled(stats)
    return _headed(lambda heads, *others: stats(heads.student_hidden, *others))


CUDA_KERNELS = ("loss_grad", "loss_grad_", "stats", "grad", "grad_", "scale_")
_PLAIN = {"scale_", "tempered_softmax", "tempered_softmax_backward"}  # the operators that take no loss's arguments

_NAMESPACES = ("kdfast", "kdfast_reference", "kdfast_triton", "kdfast_cuda")
_defined = {name: torch.library.Library(name, "DEF") for name in _NAMESPACES}
_warned: set[str] = set()


def _reference(name: str) -> Callable[..., Any]:
    function = getattr(reference, name)
    return function if name in _PLAIN else _bundled(function)


def _cuda(name: str) -> Callable[..., Any]:
    function = getattr(cuda_ops, name)
    return function if name in _PLAIN else _bundled(function)


def _triton(name: str) -> Callable[..., Any]:
    """The Triton kernels, which are imported at their first call."""

    def call(*args: Any) -> Any:
        from kdfast.triton import ops

        function = getattr(ops, name)
        return (function if name in _PLAIN else _bundled(function))(*args)

    return call


def _gpu(name: str) -> Callable[..., Any]:
    """What CUDA and ROCm tensors get."""
    kernels = {"triton": _triton(name), "reference": _with_warning(name)}
    kernels |= {"cuda": _cuda(name)} if name in CUDA_KERNELS else {}

    def chosen(first: Tensor, teachers: list[Tensor], settings: Settings | None) -> Callable[..., Any]:
        return kernels[gpu_choice.of_gpu(choice.usable_on(first.device.type), name, first, teachers, settings)]

    def plain(first: Tensor, *args: Any) -> Any:
        return chosen(first, [], None)(first, *args)

    def of_loss(*args: Any) -> Any:
        first, *_, inputs, settings = arguments(*args)
        return chosen(first, inputs.teachers, settings)(*args)

    arguments = _bundled(lambda *args: args)
    return plain if name in _PLAIN else of_loss


def _with_warning(name: str) -> Callable[..., Any]:
    """The reference as a device's only implementation: it says so, once per device."""
    implementation = _reference(name)

    def call(first: Tensor, *args: Any) -> Any:
        device = first.device.type
        if device not in _warned:
            _warned.add(device)
            warnings.warn(
                f"kdfast: no fast kernels for {device} tensors, so the slower plain PyTorch reference is used: "
                f"{choice.why_not(device)}",
                stacklevel=2,
            )
        return implementation(first, *args)

    return call


def _linear(name: str, namespace: str) -> Callable[..., Any]:
    """The fused linear losses: one implementation for all devices, over a namespace's row operators."""
    function = getattr(linear_ops, name.removeprefix("linear_"))

    def call(heads: Heads, *args: Any) -> Any:
        device = heads.student_hidden.device.type  # what autocast casts has been cast
        off = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with off:
            return function(getattr(torch.ops, namespace), heads, *args)

    return _headed(call)


_cuda_rows = torch.library.Library("kdfast_cuda_rows", "DEF")  # the CUDA kernels, which register themselves
for _name in CUDA_KERNELS:
    _cuda_rows.define(_name + SCHEMAS[_name])

for _name, _schema in SCHEMAS.items():
    for _namespace, _library in _defined.items():
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{_namespace}::{_name}", _fake(_name, _namespace), lib=_library)
    if _name.startswith("linear_"):
        for _namespace, _library in _defined.items():
            _library.impl(_name, _linear(_name, _namespace), "CompositeExplicitAutograd")
        continue
    _defined["kdfast"].impl(_name, _with_warning(_name), "CompositeExplicitAutograd")
    _defined["kdfast"].impl(_name, _gpu(_name), "CUDA")  # ROCm's tensors too
    _defined["kdfast_reference"].impl(_name, _reference(_name), "CompositeExplicitAutograd")
    _defined["kdfast_triton"].impl(_name, _triton(_name), "CompositeExplicitAutograd")
    if _name in CUDA_KERNELS:
        _defined["kdfast_cuda"].impl(_name, _cuda(_name), "CompositeExplicitAutograd")
    elif _name not in _PLAIN:  # of shards, for which the CUDA kernels have no pass of its own
        _defined["kdfast_cuda"].impl(_name, _triton(_name), "CompositeExplicitAutograd")


choice.load()  # what is compiled registers for the operators defined here
