"""A head's matrix products with a chunk of rows. Logits are not rounded.

    s = h W^T + b        the chunk's logits, (rows, V)
    d h = g W            from their gradient g, (rows, H)
    d W += g^T h         (V, H)

The products of a 16-bit head:

    on a GPU              16-bit factors, fp32 sums, fp32 results. g is rounded once, to the head's dtype, as a factor
    CPUs, AVX512_BF16,    kdfast's own, csrc/cpu/matmul_kernel.h, which fp32 heads take too: 16-bit factors of logits,
    not Intel's           fp32 ones of gradients, fp32 sums and results
    anywhere else         fp32: the head is converted slice by slice

On two cores of a Zen 5, where MKL runs code for AVX2, kdfast's own take 19 ms for the logits of 512 rows and a bf16
head, V = 16000, H = 1024, and PyTorch's bf16 product 19 to 21 ms. The gradients' take 37 to 42 ms each, the fp32 limit
of the cores being 32: two bf16 parts of g would be twice the work at twice the speed, and one part would round it.

PyTorch's CPU product of 16-bit factors rounds its result to their dtype, which moves bf16 logits of size 100 by up to
0.25, and larger ones by 0.5. On a CPU with instructions for bf16 matrices fp32 products are slower: 132 ms for 512
rows, V = 32000, H = 1024 on two cores of a Sapphire Rapids, where the bf16 product takes 24 ms. With
torch.backends.mkldnn.matmul.fp32_precision = "bf16" PyTorch takes 52 ms for fp32 logits of bf16 factors. kdfast does
not set it, because it holds for all threads: while one thread had it set around its own products, 86 of another
thread's 90 fp32 products used it as well, and torch.get_float32_matmul_precision() raised there. A program may set it
for the whole process: the logits of bf16 heads lose nothing by it, and g is then rounded as on a GPU.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from kdfast import choice

SLICE = 4096  # classes converted, or multiplied, at a time: a few MB, where a chunk takes hundreds
OWN_LEAST_ROWS = 4  # of 1 row with an fp32 head, V = 32000, H = 1024, PyTorch makes the logits in 0.7x of the time

_library = torch.library.Library("kdfast", "FRAGMENT")
_library.define("matmul_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()")  # csrc/cpu/matmul_ops.h


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the gradients that forward computes: fp32 for float16, until the loss scaler's factor is known."""
    return torch.float32 if dtype == torch.float16 else dtype


class Head:
    """The products in the head's own dtype, fp32 or fp64."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias  # (V, H), (V,)
        self.logits_dtype = self.hidden_dtype = self.gradient_dtype = weight.dtype

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """out = hidden W^T + b, (rows, V) of logits_dtype; hidden is of hidden_dtype."""
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def to_hidden(self, grad: Tensor) -> Tensor:
        """g W, (rows, H); grad is of gradient_dtype."""
        return torch.mm(grad, self.weight)

    def add_to_weight(self, grad: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
        """total += g^T h, (V, H); the first call does not read total. The factors are of the dtypes above."""
        for part in self._parts(total, grad):
            g = grad[:, part].t()
            if total.dtype != grad.dtype:
                product = grad.new_empty((len(g), hidden.shape[1]))
                self._multiply(g, hidden, product)
                total[part].copy_(product) if first else total[part].add_(product)
            else:
                self._multiply(g, hidden, total[part], add=not first)

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
        """out = a b, or out += a b"""
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)

    def _parts(self, total: Tensor, grad: Tensor) -> Iterator[slice]:
        """One part, but slices where a product needs memory of its own."""
        step = max(1, len(total)) if total.dtype == grad.dtype else SLICE
        return (slice(start, start + step) for start in range(0, len(total), step))


class WidenedHead(Head):
    """fp32 products with a 16-bit head, converted slice by slice."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, None if bias is None else bias.float())
        self.logits_dtype = self.hidden_dtype = self.gradient_dtype = torch.float32
        self._wide = weight.new_empty((min(SLICE, len(weight)), weight.shape[1]), dtype=torch.float32)

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.weight), SLICE):
            narrow = self.weight[start : start + SLICE]
            yield slice(start, start + len(narrow)), self._wide[: len(narrow)].copy_(narrow)

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        for part, weight in self._slices():
            if self.bias is None:
                torch.mm(hidden, weight.t(), out=out[:, part])
            else:
                torch.addmm(self.bias[part], hidden, weight.t(), out=out[:, part])

    def to_hidden(self, grad: Tensor) -> Tensor:
        out = grad.new_zeros((len(grad), self.weight.shape[1]))
        for part, weight in self._slices():
            out.addmm_(grad[:, part], weight)
        return out


class OwnHead(Head):
    """kdfast's own products: factors of any dtype but fp64, fp32 sums and results."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.logits_dtype = self.gradient_dtype = torch.float32

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        if self.bias is not None:
            out.copy_(self.bias)
        self._multiply(hidden, self.weight.t(), out, add=self.bias is not None)

    def to_hidden(self, grad: Tensor) -> Tensor:
        out = grad.new_empty((len(grad), self.weight.shape[1]))
        self._multiply(grad, self.weight, out)
        return out

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
        torch.ops.kdfast.matmul_(out, a, b, add)


class TensorCoreHead(Head):
    """16-bit factors and fp32 results, on a GPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.logits_dtype = torch.float32

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        torch.ops.aten.mm.dtype_out(hidden, self.weight.t(), torch.float32, out=out)
        if self.bias is not None:
            out.add_(self.bias)

    def to_hidden(self, grad: Tensor) -> Tensor:
        return torch.ops.aten.mm.dtype(grad, self.weight, torch.float32)

    def add_to_weight(self, grad: Tensor, hidden: Tensor, total: Tensor, first: bool) -> None:
        if total.dtype != torch.float32:
            super().add_to_weight(grad, hidden, total, first)
        elif first:  # addmm's summand may be of the result's dtype, read and written in place, from torch 2.10 on
            torch.ops.aten.mm.dtype_out(grad.t(), hidden, torch.float32, out=total)
        else:
            torch.ops.aten.addmm.dtype_out(total, grad.t(), hidden, torch.float32, out=total)


_own_are_faster = lru_cache(choice.own_products_are_faster)


def head_for(weight: Tensor, bias: Tensor | None, rows: int) -> Head:
    """The products for the weight's dtype and device, and the rows of all chunks."""
    size = weight.dtype.itemsize
    if weight.device.type == "cpu" and _own_are_faster() and (size == 2 or (size == 4 and rows >= OWN_LEAST_ROWS)):
        return OwnHead(weight, bias)
    if weight.dtype.itemsize > 2:
        return Head(weight, bias)
    return TensorCoreHead(weight, bias) if weight.device.type == "cuda" else WidenedHead(weight, bias)
