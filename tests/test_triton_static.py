"""What the compilers make of the Triton kernels, without a GPU: registers, spills, programs that fit, code for AMD."""

import re
from collections.abc import Iterator
from typing import Any

import gpu
import pytest
import torch
from cases import BF16, F16, F32, F64, KINDS, as_target, batch, name

import kdfast
from kdfast import gpu_choice
from kdfast.triton import launch, prepared, reductions, row_kernels, softmax_kernels, tiny_rows

pytestmark = pytest.mark.skipif(not gpu.EMULATED, reason=gpu.NEEDS_EMULATOR)

ARCHITECTURES = (80, 90, 100)
AMD = {"gfx942": 64, "gfx1100": 32, "gfx950": 64, "gfx90a": 64}  # MI300, RX 7900, MI355, MI200; wavefronts
FAST_AMD = ("gfx942", "gfx1100")
KERNELS = [
    row_kernels.loss_grad_short, row_kernels.loss_grad_long, row_kernels.stats, row_kernels.grad,
    reductions.sums, reductions.pointwise_sums, reductions.merge_segments, reductions.scale,
    tiny_rows.loss_grad_tiny,
    softmax_kernels.softmax_short, softmax_kernels.softmax_long,
]  # fmt: skip
# Few threads of 4 tiles each; the longest rows in registers, of most tiles; and rows that are not kept.
LONGEST = {
    "cross_entropy": ((32768, BF16), (32768, F16), (16384, F32)),  # 8 tiles of 512 threads
    "logit_mse": ((32768, BF16), (32768, F16), (16384, F32)),
    "symmetric_kl": ((8192, BF16), (8192, F16), (4096, F32)),  # 4 of 256
    "jsd": ((8192, BF16), (8192, F16), (4096, F32)),
}
SWEPT = ((40000, BF16), (40000, F16), (40000, F32), (40000, F64))
# Of kinds that keep the same number of tiles one has each dtype: types are loads, kinds arithmetic.
DTYPES_OF = {
    "cross_entropy": (BF16, F32, F64),
    "symmetric_kl": (F16, F32),
    "jsd": (BF16, F32, F64),
    "logit_mse": (F16,),
}
ROWS = [
    (divergence, vocab, dtype)
    for divergence in KINDS
    for vocab, dtype in ((2048, BF16), *LONGEST[divergence], *SWEPT)
    if vocab == 2048 or dtype in DTYPES_OF[divergence]
]
# The most tiles of the commonest dtype, and the most sums of the dtype with the widest loads.
FAST = (("cross_entropy", 32768, BF16), ("jsd", 40000, F32))
SETTINGS: dict[str, Any] = {"backend": "triton"}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What a test's launches, which are not run, compile for sm_80: a function that gives it and forgets it."""

    def take() -> list[Any]:
        found = []
        for kernel in KERNELS:
            for caches in kernel.device_caches.values():
                found += caches[0].values()
                caches[0].clear()
        return found

    monkeypatch.setattr(gpu.emulator().Launcher, "__call__", lambda *args: None)
    take()
    with gpu.kernels():
        yield take


def everything(dtype: torch.dtype, vocab: int, *teachers: torch.dtype, **settings: Any) -> None:
    """All of a loss's kernels: gradients in forward and in backward, rows split and whole. One teacher, or several.

    Where rows are kept in registers the kernel that keeps them: the others have the fewer threads the shorter they are.
    """
    student, _, labels = batch(1, vocab, dtype)
    several = [batch(1, vocab, each, seed=i).teacher for i, each in enumerate(teachers or (dtype,))]
    teacher = several if len(several) > 1 else as_target(several[0], settings.get("target", "logits"), 2)
    long = vocab > gpu_choice.SPLIT_CLASSES
    for classes in (1 << 30, gpu_choice.SPLIT_CLASSES) if long else (1 << 30,):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_choice, "SPLIT_CLASSES", classes)
            patch.setattr(prepared, "_kinds", {})
            for reduction in ("mean", "none") if long else ("mean",):
                leaf = student.clone().requires_grad_()
                kdfast.kd_loss(leaf, teacher, labels, reduction=reduction, **SETTINGS | settings).sum().backward()


def as_launched(kernel: Any, *names: str) -> dict[str, Any]:
    """Those of a launch's options that another architecture's compiler has too."""
    return {name: getattr(kernel.metadata, name) for name in ("num_warps", "enable_fp_fusion", *names)}


def registers(kernel: Any, arch: int) -> tuple[int, int]:
    """Registers a thread, and bytes spilled, by ptxas."""
    import triton
    from ptxemu import static
    from triton.backends.compiler import GPUTarget

    made = triton.compile(kernel.src, target=GPUTarget("cuda", arch, 32), options=as_launched(kernel, "maxnreg"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "sass_counts", lambda *args: None)  # which disassembles all of it
        (found,) = static.static_report_ptx(made.asm["ptx"], "100a" if arch == 100 else arch).values()
    return found.registers, found.spill_bytes


def assert_nothing_spills(kernels: list[Any], full: bool = True) -> None:
    assert kernels
    for kernel in kernels:
        for arch in ARCHITECTURES if full else (90,):
            assert registers(kernel, arch)[1] == 0, f"{kernel.name} on sm_{arch}, {kernel.src.signature}"


@pytest.mark.parametrize(
    ("divergence", "vocab", "dtype"),
    [pytest.param(*row, marks=() if row in FAST else pytest.mark.full) for row in ROWS],
    ids=name,
)
def test_no_kernel_spills(compiled: Any, divergence: str, vocab: int, dtype: torch.dtype, full: bool) -> None:
    everything(dtype, vocab, divergence=divergence, temperature=3.7)  # not whole: the most arithmetic
    kernels = compiled()
    in_forward = dtype != F16  # whose gradient is of `stats` and `grad`
    assert any(kernel.name == "loss_grad_short" for kernel in kernels) == (vocab < 40000 and in_forward)
    assert_nothing_spills(kernels, full)


@pytest.mark.full
@pytest.mark.parametrize(
    ("vocab", "dtype", "teachers", "settings"),
    [
        (16384, BF16, (BF16,), {"divergence": "reverse_kl", "temperature": 3.7, "target": "probs"}),
        (16384, BF16, (BF16,), {"divergence": "reverse_kl", "temperature": 3.7, "target": "log_probs"}),
        (2048, BF16, 2 * (BF16,), {"divergence": "reverse_kl", "temperature": 2, "ensemble": "geometric"}),
        # the most teachers, of most sums
        (2048, BF16, 8 * (BF16,), {"divergence": "reverse_kl", "temperature": 2, "ensemble": "arithmetic"}),
        *((16384, *pair, {"temperature": 3.7}) for pair in ((BF16, (F32,)), (F32, (BF16,)), (F16, (BF16,)))),
    ],
    ids=name,
)
def test_nor_with_other_teachers(compiled: Any, vocab: int, dtype: Any, teachers: Any, settings: Any) -> None:
    for each in (vocab, 40000):
        everything(dtype, each, *teachers, **settings)
    assert_nothing_spills(compiled())


@pytest.mark.full
def test_nor_does_tempered_softmax(compiled: Any) -> None:
    for dtype in (BF16, F32):
        for vocab in (16384, 40000):
            for log in (False, True):
                leaf = batch(1, vocab, dtype).student
                p = torch.ops.kdfast_triton.tempered_softmax(leaf, None, 2.0, log, dtype)
                torch.ops.kdfast_triton.tempered_softmax_backward(p, p, None, 2.0, log, dtype)
    assert_nothing_spills(compiled())


def test_two_programs_of_the_long_kernel_fit_into_a_multiprocessor_and_keep_24_kb_in_flight(compiled: Any) -> None:
    for dtype in (BF16, F32):
        everything(dtype, 40000, divergence="reverse_kl", temperature=3.7)
    kernels = [kernel for kernel in compiled() if kernel.name == "loss_grad_long"]
    assert len(kernels) == 2
    for kernel in kernels:
        threads = 32 * kernel.metadata.num_warps
        for arch in ARCHITECTURES:
            allotted = (registers(kernel, arch)[0] + 7) // 8 * 8  # registers are given out in eights
            assert 65536 // (allotted * threads) >= 2
        tile = 2 * 16 * threads  # the student's and its teacher's
        ahead = (kernel.metadata.shared - tile) // tile  # of the tiles in shared memory one is computed
        assert 2 * ahead * tile >= 24 << 10
        assert kernel.asm["ptx"].count("cp.async.cg.shared.global") == 2 * 2 * (ahead + 2)  # in both sweeps
    assert launch.program_count(200, launch.Gpu("cuda", 32, 108)) == 200
    assert launch.program_count(300, launch.Gpu("cuda", 32, 108)) == 216


@pytest.fixture(params=[pytest.param(arch, marks=() if arch in FAST_AMD else pytest.mark.full) for arch in AMD])
def on_amd(request: pytest.FixtureRequest, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`compiled`, of launches on AMD's devices, with their options."""
    import triton
    from triton.backends.compiler import GPUTarget

    driver, arch = triton.runtime.driver.active, request.param
    monkeypatch.setattr(driver, "get_current_target", lambda: GPUTarget("hip", arch, AMD[arch]))
    monkeypatch.setattr(driver, "get_current_device", lambda: int(arch[3:], 16))  # whose kernels are its own
    return compiled


def test_every_kernel_is_launched_on_amd_without_spills_and_accesses_16_bytes(on_amd: Any, full: bool) -> None:
    for dtype in (BF16, F32) if full else (BF16,):
        for vocab in (2048, 32768, 40000) if full else (2048, 40000):
            everything(dtype, vocab, temperature=3.7)
    everything(BF16, 10)
    everything(BF16, 40000, divergence="jsd", temperature=3.7)
    p = torch.ops.kdfast_triton.tempered_softmax(batch(1, 1000, BF16).student, None, 2.0, False, BF16)
    torch.ops.kdfast_triton.tempered_softmax(batch(1, 40000, BF16).student, None, 2.0, False, BF16)
    torch.ops.kdfast_triton.tempered_softmax_backward(p, p, None, 2.0, False, BF16)
    kernels = on_amd()
    assert {kernel.name for kernel in kernels} == {kernel.fn.__name__ for kernel in KERNELS}
    for kernel in kernels:
        assert_nothing_spills_on_amd(kernel)
        assert kernel.asm["amdgcn"].count("v_div_scale_f32") <= 100, "no exact divisions of classes"
        if kernel.name in ("loss_grad_short", "loss_grad_long", "grad", "scale", "softmax_short", "softmax_long"):
            assert_rows_are_stored_in_16_bytes(kernel)


@pytest.mark.full
def test_nor_does_what_takes_most_arithmetic_spill_on_amd(on_amd: Any) -> None:
    everything(F64, 40000, divergence="jsd", temperature=3.7)
    everything(BF16, 8192, divergence="jsd", temperature=3.7)
    for vocab, settings in OPTIONS.values():
        student, teacher, labels = batch(1, vocab, BF16)
        kdfast.kd_loss(student.requires_grad_(), teacher, labels, temperature=3.7, **SETTINGS | settings)
    for kernel in on_amd():
        assert_nothing_spills_on_amd(kernel)


def assert_nothing_spills_on_amd(kernel: Any) -> None:
    """To memory; what scalar registers spill goes to lanes of vector registers."""
    (spills,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
    assert int(spills) == 0, f"{kernel.name}, {kernel.src.signature}"


def assert_rows_are_stored_in_16_bytes(kernel: Any) -> None:
    """But for their ends, and loads too: of classes, in each sweep, and of what there is by row."""
    code = kernel.asm["amdgcn"]
    assert re.search(r"_store_(dwordx4|b128)\b", code), f"{kernel.name}, {kernel.src.signature}"
    assert re.search(r"_load_(dwordx4|b128)\b", code), f"{kernel.name}, {kernel.src.signature}"
    narrow = {
        what: len(re.findall(rf"(buffer|global)_{what}_\w*(short|b16|u16|dword|b32)\b", code))
        for what in ("store", "load")
    }
    losses = kernel.name.startswith("loss_grad")
    assert narrow["store"] <= 2 + losses, f"{kernel.name}, {kernel.src.signature}: {narrow}"
    assert narrow["load"] <= 6, f"{kernel.name}, {kernel.src.signature}: {narrow}"


# Each at the longest row that stays in registers beside it; together as they need most, in registers and in sweeps.
OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "dkd": (16384, {"divergence": "dkd"}),
    "terms": (8192, {"divergence": "dkd", "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0}),
    "metrics": (8192, {"return_metrics": True}),
    "standardize": (4096, {"standardize": True}),
    "together": (40000, {"divergence": "jsd", "label_smoothing": 0.1, "return_metrics": True, "standardize": True}),
}


@pytest.mark.parametrize(
    "option", [pytest.param(o, marks=() if o == "together" else pytest.mark.full) for o in OPTIONS]
)
def test_nor_do_options(compiled: Any, option: str, full: bool) -> None:
    vocab, settings = OPTIONS[option]
    student, teacher, labels = batch(1, vocab, BF16)
    kdfast.kd_loss(student.requires_grad_(), teacher, labels, temperature=3.7, **SETTINGS | settings)
    assert_nothing_spills(compiled(), full)
