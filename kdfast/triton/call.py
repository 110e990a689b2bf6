"""One loss on the Triton kernels: its arguments in the kernels' order, and which kernels it takes."""

from typing import Any

import torch
import triton
from torch import Tensor

from kdfast import rows
from kdfast.arguments import METRICS, Inputs, Settings
from kdfast.row_math import Sums
from kdfast.triton import autotune, launch, matrices, reductions, row_kernels, tiny_rows
from kdfast.triton.matrices import bits, flatten_rows, matrix
from kdfast.triton.prepared import pointer_kind, prepare
from kdfast.triton.spec import Numbers, PerRow


class Call:
    def __init__(
        self, student: Tensor, inputs: Inputs, settings: Settings, shard: bool = False, reduced: bool = True
    ) -> None:
        """shard: of a row's classes; reduced: the losses are reduced as settings say, which in backward is done."""
        if not shard:  # most of its labels belong to other shards
            rows.check_values(student, inputs, settings)
        self.settings, self.shape, self.width = settings, student.shape[:-1], student.shape[-1]
        self.student = matrices.make_readable(student)
        self.teachers = [matrices.make_readable(t) for t in inputs.teachers]
        labels, weights, normalizer, *temperatures = inputs[1:6]
        by_row = [None if each is None else flatten_rows(each) for each in (labels, weights, *temperatures)]
        summed = reduced and rows.sums_weights(inputs, settings)
        prepared = prepare(self.student, self.teachers, by_row, normalizer, settings, summed)
        self.prepared, self.spec, self.gpu, self.sweep = prepared, prepared.spec, prepared.gpu, prepared.sweep
        self.rows, self.vocab, self.columns = prepared.rows, prepared.vocab, prepared.columns
        self.segments, self.segment = prepared.segments, prepared.segment
        self.logits = matrix(self.student), tuple([matrix(each) for each in self.teachers])
        self.losses = torch.empty(self.rows, dtype=rows.loss_dtype(student), device=student.device)
        self.weights, number, divisor = None, 1.0, None
        if reduced and not self.spec.counted:
            if summed or settings.metrics:
                self.weights = rows.row_weights(inputs, settings)
            number, divisor = rows.divisor(student, self.weights, inputs, settings)
        self.row_metrics = self.losses.new_empty(METRICS, self.rows) if settings.metrics else None
        self.per_row = PerRow(
            self.losses, by_row[0], by_row[1], by_row[2], by_row[3], None, divisor, self.row_metrics
        )  # fmt: skip
        self.numbers = numbers_of(settings, self.spec.dkd, bool(self.teachers), number)

    # ---- the operators ----

    def loss_grad(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The reduced loss and the metrics; the loss's gradient goes to `output`."""
        with matrices.device_guard(output):
            if self.segments > 1:
                self._launch_grad(self._stats_of_segments(), None, output)
            elif self.rows and self.prepared.tiny is not None:
                self._launch_tiny(*self.prepared.tiny, output)
            elif self.rows:
                self._launch_loss_grad(output)
        return self.losses.sum(), self._metrics()

    def stats(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss under the reduction, the rows' coefficients, the metrics."""
        with matrices.device_guard(self.losses):
            if self.segments > 1:
                table = self._stats_of_segments()
            else:
                table = self.losses.new_empty(self.rows, self.columns)
                self._launch_rows(row_kernels.stats, table, losses=self.losses)
        return rows.reduce_losses(self.losses.view(self.shape), self.settings), table, self._metrics()

    def grad(self, stats: Tensor, grad_loss: Tensor, output: Tensor) -> None:
        """The gradient, from the rows' coefficients."""
        if not self.rows:
            return
        grad_loss = grad_loss.expand(self.shape).reshape(-1).contiguous()
        with matrices.device_guard(output):
            self._launch_grad(stats.contiguous(), grad_loss, output)

    def _metrics(self) -> Tensor:
        """KDMetrics, of the rows or their means; empty where they are not wanted."""
        if self.row_metrics is None:
            return rows.no_metrics(self.losses)
        return rows.mean_metrics(self.row_metrics.view(METRICS, *self.shape), self.weights, self.settings)

    def sums(self) -> Tensor:
        """row_math.Sums of this shard's classes, (rows, 12)."""
        table = self.losses.new_empty(self.rows, len(Sums._fields))
        with matrices.device_guard(table):
            self._launch_rows(reductions.sums, table, numbers=(1, self.vocab), SHARD=True)
        return table

    def pointwise_sums(self, sums: Tensor) -> Tensor:
        """The last three of row_math.Sums, of this shard's classes, (rows, 3), from the others of all classes."""
        table = self.losses.new_empty(self.rows, 3)
        with matrices.device_guard(table):
            self._launch_rows(reductions.pointwise_sums, table, sums.contiguous(), numbers=(1, self.vocab), SEGMENTS=1)
        return table

    def losses_and_coefficients(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the rows, from the sums of all classes."""
        table = self.losses.new_empty(self.rows, self.columns)
        with matrices.device_guard(table):
            self._launch_rows(reductions.losses_and_coefficients, table, sums.contiguous(), losses=self.losses)
        return self.losses, table

    def copy_back(self, student: Tensor) -> None:
        if self.student is not student:
            student.copy_(self.student)

    # ---- the launches ----

    def _launch(
        self, kernel: Any, programs: int, args: tuple[Any, ...], plan: launch.Plan, output: Tensor | None,
        given: tuple[Tensor | None, ...] = (), constants: dict[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        """given: tensors among args that are neither the call's nor allocated here, where all are aligned."""

        def make_constants() -> dict[str, Any]:
            others = [self.student if output is None else output, *self.teachers]
            places = matrices.alignments(self.student, others, plan.vec)
            spec = self.spec._replace(aligned=places, lanes=plan.lanes, vec=plan.vec, tiles=plan.tiles)
            return {**(constants or {}), "SPEC": spec}

        kind = (
            plan, None if output is None else (output.dtype, output.stride()), output is self.student,
            *map(pointer_kind, given), *(constants or {}).values(), *options.values(),
        )  # fmt: skip
        self.prepared.launch(
            kernel, programs, args, kind, make_constants, lambda: {**plan.options(self.gpu), **options}
        )

    def _launch_loss_grad(self, output: Tensor) -> None:
        def run(choice: tuple[launch.Plan, int], output: Tensor) -> None:
            plan, programs = choice
            kernel = row_kernels.loss_grad_short if plan.tiles else row_kernels.loss_grad_long
            self._launch(kernel, programs, self._loss_grad_args(output), plan, output)

        choice = self.prepared.choice
        if autotune.is_wanted:
            kind = (self.vocab, self.spec, [each.dtype for each in self.prepared.read])
            choice = autotune.choose(kind, self.rows, self.prepared.choices, output, run)
        run(choice, output)

    def _launch_tiny(self, plan: launch.Plan, classes: int, output: Tensor) -> None:
        programs = triton.cdiv(self.rows, plan.lanes)
        args = self._loss_grad_args(output)
        self._launch(tiny_rows.loss_grad_tiny, programs, args, plan, output, constants={"CLASSES": classes})

    def _loss_grad_args(self, output: Tensor) -> tuple[Any, ...]:
        return (
            *self.logits, matrix(output), self.per_row, self.numbers,
            self.rows, self.vocab, self.width, self.settings.ignore_index,
        )  # fmt: skip

    def _launch_rows(
        self, kernel: Any, *tables: Any, losses: Tensor | None = None, plan: launch.Plan | None = None,
        numbers: tuple[int, ...] = (), **constants: Any,
    ) -> None:  # fmt: skip
        """A kernel that writes the first of the tables, a row of it for each row or segment; losses: too.

        numbers: its last arguments.
        """
        programs = min(tables[0].shape[0], 8 * self.gpu.multiprocessors)
        if programs:
            per_row = self.per_row if losses is not None else self.per_row._replace(losses=None)
            args = (
                *self.logits, *tables, per_row, self.numbers, self.rows, self.vocab, self.settings.ignore_index,
                *numbers,
            )  # fmt: skip
            self._launch(
                kernel, programs, args, plan or self.sweep, None, (*tables, losses),
                {**constants, "COLUMNS": tables[-1].shape[1]},
                enable_fp_fusion=False,  # or a product enters a sum unrounded in its own thread, rounded in the others
            )  # fmt: skip

    def _launch_grad(self, table: Tensor, grad_loss: Tensor | None, output: Tensor) -> None:
        per_row = self.per_row._replace(losses=None, grad_loss=grad_loss)
        args = (
            *self.logits, matrix(output), table, per_row, self.numbers,
            self.vocab, self.width, self.settings.ignore_index, self.segments, self.segment,
        )  # fmt: skip
        self._launch(
            row_kernels.grad, self.rows * self.segments, args, self.sweep, output, (table, grad_loss),
            {"COLUMNS": table.shape[1]},
        )  # fmt: skip

    def _stats_of_segments(self) -> Tensor:
        """The rows' coefficients, from their segments; the losses are written too."""
        programs, members = self.rows * self.segments, self.spec.members
        split = self.segments, self.segment
        parts = self.losses.new_empty(programs, len(Sums._fields) + 3 * max(0, members - 1))
        self._launch_rows(reductions.sums, parts, numbers=split, SHARD=False)
        pointwise = None
        if not self.spec.linear:
            pointwise = self.losses.new_empty(programs, 3)
            self._launch_rows(reductions.pointwise_sums, pointwise, parts, numbers=split, SEGMENTS=launch.SEGMENTS)
        table = self.losses.new_empty(self.rows, self.columns)
        self._launch_rows(
            reductions.merge_segments, table, pointwise, parts, losses=self.losses,
            plan=launch.merging_plan(self.sweep.vec, self.gpu.warp), numbers=(self.segments,),
            SEGMENTS=launch.SEGMENTS, WIDTH=self.columns,
        )  # fmt: skip
        return table


def optional_bits(number: float, unused: float = 0) -> int | None:
    """None in place of a number that changes nothing."""
    return None if number == unused else bits(number)


def numbers_of(settings: Settings, dkd: bool, taught: bool, divisor: float) -> Numbers:
    target, others = map(bits, settings.dkd_weights) if dkd else (None, None)
    return Numbers(
        bits(settings.temperature), bits(settings.teacher_temperature), bits(settings.alpha),
        bits(settings.hard_weight), bits(1 / divisor), optional_bits(settings.beta),
        optional_bits(1 - settings.beta, 1), optional_bits(settings.label_smoothing), optional_bits(settings.z_loss),
        optional_bits(settings.logit_scale, 1), optional_bits(settings.teacher_logit_scale, 1),
        optional_bits(settings.softcap), optional_bits(settings.teacher_softcap) if taught else None,
        target, others, tuple(map(bits, settings.teacher_weights)) if taught else (),
    )  # fmt: skip
