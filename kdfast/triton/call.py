"""One loss on the Triton kernels: its arguments in the kernels' order, and which kernels it takes."""

from typing import Any

import torch
import triton
from torch import Tensor

from kdfast import reference
from kdfast.arguments import Inputs, Settings
from kdfast.triton import autotune, launch, reductions, row_kernels
from kdfast.triton.divergences import DIVERGENCES
from kdfast.triton.matrices import aligned, arithmetic, bits, by_row, launching_on, matrix, readable, rows_of
from kdfast.triton.spec import Spec

MOST_TEACHERS = 8


class Call:
    def __init__(self, student: Tensor, inputs: Inputs, settings: Settings) -> None:
        reference.check_values(student, inputs, settings)
        self.student, self.settings = readable(student), settings
        self.shape, self.rows, self.width = student.shape[:-1], rows_of(student), student.shape[-1]
        self.vocab = self.width if settings.vocab_size < 0 else settings.vocab_size
        self.teachers = [readable(t) for t in inputs.teachers] if settings.alpha else []
        if len(self.teachers) > MOST_TEACHERS:
            raise ValueError(
                f"teacher: {len(self.teachers)} teachers, but the Triton kernels take at most {MOST_TEACHERS}"
            )
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        self.losses = student.new_empty(self.rows, dtype=dtype)
        self.facts = launch.facts(student.device)
        self.read = [self.student, *self.teachers]
        self.spec = self._spec(inputs)
        self.joined = 1 if self.spec.joint and self.teachers else len(self.teachers)
        self.columns = len(reference.STATS) + 3 * max(0, self.joined - 1)
        self.room = launch.room_for(self.spec, self.read)
        self.plan = launch.plan(self.vocab, self.read, self.facts.warp, self.room)
        self.sweep = launch.sweep(self.vocab, self.read, self.facts.warp)
        self.segments, self.segment = (1, self.vocab)
        if self.spec.linear and not self.plan.tiles:
            tile = self.sweep.lanes * self.sweep.vec
            self.segments, self.segment = launch.segments(self.rows, self.vocab, tile, self.facts)

        labels = None if inputs.labels is None else inputs.labels.reshape(-1).contiguous()
        columns = (inputs.weight, inputs.temperatures, inputs.teacher_temperatures)
        weight, temperatures, at = (None if c is None else by_row(c) for c in columns)
        if self.spec.teacher in ("none", "difference"):
            temperatures = None
        self.per_row = [labels, weight, temperatures, at]
        scale, self.divisor, self.counted = self._divisor(inputs)
        temperature = 1.0 if self.spec.divergence is None else settings.temperature
        numbers = (
            temperature,
            settings.teacher_temperature,
            settings.alpha,
            settings.hard_weight,
            scale,
            settings.beta,
        )
        self.numbers = tuple(map(bits, (*numbers, *(settings.teacher_weights if self.teachers else ()))))

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
        linear = divergence is None or (divergence.phi is None and (joint or not divergence.log_p))
        t = settings.temperature
        whole = inputs.temperatures is None and t in (1, 2, 3, 4)
        power = 1 if divergence is None else int(t) if whole else 0
        return Spec(
            arithmetic(self.student), teacher, divergence, linear, settings.target, joint,
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
        with launching_on(output):
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
        with launching_on(self.losses):
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
        with launching_on(output):
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
        places = aligned(self.student, [self.student if output is None else output, *self.teachers], plan.vec)
        return {
            "members": self.joined, "LANES": plan.lanes, "VEC": plan.vec,
            "SPEC": self.spec._replace(aligned=places), **plan.options(),
        }  # fmt: skip

    def _tensors(self) -> tuple[Any, Any]:
        return matrix(self.student), tuple(map(matrix, self.teachers))

    def _reducing(self) -> dict[str, int]:
        lanes = launch.reducing_lanes(self.rows, self.facts.warp)
        return {"LANES": lanes, "num_warps": lanes // self.facts.warp}

    def _count(self) -> None:
        """The mean's denominator, where it depends on tensors."""
        if self.counted:
            labels, weight = self.per_row[:2]
            reductions.normalizer[(1,)](
                labels, weight, self.divisor, self.rows, self.settings.ignore_index,
                dtype=self.spec.dtype, **self._reducing(),
            )  # fmt: skip

    def _rows(self, output: Tensor, grad_loss: Tensor | None, losses: Tensor | None) -> None:
        def run(choice: tuple[launch.Plan, int], output: Tensor) -> None:
            plan, programs = choice
            args = (
                *self._tensors(), matrix(output), self._pointers(grad_loss, losses), self.numbers,
                self.rows, self.vocab, self.width, self.settings.ignore_index,
            )  # fmt: skip
            constants = self._constants(plan, output)
            if plan.tiles:
                row_kernels.loss_grad_short[(programs,)](*args, TILES=plan.tiles, **constants)
            else:
                row_kernels.loss_grad_long[(programs,)](*args, **constants)

        choice = autotune.chosen(
            (self.rows, self.vocab, self.spec, tuple(t.dtype for t in self.read), output.device),
            lambda: launch.choices(self.rows, self.vocab, self.read, self.facts, self.room),
            lambda choice: run(choice, torch.empty_like(output)),  # the output may be the student
        )
        run(choice, output)

    def _stats(self, table: Tensor, losses: Tensor | None) -> None:
        programs = min(self.rows * self.segments, 8 * self.facts.multiprocessors)
        row_kernels.stats[(programs,)](
            *self._tensors(), table, self._pointers(None, losses), self.numbers,
            self.rows, self.vocab, self.settings.ignore_index, self.segments, self.segment,
            COLUMNS=self.columns, SPLIT=self.segments > 1, **self._constants(self.sweep, None),
        )  # fmt: skip

    def _grad(self, table: Tensor, grad_loss: Tensor | None, output: Tensor) -> None:
        row_kernels.grad[(self.rows * self.segments,)](
            *self._tensors(), matrix(output), table, self._pointers(grad_loss, None), self.numbers,
            self.vocab, self.width, self.settings.ignore_index, self.segments, self.segment,
            COLUMNS=self.columns, **self._constants(self.sweep, output),
        )  # fmt: skip

    def _split_statistics(self, table: Tensor, reduced: bool) -> Tensor:
        """The statistics of few and long rows, their losses, and, where `reduced`, the loss and its denominator."""
        parts = self.losses.new_empty(self.rows * self.segments, self.columns)
        self._stats(parts, None)
        loss = self.losses.new_empty(())
        new_divisor = self.divisor if self.counted else None
        reductions.join[(1,)](
            matrix(self.student), parts, table, loss if reduced else None, new_divisor,
            self._pointers(None, self.losses), self.numbers, self.rows, self.vocab,
            self.settings.ignore_index, self.segments, members=self.joined, COLUMNS=self.columns,
            WIDTH=triton.next_power_of_2(self.columns), ROWS=triton.next_power_of_2(self.rows),
            SEGMENTS=triton.next_power_of_2(self.segments), SPEC=self.spec,
            num_warps=128 // self.facts.warp,
        )  # fmt: skip
        return loss

    def _reduced(self) -> Tensor:
        loss = self.losses.new_empty(())
        reductions.reduce[(1,)](
            self.losses, self.divisor, self.numbers[4], loss, self.rows, dtype=self.spec.dtype, **self._reducing(),
        )  # fmt: skip
        return loss
