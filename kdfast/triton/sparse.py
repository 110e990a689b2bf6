"""One loss with a sparse teacher on the Triton kernels."""

import math
from typing import Any

import torch
from torch import Tensor

from kdfast import rows, sparse_rows
from kdfast.arguments import Inputs, Settings
from kdfast.row_math import Coefficients
from kdfast.rows import as_matrix
from kdfast.triton import launch, sparse_kernels
from kdfast.triton.call import Call
from kdfast.triton.divergences import DIVERGENCES
from kdfast.triton.matrices import device_guard, matrix
from kdfast.triton.prepared import make_spec, remember
from kdfast.triton.sparse_row_math import Entries, Form
from kdfast.triton.spec import Spec
from kdfast.triton.support import ABSENT

MANY_ENTRIES = 1023  # with which one program has all registers of a multiprocessor


def sort_classes(numbers: Tensor, counted: Tensor) -> Tensor:
    """Those of the class numbers, (rows, K), that count, in ascending order, (rows, K + 1) int32; then ABSENT."""
    absent = torch.full((), ABSENT.value, dtype=torch.int32, device=numbers.device)
    numbers = torch.where(counted, numbers.int(), absent)
    return torch.nn.functional.pad(numbers, (0, 1), value=ABSENT.value).sort(-1).values


class SparseCall(Call):
    """Call, whose launches and rows it has; its teachers are none."""

    def __init__(self, student: Tensor, inputs: Inputs, settings: Settings, reduced: bool = True) -> None:
        rows.check_values(student, inputs, settings)
        given = sparse_rows.is_given(settings)
        settings = settings._replace(target="log_probs" if given else "logits")
        super().__init__(student, inputs._replace(teachers=[], indices=None), settings, reduced=reduced)
        assert inputs.indices is not None
        log_probs, indices = as_matrix(inputs.teachers[0]).contiguous(), as_matrix(inputs.indices).contiguous()
        self.log_probs, self.indices, self.entries = log_probs, indices, indices.shape[-1]
        self.reads_rows = settings.missing != "conditional" or self.spec.hard
        kind = "sparse", self.spec, id(DIVERGENCES.get(settings.divergence)), student.dtype, self.rows, self.vocab
        self.dense, self.choice = remember(kind, lambda: (self._dense_spec(), self._plan()))
        self.columns = len(Coefficients._fields) + self.entries

    def _dense_spec(self) -> Spec:
        """Of the loss of K + 1 classes."""
        settings = self.settings._replace(hard_weight=0.0, z_loss=0.0, label_smoothing=0.0, softcap=0.0, missing="")
        return make_spec(self.student, [self.log_probs], False, self.spec.power, settings)._replace(lanes=1)

    def _plan(self) -> tuple[launch.Plan, int]:
        """Of the kernels that make loss and gradient at once: a row's entries take registers too."""
        budget = launch.register_budget(self.spec, self.prepared.read)
        smaller = {launch.FULL_BUDGET: launch.OPTIONS_BUDGET, launch.OPTIONS_BUDGET: launch.ARITHMETIC_BUDGET}
        budget = smaller.get(budget, budget)
        return next(launch.candidates(self.rows, self.vocab, self.prepared.read, self.gpu, budget))

    def loss_grad(self, output: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows:
            plan, programs = self.choice
            if not self.reads_rows:
                plan, programs = self.sweep, launch.program_count(self.rows, self.gpu)
            kernel = sparse_kernels.sparse_loss_grad_short if plan.tiles else sparse_kernels.sparse_loss_grad_long
            args = (
                matrix(output), self._entries(self.reads_rows), self.per_row, self.numbers,
                self.rows, self.vocab, self.width, self.settings.ignore_index,
            )  # fmt: skip
            self._launch_sparse(kernel, programs, args, plan, output)
        return self.losses.sum(), rows.no_metrics(self.losses)

    def stats(self) -> tuple[Tensor, Tensor, Tensor]:
        table = self.losses.new_empty(self.rows, self.columns)
        programs = min(self.rows, 8 * self.gpu.multiprocessors)
        if programs:
            args = (
                table, self._entries(self.reads_rows), self.per_row, self.numbers,
                self.rows, self.vocab, self.settings.ignore_index,
            )  # fmt: skip
            self._launch_sparse(sparse_kernels.sparse_stats, programs, args, self.sweep, None, table)
        losses = rows.reduce_losses(self.losses.view(self.shape), self.settings)
        return losses, table, rows.no_metrics(self.losses)

    def _launch_grad(self, table: Tensor, grad_loss: Tensor | None, output: Tensor) -> None:
        per_row = self.per_row._replace(losses=None, grad_loss=grad_loss)
        args = (
            matrix(output), table, self._entries(False), per_row, self.numbers,
            self.vocab, self.width, self.settings.ignore_index,
        )  # fmt: skip
        self._launch_sparse(sparse_kernels.sparse_grad, self.rows, args, self.sweep, output, table, grad_loss)

    def _entries(self, ordered: bool) -> Entries:
        """ordered: for the sums of the rest."""
        in_order = None
        if ordered:
            counted = (self.log_probs != -math.inf) & (self.indices >= 0) & (self.indices < self.vocab)
            in_order = sort_classes(self.indices, counted)
        return Entries(self.log_probs, self.indices, in_order)

    def _launch_sparse(
        self, kernel: Any, programs: int, args: tuple[Any, ...], plan: launch.Plan, output: Tensor | None,
        *given: Tensor | None,
    ) -> None:  # fmt: skip
        if self.entries > MANY_ENTRIES:
            plan = plan._replace(registers=min(255, 65536 // plan.lanes))
        form = Form(self.settings.missing, self.entries, self.dense, self.reads_rows)
        with device_guard(self.losses):
            self._launch(
                kernel, programs, (self.logits[0], *args), plan, output, (self.log_probs, self.indices, *given),
                {"FORM": form},
            )  # fmt: skip
