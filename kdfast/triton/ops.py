"""The operators on the Triton kernels; reference.py says what each computes."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast import row_math
from kdfast.arguments import Inputs, Settings
from kdfast.triton import (
    launch,
    matrices,
    reductions,
    row_kernels,
    softmax_kernels,
    sparse_kernels,
    tiny_rows,
    token_kernels,
    tokens,
)
from kdfast.triton.call import Call
from kdfast.triton.limits import take_any_number_of_entries, take_any_number_of_teachers
from kdfast.triton.matrices import arithmetic_dtype, make_readable, matrix
from kdfast.triton.prepared import Kernels, matrix_kind, pointer_kind, remember
from kdfast.triton.sparse import SparseCall
from kdfast.triton.spec import Spec

# A kernel's key in Triton's cache on disk depends on which functions had theirs before: DependenciesFinder._update_hash
# takes over a callee's global values first, and only then asks for the callee's key, which is what finds them. So all
# are asked for here, in one order, before any launch; else a process would compile again what is in the cache.
for _module in (row_kernels, reductions, softmax_kernels, tiny_rows, sparse_kernels, token_kernels):
    for _function in vars(_module).values():
        if isinstance(_function, triton.JITFunction):  # the interpreter's functions have no keys
            hash(_function)  # asks for the key


def _call(student: Tensor, inputs: Inputs, settings: Settings, reduced: bool = True) -> Call:
    return (SparseCall if settings.missing else Call)(student, inputs, settings, reduced=reduced)


def loss_grad(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    return loss_grad_as(student, student.dtype, inputs, settings)


@take_any_number_of_teachers
@take_any_number_of_entries
def loss_grad_as(
    student: Tensor, dtype: torch.dtype, inputs: Inputs, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty(student.shape, dtype=dtype, device=student.device)
    loss, metrics = _call(student, inputs, settings).loss_grad(grad)
    return loss, grad, metrics


@take_any_number_of_teachers
@take_any_number_of_entries
def loss_grad_(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    call = _call(student, inputs, settings)
    results = call.loss_grad(call.student)
    call.copy_back(student)
    return results


@take_any_number_of_teachers
@take_any_number_of_entries
def stats(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    return _call(student, inputs, settings).stats()


def grad(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    return grad_as(student, student.dtype, stats, grad_loss, inputs, settings)


@take_any_number_of_teachers
@take_any_number_of_entries
def grad_as(
    student: Tensor, dtype: torch.dtype, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings
) -> Tensor:
    grad = student.new_empty(student.shape, dtype=dtype)
    _call(student, inputs, settings, reduced=False).grad(stats, grad_loss, grad)
    return grad


@take_any_number_of_teachers
@take_any_number_of_entries
def grad_(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> None:
    call = _call(student, inputs, settings, reduced=False)
    call.grad(stats, grad_loss, call.student)
    call.copy_back(student)


def _shard(student: Tensor, inputs: Inputs, settings: Settings) -> Call:
    """Without what shards do not have."""
    return Call(student, inputs, settings._replace(reduction="sum", metrics=False, standardize=False), shard=True)


@take_any_number_of_teachers
def sums(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """row_math.Sums of whatever classes are given, (rows, 12); a label that is not among them adds nothing."""
    return _shard(student, inputs, settings).sums()


@take_any_number_of_teachers
def pointwise_sums(student: Tensor, sums: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Sums of all shards, of which the last three, phi's and psi's, are of this shard's classes."""
    call = _shard(student, inputs, settings)
    return sums.clone() if call.spec.linear else torch.cat([sums[:, :-3], call.pointwise_sums(sums)], 1)


def losses_and_coefficients(student: Tensor, sums: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    if len(inputs.teachers) > 1 or settings.divergence in ("dkd", "logit_mse"):  # theirs are not Sums
        return row_math.losses_and_coefficients(sums, inputs, settings)
    return _shard(student, inputs, settings).losses_and_coefficients(sums)


token_stats, token_grad, token_grad_as = tokens.token_stats, tokens.token_grad, tokens.token_grad_as


def _prepare_scale(view: Tensor) -> tuple[Kernels, launch.Gpu, launch.Plan]:
    gpu = launch.gpu_properties(view.device)
    return Kernels(), gpu, launch.plan(view.shape[-1], [view], gpu.warp, launch.FULL_BUDGET)


def scale_(grad: Tensor, factor: Tensor) -> None:
    view = make_readable(grad)
    rows, width = matrices.row_count(view), view.shape[-1]
    if rows:
        kind = ("scale", view.device, matrix_kind(view), pointer_kind(factor))
        kernels, gpu, plan = remember(kind, lambda: _prepare_scale(view))
        with matrices.device_guard(grad):
            kernels.launch(
                reductions.scale, min(rows, 4 * gpu.multiprocessors), (matrix(view), factor, rows, width), None,
                lambda: {"SPEC": Spec(arithmetic_dtype(grad), lanes=plan.lanes, vec=plan.vec)},
                lambda: plan.options(gpu),
            )  # fmt: skip
    if view is not grad:
        grad.copy_(view)


def tempered_softmax(
    logits: Tensor, temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype
) -> Tensor:
    return _softmax([make_readable(logits)], temperatures, temperature, log, dtype, arithmetic_dtype(logits))


def tempered_softmax_backward(
    grad: Tensor, output: Tensor, temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype
) -> Tensor:
    wide = tl.float64 if torch.float64 in (output.dtype, dtype) else tl.float32
    return _softmax([make_readable(output), make_readable(grad)], temperatures, temperature, log, dtype, wide)


def _softmax(
    inputs: list[Tensor], temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype, wide: Any
) -> Tensor:
    output = inputs[0].new_empty(inputs[0].shape, dtype=dtype)
    rows, vocab = matrices.row_count(output), output.shape[-1]
    if not rows:
        return output
    gpu = launch.gpu_properties(output.device)
    plan = launch.plan(vocab, inputs, gpu.warp, launch.ARITHMETIC_BUDGET)
    per_row = None if temperatures is None else matrices.flatten_rows(temperatures)
    places = matrices.alignments(inputs[0], [output, *inputs[1:]], plan.vec)
    spec = Spec(wide, aligned=places, lanes=plan.lanes, vec=plan.vec, tiles=plan.tiles)
    args = (tuple(map(matrix, inputs)), matrix(output), per_row, matrices.bits(temperature), rows, vocab)
    with matrices.device_guard(output):
        kernel, programs = softmax_kernels.softmax_short, rows
        if not plan.tiles:
            kernel, programs = softmax_kernels.softmax_long, launch.program_count(rows, gpu)
        kernel[(programs,)](*args, LOG=log, SPEC=spec, **plan.options(gpu))
    return output
