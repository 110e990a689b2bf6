"""kd_loss and KDLoss: the public edge, where defaults are settled and arguments are checked, once."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast import ops
from kdfast.autograd import row_loss
from kdfast.reference import DIVERGENCES
from kdfast.targets import check_floating, check_teachers, kind

_CHOICES = {
    "divergence": (*DIVERGENCES, "logit_mse"),
    "target": ("logits", "probs", "log_probs"),
    "reduction": ("mean", "sum", "batchmean", "none"),
    "ensemble": ("arithmetic", "geometric"),
    "backend": (None, "reference", "cpu"),
}


def kd_loss(
    student_logits: Tensor,
    teacher: Tensor | Sequence[Tensor] | None,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    alpha: float | None = None,
    hard_weight: float | None = None,
    divergence: str = "cross_entropy",
    target: str = "logits",
    vocab_size: int | None = None,
    t_squared: bool = True,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    teacher_weights: Sequence[float] | None = None,
    ensemble: str = "arithmetic",
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""The distillation loss of a student against a teacher, and against labels where there are any.

    With :math:`q = \mathrm{softmax}(s / T)`, :math:`p = \mathrm{softmax}(t / T)` and :math:`q^1 = \mathrm{softmax}(s)`,
    a row (a token, an image) of weight w costs

    .. math:: l = w \, [ \, \alpha T^2 D(p, q) + h \, \mathrm{CE}(y, q^1) \, ]

    with D the divergence and h = ``hard_weight``: the objective of Hinton, Vinyals & Dean, "Distilling the Knowledge in
    a Neural Network" (2015), section 2, whose factor :math:`T^2` keeps the size of the soft gradients whatever T.

    Args:
        student_logits: (..., V), float32, bfloat16, float16 or float64.
        teacher: (..., V) of any of these dtypes, or a sequence of such tensors, an ensemble. It never gets a gradient.
            May be None where ``alpha`` is 0.
        labels: (...) int64 class indices, already shifted. None: no hard term.
        temperature: T > 0, a number or a tensor (...) of one per row, which gets no gradient.
        teacher_temperature: the same for the teacher; None: ``temperature``. :math:`T^2` stays the student's.
        alpha: the weight of the soft term. None: 0.9 with labels, 1 without. In [0, 1] unless ``hard_weight`` is given;
            the paper found more than 0.5 best.
        hard_weight: the weight of the hard term. None: 1 - alpha; given: any finite number >= 0, and alpha likewise.
        divergence: ``"cross_entropy"``, :math:`-\sum p \log q`, the paper's; ``"forward_kl"``, KL(p, q), the same
            gradient and 0 at its minimum; ``"reverse_kl"``, KL(q, p); ``"logit_mse"``, :math:`\frac{1}{2V} \sum
            (s_i - t_i)^2` on centred rows, the paper's limit for high T, which has no temperature and no T^2.
        target: what ``teacher`` holds: ``"logits"``, ``"probs"`` or ``"log_probs"``. The latter two are at the
            temperature already and need not sum to exactly 1.
        vocab_size: how many of the first classes are real, where heads are padded (to different sizes, it may be). The
            others take no part, and their gradient is 0.
        t_squared: False leaves :math:`T^2` out.
        weight: (...) row weights >= 0 of any real dtype. A row of weight 0 is treated as an ignored one.
        ignore_index: rows with this label drop out of both terms and of the mean, and get zero gradient.
        reduction: ``"none"``: (...) row losses; ``"sum"``; ``"mean"``: :math:`\sum l / \sum w` over the rows not
            ignored, 0 if there are none; ``"batchmean"``: :math:`\sum l` / the size of the first dimension.
        normalizer: a number > 0 or a 0-dim tensor that :math:`\sum l` is divided by in place of the mean's denominator:
            the number of tokens over all micro-batches and ranks.
        teacher_weights: one number >= 0 per teacher of a sequence, scaled to sum to 1. None: equal ones.
        ensemble: ``"arithmetic"``, the weighted mean of the teachers' probabilities, or ``"geometric"``, the softmax of
            the weighted mean of their logits / T (paper, section 2 and 5).
        inplace: the gradient overwrites the storage of ``student_logits``, which saves a tensor of that size; the
            logits must not be a leaf that requires grad.
        backend: None (by the device), ``"reference"`` or ``"cpu"``; see :func:`kdfast.backends`.

    Returns:
        0-dim, or (...) with reduction ``"none"``; float32, for float64 logits float64. Scalar losses of other than
        float16 logits compute the gradient in forward, and backward scales it where grad_output is not 1. Not twice
        differentiable.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: a shape, a number or a name that is not allowed, or arguments that exclude each other.
        RuntimeError: a wrong dtype or device, a backend that is not usable here, ``inplace`` on a leaf.
        IndexError: a label outside [0, V) that is not ``ignore_index``.
    """
    student = student_logits
    if not isinstance(student, Tensor):
        raise TypeError(f"student_logits: must be a tensor, not {kind(student)}")
    check_floating("student_logits", student)
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_logits: has shape {tuple(student.shape)}, but it must be (..., V) with V >= 1")
    shape = student.shape[:-1]
    _check_choice("divergence", divergence)
    _check_choice("target", target)
    _check_choice("reduction", reduction)
    _check_choice("ensemble", ensemble)
    _check_choice("backend", backend)
    check_bool("t_squared", t_squared)
    alpha, hard_weight = _mix(alpha, hard_weight, labels is not None)
    vocab = _vocab(vocab_size, student)
    if labels is not None:
        _check_rows("labels", labels, shape, student, integer=True)
    if weight is not None:
        _check_rows("weight", weight, shape, student)
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("weight: requires grad, but kd_loss has no derivative for it; pass weight.detach()")
    temperature, temperatures = check_temperature("temperature", temperature, shape, student)
    at, ats = temperature, temperatures
    if teacher_temperature is not None:
        if target != "logits":
            raise ValueError(f"teacher_temperature: given with target={target!r}, which is tempered already")
        at, ats = check_temperature("teacher_temperature", teacher_temperature, shape, student)
    teachers, weights = _teachers(teacher, teacher_weights, student, vocab_size, alpha)
    if divergence == "logit_mse":
        if target != "logits":
            raise ValueError(f"divergence: 'logit_mse' needs target='logits', not {target!r}")
        if len(teachers) > 1 and ensemble != "geometric":
            raise ValueError("divergence: 'logit_mse' with several teachers needs ensemble='geometric'")
        temperature, temperatures, at, ats, t_squared = 1.0, None, 1.0, None, False
    divisor, normalizer = _normalizer(normalizer, reduction, student)
    if check_bool("inplace", inplace):
        _check_inplace(student)
    ignore_index = _integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: {ignore_index} must fit into 64 bits, as labels do")

    inputs = ops.Inputs(teachers, labels, weight, normalizer, temperatures, ats)
    settings = ops.Settings(
        temperature=temperature,
        teacher_temperature=at,
        alpha=alpha,
        hard_weight=hard_weight,
        t_squared=t_squared,
        divergence=divergence,
        target=target,
        ensemble=ensemble,
        teacher_weights=weights,
        vocab_size=vocab,
        ignore_index=ignore_index,
        reduction=reduction,
        divisor=divisor,
    )
    return row_loss(student, inputs, settings, ops.namespace(backend, student), inplace)


class KDLoss(nn.Module):
    """:func:`kd_loss` as a module: its settings are given once, here; ``forward`` takes the tensors.

    Takes every keyword of :func:`kd_loss` but ``weight`` and ``normalizer``, which belong to a call. Has no parameters
    and no buffers. The settings are plain attributes and can be changed between calls.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        teacher_temperature: float | Tensor | None = None,
        alpha: float | None = None,
        hard_weight: float | None = None,
        divergence: str = "cross_entropy",
        target: str = "logits",
        vocab_size: int | None = None,
        t_squared: bool = True,
        ignore_index: int = -100,
        reduction: str = "mean",
        teacher_weights: Sequence[float] | None = None,
        ensemble: str = "arithmetic",
        inplace: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name in _SETTINGS:
            setattr(self, name, locals()[name])

    def extra_repr(self) -> str:
        settings = {name: getattr(self, name) for name in _SETTINGS}
        # identity first: a tensor of temperatures is not equal to anything
        changed = {k: v for k, v in settings.items() if v is not _SETTINGS[k] and (v == _SETTINGS[k]) is not True}
        shown = {"temperature": self.temperature, "alpha": self.alpha, "divergence": self.divergence} | changed
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def forward(
        self,
        student_logits: Tensor,
        teacher: Tensor | Sequence[Tensor] | None,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return kd_loss(student_logits, teacher, labels, weight=weight, normalizer=normalizer, **settings)


_SETTINGS = dict(KDLoss.__init__.__kwdefaults__ or {})


def _check_choice(name: str, value: Any) -> None:
    choices = _CHOICES[name]
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(repr, choices))}")


def _number(name: str, value: Any) -> float:
    """A Python or numpy number as a float."""
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if not isinstance(value, (bool, str, Tensor)) and hasattr(value, "__float__"):
        try:
            return float(value)
        except OverflowError:  # an int beyond every float
            return math.inf
        except TypeError:  # an array
            pass
    raise TypeError(f"{name}: must be a number, not {value!r}")


def _integer(name: str, value: Any) -> int:
    """A Python or numpy integer as an int."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if not isinstance(value, (bool, Tensor)) and hasattr(value, "__index__"):
        return int(value)
    raise TypeError(f"{name}: must be an int, not {value!r}")


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: must be a bool, not {value!r}")
    return value


def _mix(alpha: Any, hard_weight: Any, labelled: bool) -> tuple[float, float]:
    """alpha and hard_weight with their defaults settled."""
    given = alpha
    if alpha is None:
        alpha = 0.9 if labelled else 1.0
    else:
        alpha = _number("alpha", alpha)
        if not alpha >= 0 or alpha == math.inf:
            raise ValueError(f"alpha: {given!r} must be a finite number >= 0")
    if hard_weight is None:
        if alpha > 1:
            raise ValueError(f"alpha: {given!r} must lie in [0, 1] where no hard_weight is given")
        if not labelled and alpha != 1:
            raise ValueError(
                f"alpha: {given!r} without labels leaves a part of the loss out; give labels, alpha=1, or hard_weight=0"
            )
        return alpha, 1.0 - alpha
    number = _number("hard_weight", hard_weight)
    if not number >= 0 or number == math.inf:
        raise ValueError(f"hard_weight: {hard_weight!r} must be a finite number >= 0")
    if number and not labelled:
        raise ValueError(f"hard_weight: {hard_weight!r} without labels; give labels or hard_weight=0")
    return alpha, number


def _vocab(vocab_size: Any, student: Tensor) -> int:
    if vocab_size is None:
        return -1
    vocab_size = _integer("vocab_size", vocab_size)
    if not 1 <= vocab_size <= student.shape[-1]:
        raise ValueError(
            f"vocab_size: {vocab_size} must lie in [1, {student.shape[-1]}], the classes of student_logits"
        )
    return vocab_size


def _check_rows(
    name: str, value: Any, shape: torch.Size, logits: Tensor, integer: bool = False, of: str = "student_logits"
) -> None:
    """A tensor with one value per row of the logits, which the caller knows under the name `of`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: must be a tensor, not {kind(value)}")
    if integer and value.dtype != torch.int64:
        raise RuntimeError(f"{name}: has dtype {value.dtype}, but it must be torch.int64 class indices")
    if value.is_complex():
        raise RuntimeError(f"{name}: has dtype {value.dtype}, but it must be real")
    if value.shape != shape:
        raise ValueError(
            f"{name}: has shape {tuple(value.shape)}, but with {of} of shape {tuple(logits.shape)} it must "
            f"be {tuple(shape)}"
        )
    if value.device != logits.device:
        raise RuntimeError(f"{name}: is on {value.device}, but {of} is on {logits.device}")


def check_temperature(
    name: str, value: Any, shape: torch.Size, logits: Tensor, of: str = "student_logits"
) -> tuple[float, Tensor | None]:
    """A temperature as a number or as one per row; the other of the two is 1 or None."""
    if isinstance(value, Tensor):
        _check_rows(name, value, shape, logits, of=of)
        return 1.0, value.detach()
    number = _number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: {value!r} must be finite and > 0")
    return number, None


def _teachers(
    teacher: Any, teacher_weights: Any, student: Tensor, vocab_size: int | None, alpha: float
) -> tuple[list[Tensor], list[float]]:
    """The teachers that are read: none where alpha is 0."""
    if teacher is None and alpha == 0:
        return [], []
    teachers, weights = check_teachers(teacher, teacher_weights, student, vocab_size)
    return (teachers, weights) if alpha else ([], [])


def _normalizer(value: Any, reduction: str, student: Tensor) -> tuple[float, Tensor | None]:
    """The normalizer as a number (0: none) or as a tensor."""
    if value is None:
        return 0.0, None
    if reduction != "mean":
        raise ValueError(f"normalizer: given with reduction={reduction!r}; it takes the place of the mean's denominator")
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex():
            raise ValueError(
                f"normalizer: must be a number or a real 0-dim tensor, not {value.dtype} of shape {tuple(value.shape)}"
            )
        if value.device != student.device:
            raise RuntimeError(f"normalizer: is on {value.device}, but student_logits is on {student.device}")
        if value.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("normalizer: requires grad, but kd_loss has no derivative for it; detach() it")
        return 0.0, value
    number = _number("normalizer", value)
    if not 0 < number < math.inf:
        raise ValueError(f"normalizer: {value!r} must be finite and > 0")
    return number, None


def _check_inplace(student: Tensor) -> None:
    """The errors of PyTorch's own in-place operations."""
    if not (student.requires_grad and torch.is_grad_enabled()):
        return
    base = student
    if not torch.compiler.is_compiling() and student._base is not None:
        base = student._base
    if base.is_leaf and base.requires_grad:
        raise RuntimeError("inplace: student_logits is a leaf (or a view of one) that requires grad")
    if any(size > 1 and stride == 0 for size, stride in zip(student.shape, student.stride(), strict=True)):
        raise RuntimeError(
            "inplace: student_logits is expanded, so more than one of its elements refers to a single memory location; "
            "clone() it first"
        )
