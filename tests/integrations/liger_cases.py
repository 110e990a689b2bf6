"""Calls of Liger's loss modules, for any library that has these classes: Liger itself, and kdfast's."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

N, V, H, TEACHER_H = 6, 11, 5, 7
IGNORED = -7
BF16, F32 = torch.bfloat16, torch.float32


def inputs(dtype: torch.dtype, at_first: torch.dtype) -> SimpleNamespace:
    """Leaves in ``dtype``, of values that ``at_first`` can hold: logits, hidden states, heads, labels."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(at_first).to(dtype)

    x = SimpleNamespace(s=normal(N, V) * 2, h=normal(N, H), w=normal(V, H), b=normal(V))
    for leaf in vars(x).values():
        leaf.requires_grad_()
    x.t, x.ht, x.wt = normal(N, V) * 2, normal(N, TEACHER_H), normal(V, TEACHER_H)
    x.y = torch.randint(V, (N,), generator=generator)
    x.y[2] = IGNORED
    x.class_weight = torch.rand(V, generator=generator).to(F32)
    return x


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[Any, SimpleNamespace], Any]  # (the library's module, inputs) -> loss or several outputs
    dtype: torch.dtype = F32

    def __str__(self) -> str:
        return self.name


def run(case: Case, library: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All outputs, and the gradients of the first ones times fixed numbers that are not 1."""
    x = inputs(dtype or case.dtype, case.dtype)
    outputs = case.call(library, x)
    outputs = vars(outputs) if hasattr(outputs, "predicted_tokens") else outputs
    if not isinstance(outputs, dict):
        outputs = dict(enumerate(outputs if isinstance(outputs, tuple) else (outputs,)))
    outputs = {f"output {name}": value for name, value in outputs.items() if value is not None}
    total = sum(
        (value * torch.linspace(0.5, 2.5, value.numel()).view(value.shape) * (1 + 0.5 * i)).sum()
        for i, value in enumerate(outputs.values())
        if value.is_floating_point()
    )
    total.backward()
    gradients = {f"gradient {name}": getattr(x, name).grad for name in "shwb"}
    return {k: v.detach() for k, v in (outputs | gradients).items() if v is not None}


CASES: list[Case] = []


def add(name: str, call: Callable[[Any, SimpleNamespace], Any], *dtypes: torch.dtype) -> None:
    CASES.extend(Case(name if d is F32 else f"{name} in bfloat16", call, d) for d in dtypes or (F32,))


def _labels(x: SimpleNamespace, given: bool) -> Tensor | None:
    return x.y if given else None


for beta in (0.0, 0.3, 0.5, 1.0):  # both ends are KLs, and 0.5 hides which side beta weighs
    for given in (False, True):
        rows = "kept rows" if given else "all rows"

        def jsd(library: Any, x: SimpleNamespace, beta: float = beta, given: bool = given) -> Tensor:
            loss = library.LigerJSD(beta, IGNORED)
            return loss(x.s.log_softmax(-1), x.t.log_softmax(-1), _labels(x, given))

        def linear_jsd(library: Any, x: SimpleNamespace, beta: float = beta, given: bool = given) -> Tensor:
            loss = library.LigerFusedLinearJSD(beta, IGNORED, 2.0, torch.float32 if given else None)
            return loss(x.h, x.w, x.ht, x.wt, _labels(x, given))

        add(f"LigerJSD, beta {beta}, {rows}", jsd, F32, *([BF16] if given else []))
        add(f"LigerFusedLinearJSD, beta {beta}, {rows}", linear_jsd, F32, *([BF16] if given else []))

for reduction in ("none", "sum", "mean", "batchmean"):
    for log_target in (False, True):

        def kl_div(library: Any, x: SimpleNamespace, r: str = reduction, log_target: bool = log_target) -> Tensor:
            target = x.t.log_softmax(-1) if log_target else x.t.softmax(-1)
            return library.LigerKLDIVLoss(reduction=r, log_target=log_target)(x.s.log_softmax(-1), target)

        add(f"LigerKLDIVLoss, {reduction}, log_target {log_target}", kl_div, F32, *([] if log_target else [BF16]))

    for given in (False, True):
        rows = "kept rows" if given else "all rows"

        def tvd(library: Any, x: SimpleNamespace, r: str = reduction, given: bool = given) -> Tensor:
            return library.LigerTVDLoss(r, IGNORED)(x.s.softmax(-1), x.t.softmax(-1), _labels(x, given))

        # No bfloat16: Liger's kernel computes in it, which Triton's interpreter cannot.
        add(f"LigerTVDLoss, {reduction}, {rows}", tvd)

        def linear_kl(library: Any, x: SimpleNamespace, r: str = reduction, given: bool = given) -> Tensor:
            loss = library.LigerFusedLinearKLDivLoss(r, IGNORED, 2.0)
            return loss(x.h, x.w, x.t.softmax(-1), _labels(x, given))

        if reduction != "none":
            add(f"LigerFusedLinearKLDivLoss, {reduction}, {rows}", linear_kl, F32, *([BF16] if given else []))

add("LigerKLDIVLoss, eps 0.05", lambda lib, x: lib.LigerKLDIVLoss(0.05)(x.s.log_softmax(-1), x.t.softmax(-1)))
add(  # of some classes: what kd_loss would renormalize
    "LigerKLDIVLoss, not normalized",
    lambda lib, x: lib.LigerKLDIVLoss()(x.s.log_softmax(-1)[:, :4], x.t.softmax(-1)[:, :4]),
)
for beta in (0.0, 0.3, 1.0):
    add(
        f"LigerJSD, beta {beta}, not normalized",
        lambda lib, x, beta=beta: lib.LigerJSD(beta, IGNORED)(
            x.s.log_softmax(-1)[:, :4], x.t.log_softmax(-1)[:, :4], x.y
        ),
    )
add("LigerFusedCETVDLoss", lambda lib, x: lib.LigerFusedCETVDLoss(IGNORED)(x.s, x.t, x.y), F32, BF16)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed, z-loss, softcap": {"label_smoothing": 0.1, "lse_square_scale": 0.01, "softcap": 3.0},
    "z-loss and accuracy": {
        "lse_square_scale": 0.01,
        "label_smoothing": 0.1,
        "return_z_loss": True,
        "return_token_accuracy": True,
    },
}
for reduction in ("none", "sum", "mean"):
    for name, options in OPTIONS.items():
        options = {"reduction": reduction, "ignore_index": IGNORED, **options}

        def cross_entropy(library: Any, x: SimpleNamespace, options: dict[str, Any] = options) -> Any:
            return library.LigerCrossEntropyLoss(**options)(x.s * 1, x.y)  # Liger overwrites its logits

        def linear(library: Any, x: SimpleNamespace, options: dict[str, Any] = options) -> Any:
            return library.LigerFusedLinearCrossEntropyLoss(**options)(x.w, x.h, x.y, x.b)

        # Triton's interpreter cannot scale a bfloat16 gradient, which Liger's kernel does for the other reductions.
        has_bf16 = name == "plain" and reduction == "none"
        add(f"LigerCrossEntropyLoss, {reduction}, {name}", cross_entropy, F32, *([BF16] if has_bf16 else []))
        add(f"LigerFusedLinearCrossEntropyLoss, {reduction}, {name}", linear, F32, *([BF16] if name == "plain" else []))

    options = {"reduction": reduction, "ignore_index": IGNORED}
    add(
        f"LigerCrossEntropyLoss, {reduction}, predicted tokens",
        lambda lib, x, options=options: lib.LigerCrossEntropyLoss(return_predicted_tokens=True, **options)(
            x.s * 1, x.y
        ),
    )
    add(
        f"LigerCrossEntropyLoss, {reduction}, weights of classes",
        lambda lib, x, options=options: lib.LigerCrossEntropyLoss(x.class_weight, **options)(x.s * 1, x.y),
    )
    add(
        f"LigerFusedLinearCrossEntropyLoss, {reduction}, weights of classes",
        lambda lib, x, options=options: lib.LigerFusedLinearCrossEntropyLoss(x.class_weight, **options)(x.w, x.h, x.y),
    )
    add(
        f"LigerFusedLinearCrossEntropyLoss, {reduction}, token scaling",
        lambda lib, x, options=options: lib.LigerFusedLinearCrossEntropyLoss(
            use_token_scaling=True, lse_square_scale=0.01, softcap=3.0, **options
        )(x.w, x.h, x.y, x.b),
    )


# What kdfast leaves to Liger's kernels.
_SMOOTHED: dict[str, Any] = {"ignore_index": IGNORED, "label_smoothing": 0.1}
FALLBACKS = [
    Case(
        "weights of classes with smoothing",
        lambda lib, x: lib.LigerCrossEntropyLoss(x.class_weight, **_SMOOTHED)(x.s * 1, x.y),
    ),
    Case(
        "weights of classes with smoothing, linear",
        lambda lib, x: lib.LigerFusedLinearCrossEntropyLoss(x.class_weight, **_SMOOTHED)(x.w, x.h, x.y, x.b),
    ),
    Case(
        "predicted tokens, linear",
        lambda lib, x: lib.LigerFusedLinearCrossEntropyLoss(return_predicted_tokens=True, **_SMOOTHED)(x.w, x.h, x.y),
    ),
    Case(
        "token scaling and accuracy",
        lambda lib, x: lib.LigerFusedLinearCrossEntropyLoss(
            use_token_scaling=True, return_token_accuracy=True, **_SMOOTHED
        )(x.w, x.h, x.y),
    ),
    Case(
        "eps 0.05, linear",
        lambda lib, x: lib.LigerFusedLinearKLDivLoss(eps=0.05)(x.h, x.w, x.t.softmax(-1)),
    ),
]


def masked(library: Any) -> dict[str, Tensor]:
    """LigerJSD where the first class is -inf on both sides."""
    mask = torch.zeros(V).masked_fill(torch.arange(V) == 0, -torch.inf)
    x = inputs(F32, F32)
    loss = library.LigerJSD(0.3)((x.s + mask).log_softmax(-1), (x.t + mask).log_softmax(-1))
    loss.backward()
    return {"loss": loss.detach(), "gradient": x.s.grad}


def chunked(library: Any, dtype: torch.dtype, options: tuple[Any, ...], **others: Any) -> list[Tensor]:
    """The chunked loss's outputs and gradients, of three sequences of two tokens."""
    x = inputs(dtype, BF16)
    teacher_bias = torch.linspace(-1, 1, V).to(dtype)
    loss = library.LigerFusedLinearJSDLoss(*options, compiled=False, **others)
    hidden, teacher, labels = x.h.view(3, 2, -1), x.ht.view(3, 2, -1), x.y.view(3, 2)
    outputs = loss(hidden, x.w, teacher, x.wt, labels, x.b, teacher_bias)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    (outputs[0] * 1.7).backward()
    return [*(value.detach() for value in outputs), x.h.grad, x.w.grad, x.b.grad]
