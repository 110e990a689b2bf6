"""A head's products, whichever class makes them here, and kdfast's own product of matrices."""

import itertools

import pytest
import torch
from cases import BF16, F16, F32, F64, name
from torch import Tensor

from kdfast import choice, products

OWN = pytest.param(
    products.OwnHead,
    marks=pytest.mark.skipif(
        not choice.backends()["cpu"]["usable"] or choice.isa() != "avx512_bf16",
        reason="kdfast has a product of its own for avx512_bf16 alone",
    ),
)
own = OWN.marks[0]


def matrix(rows: int, columns: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    return torch.randn(columns, rows).to(dtype).t() if transposed else torch.randn(rows, columns).to(dtype)


def check(got: Tensor, want: Tensor, terms: int) -> None:
    """Each of `terms` additions of numbers of size 1 may be rounded."""
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=2e-7 * terms)


@own
@pytest.mark.parametrize(
    "dtypes", list(itertools.product((F32, BF16, F16), repeat=2)), ids=lambda x: "-".join(map(name, x))
)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    # one of each; a tile and one more row and column; an odd number of terms and more than one depth of 512; more than
    # one unit of rows and columns
    [(1, 1, 1), (13, 33, 5), (7, 40, 1035), (130, 70, 300)],
)
def test_own_product_has_float_sums_of_every_dtype_and_layout(
    dtypes: tuple[torch.dtype, torch.dtype], m: int, n: int, k: int
) -> None:
    for a_transposed, b_transposed, add in itertools.product((False, True), repeat=3):
        a, b = matrix(m, k, dtypes[0], a_transposed), matrix(k, n, dtypes[1], b_transposed)
        wide = torch.randn(m, n + 3)  # its last columns stay
        before, out = wide.clone(), wide[:, :n]
        torch.ops.kdfast.matmul_(out, a, b, add)
        check(out, a.double() @ b.double() + (before[:, :n].double() if add else 0), k)
        assert torch.equal(wide[:, n:], before[:, n:])


@own
def test_own_product_has_the_same_bits_with_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    for m, n, dtype in ((70, 900, BF16), (900, 70, F32), (300, 400, F32)):
        a, b = matrix(m, 600, dtype), matrix(600, n, dtype, transposed=True)
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(torch.empty(m, n))
            torch.ops.kdfast.matmul_(results[-1], a, b, False)
        torch.set_num_threads(threads)
        assert all(torch.equal(results[0], other) for other in results)


@own
def test_own_product_keeps_nan_and_infinities_in_their_rows_and_columns() -> None:
    a, b = matrix(20, 77, BF16), matrix(77, 50, BF16, transposed=True)
    a[3, 5], b[76, 49] = float("nan"), float("inf")
    out = torch.empty(20, 50)
    torch.ops.kdfast.matmul_(out, a, b, False)
    finite = torch.ones(20, 50, dtype=torch.bool)
    finite[3], finite[:, 49] = False, False
    assert torch.equal(out.isfinite(), finite)
    assert out[3].isnan().all()


@own
def test_own_product_refuses_what_does_not_fit() -> None:
    a, b = matrix(4, 5, F32), matrix(5, 6, F32)
    for out, left, right in (
        (torch.empty(4, 5), a, b),
        (torch.empty(4, 6, dtype=F64), a, b),
        (torch.empty(6, 4).t(), a, b),
        (torch.empty(4, 6), a.double(), b),
        (torch.empty(4, 6), a[:, 1:], b),
    ):
        with pytest.raises((ValueError, RuntimeError), match="matmul_"):
            torch.ops.kdfast.matmul_(out, left, right, False)


@pytest.mark.parametrize("kind", [products.WidenedHead, OWN])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=name)
def test_a_16_bit_heads_products_round_neither_logits_nor_gradients(kind: type, dtype: torch.dtype) -> None:
    rows, width, vocab = 9, 24, products.SLICE + 70  # two slices
    weight, bias = matrix(vocab, width, dtype), torch.randn(vocab).to(dtype)
    hidden, grad = matrix(rows, width, dtype), torch.randn(rows, vocab)
    for b in (None, bias):
        head = kind(weight, b)
        factor, out = hidden.to(head.hidden_dtype), torch.empty(rows, vocab)
        head.logits(factor, out)
        check(out, hidden.double() @ weight.double().t() + (0 if b is None else b.double()), width)
    check(head.to_hidden(grad), grad.double() @ weight.double(), vocab)
    want = grad.double().t() @ hidden.double()
    for total in (torch.full((vocab, width), float("nan")), torch.full((vocab, width), float("nan"), dtype=dtype)):
        head.add_to_weight(grad, factor, total, first=True)
        head.add_to_weight(grad, factor, total, first=False)
        if total.dtype == F32:
            check(total, 2 * want, 2 * rows)
        else:
            torch.testing.assert_close(total.double(), 2 * want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
