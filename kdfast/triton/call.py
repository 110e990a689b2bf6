"""One loss on the Triton kernels: its arguments in the kernels' order, and which kernels it takes."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from kdfast import reference
from kdfast.arguments import Inputs, KDMetrics, Settings
from kdfast.triton import autotune, launch, reductions, row_kernels
from kdfast.triton.divergences import DIVERGENCES, parts
from kdfast.triton.matrices import aligned, arithmetic, bits, by_row, launching_on, matrix, readable, rows_of
from kdfast.triton.spec import Spec

MOST_TEACHERS = 8


class Call:
    def __init__(self, student: Tensor, inputs: Inputs, settings: Settings) -> None:
        reference.check_values(student, inputs, settings)
        self.student, self.settings = readable(student), settings
        self.shape, self.rows, self.width = student.shape[:-1], rows_of(student), student.shape[-1]
        self.vocab = self.width if settings.vocab_size < 0 else settings.vocab_size
        self.teachers = [readable(t) for t in inputs.teachers]
        if len(self.teachers) > MOST_TEACHERS:
            raise ValueError(
                f"teacher: {len(self.teachers)} teachers, but the Triton kernels take at most {MOST_TEACHERS}"
            )
        self.losses = student.new_empty(self.rows, dtype=reference.loss_dtype(student))
        self.facts = launch.facts(student.device)
        self.read = [self.student, *self.teachers]
        self.spec = self._spec(inputs)
        joined = 1 if self.spec.joint and self.teachers else len(self.teachers)
        self.members = 0 if self.spec.teacher == "none" else joined
        self.columns = len(reference.STATS) + 3 * max(0, self.members - 1)
        self.room = launch.room_for(self.spec, self.read)
        self.plan = launch.plan(self.vocab, self.read, self.facts.warp, self.room)
        self.sweep = launch.sweep(self.vocab, self.read, self.facts.warp, self.room)
        self.segments, self.segment = (1, self.vocab)
        spec = self.spec
        if spec.linear and not (self.plan.tiles or spec.dkd or spec.standardize or spec.metrics or spec.smoothed):
            tile = self.sweep.lanes * self.sweep.vec
            self.segments, self.segment = launch.segments(self.rows, self.vocab, tile, self.facts)

        labels = None if inputs.labels is None else inputs.labels.reshape(-1).contiguous()
        columns = (inputs.weight, inputs.temperatures, inputs.teacher_temperatures)
        self.per_row = [labels, *(None if column is None else by_row(column) for column in columns)]
        scale, self.divisor, self.counted = self._divisor(inputs)
        self.measured = self.losses.new_empty(len(KDMetrics._fields), self.rows) if settings.metrics else None
        always = (
            settings.temperature, settings.teacher_temperature, settings.alpha, settings.hard_weight, scale,
        )  # fmt: skip
        optional = (
            (settings.beta, settings.beta), (spec.smoothed, settings.label_smoothing), (spec.z_loss, settings.z_loss),
            (spec.softcap, settings.softcap), (spec.teacher_softcap, settings.teacher_softcap),
            *((spec.dkd, weight) for weight in settings.dkd_weights),
        )  # fmt: skip
        wanted = [value if on else None for on, value in optional]  # what is None is no argument of a kernel
        numbers = (*always, *wanted, *(settings.teacher_weights if self.teachers else ()))
        self.numbers = tuple(None if n is None else bits(n) for n in numbers)

    def _spec(self, inputs: Inputs) -> Spec:
        settings = self.settings
        several = len(self.teachers) > 1
        difference = bool(self.teachers) and settings.divergence == "logit_mse"
        divergence, teacher = None, "none"
        if difference and settings.metrics:
            teacher = "softmaxed"
        elif self.teachers and not difference:
            if settings.divergence not in DIVERGENCES:  # one that a program has added to the reference alone
                raise ValueError(f"divergence: no Triton kernel for {settings.divergence!r}")
            divergence = DIVERGENCES[settings.divergence]
            mixed = several and settings.ensemble == "arithmetic"
            given = settings.target != "logits" and (mixed or not several)
            teacher = "given" if given else "softmaxed"
        joint = teacher != "softmaxed" or not several or settings.ensemble == "geometric"
        linear = divergence is None or (
            divergence.phi is None
            and (joint or not (divergence.log_p or settings.metrics))
            and not settings.standardize
        )
        t = settings.temperature
        power = int(t) if inputs.temperatures is None and t in (1, 2, 3, 4) and not settings.standardize else 0
        return Spec(
            arithmetic(self.student), teacher, divergence, linear, settings.target, joint,
            hard=settings.hard_weight != 0 or settings.z_loss != 0 or (settings.metrics and inputs.labels is not None),
            power=power, t_squared=settings.t_squared,
            parts=parts(divergence if linear else None, settings.metrics, joint and teacher != "none"),
            labelled=settings.hard_weight != 0, difference=difference,
            dkd=bool(self.teachers) and settings.divergence == "dkd",
            smoothed=settings.label_smoothing != 0, z_loss=settings.z_loss != 0, softcap=settings.softcap != 0,
            teacher_softcap=bool(self.teachers) and settings.teacher_softcap != 0,
            standardize=settings.standardize, metrics=settings.metrics,
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

    def loss_grad(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The reduced loss and the metrics; the loss's gradient goes to `output`."""
        if not self.rows:
            return self.losses.new_zeros(()), self._metrics()
        with launching_on(output):
            if self.segments > 1:
                table = self.losses.new_empty(self.rows, self.columns)
                loss = self._split_statistics(table, reduced=True)
                self._grad(table, None, output)
                return loss, self._metrics()
            self._count()
            self._rows(output, None, self.losses)
            return self._reduced(), self._metrics()

    def stats(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss under the reduction, the row statistics as far as the operator's table has room, the metrics."""
        table = self.losses.new_empty(self.rows, self.columns)
        scalar = self.settings.reduction != "none"
        if not self.rows:
            loss = self.losses.new_zeros(() if scalar else self.shape)
            return loss, table[:, : len(reference.STATS)], self._metrics()
        with launching_on(self.losses):
            if self.segments > 1:
                loss = self._split_statistics(table, scalar)
            else:
                self._stats(table, self.losses)
                if scalar:
                    self._count()
                    loss = self._reduced()
            metrics = self._metrics()
        table = table[:, : len(reference.STATS)].contiguous()
        return (loss if scalar else self.losses.view(self.shape)), table, metrics

    def grad(self, stats: Tensor, grad_loss: Tensor, output: Tensor) -> None:
        """The gradient from the statistics; from the logits alone where that reads no more, or the table lacks some."""
        if not self.rows:
            return
        grad_loss = grad_loss.expand(self.shape).reshape(-1).contiguous()
        with launching_on(output):
            if self.settings.reduction == "mean":
                self._count()
            if self.plan.tiles or self.members > 1 or self.spec.dkd or self.spec.standardize:
                self._rows(output, grad_loss, None)
            else:
                self._grad(stats, grad_loss, output)

    def _metrics(self) -> Tensor:
        """KDMetrics, of the rows or reduced over them; empty where they are not wanted."""
        if self.measured is None:
            return self.losses.new_empty(0)
        if self.settings.reduction == "none":
            return self.measured.view(self.measured.shape[0], *self.shape)
        metrics = self.losses.new_empty(len(KDMetrics._fields))
        if not self.rows:
            return metrics.fill_(math.nan)
        labels, weight = self.per_row[:2]
        reductions.average[(1,)](
            self.measured, labels, weight, metrics, self.rows, self.settings.ignore_index,
            LANES=128, COUNT=len(metrics), dtype=self.spec.dtype, num_warps=128 // self.facts.warp,
        )  # fmt: skip
        return metrics

    def copy_back(self, student: Tensor) -> None:
        if self.student is not student:
            student.copy_(self.student)

    # ---- the launches ----

    def _pointers(self, grad_loss: Tensor | None, losses: Tensor | None) -> tuple[Tensor | None, ...]:
        return (losses, *self.per_row, grad_loss, self.divisor, self.measured)

    def _constants(self, plan: launch.Plan, output: Tensor | None) -> dict[str, Any]:
        places = aligned(self.student, [self.student if output is None else output, *self.teachers], plan.vec)
        return {
            "members": self.members, "LANES": plan.lanes, "VEC": plan.vec,
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
            enable_fp_fusion=False,  # or a product enters a sum unrounded in its own thread, rounded in the others
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
            self.settings.ignore_index, self.segments, members=self.members, COLUMNS=self.columns,
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
