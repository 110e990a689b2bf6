"""Token statistics on the Triton kernels."""

from typing import Any

import torch
from torch import Tensor

from kdfast import reference_tokens
from kdfast.arguments import TOKEN_STATS
from kdfast.rows import as_matrix, loss_dtype
from kdfast.triton import launch, matrices, token_kernels
from kdfast.triton.call import optional_bits
from kdfast.triton.divergences import running_sums
from kdfast.triton.limits import MOST_ENTRIES
from kdfast.triton.matrices import bits, device_guard, matrix
from kdfast.triton.prepared import Kernels, matrix_kind, pointer_kind, remember
from kdfast.triton.sparse import sort_classes
from kdfast.triton.spec import Numbers, PerRow, Spec


class _Prepared(Kernels):
    """What is remembered of calls of a kind."""

    def __init__(self, logits: Tensor, vocab: int, entropy: bool, softcap: bool) -> None:
        super().__init__()
        spec = Spec(matrices.arithmetic_dtype(logits), softcap=softcap, running=running_sums(None, entropy, False))
        self.gpu = launch.gpu_properties(logits.device)
        budget = launch.register_budget(spec, [logits])
        self.plan = launch.sweep_plan(vocab, [logits], self.gpu.warp, budget)
        self.spec = spec._replace(lanes=self.plan.lanes, vec=self.plan.vec, tiles=self.plan.tiles)


class _Call:
    def __init__(
        self, logits: Tensor, ids: Tensor, temperatures: Tensor | None, temperature: float, logit_scale: float,
        cap: float, vocab_size: int, entropy: bool,
    ) -> None:  # fmt: skip
        self.logits, self.width = matrices.make_readable(logits.detach()), logits.shape[-1]
        self.ids, self.rows, self.entries = as_matrix(ids).contiguous(), matrices.row_count(logits), ids.shape[-1]
        self.vocab = self.width if vocab_size < 0 else vocab_size
        by_row = None if temperatures is None else matrices.flatten_rows(temperatures)
        self.per_row = PerRow(None, None, None, by_row, None, None, None, None)
        scale = optional_bits(logit_scale, 1)
        self.numbers = Numbers(
            bits(temperature), None, None, None, None, None, None, None, None, scale, None, optional_bits(cap), None,
            None, None, (),
        )  # fmt: skip
        self.kind = (
            "tokens", self.logits.device, matrix_kind(self.logits), self.vocab, self.entries, scale is None, cap == 0,
            entropy, pointer_kind(by_row),
        )  # fmt: skip
        self.prepared = remember(self.kind, lambda: _Prepared(self.logits, self.vocab, entropy, cap != 0))

    def stats(self, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype, device, rows = loss_dtype(self.logits), self.logits.device, self.rows
        made = [torch.empty(n, dtype=dtype, device=device) for n in (rows * self.entries, rows * entropy, rows)]
        table = torch.empty((rows, TOKEN_STATS), dtype=dtype, device=device)
        if rows:
            ordered = sort_classes(self.ids, (self.ids >= 0) & (self.ids < self.vocab))
            results = token_kernels.Results(made[0], made[1] if entropy else None, made[2], table)
            args = (
                matrix(self.logits), self.ids, ordered, results, self.per_row, self.numbers, rows, self.vocab,
            )  # fmt: skip
            programs = min(rows, 8 * self.prepared.gpu.multiprocessors)
            self._launch(token_kernels.token_stats, programs, args, (pointer_kind(self.ids),), None)
        return made[0], made[1], made[2], table

    def grad(self, table: Tensor, gradients: tuple[Tensor | None, ...], dtype: torch.dtype) -> Tensor:
        grad = self.logits.new_empty(self.logits.shape, dtype=dtype)
        if self.rows:
            table = table.contiguous()
            flat = [None if g is None else g.contiguous() for g in gradients]
            args = (
                matrix(self.logits), matrix(grad), self.ids, table, token_kernels.Gradients(*flat), self.per_row,
                self.numbers, self.vocab, self.width,
            )  # fmt: skip
            kind = tuple(map(pointer_kind, (grad, self.ids, table, *flat)))
            self._launch(token_kernels.token_grad, self.rows, args, kind, grad)
        return grad

    def _launch(
        self, kernel: Any, programs: int, args: tuple[Any, ...], kind: tuple[Any, ...], output: Tensor | None
    ) -> None:
        prepared = self.prepared

        def constants() -> dict[str, Any]:
            aligned = () if output is None else matrices.alignments(self.logits, [output], prepared.plan.vec)
            return {"COUNT": self.entries, "SPEC": prepared.spec._replace(aligned=aligned)}

        with device_guard(self.logits):
            prepared.launch(kernel, programs, args, kind, constants, lambda: prepared.plan.options(prepared.gpu))


def token_stats(
    logits: Tensor, ids: Tensor, temperatures: Tensor | None, temperature: float, logit_scale: float, cap: float,
    vocab_size: int, entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    args = (logits, ids, temperatures, temperature, logit_scale, cap, vocab_size, entropy)
    if not 0 < ids.shape[-1] <= MOST_ENTRIES:
        return reference_tokens.token_stats(*args)
    reference_tokens.check_ids(logits, ids, vocab_size, temperatures)
    log_probs, h, log_rest, table = _Call(*args).stats(entropy)
    shape = logits.shape[:-1]
    return log_probs.view(ids.shape), h.view(shape) if entropy else h, log_rest.view(shape), table


def token_grad(logits: Tensor, *args: Any) -> Tensor:
    return token_grad_as(logits, logits.dtype, *args)


def token_grad_as(
    logits: Tensor, dtype: torch.dtype, ids: Tensor, stats: Tensor, grad_log_probs: Tensor | None,
    grad_entropy: Tensor | None, grad_log_rest: Tensor | None, grad_elsewhere: Tensor | None,
    temperatures: Tensor | None, temperature: float, logit_scale: float, cap: float, vocab_size: int,
) -> Tensor:  # fmt: skip
    gradients, call = (grad_log_probs, grad_entropy, grad_log_rest, grad_elsewhere), (logit_scale, cap, vocab_size)
    if not 0 < ids.shape[-1] <= MOST_ENTRIES:
        grad = reference_tokens.token_grad(logits, ids, stats, *gradients, temperatures, temperature, *call)
        return grad.to(dtype)
    return _Call(logits, ids, temperatures, temperature, *call, entropy=False).grad(stats, gradients, dtype)
