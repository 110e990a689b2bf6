"""Sparse teachers and token statistics on Triton's kernels: bytes, and what the compilers make of them.

Besides its classes a row moves its entries: a sector of 32 bytes each where its logit is read, and one where it is
written. What is asked for counts the reads of each of 8 or 16 warps that need the same number: of the sorted entries,
and of what there is by row.
"""

import re
from typing import Any

import gpu
import pytest
import torch
from cases import BF16, F16, F32, F64, name
from test_triton_static import compiled, registers
from traffic import ROWS, asked

import kdfast
from kdfast import TopKTargets
from kdfast.triton import prepared, sparse_kernels, token_kernels

pytestmark = pytest.mark.skipif(not gpu.EMULATED, reason=gpu.NEEDS_EMULATOR)

KERNELS = [
    sparse_kernels.sparse_loss_grad_short, sparse_kernels.sparse_loss_grad_long, sparse_kernels.sparse_stats,
    sparse_kernels.sparse_grad, token_kernels.token_stats, token_kernels.token_grad,
]  # fmt: skip
CAPABILITIES = [80, pytest.param(90, marks=pytest.mark.full)]  # the code of both differs in how it is compiled alone
SHORT, LONG = 32000, 50257  # rows that stay in registers; rows that do not, of an odd number of classes
PER_ROW = 2048  # bytes: four numbers by 16 warps
PER_ENTRY = 32 + 32 + 24  # bytes: sectors of logit and gradient; class number, twice, and log-probability

__all__ = ["compiled"]


@pytest.fixture
def made(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    """A function that gives what launches, which are not run, have compiled."""

    def caches() -> list[Any]:
        return [each[0] for kernel in KERNELS for each in kernel.device_caches.values()]

    monkeypatch.setattr(prepared, "_kinds", {})
    for cache in caches():
        cache.clear()
    return lambda: [kernel for cache in caches() for kernel in cache.values()]


def sparse(vocab: int, k: int, dtype: torch.dtype = BF16, rows: int = ROWS) -> tuple[torch.Tensor, TopKTargets]:
    torch.manual_seed(vocab + k)
    log_probs, indices = torch.randn(rows, vocab).log_softmax(-1).topk(k, -1)
    return torch.randn(rows, vocab).to(dtype), TopKTargets(indices, log_probs)


def reports_of(capability: int, vocab: int, k: int, grad: bool = True, **settings: Any) -> list[Any]:
    """Of a forward pass, and of a backward pass where forward makes no gradient."""
    student, teacher = sparse(vocab, k)
    with gpu.kernels(capability) as reports:
        loss = kdfast.kd_loss(student.requires_grad_(grad), teacher, temperature=2.0, backend="triton", **settings)
        if settings.get("reduction") == "none":
            loss.sum().backward()
    return reports


def token_reports(capability: int, vocab: int, k: int, dtype: torch.dtype = BF16) -> list[Any]:
    """Of token_stats, and of the gradient in bf16."""
    logits, teacher = sparse(vocab, k, dtype)
    options = (None, 2.0, 1.0, 0.0, -1)
    with gpu.kernels(capability) as reports:
        log_probs, entropy, log_rest, table = torch.ops.kdfast_triton.token_stats(
            logits, teacher.indices, *options, True
        )
        call = teacher.indices, table, log_probs, entropy, log_rest, None, *options
        torch.ops.kdfast_triton.token_grad_as(logits, BF16, *call)
    return reports


def from_memory(report: Any) -> int:
    """What DRAM must move."""
    return report.first_read_bytes + report.first_written_bytes


def per_class(report: Any, vocab: int, k: int, of: Any = from_memory) -> float:
    """Bytes a class, without those of the row and its entries."""
    return (of(report) / ROWS - PER_ROW - k * PER_ENTRY) / vocab


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("k", (1, 64))
def test_a_short_row_is_read_and_written_once(capability: int, k: int) -> None:
    for settings in ({}, {"missing": "renormalize", "divergence": "jsd"}):
        (report,) = reports_of(capability, SHORT, k, **settings)
        assert per_class(report, SHORT, k) <= 4.0
        if k == 1:
            assert per_class(report, SHORT, k, asked) <= 4.04


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_long_row_is_read_twice_and_comes_from_dram_once(capability: int) -> None:
    (report,) = reports_of(capability, LONG, 8)
    assert per_class(report, LONG, 8) <= 4.0
    assert per_class(report, LONG, 1, asked) <= 6.12


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_conditional_reads_its_entries_and_writes_zeros(capability: int) -> None:
    (report,) = reports_of(capability, SHORT, 64, missing="conditional")
    assert report.first_read_bytes <= ROWS * (PER_ROW + 64 * PER_ENTRY)
    assert per_class(report, SHORT, 64) <= 2.0
    assert per_class(report, SHORT, 64, asked) <= 2.06


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_without_a_gradient_in_forward_a_row_is_read_once(capability: int) -> None:
    (report,) = reports_of(capability, SHORT, 8, grad=False)
    assert per_class(report, SHORT, 8) <= 2.0
    forward, backward = reports_of(capability, SHORT, 8, reduction="none")
    assert per_class(forward, SHORT, 8) <= 2.0
    assert per_class(backward, SHORT, 8) <= 4.0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("vocab", (SHORT, LONG))
def test_token_statistics_read_a_row_once_and_their_gradient_once_more(capability: int, vocab: int) -> None:
    forward, backward = token_reports(capability, vocab, 1)
    for of in (from_memory, asked):
        assert per_class(forward, vocab, 1, of) <= 2.04
        assert per_class(backward, vocab, 1, of) <= 4.04


def test_the_gradient_of_float32_logits_of_tokens_moves_6_bytes() -> None:
    """8 in float32, and 6 more by another kernel that converts it."""
    _, backward = token_reports(80, SHORT, 1, F32)
    for of in (from_memory, asked):
        assert per_class(backward, SHORT, 1, of) <= 6.04


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_atomics_and_the_same_bits_every_time(capability: int) -> None:
    student, teacher = sparse(1000, 64)
    found = []
    for _ in range(2):
        leaf = student.clone().requires_grad_()
        with gpu.kernels(capability) as reports:
            loss = kdfast.kd_loss(leaf, teacher, temperature=2.0, backend="triton")
            loss.backward()
        assert all(array.atomics == 0 for report in reports for array in report.arrays.values())
        found.append((loss.detach(), leaf.grad))
    assert all(map(torch.equal, *found))


def test_entries_are_written_behind_a_barrier_after_all_else(made: Any) -> None:
    """The emulator's threads go step by step, and a device's do not."""
    for dtype in (BF16, F16):  # whose gradients are of the forward and of the backward kernel
        student, teacher = sparse(1000, 8, dtype)
        kdfast.kd_loss(student.requires_grad_(), teacher, backend="triton").backward()
    writing = [kernel for kernel in made() if "grad" in kernel.name]
    assert len(writing) == 2
    for kernel in writing:
        events = re.findall(r"bar\.sync|st\.global", kernel.asm["ptx"])
        last = len(events) - events[::-1].index("bar.sync")
        assert events[last:] == ["st.global"]
        assert events[:last].count("st.global") >= 3, "the rest, and its ends"


TERMS = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0}
STATIC: tuple[tuple[int, int, torch.dtype, dict[str, Any]], ...] = (
    (32768, 64, BF16, {}),  # the longest row in registers, and the usual K
    (16384, 1000, F32, {"divergence": "skew_reverse_kl"}),  # the most arithmetic of an entry, many of them
    (16384, 64, BF16, TERMS),  # the most of a class
    (40000, 2047, BF16, {"divergence": "jsd"} | TERMS),  # the most entries
    (40000, 64, F64, {"divergence": "jsd"} | TERMS),
    (32768, 64, BF16, {"missing": "conditional"}),
)


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=() if row is STATIC[0] else pytest.mark.full) for row in STATIC], ids=name
)
def test_no_kernel_spills(made: Any, row: Any, full: bool) -> None:
    vocab, k, dtype, settings = row
    student, teacher = sparse(vocab, k, dtype, rows=1)
    labels = torch.zeros(1, dtype=torch.long)
    for reduction in ("mean", "none"):
        leaf = student.clone().requires_grad_()
        more = {"temperature": 3.7, "reduction": reduction, "backend": "triton"} | settings
        kdfast.kd_loss(leaf, teacher, labels, **more).sum().backward()
    options = (None, 3.7, 1.0, settings.get("softcap", 0.0), -1)
    of_tokens = torch.ops.kdfast_triton.token_stats(student, teacher.indices, *options, True)
    results, table = of_tokens[:3], of_tokens[3]
    torch.ops.kdfast_triton.token_grad(student, teacher.indices, table, *results, None, *options)
    assert len(made()) >= 4
    for kernel in made():
        for arch in (80, 90, 100) if full else (90,):
            assert registers(kernel, arch)[1] == 0, f"{kernel.name} on sm_{arch}, {kernel.src.signature}"
