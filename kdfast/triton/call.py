"""One loss on the Triton kernels: its arguments in the kernels' order, and which kernels it takes."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast import rows
from kdfast.arguments import Inputs, KDMetrics, Settings
from kdfast.row_math import Sums, table_columns
from kdfast.triton import launch, matrices, reductions, row_kernels, tiny_rows
from kdfast.triton.divergences import DIVERGENCES, running_sums
from kdfast.triton.matrices import bits, flatten_rows, matrix
from kdfast.triton.spec import Numbers, PerRow, Spec

MOST_TEACHERS = 8


class Call:
    def __init__(self, student: Tensor, inputs: Inputs, settings: Settings, shard: bool = False) -> None:
        if not shard:  # most of its labels belong to other shards
            rows.check_values(student, inputs, settings)
        self.student, self.settings = matrices.make_readable(student), settings
        self.shape, self.rows, self.width = student.shape[:-1], matrices.row_count(student), student.shape[-1]
        self.vocab = self.width if settings.vocab_size < 0 else settings.vocab_size
        self.teachers = [matrices.make_readable(t) for t in inputs.teachers]
        if len(self.teachers) > MOST_TEACHERS:
            raise ValueError(
                f"teacher: {len(self.teachers)} teachers, but the Triton kernels take at most {MOST_TEACHERS}"
            )
        self.losses = student.new_empty(self.rows, dtype=rows.loss_dtype(student))
        self.gpu = launch.gpu_properties(student.device)
        self.read = [self.student, *self.teachers]
        self.logits = matrix(self.student), tuple(map(matrix, self.teachers))
        self.spec = self._spec(inputs)
        self.columns = table_columns("kdfast_triton", student.device.type, len(self.teachers))
        self.budget = launch.register_budget(self.spec, self.read)
        self.plan = launch.plan(self.vocab, self.read, self.gpu.warp, self.budget)
        self.sweep = launch.sweep_plan(self.vocab, self.read, self.gpu.warp, self.budget)
        self.segments, self.segment = 1, self.vocab
        spec = self.spec
        if not (self.plan.tiles or spec.standardize or spec.metrics):
            tile = self.sweep.lanes * self.sweep.vec
            self.segments, self.segment = launch.split_row(self.rows, self.vocab, tile, self.gpu)

        labels = None if inputs.labels is None else inputs.labels.reshape(-1).contiguous()
        self.weights = rows.row_weights(inputs, settings)
        columns = (inputs.row_weight, inputs.temperatures, inputs.teacher_temperatures)
        weights, temperatures, teacher_temperatures = (None if c is None else flatten_rows(c) for c in columns)
        self.per_row = PerRow(None, labels, weights, temperatures, teacher_temperatures, None, None, None)
        number, self.divisor = rows.divisor(student, self.weights, inputs, settings)
        self.row_metrics = self.losses.new_empty(len(KDMetrics._fields), self.rows) if settings.metrics else None
        optional = {
            "beta": settings.beta, "label_smoothing": settings.label_smoothing, "z_loss": settings.z_loss,
            "softcap": settings.softcap, "teacher_softcap": settings.teacher_softcap if self.teachers else 0.0,
        }  # fmt: skip
        target, others = map(bits, settings.dkd_weights) if spec.dkd else (None, None)
        self.numbers = Numbers(
            bits(settings.temperature), bits(settings.teacher_temperature), bits(settings.alpha),
            bits(settings.hard_weight), bits(1 / number),
            **{name: bits(value) if value else None for name, value in optional.items()},
            dkd_target=target, dkd_others=others,
            teacher_weights=tuple(map(bits, settings.teacher_weights)) if self.teachers else (),
        )  # fmt: skip

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
            matrices.arithmetic_dtype(self.student), teacher, divergence, linear, settings.target, joint,
            hard=settings.hard_weight != 0 or settings.z_loss != 0 or (settings.metrics and inputs.labels is not None),
            power=power, t_squared=settings.t_squared,
            running=running_sums(divergence if linear else None, settings.metrics, joint and teacher != "none"),
            labelled=settings.hard_weight != 0, difference=difference,
            dkd=bool(self.teachers) and settings.divergence == "dkd",
            smoothed=settings.label_smoothing != 0, z_loss=settings.z_loss != 0, softcap=settings.softcap != 0,
            teacher_softcap=bool(self.teachers) and settings.teacher_softcap != 0,
            standardize=settings.standardize, metrics=settings.metrics,
            members=0 if teacher == "none" else 1 if joint else len(self.teachers),
        )  # fmt: skip

    # ---- the operators ----

    def loss_grad(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The reduced loss and the metrics; the loss's gradient goes to `output`."""
        with matrices.device_guard(output):
            if self.segments > 1:
                self._launch_grad(self._stats_of_segments(), None, output)
            elif self.rows and self._are_tiny():
                self._launch_tiny(output)
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
        return rows.mean_metrics(
            self.row_metrics.view(len(KDMetrics._fields), *self.shape), self.weights, self.settings
        )

    def sums(self) -> Tensor:
        """row_math.Sums of this shard's classes, (rows, 13)."""
        table = self.losses.new_empty(self.rows, len(Sums._fields))
        with matrices.device_guard(table):
            self._launch_rows(reductions.sums, table, segments=1, segment=self.vocab, SHARD=True)
        return table

    def pointwise_sums(self, sums: Tensor) -> Tensor:
        """phi and psi of this shard's classes, (rows, 2), from the sums of all classes."""
        table = self.losses.new_empty(self.rows, 2)
        with matrices.device_guard(table):
            self._launch_rows(
                reductions.pointwise_sums, table, sums.contiguous(), segments=1, segment=self.vocab, SEGMENTS=1
            )
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

    def _pointers(self, grad_loss: Tensor | None, losses: Tensor | None) -> PerRow:
        return self.per_row._replace(losses=losses, grad_loss=grad_loss, divisor=self.divisor, metrics=self.row_metrics)

    def _constants(self, plan: launch.Plan, output: Tensor | None) -> dict[str, Any]:
        places = matrices.alignments(
            self.student, [self.student if output is None else output, *self.teachers], plan.vec
        )
        spec = self.spec._replace(aligned=places, lanes=plan.lanes, vec=plan.vec, tiles=plan.tiles)
        return {"SPEC": spec, **plan.options(self.gpu)}

    def _launch_loss_grad(self, output: Tensor) -> None:
        def run(choice: tuple[launch.Plan, int], output: Tensor) -> None:
            plan, programs = choice
            args = (
                *self.logits, matrix(output), self._pointers(None, self.losses), self.numbers,
                self.rows, self.vocab, self.width, self.settings.ignore_index,
            )  # fmt: skip
            kernel = row_kernels.loss_grad_short if plan.tiles else row_kernels.loss_grad_long
            kernel[(programs,)](*args, **self._constants(plan, output))

        choice = launch.choose(
            (self.rows, self.vocab, self.spec, tuple(t.dtype for t in self.read), output.device),
            lambda: launch.candidates(self.rows, self.vocab, self.read, self.gpu, self.budget),
            lambda choice: run(choice, torch.empty_like(output)),  # the output may be the student
        )
        run(choice, output)

    def _are_tiny(self) -> bool:
        """Whether a program takes several rows."""
        spec, temperatures = self.spec, (self.per_row.temperatures, self.per_row.teacher_temperatures)
        plain = not (spec.dkd or spec.standardize or spec.metrics) and temperatures == (None, None)
        small = spec.dtype == tl.float32 and len(self.teachers) <= 2
        return plain and small and self.width <= launch.TINY_CLASSES

    def _launch_tiny(self, output: Tensor) -> None:
        plan, classes = launch.tiny_plan(self.width, self.gpu.warp)
        tiny_rows.loss_grad_tiny[(triton.cdiv(self.rows, plan.lanes),)](
            *self.logits, matrix(output), self._pointers(None, self.losses), self.numbers,
            self.rows, self.vocab, self.width, self.settings.ignore_index,
            CLASSES=classes, SPEC=self.spec._replace(lanes=plan.lanes), **plan.options(self.gpu),
        )  # fmt: skip

    def _launch_rows(
        self, kernel: Any, *tables: Any, losses: Tensor | None = None, plan: launch.Plan | None = None, **others: Any
    ) -> None:
        """A kernel that writes the first of the tables, a row of it for each row or segment."""
        programs = min(tables[0].shape[0], 8 * self.gpu.multiprocessors)
        if programs:
            kernel[(programs,)](
                *self.logits, *tables, self._pointers(None, losses), self.numbers,
                self.rows, self.vocab, self.settings.ignore_index,
                **others, COLUMNS=tables[-1].shape[1], **self._constants(plan or self.sweep, None),
                enable_fp_fusion=False,  # or a product enters a sum unrounded in its own thread, rounded in the others
            )  # fmt: skip

    def _launch_grad(self, table: Tensor, grad_loss: Tensor | None, output: Tensor) -> None:
        row_kernels.grad[(self.rows * self.segments,)](
            *self.logits, matrix(output), table, self._pointers(grad_loss, None), self.numbers,
            self.vocab, self.width, self.settings.ignore_index, self.segments, self.segment,
            COLUMNS=table.shape[1], **self._constants(self.sweep, output),
        )  # fmt: skip

    def _stats_of_segments(self) -> Tensor:
        """The rows' coefficients, from their segments; the losses are written too."""
        split: dict[str, Any] = {"segments": self.segments, "segment": self.segment}
        programs, members = self.rows * self.segments, self.spec.members
        parts = self.losses.new_empty(programs, len(Sums._fields) + 3 * max(0, members - 1))
        self._launch_rows(reductions.sums, parts, **split, SHARD=False)
        pointwise = None
        if not self.spec.linear:
            pointwise = self.losses.new_empty(programs, 2)
            self._launch_rows(reductions.pointwise_sums, pointwise, parts, **split, SEGMENTS=launch.SEGMENTS)
        table = self.losses.new_empty(self.rows, self.columns)
        self._launch_rows(
            reductions.merge_segments, table, pointwise, parts, losses=self.losses,
            plan=launch.merging_plan(self.sweep.vec, self.gpu.warp),
            segments=self.segments, SEGMENTS=launch.SEGMENTS, WIDTH=self.columns,
        )  # fmt: skip
        return table
