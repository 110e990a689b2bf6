"""The operators on the Triton kernels; what each computes stands beside its reference, in reference.py."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.arguments import Inputs, Settings
from kdfast.triton import launch, reductions, row_kernels, softmax_kernels
from kdfast.triton.call import Call
from kdfast.triton.matrices import aligned, arithmetic, bits, by_row, launching_on, matrix, readable, rows_of
from kdfast.triton.spec import Spec

# A kernel's key in Triton's cache on disk depends on which functions had theirs before: DependenciesFinder._update_hash
# takes over a callee's global values first, and only then asks for the callee's key, which is what finds them. So all
# are asked for here, in one order, before any launch; else a process would compile again what is in the cache.
for _module in (row_kernels, reductions, softmax_kernels):
    for _function in vars(_module).values():
        if isinstance(_function, triton.JITFunction):  # the interpreter's functions have no keys
            hash(_function)  # asks for the key


def loss_grad(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    grad = student.new_empty(student.shape)
    loss, metrics = Call(student, inputs, settings).loss_grad(grad)
    return loss, grad, metrics


def loss_grad_(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    call = Call(student, inputs, settings)
    results = call.loss_grad(call.student)
    call.copy_back(student)
    return results


def stats(student: Tensor, inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    return Call(student, inputs, settings).stats()


def grad(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    grad = student.new_empty(student.shape)
    Call(student, inputs, settings).grad(stats, grad_loss, grad)
    return grad


def grad_(student: Tensor, stats: Tensor, grad_loss: Tensor, inputs: Inputs, settings: Settings) -> None:
    call = Call(student, inputs, settings)
    call.grad(stats, grad_loss, call.student)
    call.copy_back(student)


def _shard(student: Tensor, inputs: Inputs, settings: Settings) -> Call:
    """Without what is not summed by shards."""
    return Call(student, inputs, settings._replace(reduction="sum", metrics=False, standardize=False), shard=True)


def sums(student: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """row_math.Sums of whatever classes are given, (rows, 13); a label that is not among them adds nothing."""
    return _shard(student, inputs, settings).sums()


def pointwise_sums(student: Tensor, sums: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """Sums of all shards with phi and psi of the classes that are here."""
    call = _shard(student, inputs, settings)
    return sums.clone() if call.spec.linear else torch.cat([sums[:, :-2], call.pointwise_sums(sums)], 1)


def scale_(grad: Tensor, factor: Tensor) -> None:
    view = readable(grad)
    rows, width = rows_of(view), view.shape[-1]
    if rows:
        facts = launch.facts(grad.device)
        plan = launch.plan(width, [view], facts.warp, launch.MOST_ROOM)
        grid = (min(rows, 4 * facts.multiprocessors),)
        with launching_on(grad):
            reductions.scale[grid](
                matrix(view), factor, rows, width, SPEC=Spec(arithmetic(grad), lanes=plan.lanes, vec=plan.vec),
                **plan.options(),
            )  # fmt: skip
    if view is not grad:
        grad.copy_(view)


def tempered_softmax(
    logits: Tensor, temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype
) -> Tensor:
    return _softmax([readable(logits)], temperatures, temperature, log, dtype, arithmetic(logits))


def tempered_softmax_backward(
    grad: Tensor, output: Tensor, temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype
) -> Tensor:
    wide = tl.float64 if torch.float64 in (output.dtype, dtype) else tl.float32
    return _softmax([readable(output), readable(grad)], temperatures, temperature, log, dtype, wide)


def _softmax(
    inputs: list[Tensor], temperatures: Tensor | None, temperature: float, log: bool, dtype: torch.dtype, wide: Any
) -> Tensor:
    output = inputs[0].new_empty(inputs[0].shape, dtype=dtype)
    rows, vocab = rows_of(output), output.shape[-1]
    if not rows:
        return output
    facts = launch.facts(output.device)
    plan = launch.plan(vocab, inputs, facts.warp, launch.ROOM_BESIDE_ARITHMETIC)
    per_row = None if temperatures is None else by_row(temperatures)
    places = aligned(inputs[0], [output, *inputs[1:]], plan.vec)
    spec = Spec(wide, aligned=places, lanes=plan.lanes, vec=plan.vec, tiles=plan.tiles)
    args = (tuple(map(matrix, inputs)), matrix(output), per_row, bits(temperature), rows, vocab)
    with launching_on(output):
        kernel, programs = softmax_kernels.softmax_short, rows
        if not plan.tiles:
            kernel, programs = softmax_kernels.softmax_long, launch.programs(rows, vocab, inputs, facts)
        kernel[(programs,)](*args, LOG=log, SPEC=spec, **plan.options())
    return output
