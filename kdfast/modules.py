"""KDLoss, and losses as modules: options are attributes, checked when a module is built and after each change."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from kdfast import checks
from kdfast.arguments import Settings
from kdfast.losses import Teacher, checked_loss, kd_loss
from kdfast.options import Options, check_names, check_settings


class LossModule(nn.Module):
    """The base of KDLoss and LinearKDLoss. The options are plain attributes."""

    defaults: ClassVar[dict[str, Any]]  # the options' defaults, by name

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        check_names(type(self).__name__, options, self.defaults)
        self.__dict__.update(self.defaults | options)
        self.checked(True)  # whether there are labels is known in forward

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.defaults:  # changed between calls: the next call checks it
            self.__dict__.pop("_checked", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copies share the process group, which is nobody's to copy."""
        memo[id(self.process_group)] = self.process_group
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                f"process_group: must be None for a {type(self).__name__} to be pickled; it belongs to a process. "
                "Set it again after loading"
            )
        return self.__dict__

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {name: getattr(self, name) for name in self.defaults}

    def checked(self, has_labels: bool) -> tuple[dict[str, Any], Settings]:
        """A call's options and settings, which are made only after an option has changed, or may have, as a tensor."""
        if torch.compiler.is_compiling():
            return (options := self.options()), check_settings(options, has_labels)
        checked = self.__dict__.setdefault("_checked", {})
        if has_labels in checked:
            return checked[has_labels]
        options = self.options()
        settings = check_settings(options, has_labels)
        if not any(isinstance(value, Tensor) for value in options.values()):
            checked[has_labels] = options, settings
        return options, settings

    def extra_repr(self) -> str:
        # identity first: comparing a tensor of temperatures gives a tensor
        default = self.defaults
        changed = {k: v for k, v in self.options().items() if v is not default[k] and (v == default[k]) is not True}
        shown = {name: getattr(self, name) for name in ("temperature", "alpha", "divergence")} | changed
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class KDLoss(LossModule):
    """`kd_loss` as a module. It takes and checks the options once; `forward` takes the tensors.

    Takes every keyword of `kd_loss` except `row_weight` and `normalizer`, which `forward` takes. It has no
    parameters and no buffers. The options are plain attributes and can be changed between calls. Copies share a
    `process_group`; a module that has one cannot be pickled.

    Examples:
        >>> loss = KDLoss(temperature=4.0, alpha=0.9, divergence="jsd")
        >>> loss
        KDLoss(temperature=4.0, alpha=0.9, divergence='jsd')
        >>> loss(torch.randn(8, 10), torch.randn(8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
    """

    defaults: ClassVar[dict[str, Any]] = dict(kd_loss.__kwdefaults__ or {})
    del defaults["row_weight"], defaults["normalizer"]

    def __init__(
        self, *, dim: int = -1, inplace: bool = False, return_metrics: bool = False, **options: Unpack[Options]
    ) -> None:
        checks.as_integer("dim", dim)
        super().__init__({"dim": dim, "inplace": inplace, "return_metrics": return_metrics, **options})

    def forward(
        self,
        student_logits: Tensor,
        teacher: Teacher,
        labels: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        """The loss of a batch, and with `return_metrics` its metrics: `kd_loss` of these tensors."""
        options, settings = self.checked(labels is not None)
        options = options | {"row_weight": row_weight, "normalizer": normalizer}
        return checked_loss(student_logits, teacher, labels, options, settings)
