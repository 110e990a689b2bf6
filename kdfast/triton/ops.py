"""The operators of ops.py on the Triton kernels: arguments as the kernels take them, and which kernel serves a call."""

import contextlib
import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast import reference
from kdfast.arguments import Inputs, Settings
from kdfast.triton import launch, reductions, row_kernels, softmax_kernels
from kdfast.triton.divergences import DIVERGENCES
from kdfast.triton.spec import Spec

MOST_TEACHERS = 8
REDUCING_LANES = 1024


def loss_grad(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    call = Call(student, inputs, settings)
    grad = student.new_empty(student.shape)
    return call.loss_grad(grad), grad


def loss_grad_(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    call = Call(student, inputs, settings)
    loss = call.loss_grad(call.student)
    call.copy_back(student)
    return loss


def stats(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    return Call(student, inputs, settings).stats()


def grad(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    call = Call(student, inputs, settings)
    grad = student.new_empty(student.shape)
    call.grad(stats, grad_loss, grad)
    return grad


def grad_(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> None:
    call = Call(student, inputs, settings)
    call.grad(stats, grad_loss, call.student)
    call.copy_back(student)


def scale_(grad: Tensor, factor: Tensor) -> None:
    view = _readable(grad)
    rows, width = _rows(view), view.shape[-1]
    if rows:
        facts = launch.facts(grad.device)
        plan = launch.plan(width, [view], facts.warp)
        grid = (min(rows, 4 * facts.multiprocessors),)
        with _on(grad):
            reductions.scale[grid](
                _matrix(view), factor, rows, width, LANES=plan.lanes, VEC=plan.vec, dtype=_arithmetic(grad),
                num_warps=plan.warps,
            )  # fmt: skip
    if view is not grad:
        grad.copy_(view)


def tempered_softmax(
    logits: Tensor, temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype
) -> Tensor:
    return _softmax([_readable(logits)], temperatures, temperature, log, dtype, _arithmetic(logits))


def tempered_softmax_backward(
    grad: Tensor, output: Tensor, temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype
) -> Tensor:
    wide = tl.float64 if torch.float64 in (output.dtype, dtype) else tl.float32
    return _softmax([_readable(output), _readable(grad)], temperatures, temperature, log, dtype, wide)


def _softmax(
    inputs: list[Tensor], temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype, wide: Any
) -> Tensor:
    output = inputs[0].new_empty(inputs[0].shape, dtype=dtype)
    rows, vocab = _rows(output), output.shape[-1]
    if not rows:
        return output
    facts = launch.facts(output.device)
    plan = launch.plan(vocab, inputs, facts.warp)
    per_row = None if temperatures is None else _by_row(temperatures)
    spec = Spec(wide, aligned=_aligned(inputs[0], [output, *inputs], plan.vec))
    args = (tuple(map(_matrix, inputs)), _matrix(output), per_row, _bits(temperature))
    with _on(output):
        if plan.tiles:
            softmax_kernels.softmax_short[(rows,)](
                *args, vocab, 0, LOG=log, TILES=plan.tiles, LANES=plan.lanes, VEC=plan.vec, SPEC=spec,
                num_warps=plan.warps,
            )  # fmt: skip
        else:
            grid = (launch.programs(rows, vocab, inputs, facts),)
            softmax_kernels.softmax_long[grid](
                *args, rows, vocab, LOG=log, LANES=plan.lanes, VEC=plan.vec, SPEC=spec, num_warps=plan.warps
            )
    return output


# ---- tensors as the kernels take them ----


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def _arithmetic(student: Tensor) -> Any:
    return tl.float64 if student.dtype == torch.float64 else tl.float32


def _rows(tensor: Tensor) -> int:
    return tensor.shape[:-1].numel()


def _layout(tensor: Tensor) -> tuple[int, int, int] | None:
    """(inner, outer_stride, stride) of the rows of a (..., V) tensor; None where they do not lie so."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return None
    dims: list[tuple[int, int]] = []  # (size, stride), innermost first, dimensions that lie as one joined
    for size, stride in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1] = (dims[-1][0] * size, dims[-1][1])
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return None
    inner, stride = dims[0] if dims else (1 << 30, 0)  # a 1 would make Triton compile for it
    return inner, dims[1][1] if len(dims) == 2 else 0, stride


def _readable(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if _layout(tensor) is None else tensor


def _matrix(tensor: Tensor) -> tuple[Tensor, int, int, int]:
    layout = _layout(tensor)
    assert layout is not None
    return (tensor, *layout)


def _aligned(student: Tensor, others: list[Tensor], vec: int) -> tuple[bool, ...]:
    """Which matrices have their rows' vectors where the student has them."""

    def places(tensor: Tensor) -> list[int]:
        inner, outer, stride = _layout(tensor) or (1, 0, 0)
        rows = _rows(tensor)
        return [
            tensor.data_ptr() // tensor.element_size() % vec,
            stride % vec if min(inner, rows) > 1 else 0,
            outer % vec if rows > inner else 0,
        ]

    return tuple(places(student) == places(other) for other in others)


def _by_row(values: Tensor) -> Tensor:
    return values.reshape(-1).contiguous()


def _bits(number: float) -> int:
    """A double as the kernels take it, by its bits."""
    return struct.unpack("q", struct.pack("d", number))[0]


class Call:
    """One loss: its tensors and numbers in the kernels' order, and the kernels that it takes."""

    def __init__(self, student: Tensor, inputs: Inputs, settings: Settings) -> None:
        reference.check_values(student, inputs, settings)
        self.student, self.settings = _readable(student), settings
        self.shape, self.rows, self.width = student.shape[:-1], _rows(student), student.shape[-1]
        self.vocab = self.width if settings.vocab_size < 0 else settings.vocab_size
        self.teachers = [_readable(t) for t in inputs.teachers] if settings.alpha else []
        if len(self.teachers) > MOST_TEACHERS:
            raise ValueError(
                f"teacher: {len(self.teachers)} teachers, but the Triton kernels take at most {MOST_TEACHERS}"
            )
        self.losses = student.new_empty(self.rows, dtype=reference_dtype(student))
        self.facts = launch.facts(student.device)
        self.read = [self.student, *self.teachers]
        self.spec = self._spec(inputs)
        self.joined = 1 if self.spec.joint and self.teachers else len(self.teachers)
        self.columns = len(reference.STATS) + 3 * max(0, self.joined - 1)
        self.plan = launch.plan(self.vocab, self.read, self.facts.warp)
        long = launch.LONG_LANES
        self.long = launch.Plan(long, self.plan.vec, 0, long // self.facts.warp)
        self.segments, self.segment = (1, self.vocab)
        if self.spec.linear and not self.plan.tiles:
            self.segments, self.segment = launch.segments(self.rows, self.vocab, long * self.plan.vec, self.facts)

        labels = None if inputs.labels is None else inputs.labels.reshape(-1).contiguous()
        columns = (inputs.weight, inputs.temperatures, inputs.teacher_temperatures)
        weight, temperatures, at = (None if c is None else _by_row(c) for c in columns)
        if self.spec.teacher in ("none", "difference"):
            temperatures = None
        self.per_row = [labels, weight, temperatures, at]
        scale, self.divisor, self.counted = self._divisor(inputs)
        temperature = 1.0 if self.spec.divergence is None else settings.temperature
        numbers = (temperature, settings.teacher_temperature, settings.alpha, settings.hard_weight, scale)
        self.numbers = tuple(map(_bits, (*numbers, *(settings.teacher_weights if self.teachers else ()))))

    def _spec(self, inputs: Inputs) -> Spec:
        settings = self.settings
        several = len(self.teachers) > 1
        divergence = None
        if not self.teachers:
            teacher = "none"
        elif settings.divergence == "logit_mse":
            teacher = "difference"
        else:
            divergence = DIVERGENCES[settings.divergence]
            mixed = several and settings.ensemble == "arithmetic"
            given = settings.target != "logits" and (mixed or not several)
            teacher = "given" if given else "softmaxed"
        joint = teacher != "softmaxed" or not several or settings.ensemble == "geometric"
        linear = divergence is None or (divergence.over is not None and (joint or not divergence.log_p))
        t = settings.temperature
        whole = inputs.temperatures is None and t in (1, 2, 3, 4)
        power = 1 if divergence is None else int(t) if whole else 0
        return Spec(
            _arithmetic(self.student), teacher, divergence, linear, settings.target, joint,
            inputs.labels is not None and settings.hard_weight != 0, power, settings.t_squared,
        )  # fmt: skip

    def _divisor(self, inputs: Inputs) -> tuple[float, Tensor | None, bool]:
        """What the sum of the losses is multiplied by, what it is divided by, and whether that has to be counted."""
        settings = self.settings
        if settings.reduction == "batchmean":
            size = self.student.shape[0] if self.student.dim() > 1 else 1
            return (1 / size if size else 0.0), None, False
        if settings.reduction != "mean":
            return 1.0, None, False
        if inputs.normalizer is not None:
            return 1.0, inputs.normalizer, False
        if settings.divisor:
            return 1 / settings.divisor, None, False
        if inputs.labels is None and inputs.weight is None:
            return (1 / self.rows if self.rows else 0.0), None, False
        return 1.0, self.losses.new_empty(()), True

    # ---- the operators ----

    def loss_grad(self, output: Tensor) -> Tensor:
        """The reduced loss; its gradient goes to `output`."""
        if not self.rows:
            return self.losses.new_zeros(())
        with _on(output):
            if self.segments > 1:
                table = self.losses.new_empty(self.rows, self.columns)
                loss = self._split_statistics(table, reduced=True)
                self._grad(table, None, output)
                return loss
            self._count()
            self._rows(output, None, self.losses)
            return self._reduced()

    def stats(self) -> tuple[Tensor, Tensor]:
        """The loss under the reduction, and the row statistics, as far as the operator's table has room for them."""
        table = self.losses.new_empty(self.rows, self.columns)
        scalar = self.settings.reduction != "none"
        if not self.rows:
            return self.losses.new_zeros(() if scalar else self.shape), table[:, : len(reference.STATS)]
        with _on(self.losses):
            if self.segments > 1:
                loss = self._split_statistics(table, scalar)
            else:
                self._stats(table, self.losses)
                if scalar:
                    self._count()
                    loss = self._reduced()
        table = table[:, : len(reference.STATS)].contiguous()
        return (loss if scalar else self.losses.view(self.shape)), table

    def grad(self, stats: Tensor, grad_loss: Tensor, output: Tensor) -> None:
        """The gradient from the statistics; from the logits alone where that reads no more, or the table lacks some."""
        if not self.rows:
            return
        grad_loss = grad_loss.expand(self.shape).reshape(-1).contiguous()
        with _on(output):
            if self.settings.reduction == "mean":
                self._count()
            if self.plan.tiles or self.joined > 1:
                self._rows(output, grad_loss, None)
            else:
                self._grad(stats, grad_loss, output)

    def copy_back(self, student: Tensor) -> None:
        if self.student is not student:
            student.copy_(self.student)

    # ---- the launches ----

    def _pointers(self, grad_loss: Tensor | None, losses: Tensor | None) -> tuple[Tensor | None, ...]:
        return (losses, *self.per_row, grad_loss, self.divisor)

    def _constants(self, plan: launch.Plan, output: Tensor | None) -> dict[str, Any]:
        aligned = _aligned(self.student, [self.student if output is None else output, *self.teachers], plan.vec)
        return {
            "members": self.joined, "LANES": plan.lanes, "VEC": plan.vec,
            "SPEC": self.spec._replace(aligned=aligned), "num_warps": plan.warps,
        }  # fmt: skip

    def _tensors(self) -> tuple[Any, Any]:
        return _matrix(self.student), tuple(map(_matrix, self.teachers))

    def _count(self) -> None:
        """The mean's denominator, where it depends on tensors."""
        if self.counted:
            labels, weight = self.per_row[:2]
            reductions.normalizer[(1,)](
                labels, weight, self.divisor, self.rows, self.settings.ignore_index,
                LANES=REDUCING_LANES, dtype=self.spec.dtype, num_warps=REDUCING_LANES // self.facts.warp,
            )  # fmt: skip

    def _rows(self, output: Tensor, grad_loss: Tensor | None, losses: Tensor | None) -> None:
        args = (
            *self._tensors(), _matrix(output), self._pointers(grad_loss, losses), self.numbers,
            self.rows, self.vocab, self.width, self.settings.ignore_index,
        )  # fmt: skip
        constants = self._constants(self.plan, output)
        if self.plan.tiles:
            row_kernels.loss_grad_short[(self.rows,)](*args, TILES=self.plan.tiles, **constants)
        else:
            grid = (launch.programs(self.rows, self.vocab, self.read, self.facts),)
            row_kernels.loss_grad_long[grid](*args, **constants)

    def _stats(self, table: Tensor, losses: Tensor | None) -> None:
        row_kernels.stats[(self._units(),)](
            *self._tensors(), table, self._pointers(None, losses), self.numbers,
            self.rows, self.vocab, self.settings.ignore_index, self.segments, self.segment,
            COLUMNS=self.columns, SPLIT=self.segments > 1, **self._constants(self.long, None),
        )  # fmt: skip

    def _grad(self, table: Tensor, grad_loss: Tensor | None, output: Tensor) -> None:
        row_kernels.grad[(self._units(),)](
            *self._tensors(), _matrix(output), table, self._pointers(grad_loss, None), self.numbers,
            self.rows, self.vocab, self.width, self.settings.ignore_index, self.segments,
            self.segment, COLUMNS=self.columns, **self._constants(self.long, output),
        )  # fmt: skip

    def _units(self) -> int:
        return min(self.rows * self.segments, 8 * self.facts.multiprocessors)

    def _split_statistics(self, table: Tensor, reduced: bool) -> Tensor:
        """The statistics of few and long rows, their losses, and, where `reduced`, the loss and its denominator."""
        parts = self.losses.new_empty(self.rows * self.segments, self.columns)
        self._stats(parts, None)
        loss = self.losses.new_empty(())
        new_divisor = self.divisor if self.counted else None
        reductions.join[(1,)](
            _matrix(self.student), parts, table, loss if reduced else None, new_divisor,
            self._pointers(None, self.losses), self.numbers, self.rows, self.vocab,
            self.settings.ignore_index, self.segments, members=self.joined, COLUMNS=self.columns,
            ROWS=triton.next_power_of_2(self.rows), SEGMENTS=launch.SEGMENTS, SPEC=self.spec,
            num_warps=256 // self.facts.warp,
        )  # fmt: skip
        return loss

    def _reduced(self) -> Tensor:
        loss = self.losses.new_empty(())
        reductions.reduce[(1,)](
            self.losses, self.divisor, self.numbers[4], loss, self.rows, LANES=REDUCING_LANES, dtype=self.spec.dtype,
            num_warps=REDUCING_LANES // self.facts.warp,
        )  # fmt: skip
        return loss


def reference_dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32
