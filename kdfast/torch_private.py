"""What kdfast uses of PyTorch's private API, and what it does where a later torch lacks it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor, unwrap_if_dead
from torch.autograd import forward_ad

# Inside of it an operator runs without its kernel for autograd. torch.library is made of it.
below_autograd: Callable[[], AbstractContextManager[Any]] = torch._C._AutoDispatchBelowAutograd
_TENSORS = (Tensor, torch.nn.Parameter)


def _missing(name: str, consequence: str) -> None:
    warnings.warn(f"kdfast: torch {torch.__version__} has no {name}: {consequence}", stacklevel=3)


def graph_is_kept() -> bool:
    """Whether the backward pass that runs now was called with retain_graph=True, so that it may run again."""
    try:
        return torch._C._autograd._get_current_graph_task_keep_graph()
    except AttributeError:
        _missing("torch._C._autograd._get_current_graph_task_keep_graph", "backward copies each gradient")
        return True


def calls_are_recorded() -> bool:
    """Whether a TorchDispatchMode, such as that of make_fx, sees the operators that run now."""
    try:
        return torch._C._len_torch_dispatch_stack() > 0
    except AttributeError:
        _missing("torch._C._len_torch_dispatch_stack", "backward calls an operator to multiply a gradient by 1")
        return True


def enable_autograd() -> AbstractContextManager[Any]:
    """Enables autograd inside an operator: a compiled graph calls it below autograd."""
    try:
        return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    except AttributeError:
        _missing("torch._C._SetExcludeDispatchKeyGuard", "backend='reference' works outside of torch.compile only")
        return nullcontext()


def mark_constant_in_graphs(function: Callable[..., Any]) -> None:
    """Makes Dynamo call a function once and keep its result, as torch.compiler.assume_constant_result does.

    assume_constant_result would import all of Dynamo with kdfast. A torch without this mark traces the function.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward_ad_is_active() -> bool:
    """Whether tensors may have tangents now: inside of forward_ad.dual_level(), torch.func.jvp or jacfwd."""
    return forward_ad._current_level >= 0


def has_tangent(x: Tensor) -> bool:
    return forward_ad_is_active() and forward_ad.unpack_dual(x).tangent is not None


def functorch_is_active() -> bool:
    """Whether this is called inside of a transform of torch.func."""
    return torch._C._are_functorch_transforms_active()


def is_batched(x: Tensor) -> bool:
    """Whether torch.vmap, or autograd's is_grads_batched=True, has given x one more dimension."""
    return is_batchedtensor(x) or is_legacy_batchedtensor(x)


def jvp_depth() -> int:
    """How many torch.func.jvp are active, one inside of another."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(interpreter.key() == torch._C._functorch.TransformType.Jvp for interpreter in stack)


def single_level_functions() -> AbstractContextManager[Any]:
    """Lets an operator's kernel for autograd apply a Function inside of a transform of torch.func."""
    return torch._functorch.autograd_function.enable_single_level_autograd_function()


@contextmanager
def next_level() -> Iterator[None]:
    """below_autograd, but transforms of torch.func around the one that is being applied see the operator."""
    outer = (torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True)) if functorch_is_active() else ()
    with ExitStack() as stack:
        for context in (*outer, below_autograd()):
            stack.enter_context(context)
        yield


@lru_cache
def _single_level(function: type[torch.autograd.Function]) -> Any:
    """The same Function without Function.apply, which asks functorch and inspect.signature."""
    names = ("forward", "setup_context", "backward", "jvp", "_compiled_autograd_key")
    methods = {name: staticmethod(getattr(function, name)) for name in names if hasattr(function, name)}
    return type(function.__name__, (torch.autograd.function._SingleLevelFunction,), methods)


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(), but at one level of transforms, and without inspect.signature, which takes 50 us."""
    unwrapped = [unwrap_if_dead(x) if type(x) in _TENSORS else x for x in args]  # of a transform that has ended
    return _single_level(function).apply(*unwrapped)


def entry_products(x: Tensor, table: Tensor, places: Tensor) -> Tensor:
    """x[i] . table[places[i, k]], (rows, K), without a copy of the table's rows; float32 or float64, on a CPU.

    As PyTorch differentiates embedding_bag in its per_sample_weights.
    """
    rows, count = places.shape
    starts = torch.arange(0, rows * count, count)
    row_of = torch.arange(rows).repeat_interleave(count)
    try:
        function = torch.ops.aten._embedding_bag_per_sample_weights_backward
    except AttributeError:
        _missing("aten._embedding_bag_per_sample_weights_backward", "sparse teachers with heads copy the heads' rows")
        return torch.bmm(table[places], x.unsqueeze(-1)).squeeze(-1)
    return function(x, table, places.flatten(), starts, row_of, 0).view(rows, count)
