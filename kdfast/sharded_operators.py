"""ShardedRows and ShardedTokens as operators of the dispatcher, `torch.ops.kdfast_sharded.*`, for torch.compile.

Each takes first the name of the process group, the namespace whose operators compute its own classes, and whether
grad_hidden is summed up, and then what the operator of this name in that namespace takes. They exchange inside.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from kdfast.derivatives import is_transformed, refuse_vmap
from kdfast.fakes import fake
from kdfast.operator_autograd import differentiable
from kdfast.ops import SCHEMAS
from kdfast.sharded_rows import ShardedRows
from kdfast.sharded_token_ops import ShardedTokens
from kdfast.torch_private import below_autograd

NO_TRANSFORMS = (
    "process_group: kdfast's losses over a group do not support transforms of torch.func, nor forward-mode AD; take "
    "their gradient by backward()"
)
_FIRST = "str group, str namespace, bool reduce_hidden"
_NAMES = (
    "stats", "stats_for_inplace", "grad", "grad_", "linear_loss_grad", "linear_stats", "linear_grad", "token_stats",
    "token_grad", "linear_token_stats", "linear_token_grad",
)  # fmt: skip
_library = torch.library.Library("kdfast_sharded", "DEF")


class Operators:
    """Has their methods, each of which calls the operator of its name."""

    def __init__(self, group: str, namespace: str, reduce_hidden: bool) -> None:
        self.first = group, namespace, reduce_hidden

    def stats(self, *args: Any) -> Any:
        return torch.ops.kdfast_sharded.stats(*self.first, *args)

    def stats_for_inplace(self, *args: Any) -> Any:
        return torch.ops.kdfast_sharded.stats_for_inplace(*self.first, *args)

    def grad(self, *args: Any) -> Any:
        return torch.ops.kdfast_sharded.grad(*self.first, *args)

    def grad_(self, *args: Any) -> Any:
        return torch.ops.kdfast_sharded.grad_(*self.first, *args)

    def linear_loss_grad(self, *args: Any) -> Any:
        return torch.ops.kdfast_sharded.linear_loss_grad(*self.first, *args)

    def linear_stats(self, *args: Any) -> Any:
        return torch.ops.kdfast_sharded.linear_stats(*self.first, *args)

    def linear_grad(self, *args: Any) -> Any:
        return torch.ops.kdfast_sharded.linear_grad(*self.first, *args)

    def token_stats(self, *args: Any) -> Any:
        return torch.ops.kdfast_sharded.token_stats(*self.first, *args)

    def token_grad(self, *args: Any) -> Any:
        return torch.ops.kdfast_sharded.token_grad(*self.first, *args)

    def linear_token_stats(self, *args: Any) -> Any:
        return torch.ops.kdfast_sharded.linear_token_stats(*self.first, *args)

    def linear_token_grad(self, *args: Any) -> Any:
        return torch.ops.kdfast_sharded.linear_token_grad(*self.first, *args)

    def first_class(self, like: Tensor, classes: int) -> Tensor:
        return torch.ops.kdfast_sharded.first_class(self.first[0], like, classes)


def _group(name: Any) -> Any:
    return distributed_c10d._resolve_process_group(name)


def compiled(ops: Any, group: Any, reduce_hidden: bool = True) -> Operators:
    return Operators(group.group_name, ops.name, reduce_hidden)


def _implementation(name: str) -> Callable[..., Any]:
    def call(group: str, namespace: str, reduce_hidden: bool, *args: Any) -> Any:
        ops = getattr(torch.ops, namespace)
        kind: Any = ShardedTokens if "token" in name else ShardedRows
        rows = kind(ops, _group(group), reduce_hidden=reduce_hidden)
        device = args[0].device.type  # the heads' checks have applied autocast already
        off = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with off:
            return getattr(rows, name.removesuffix("_for_inplace"))(*args)

    return call


def _fake(name: str) -> Callable[..., Any]:
    def call(group: str, namespace: str, reduce_hidden: bool, *args: Any) -> Any:
        return fake(name.removesuffix("_for_inplace"), f"sharded_{namespace}")(*args)

    return call


def _autograd(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.kdfast_sharded, name)

    def call(*args: Any) -> Any:
        if is_transformed():
            raise RuntimeError(NO_TRANSFORMS)
        if any(isinstance(x, Tensor) and x.requires_grad for x in args) and torch.is_grad_enabled():
            return differentiable(Operators(*args[:3]), name)(*args[3:])
        with below_autograd():
            return operator(*args)

    return call


def _first_class(group: str, like: Tensor, classes: int) -> Tensor:
    start = ShardedRows(None, _group(group)).first_class(like.detach(), classes)
    return torch.as_tensor(start, device=like.device)


for _name in _NAMES:
    _schema = SCHEMAS[_name.removesuffix("_for_inplace")]
    _library.define(f"{_name}({_FIRST}, {_schema[1:]}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"kdfast_sharded::{_name}", _fake(_name), lib=_library)
    _library.impl(_name, _implementation(_name), "CompositeExplicitAutograd")
    _library.impl(_name, _autograd(_name), "Autograd")
    _library.impl(_name, refuse_vmap, "FuncTorchBatched")
_library.define("first_class(str group, Tensor like, SymInt classes) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("first_class", _first_class, "CompositeExplicitAutograd")
torch.library.register_fake(
    "kdfast_sharded::first_class",
    lambda group, like, classes: like.new_empty((), dtype=torch.int64),
    lib=_library,
)
