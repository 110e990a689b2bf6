"""The operators: their schemas, and which implementation a device gets.

Every operator is defined here, once, in four namespaces. In `torch.ops.kdfast.*` the dispatcher picks by device: the
C++ kernels register themselves for the CPU when their library is loaded; gpu_choice.py chooses for CUDA and ROCm
tensors; any other device gets the reference, with one warning. `torch.ops.kdfast_reference.*`,
`torch.ops.kdfast_triton.*` and `torch.ops.kdfast_cuda.*` are that backend on every device that it supports.
`kdfast_cuda_rows` has the CUDA kernels themselves, which compute row by row; cuda_ops.py calls them.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kdfast import (
    choice,
    cuda_ops,
    gpu_choice,
    linear_ops,
    linear_sparse,
    linear_token_ops,
    reference,
    reference_sums,
    reference_tokens,
)
from kdfast.arguments import Heads, Inputs, Settings, take_flat, take_flat_heads, with_numbers
from kdfast.derivatives import refuse_vmap
from kdfast.fakes import fake
from kdfast.operator_autograd import autograd

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


_ARGS = _arguments(Inputs.__annotations__ | Settings.__annotations__)
_HEADS = _arguments(Heads.__annotations__)
_TOKENS = "Tensor? temperatures, float temperature, float logit_scale, float softcap, SymInt vocab_size"
_TOKEN_GRADIENTS = (
    "Tensor ids, Tensor stats, Tensor? grad_log_probs, Tensor? grad_entropy, Tensor? grad_log_rest, "
    "Tensor? grad_elsewhere"
)
_CHUNKS = "SymInt chunk_rows, ScalarType accumulate_dtype"
_HEAD_GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"

# The docstrings are in reference.py, reference_sums.py, reference_tokens.py and, from hidden states, in linear_ops.py
# and linear_token_ops.py. An operator with a trailing underscore writes the gradient into the student's storage, one
# that ends with _as gives the gradient of float32 logits another dtype.
SCHEMAS = {
    "loss_grad": f"(Tensor student, {_ARGS}) -> (Tensor loss, Tensor grad, Tensor metrics)",
    "loss_grad_": f"(Tensor(a!) student, {_ARGS}) -> (Tensor loss, Tensor metrics)",
    "loss_grad_as": f"(Tensor student, ScalarType dtype, {_ARGS}) -> (Tensor loss, Tensor grad, Tensor metrics)",
    "stats": f"(Tensor student, {_ARGS}) -> (Tensor loss, Tensor stats, Tensor metrics)",
    "sums": f"(Tensor student, {_ARGS}) -> Tensor",
    "pointwise_sums": f"(Tensor student, Tensor sums, {_ARGS}) -> Tensor",
    "losses_and_coefficients": f"(Tensor student, Tensor sums, {_ARGS}) -> (Tensor losses, Tensor coefficients)",
    "grad": f"(Tensor student, Tensor stats, Tensor grad_loss, {_ARGS}) -> Tensor",
    "grad_": f"(Tensor(a!) student, Tensor stats, Tensor grad_loss, {_ARGS}) -> ()",
    "grad_as": f"(Tensor student, ScalarType dtype, Tensor stats, Tensor grad_loss, {_ARGS}) -> Tensor",
    "linear_loss_grad": f"({_HEADS}, {_ARGS}) -> (Tensor loss, {_HEAD_GRADIENTS}, Tensor metrics)",
    "linear_stats": f"({_HEADS}, {_ARGS}) -> (Tensor loss, Tensor stats, Tensor metrics)",
    "linear_grad": f"({_HEADS}, Tensor stats, Tensor grad_loss, {_ARGS}) -> ({_HEAD_GRADIENTS})",
    "scale_": "(Tensor(a!) grad, Tensor factor) -> ()",
    "token_stats": f"(Tensor logits, Tensor ids, {_TOKENS}, bool entropy) "
    "-> (Tensor log_probs, Tensor entropy, Tensor log_rest, Tensor stats)",
    "token_grad": f"(Tensor logits, {_TOKEN_GRADIENTS}, {_TOKENS}) -> Tensor",
    "token_grad_as": f"(Tensor logits, ScalarType dtype, {_TOKEN_GRADIENTS}, {_TOKENS}) -> Tensor",
    "linear_token_stats": f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, {_TOKENS}, bool entropy, "
    f"{_CHUNKS}) -> (Tensor log_probs, Tensor entropy, Tensor log_rest, Tensor stats)",
    "linear_token_grad": "(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor stats, "
    f"Tensor? grad_log_probs, Tensor? grad_entropy, Tensor? grad_log_rest, {_TOKENS}, {_CHUNKS}, "
    f"bool grad_hidden, bool grad_weight, bool grad_bias) -> ({_HEAD_GRADIENTS})",
    "tempered_softmax": "(Tensor logits, Tensor? temperatures, float temperature, bool log, ScalarType dtype) "
    "-> Tensor",
    "tempered_softmax_backward": "(Tensor grad, Tensor output, Tensor? temperatures, float temperature, bool log, "
    "ScalarType dtype) -> Tensor",
}


CUDA_KERNELS = ("loss_grad_as", "loss_grad_", "stats", "grad_as", "grad_", "scale_")
# operators without Inputs and Settings
_TENSORS_ONLY = {
    "scale_", "token_stats", "token_grad", "token_grad_as", "linear_token_stats", "linear_token_grad",
    "tempered_softmax", "tempered_softmax_backward",
}  # fmt: skip

_NAMESPACES = ("kdfast", "kdfast_reference", "kdfast_triton", "kdfast_cuda")
_libraries = {name: torch.library.Library(name, "DEF") for name in _NAMESPACES}
_warned: set[str] = set()


def _by_rounding(namespace: str, name: str) -> Callable[..., Any]:
    """An operator whose name ends with _as, by the one without."""

    def call(student: Tensor, dtype: torch.dtype, *args: Any) -> Any:
        if name not in _TENSORS_ONLY:
            *tables, inputs, settings = args
            args = (*tables, *inputs, *settings)
        operator = getattr(getattr(torch.ops, namespace), name.removesuffix("_as"))
        results = operator(student, *args)
        if isinstance(results, Tensor):
            return results.to(dtype)
        loss, grad, metrics = results
        return loss, grad.to(dtype), metrics

    return call


def _reference(name: str) -> Callable[..., Any]:
    if name.endswith("_as"):
        return _by_rounding("kdfast_reference", name)
    modules = (reference, reference_sums, reference_tokens)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def _triton(name: str) -> Callable[..., Any]:
    """The Triton kernels, which are imported at their first call."""

    @lru_cache
    def function() -> Callable[..., Any]:
        from kdfast.triton import ops

        return getattr(ops, name)

    return lambda *args: function()(*args)


def _cuda(name: str) -> Callable[..., Any]:
    """Sums of shards are Triton's: the CUDA kernels have no pass that ends with them."""
    return getattr(cuda_ops, name) if hasattr(cuda_ops, name) else _triton(name)


def _gpu(name: str) -> Callable[..., Any]:
    """The implementation for CUDA and ROCm tensors, chosen at each call."""
    functions = {"triton": _triton(name), "reference": _reference_with_warning(name), "cuda": _cuda(name)}

    def call(first: Tensor, *args: Any) -> Any:
        inputs, settings = (None, None) if name in _TENSORS_ONLY else args[-2:]
        teachers = [] if inputs is None else inputs.teachers
        usable = choice.usable_on(first.device)
        return functions[gpu_choice.gpu_backend(usable, name, first, teachers, settings)](first, *args)

    return call


def _reference_with_warning(name: str) -> Callable[..., Any]:
    """The reference on a device that has nothing else; it warns once per device."""
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
    """The fused linear operators: one implementation for all devices, over a namespace's row operators."""
    short = name.removeprefix("linear_")

    def call(first: Heads | Tensor, *args: Any) -> Any:
        module = linear_token_ops if name in _TENSORS_ONLY else linear_ops
        if module is linear_ops and linear_sparse.reads_entries_alone(*args[-2:]):
            module = linear_sparse
        function = getattr(module, short)
        hidden = first if isinstance(first, Tensor) else first.student_hidden
        device = hidden.device.type  # the heads' checks have applied autocast already
        off = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with off:
            return function(getattr(torch.ops, namespace), first, *args)

    return call


def _implement(namespace: str, name: str, function: Callable[..., Any], device: str = "") -> None:
    if name not in _TENSORS_ONLY:
        take = take_flat_heads if name.startswith("linear_") else take_flat
        function = take(with_numbers(function))
    _libraries[namespace].impl(name, function, device or "CompositeExplicitAutograd")


_cuda_rows = torch.library.Library("kdfast_cuda_rows", "DEF")  # the CUDA kernels, which register themselves
for _name in CUDA_KERNELS:
    _cuda_rows.define(_name + SCHEMAS[_name])

for _name, _schema in SCHEMAS.items():
    for _namespace, _library in _libraries.items():
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{_namespace}::{_name}", fake(_name, _namespace), lib=_library)
        _library.impl(_name, autograd(_namespace, _name), "Autograd")
        _library.impl(_name, refuse_vmap, "FuncTorchBatched")
    if _name.startswith("linear_"):
        for _namespace in _NAMESPACES:
            _implement(_namespace, _name, _linear(_name, _namespace))
    else:
        _is_rounded = _name.endswith("_as")  # for the products of GPUs: others have no kernels of their own
        _implement("kdfast", _name, _by_rounding("kdfast", _name) if _is_rounded else _reference_with_warning(_name))
        _implement("kdfast", _name, _gpu(_name), "CUDA")  # ROCm's tensors too
        _implement("kdfast_reference", _name, _reference(_name))
        _implement("kdfast_triton", _name, _triton(_name))
        if not _name.startswith("tempered_softmax"):
            _implement("kdfast_cuda", _name, _cuda(_name))

# stats whose backward writes the gradient over the logits: what a compiled graph calls for inplace=True
for _namespace, _library in _libraries.items():
    _library.define("stats_for_inplace" + SCHEMAS["stats"], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{_namespace}::stats_for_inplace", fake("stats", _namespace), lib=_library)
    _library.impl("stats_for_inplace", getattr(torch.ops, _namespace).stats, "CompositeExplicitAutograd")
    _library.impl("stats_for_inplace", autograd(_namespace, "stats_for_inplace"), "Autograd")
    _library.impl("stats_for_inplace", refuse_vmap, "FuncTorchBatched")

choice.load()  # a compiled library registers its kernels for the operators defined here
