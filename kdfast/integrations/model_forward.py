"""A loss inside of the forward of a Hugging Face model, from its logits or in the place of its head.

`accept_loss(model)` gives the model's forward one more keyword, `kdfast`, which takes over the call. Whatever wraps
the model later (DistributedDataParallel, FSDP, accelerate's autocast, torch.compile) has the loss inside. Parameters,
state and class of the model stay as they are, and a call without the keyword is the model's own.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

from torch import Tensor, nn

from kdfast.integrations.head import check_linear
from kdfast.linear import linear_kd_loss
from kdfast.losses import kd_loss
from kdfast.tensor_checks import is_dtensor, kind


def accept_loss(model: nn.Module) -> None:
    """Lets forward take `kdfast`, a function of (model, forward, args, kwargs) that returns what forward returns."""
    original: Any = model.forward
    if getattr(original, "takes_kdfast", False):
        return
    function: Any = getattr(original, "__func__", None) or _unbound(original)

    @functools.wraps(function)  # Trainer reads the signature
    def forward(self: nn.Module, *args: Any, kdfast: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if kdfast is None:
            return function(self, *args, **kwargs)
        return kdfast(self, functools.partial(function, self), args, kwargs)

    forward.takes_kdfast = True  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)  # bound, so that a copy of the model has its own


def _unbound(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that another library has set on the model, as a method."""

    @functools.wraps(forward)
    def method(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return method


@dataclass
class Rows:
    """What a loss needs of the batch."""

    labels: Tensor | None
    row_weight: Tensor | None
    normalizer: Tensor


@dataclass
class LossOfLogits:
    """The loss from the model's logits. keep: return the model's outputs too."""

    teacher: Any
    rows: Rows
    options: dict[str, Any]
    keep: bool

    def __call__(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
        outputs = forward(*args, **kwargs)
        found = kd_loss(logits_of(outputs), self.teacher, **vars(self.rows), **self.options)
        if not self.keep:
            return named(found)
        others = outputs if isinstance(outputs, dict) else {f"output_{i}": x for i, x in enumerate(outputs)}
        return named(found) | {name: x for name, x in others.items() if name != "loss"}


@dataclass
class LossInsteadOfHead:
    """The loss from the head's input, in the forward of the head, where its weight is whole. No logits are made."""

    teacher: Any
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    rows: Rows
    options: dict[str, Any]

    def __call__(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
        head, found = output_head(model), []

        def loss(hidden: Tensor) -> Tensor:
            found.append(
                linear_kd_loss(
                    hidden,
                    head.weight,
                    self.teacher,
                    self.teacher_weight,
                    student_bias=head.bias,
                    teacher_bias=self.teacher_bias,
                    **vars(self.rows),
                    **self.options,
                )
            )
            return nothing(hidden)

        with forward_instead(head, loss):
            forward(*args, **kwargs)
        return named(called_once(model, found))


def named(found: Any) -> dict[str, Any]:
    """A loss with its metrics, as an output."""
    return {"loss": found[0], "kd_metrics": found[1]} if isinstance(found, tuple) else {"loss": found}


def logits_of(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, dict) else outputs[0] if isinstance(outputs, tuple) else None
    if not isinstance(logits, Tensor):
        raise ValueError(f"model: must return logits, and its output is a {kind(outputs)} without them")
    if logits.shape[-1] == 1:
        raise ValueError("model: its logits have one class (a regression), which has probability 1 and loss 0")
    return logits


def output_head(model: Any) -> nn.Linear:
    """The nn.Linear that makes the logits."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        raise ValueError(
            f"linear: {kind(model)} has no output embeddings (get_output_embeddings), whose product linear=True "
            "replaces. For models without a vocabulary set linear=False"
        )
    check_linear("linear: the head", head)
    if "forward" in vars(head) and not hasattr(head, "kdfast_instead"):
        raise ValueError("linear: another library has replaced the head's forward; set linear=False")
    _accept_instead(head)
    return head


class HeadInput(NamedTuple):
    """What a teacher's head multiplies."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def head_input(model: Any, inputs: dict[str, Any]) -> HeadInput:
    """The input of the model's head, which is not computed."""
    head, found = output_head(model), []

    def keep(hidden: Tensor) -> Tensor:
        found.append(HeadInput(hidden, head.weight, head.bias))
        return nothing(hidden)

    with forward_instead(head, keep):
        model(**inputs)
    return called_once(model, found)


def has_plain_head(model: Any) -> bool:
    """Whether head_input works: the head is an nn.Linear, and whole outside of its forward too."""
    try:
        return not is_dtensor(output_head(model).weight)
    except (TypeError, ValueError):
        return False


class Instead:
    """What a head calls in place of its forward; None: its forward."""

    def __init__(self) -> None:
        self.function: Callable[[Tensor], Tensor] | None = None


def _accept_instead(head: Any) -> None:
    """Set once and for all, because torch.compile traces attributes of plain objects, and no change of a forward."""
    if hasattr(head, "kdfast_instead"):
        return

    def forward(self: Any, hidden: Tensor) -> Tensor:
        function = self.kdfast_instead.function
        return type(self).forward(self, hidden) if function is None else function(hidden)

    head.kdfast_instead = Instead()
    head.forward = MethodType(forward, head)


@contextmanager
def forward_instead(head: Any, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The head calls the function in place of its forward. Its hooks stay: FSDP2's make its weight whole."""
    head.kdfast_instead.function = function
    try:
        yield
    finally:
        head.kdfast_instead.function = None


def nothing(hidden: Tensor) -> Tensor:
    """What stands for the logits in the rest of the model's forward."""
    return hidden.new_zeros((1,) * hidden.dim())


def called_once(model: Any, found: list[Any]) -> Any:
    if len(found) != 1:
        raise ValueError(
            f"linear: the forward of {kind(model)} called its head {len(found)} times, not once; set linear=False"
        )
    return found[0]
