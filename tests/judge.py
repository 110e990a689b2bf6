r"""How numbers are judged: against the reference in fp64, with eager PyTorch as the yardstick.

Every logit enters a loss through exp(z), z = s / T. Computed with care in a format whose numbers are eps apart, z is
off by |z| eps and exp(z) by as much relatively; exp itself by up to 8 eps (1e-6 in fp32, the most that this package
allows), and so are sums over rows. Hence each probability may be off by q_i * (8 + |log q_i|) * eps (or by the smallest
normal number, where exp underflows), and a gradient, which is a sum of such terms, by A_i, the sum of its terms'
errors. These are the "few ulp", at the size of the terms and not of their difference: where the student is good q - p
cancels, and no arithmetic in that format restores the lost digits. The same holds for the terms of a row's loss, with
A. Then

    |gradient_i - truth_i|  <=  (1 + R) * A_i + 1/2 ulp(truth_i)
    |loss - truth|          <=  A + |eager - truth|

where R is the largest |eager_i - truth_i| / A_i of the row, eager being the usual recipe (eager.py) in fp32 on the same
numbers, upcast where they are of 16 bits, and the half ulp is that of a 16-bit student: the gradient is fp32's, rounded
once. For fp64, where the truth has no more digits than what it judges, the truth's own rounding stands for eager's
error, of z and of log q, which is log V where all logits are alike (torch.log_softmax is then off by up to 24 eps of q
at V = 151936): R is the largest |z| among the classes with a probability, or log V, and the loss gets as much.

For softcapped or standardized logits eager.py adds their error to |log q_i|, and their derivatives' error to A_i. The
loss's other terms are in A like those of the divergence.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from cases import BF16, F32, F64, to_device
from eager import DEFAULTS, eager, largest_z
from gpu import INTERPRETED
from torch import Tensor

import kdfast


def run(
    student: Tensor, teacher: Any, labels: Tensor | None = None, grad_loss: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """kd_loss and its gradient in the student's logits, which keep their strides; for row losses the sum's gradient."""
    leaf = student.detach().requires_grad_()
    loss = kdfast.kd_loss(leaf.clone() if settings.get("inplace") else leaf, teacher, labels, **settings)
    loss = loss[0] if settings.get("return_metrics") else loss
    loss.backward(torch.ones_like(loss) if grad_loss is None else grad_loss)
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def judge(
    student: Tensor,
    teacher: Any,
    labels: Tensor | None = None,
    *,
    backend: str,
    by_row: bool = True,
    truth: "Truth | None" = None,
    limits: bool = False,
    **settings: Any,
) -> "Truth":
    """Judges a scalar loss with its gradient and, if `by_row`, the loss without a gradient and the losses by row.

    With `limits` the truth may be infinite or NaN, and the result must be the same.
    """
    if truth is None:
        truth = truth_of(student, teacher, labels, settings)
    truth.truncated, truth.limits = backend == "triton" and INTERPRETED, limits
    if settings.get("reduction") != "none":
        scale = divisor(student, labels, settings)
        loss, grad = run(student, teacher, labels, backend=backend, **settings)
        truth.judge_sum("loss and gradient in one", loss, scale)
        truth.judge_gradient("loss and gradient in one", grad, torch.full_like(truth.loss, scale))
        if not by_row:
            return truth
        with torch.no_grad():
            loss = kdfast.kd_loss(student, teacher, labels, backend=backend, **settings | {"inplace": False})
            loss = loss[0] if settings.get("return_metrics") else loss
        truth.judge_sum("loss alone", loss, scale)
    # coefficients of both signs, exact in every dtype
    factor = (1.5 - torch.arange(truth.loss.numel(), device="cpu") % 4).reshape(truth.loss.shape).to(truth.kind)
    loss, grad = run(student, teacher, labels, factor.to(student.device), backend=backend, **per_row_settings(settings))
    truth.judge_rows("losses by row", loss)
    truth.judge_gradient("gradient by row", grad, factor.double())
    return truth


def truth_of(student: Tensor, teacher: Any, labels: Tensor | None, settings: dict[str, Any]) -> "Truth":
    """The truth of a call: the same for every backend and every reduction."""
    with one_thread():
        return Truth(*to_device((student, teacher, labels, per_row_settings(settings)), "cpu"))


def per_row_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in ("reduction", "normalizer")} | {"reduction": "none"}


@contextmanager
def one_thread() -> Iterator[None]:
    """For PyTorch's small operators, which a second thread slows down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Truth:
    """Each row's loss and gradient, and how far off they may be. For tensors on the CPU."""

    truncated = False  # whether gradients are truncated to bf16 instead of rounded
    limits = False  # whether results must be infinite or NaN where the truth is

    def __init__(self, student: Tensor, teacher: Any, labels: Tensor | None, settings: dict[str, Any]) -> None:
        wide = {k: in_fp64(v) for k, v in settings.items() if k != "inplace"} | {"backend": "reference"}
        with torch.no_grad():
            self.loss = kdfast.kd_loss(in_fp64(student), in_fp64(teacher), labels, **wide)
            self.loss = self.loss[0] if wide.get("return_metrics") else self.loss
        wide["reduction"] = "sum"  # its gradient is autograd's
        self.grad = run(in_fp64(student), in_fp64(teacher), labels, **wide)[1]
        self.dtype, self.kind = student.dtype, F64 if student.dtype == F64 else F32

        s, teachers = real_classes(student, teacher, settings)
        weight, options = row_weights(student, labels, settings), DEFAULTS | settings | sparse_options(teacher)

        info = torch.finfo(self.kind)
        self.floor = info.tiny
        _, loss_off, grad_off = eager(s.double(), [t.double() for t in teachers], labels, in_fp64(options), self.kind)
        loss_off, grad_off = loss_off * weight * info.eps, grad_off * weight.unsqueeze(-1) * info.eps
        if self.kind == F64:
            ratio = largest_z(s, teachers, options).clamp_min(math.log(s.shape[-1]))
            self.loss_off = loss_off * (1 + ratio.squeeze(-1))
        else:
            # the products with the terms' weights and with the row's, half an ulp each
            loss_off = loss_off + 2 * info.eps * self.loss.abs().nan_to_num(0, 0)
            leaf = s.float().requires_grad_()
            loss, _, _ = eager(leaf, [t.float() for t in teachers], labels, options)
            (grad,) = torch.autograd.grad((loss * weight).sum(), leaf)
            missed = (grad - self.grad[..., : s.shape[-1]]).abs() / (grad_off + self.floor)
            ratio = missed.amax(-1, True).nan_to_num(0, 0)  # where eager itself fails it allows nothing more
            self.loss_off = loss_off + (loss.detach() * weight - self.loss).abs().nan_to_num(0, 0)
        self.grad_off = F.pad(grad_off * (1 + ratio), (0, student.shape[-1] - s.shape[-1]))

    def judge_rows(self, what: str, loss: Tensor) -> None:
        assert loss.dtype == self.kind, f"{what}: has dtype {loss.dtype}"
        _within(what, loss, self.loss, self.loss_off + self.floor, self.limits)

    def judge_sum(self, what: str, loss: Tensor, scale: float) -> None:
        assert loss.dtype == self.kind, f"{what}: has dtype {loss.dtype}"
        _within(what, loss, self.loss.sum() * scale, self.loss_off.sum() * scale + self.floor, self.limits)

    def judge_gradient(self, what: str, grad: Tensor, factor: Tensor) -> None:
        assert grad.dtype == self.dtype, f"{what}: has dtype {grad.dtype}"
        factor = factor.unsqueeze(-1)
        want, allowed = self.grad * factor, self.grad_off * factor.abs() + self.floor
        if self.dtype.itemsize == 2:
            # Triton's interpreter truncates fp32 to bf16 where devices round it: a whole ulp
            ulps = 2 if self.truncated and self.dtype == BF16 else 1
            allowed = allowed + ulps * half_ulp(want, self.dtype)
        allowed = torch.where(self.grad_off * factor == 0, 0, allowed)  # padding and dropped rows: exactly 0
        if self.limits:  # where a loss is infinite its gradient may be NaN or infinite
            none = self.loss.isinf().unsqueeze(-1) & ~want.isfinite()
            grad = torch.where(none & ~grad.to(want.device).isfinite(), want, grad.to(want))
        _within(what, grad, want, allowed, self.limits)


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between the numbers of a dtype at x."""
    info = torch.finfo(dtype)
    power = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1)
    return 0.5 * info.eps * power.clamp_min(info.smallest_normal)


def sparse_options(teacher: Any) -> dict[str, Any]:
    """What eager.py has to know of a sparse teacher beside its log-probabilities."""
    return {"indices": teacher.indices, "target": "log_probs"} if isinstance(teacher, kdfast.TopKTargets) else {}


def real_classes(student: Tensor, teacher: Any, settings: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The logits of the student and of each teacher, without their padding."""
    vocab = settings.get("vocab_size") or student.shape[-1]
    if isinstance(teacher, kdfast.TopKTargets):
        return student.detach()[..., :vocab], [teacher.log_probs]
    teachers = [] if teacher is None else [teacher] if isinstance(teacher, Tensor) else teacher
    return student.detach()[..., :vocab], [t[..., :vocab] for t in teachers]


def row_weights(student: Tensor, labels: Tensor | None, settings: dict[str, Any]) -> Tensor:
    """In fp64; 0 for dropped rows."""
    weight = student.new_ones(student.shape[:-1], dtype=F64)
    if labels is not None:
        weight = weight * (labels != settings.get("ignore_index", -100))
    return weight if settings.get("row_weight") is None else weight * settings["row_weight"].double()


def divisor(student: Tensor, labels: Tensor | None, settings: dict[str, Any]) -> float:
    """What the sum of the rows' losses is multiplied by."""
    reduction, normalizer = settings.get("reduction", "mean"), settings.get("normalizer")
    total = float(row_weights(student, labels, settings).sum() if normalizer is None else normalizer)
    if reduction != "mean":
        total = student.shape[0] if reduction == "batchmean" and student.dim() > 1 else 1.0
    return 1.0 / total if total else 0.0


def in_fp64(value: Any) -> Any:
    """Floating tensors, also in dicts, lists and tuples, in fp64."""
    if isinstance(value, dict):
        return {k: in_fp64(v) for k, v in value.items()}
    if isinstance(value, kdfast.TopKTargets):
        return value.to(F64)
    if isinstance(value, (list, tuple)):
        return [in_fp64(v) for v in value]
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _within(what: str, got: Tensor, want: Tensor, allowed: Tensor, limits: bool = False) -> None:
    """|got - want| <= allowed; the message shows the worst element. With `limits` both may be infinite or NaN."""
    assert got.shape == want.shape, f"{what}: has shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    got, want, allowed = got.cpu(), want.cpu(), allowed.cpu()
    missed = (got.double() - want).abs()
    bad = ~(missed <= allowed)
    if limits:
        bad = torch.where(want.isfinite(), bad, (got != want) & ~(got.isnan() & want.isnan()))
    if bad.any():
        worst = int(torch.where(bad, missed / allowed.clamp_min(1e-300), 0).nan_to_num(torch.inf).argmax())
        a, b, c = (x.broadcast_to(want.shape).flatten()[worst].item() for x in (got, want, allowed))
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {want.numel()} are off; the worst, element {worst}, is {a!r} instead of "
            f"{b!r}, off by {abs(a - b):.3g} where {c:.3g} is allowed"
        )
