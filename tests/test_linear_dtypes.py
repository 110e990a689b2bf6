"""16-bit heads: where numbers are rounded, for each kind of product; loss scaling and autocast."""

from collections.abc import Iterator

import gpu  # before anything that imports Triton
import pytest
import torch
from cases import BF16, F16, F32, F64, name
from linear_cases import VOCAB, Case, check, fused_results, plain_results, relative_error
from test_linear_tokens import by_logits
from test_linear_tokens import fused as token_results
from torch import Tensor

from kdfast import chunks, linear_ops, products
from kdfast.sharded_token_ops import ShardedTokens


def test_a_16_bit_heads_gradient_is_accumulated_in_fp32_by_default(cpu: str) -> None:
    case = Case(BF16, rows=600, bias=False)
    _, (_, truth), _ = plain_results(case, case.labels, F64)
    errors = {}
    for accumulate in (F32, BF16, F64):
        _, (_, grad), _ = fused_results(case, case.labels, chunk_rows=4, accumulate_dtype=accumulate)
        assert grad.dtype == BF16
        errors[accumulate] = relative_error(grad, truth)
    assert errors[F32] < 2.0**-9  # rounded once
    assert errors[F64] < 2.0**-9
    assert errors[BF16] > 4 * errors[F32]  # rounded 150 times


@pytest.mark.parametrize("reduction", ["mean", "none"])  # one pass over the chunks, and two
@pytest.mark.parametrize("dtype", [BF16, F16], ids=name)
def test_logits_of_16_bit_heads_are_never_rounded(
    cpu: str, dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged against products in fp64: rounding to bf16 would change logits by up to 0.5."""
    monkeypatch.setattr(products, "SLICE", 16)  # four slices of the 50 classes are widened
    case = Case(dtype)
    case.hidden, case.teacher_hidden = 32 * case.hidden, 32 * case.teacher_hidden
    assert case.teacher_logits(F64).abs().max() > 128
    check(case, case.labels, temperature=10.0, reduction=reduction, chunk_rows=4, backend=cpu)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU: products with fp32 results, for which PyTorch has no CPU kernels, and no reading of values."""

    def mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype
        return a.to(dtype) @ b.to(dtype)

    def mm_out(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        return out.copy_(mm(a, b, dtype))

    def addmm_out(c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta=1, alpha=1, out: Tensor) -> Tensor:
        return out.copy_(c + mm(a, b, dtype))

    with torch.library._scoped_library("aten", "IMPL") as library:
        for overload, function in (("mm.dtype", mm), ("mm.dtype_out", mm_out), ("addmm.dtype_out", addmm_out)):
            library.impl(overload, function, "CPU")
        monkeypatch.setattr(products, "WidenedHead", products.TensorCoreHead)
        monkeypatch.setattr(products, "_own_are_faster", lambda: False)
        monkeypatch.setattr(chunks, "_can_read_values", lambda x: False)
        monkeypatch.setattr(linear_ops, "SLICE", 16)  # four slices of the 50 classes
        yield


@pytest.fixture
def row_kernels_dtypes(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Those in which the row kernels give the logits' gradient to the products."""
    seen: set[torch.dtype] = set()
    add = linear_ops.Gradients.add
    monkeypatch.setattr(linear_ops.Gradients, "add", lambda *args: (seen.add(args[2].dtype), add(*args))[1])
    return seen


@pytest.mark.skipif(gpu.ON_DEVICE, reason="here all tests of this file use the GPU's own products")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])  # its gradient is summed before the rounding
@pytest.mark.parametrize("rows", [13, 600])  # 2 H are 16: the logits' gradient is kept, or the weight's accumulated
@pytest.mark.parametrize("dtype", [BF16, F16], ids=name)
def test_tensor_cores_round_no_logits_and_zero_dropped_rows(
    cpu: str,
    dtype: torch.dtype,
    rows: int,
    bias: bool,
    reduction: str,
    tensor_cores: None,
    row_kernels_dtypes: set[torch.dtype],
) -> None:
    case = Case(dtype, rows, bias=False)
    case.bias = torch.linspace(-1, 1, VOCAB).to(dtype) if bias else None
    case.labels[rows // 6 : rows // 3] = -100
    settings = {"temperature": 2.0, "reduction": reduction, "return_metrics": True}
    truth = plain_results(case, case.labels, F64, **settings)
    case.hidden[rows // 4] = float("nan")  # an ignored row
    loss, grads, metrics = fused_results(case, case.labels, chunk_rows=7, **settings)
    assert row_kernels_dtypes == {F32 if bias else dtype}
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        [m.double() for m in metrics[:7]], list(truth[2][:7]), rtol=1e-5, atol=1e-6, equal_nan=True
    )
    for got, want in zip(grads, truth[1], strict=True):
        assert got.dtype == dtype
        assert relative_error(got, want) < torch.finfo(dtype).eps  # logits' gradient and result are rounded


@pytest.mark.skipif(gpu.ON_DEVICE, reason="here all tests of this file use the GPU's own products")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])  # its gradient is summed before the rounding
@pytest.mark.parametrize("rows", [13, 600])
def test_row_kernels_round_the_gradient_of_tokens_logits_for_tensor_cores(
    cpu: str, rows: int, bias: bool, tensor_cores: None, row_kernels_dtypes: set[torch.dtype]
) -> None:
    case = Case(BF16, rows, bias=False)
    case.bias = torch.linspace(-1, 1, VOCAB).to(BF16) if bias else None
    values, truth = by_logits(case, case.labels, F64)
    case.hidden[rows // 3] = float("nan")  # an ignored row
    got, grads = token_results(case, case.labels, chunk_rows=7)
    assert row_kernels_dtypes == {F32 if bias else BF16}
    torch.testing.assert_close([x.double() for x in got], values, rtol=1e-5, atol=1e-5)
    for mine, want in zip(grads, truth, strict=True):
        assert mine.dtype == BF16
        assert relative_error(mine, want) < torch.finfo(BF16).eps


@pytest.mark.skipif(gpu.ON_DEVICE, reason="here all tests of this file use the GPU's own products")
def test_row_kernels_round_the_gradient_of_shards_too(
    cpu: str, tensor_cores: None, row_kernels_dtypes: set[torch.dtype]
) -> None:
    case, numbers = Case(BF16, bias=False), (None, 2.0, 1.0, 0.0, -1)
    head, chunks = (case.hidden, case.weight, None, case.labels.unsqueeze(-1)), (7, F32)
    *results, table = torch.ops.kdfast.linear_token_stats(*head, *numbers, True, *chunks)
    found = [
        ops.linear_token_grad(*head, table, *results, *numbers, *chunks, True, True, False)
        for ops in (torch.ops.kdfast, ShardedTokens(torch.ops.kdfast, None, reduce_hidden=False))
    ]
    assert row_kernels_dtypes == {BF16}
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert found[0][1].any()


def test_float16_with_a_loss_scaler_loses_no_gradient(backend: str) -> None:
    case = Case(F16, bias=False)
    scaler = torch.amp.GradScaler(case.hidden.device.type)  # its first factor is 65536
    total = 2**20
    leaves = case.leaves()
    scaler.scale(case.loss(leaves, case.labels, normalizer=total, chunk_rows=4, backend=backend)).backward()
    _, truth, _ = plain_results(case, case.labels, F64, normalizer=total)
    for leaf, want in zip(leaves, truth, strict=True):
        torch.testing.assert_close(leaf.grad.double(), want * 65536, rtol=2.0**-10, atol=2.0**-24)
        rounded = want.half().double() * 65536
        assert relative_error(leaf.grad, want * 65536) < 0.1 * relative_error(rounded, want * 65536), (
            "rounded before it was scaled"
        )


@pytest.mark.skipif(gpu.ON_DEVICE, reason="here all tests of this file use the GPU's own products")
@pytest.mark.parametrize("rows", [13, 600])
def test_float16_heads_neither_underflow_nor_overflow(cpu: str, rows: int, tensor_cores: None) -> None:
    """On tensor cores gradients of logits are float16 factors."""
    case = Case(F16, rows, bias=False)
    for power in (-24, 17):  # without rescaling it would underflow, overflow
        weight = torch.linspace(0.5, 1, rows) * 2.0**power
        for settings in ({"reduction": "sum"}, {"normalizer": 2.0**20}):
            settings |= {"row_weight": weight, "accumulate_dtype": F16}
            scale = torch.tensor(2.0**-power if "reduction" in settings else 2.0 ** (20 - power))
            _, grads, _ = fused_results(case, case.labels, chunk_rows=70, grad=scale, **settings)
            _, truth, _ = plain_results(case, case.labels, F64, grad=scale, **settings)
            for got, want in zip(grads, truth, strict=True):
                assert relative_error(got, want) < 4 * torch.finfo(F16).eps


@pytest.mark.parametrize("dtype", [BF16, F16], ids=name)
def test_autocast_casts_what_f_linear_casts(backend: str, dtype: torch.dtype) -> None:
    case = Case()
    with torch.autocast(case.hidden.device.type, dtype):
        loss, grads, _ = fused_results(case, case.labels, chunk_rows=4, backend=backend)
    narrow = Case()
    for field in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight"):
        setattr(narrow, field, getattr(case, field).to(dtype))
    same, same_grads, _ = fused_results(narrow, case.labels, chunk_rows=4, backend=backend)
    assert torch.equal(loss, same)
    for got, want in zip(grads, same_grads, strict=True):
        assert got.dtype == F32
        assert torch.equal(got, want.float())
