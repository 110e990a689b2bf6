"""The CUDA row kernel as its compiled PTX runs on the emulator: values, bytes, accesses, registers.

Bytes are sectors of 32, per pair of logits, less 256 bytes a row for labels, losses and ragged ends.
"""

import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gpu
import pytest
import torch
from cases import BF16, F32, batch
from judge import half_ulp

import kdfast

pytestmark = [
    pytest.mark.skipif(not gpu.EMULATED, reason=gpu.NEEDS_EMULATOR),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, which compiles the kernels"),
    pytest.mark.parametrize("capability", gpu.CAPABILITIES),
]

SOURCE = Path(__file__).parent / "cuda" / "row_kernels.cu"
FLAGS = ["-O3", "--expt-relaxed-constexpr"]
ROWS, IGNORED = 3, -100


class Kind(NamedTuple):
    kernel: str  # a part of its mangled name
    divergence: str
    dtype: torch.dtype
    keep: bool  # on chip
    beta: float = 0.0


CROSS_ENTROPY = Kind("__nv_bfloat16NS0_12CrossEntropyELb1", "cross_entropy", BF16, True)
KINDS = (
    CROSS_ENTROPY,
    Kind("__nv_bfloat16NS0_3JSDELb1", "jsd", BF16, True, 0.5),
    Kind("fNS0_8LogitMSEELb1", "logit_mse", F32, True),
    Kind("__nv_bfloat16NS0_11SymmetricKLELb0", "symmetric_kl", BF16, False, 0.5),
)
_modules: dict[int, Any] = {}


def module(capability: int) -> Any:
    from ptxemu.cuda import load_cu

    if capability not in _modules:
        _modules[capability] = load_cu(SOURCE, cap=capability, flags=FLAGS)
    return _modules[capability]


def launch(capability: int, kind: Kind, vocab: int, width: int = 0, blocks: int = 1, threads: int = 256) -> Any:
    """(loss, gradient, report, truth, its gradient) of the mean over rows of which one is ignored."""
    width = width or vocab
    student, teacher, labels = batch(ROWS, width, kind.dtype)
    labels %= vocab
    labels[1] = IGNORED
    temperature = 1.0 if kind.divergence == "logit_mse" else 2.0
    grad, losses = torch.full((ROWS, width), 7.0, dtype=kind.dtype), torch.full((ROWS,), 7.0)
    far = 1 << 29  # rows of one leading dimension
    layouts = (far, 0, student.stride(0), far, 0, teacher.stride(0), far, 0, grad.stride(0))
    numbers = (temperature, temperature, 0.9, 0.1, 0.0, kind.beta, 0.5)  # ..., alpha, hard_weight, z_loss, beta, scale
    packed = struct.pack(
        "10q3i7f2i", *layouts, IGNORED, ROWS, vocab, width, *numbers, int(temperature), temperature != 1
    )
    vec = 16 // kind.dtype.itemsize
    part = vocab // vec if blocks == 1 else -(-(vocab // vec) // (32 * blocks)) * 32
    shared = 2 * 16 * part if kind.keep else 0
    compiled = module(capability)
    (name,) = (name for name in compiled.kernels() if kind.kernel in name)
    arguments = (student, teacher, grad, losses, labels, None, None, None, None, None, packed)
    cluster = (blocks, 1, 1) if blocks > 1 else None
    report = compiled.launch(name, (ROWS * blocks,), (threads,), arguments, smem=shared, cluster=cluster)
    assert not report.findings, "\n".join(map(str, report.findings))
    leaf = student[:, :vocab].double().requires_grad_()
    truth = kdfast.kd_loss(
        leaf, teacher[:, :vocab].double(), labels, temperature=2.0, divergence=kind.divergence, backend="reference"
    )
    truth.backward()
    return losses.sum() / 2, grad, report, truth.detach(), leaf.grad


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kernel)
def test_loss_and_gradient_are_the_references(capability: int, kind: Kind) -> None:
    for vocab, width, blocks in ((5, 8, 1), (1000, 1000, 1), (2053, 2060, 1), (4099, 4099, 2), (3000, 3000, 16)):
        if blocks > 1 and (capability < 90 or not kind.keep):
            continue
        loss, grad, _, truth, want = launch(capability, kind, vocab, width, blocks)
        assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
        allowed = 1e-5 * want.abs().max() + (half_ulp(want, BF16) if kind.dtype == BF16 else 0)
        assert ((grad[:, :vocab].double() - want).abs() <= allowed).all(), (vocab, blocks)
        assert not grad[:, vocab:].any()
        assert not grad[1].any(), "the row that is ignored"


@pytest.mark.parametrize(
    "vocab, blocks",
    [
        (4096, 1),
        (32_000, 2),  # Llama 2's
        (50_257, 4),  # GPT-2's: odd
        (151_936, 16),  # Qwen 2.5's
        (262_144, 16),  # Gemma's
    ],
)
def test_a_row_is_read_once_whatever_its_length(capability: int, vocab: int, blocks: int) -> None:
    if capability < 90:
        blocks, vocab = 1, min(vocab, 32_768)  # what one multiprocessor's shared memory holds of a pair
    _, _, report, *_ = launch(capability, CROSS_ENTROPY, vocab, blocks=blocks, threads=512)
    kept = ROWS - 1
    moved = 32 * (report.load_sectors + report.store_sectors) - 2 * vocab  # zeros for the row that is ignored
    assert (moved - 256 * ROWS) / (kept * vocab) <= 6.06
    wide = report.load_widths.get(16, 0) / sum(report.load_widths.values())
    assert wide >= 0.9, report.load_widths
    for wavefronts, ideal in report.shared.values():
        assert wavefronts <= 1.05 * ideal, report.shared


def test_no_kernel_spills(capability: int) -> None:
    spilled = {name: (each.spill_stores, each.spill_loads) for name, each in module(capability).static_report().items()}
    assert spilled
    assert not any(any(each) for each in spilled.values()), spilled
