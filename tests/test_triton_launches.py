"""How often the Triton kernels are launched and compiled, and that the host never waits for them."""

import itertools
import math
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
import triton
from cases import BF16, DIVERGENCES, F16, F32, batch
from judge import judge, run
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast import rows
from kdfast.options import check_inputs, check_settings
from kdfast.triton import autotune, call, launch, ops, prepared, reductions, row_kernels, tiny_rows

pytestmark = pytest.mark.skipif(not gpu.EMULATED, reason=gpu.NEEDS_EMULATOR)
SETTINGS: dict[str, Any] = {"backend": "triton", "temperature": 2}


@pytest.mark.parametrize("settings", [
    {},  # rows that stay in registers
    {"divergence": "jsd", "beta": 0.3},  # rows that are swept, pass B
    {"divergence": "dkd", "standardize": True, "return_metrics": True},
    {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 0.1},
])  # fmt: skip
def test_calls_of_four_kinds_compile_and_are_right(settings: dict[str, Any]) -> None:
    """What `make versions` runs with each Triton. fp16: the gradient is made in backward."""
    dtype = F16 if "softcap" in settings else BF16
    with gpu.kernels():
        judge(*batch(2, 1000 if not settings else 9000, dtype), by_row=False, **settings, **SETTINGS)


def test_fifty_shapes_take_a_handful_of_kernels() -> None:
    """One for each power of 2 from 16 to 32768 (512 for one tile), one for longer rows, three when few of them."""
    shapes = [(1 + 7 * i % 13, 1 + int(1.27**i)) for i in range(2, 44)]
    shapes += [(1, 50257), (70, 33000), (2, 40000), (16, 32), (32, 16), (1, 1), (128, 128), (5, 151936)]
    assert len(set(shapes)) == 50
    kernels = [row_kernels.loss_grad_short, row_kernels.loss_grad_long, row_kernels.grad, tiny_rows.loss_grad_tiny]
    kernels += [reductions.sums, reductions.merge_segments]

    def caches() -> list[Any]:
        return [each[0] for kernel in kernels for each in kernel.device_caches.values()]

    for cache in caches():
        cache.clear()
    with gpu.kernels():
        for rows, vocab in shapes:
            student, teacher, labels = batch(rows, vocab, BF16)
            kdfast.kd_loss(student.requires_grad_(), teacher, labels, **SETTINGS)
    assert 0 < sum(map(len, caches())) <= 17


class NoWaiting(TorchDispatchMode):
    """On a GPU, reading a tensor's value on the host waits for all that was launched."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("vocab", (1000, 50257))
def test_the_host_never_waits(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = batch(3, vocab, BF16)
    monkeypatch.setattr(rows, "check_values", lambda *args: None)  # which looks at tensors of the CPU alone
    given = {"temperature": 2, "row_weight": torch.rand(3), "normalizer": torch.tensor(2.0)}
    options = kdfast.kd_loss.__kwdefaults__ | given
    inputs, settings = check_inputs(student, teacher, labels, options, check_settings(options, has_labels=True))
    with gpu.kernels(), NoWaiting():
        loss, grad, _ = ops.loss_grad(student, inputs, settings)
        ops.scale_(grad, torch.ones(()))
        _, stats, _ = ops.stats(student, inputs, settings)
        ops.grad(student, stats, loss, inputs, settings)
        ops.tempered_softmax(student, None, 2.0, False, BF16)
    with pytest.raises(AssertionError), NoWaiting():
        loss.item()


@pytest.mark.parametrize("inplace", [False, True])
def test_autotuning_where_it_is_wanted_measures_once_and_stays_right(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, inplace: bool
) -> None:
    monkeypatch.setattr(autotune, "is_wanted", False)
    monkeypatch.setattr(autotune, "_places", {})
    monkeypatch.setattr(autotune, "_file", lambda: tmp_path / "choices.json")
    inputs, settings = batch(2, 3000, F32), {"inplace": inplace, "reduction": "sum", **SETTINGS}
    with gpu.kernels() as reports:
        run(*inputs, **settings)
        assert not autotune._places
        monkeypatch.setattr(autotune, "is_wanted", True)
        judge(*inputs, **settings)
        (choices,) = autotune._places.values()
        assert len(choices) == 1
        measured = len(reports)
        run(*inputs, **settings)
    assert len(reports) - measured <= 4


def test_choices_are_measured_once_for_rows_up_to_a_power_of_2_and_kept_on_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = {"first": 3.0, "fast": 1.0, "fails": 0.0}
    measured: list[tuple[str, torch.Tensor]] = []
    output = torch.empty(4)

    def run(choice: str, scratch: torch.Tensor) -> None:
        measured.append((choice, scratch))
        if choice == "fails":
            raise RuntimeError("out of resources")

    def bench(call: Any, quantiles: list[float]) -> list[float]:
        call()
        return [times[measured[-1][0]]]

    def choose(rows: int) -> str:
        return autotune.choose("kind", rows, lambda: times, output, run)

    monkeypatch.setattr(triton.runtime.driver.active, "get_benchmarker", lambda: bench)
    monkeypatch.setattr(autotune, "_file", lambda: tmp_path / "new" / "choices.json")
    monkeypatch.setattr(autotune, "_places", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert autotune._is_capturing(torch.device("cuda")) and not autotune._is_capturing(output.device)
    with monkeypatch.context() as capture:
        capture.setattr(autotune, "_is_capturing", lambda device: True)
        assert (choose(5), measured) == ("first", []), "a graph's capture forbids to measure"
    assert (choose(5), len(measured)) == ("fast", 3)
    assert len({scratch.data_ptr() for _, scratch in measured} - {output.data_ptr()}) == 1
    assert (choose(8), len(measured)) == ("fast", 3)
    times["first"] = 0.5
    assert (choose(9), len(measured)) == ("first", 6)
    monkeypatch.setattr(autotune, "_places", {})  # another process's
    assert (choose(7), choose(10), len(measured)) == ("fast", "first", 6)
    monkeypatch.setattr(autotune, "_places", {})
    (tmp_path / "new" / "choices.json").write_text("{")
    assert (choose(7), len(measured)) == ("first", 9)


def test_what_is_remembered_of_one_kind_of_call_is_not_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call the second time, after all others, as if it were the first. A misplaced vector is a finding."""
    student, teacher, labels = batch(3, 1000, BF16)
    off = torch.empty(3001, dtype=BF16)[1:].view(3, 1000).copy_(teacher)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0])
    calls: list[tuple[Any, dict[str, Any]]] = [
        ((student, teacher, labels), {}),
        ((student, off, labels), {}),
        ((student, teacher.float(), torch.cat([labels[:1], labels])[1:]), {"normalizer": torch.tensor(7)}),
        ((student, teacher, labels), {"row_weight": weight[:3], "normalizer": weight[3]}),
        ((student, teacher, labels), {"row_weight": weight[1:], "alpha": 0.25}),
        ((student, teacher, labels), {"row_weight": weight[1:] != 0, "alpha": 0.0}),
        ((student, teacher, labels), {"temperature": 1.5, "reduction": "sum"}),
        (batch(2, 40000, BF16), {}),  # rows that are split
        (batch(2, 40000, BF16), {"divergence": "jsd", "beta": 0.5, "label_smoothing": 0.1}),
    ]

    def call(at: int) -> Any:
        arguments, settings = calls[at]
        return run(*arguments, **SETTINGS | settings)

    with gpu.kernels():
        alone = []
        for at in range(len(calls)):
            monkeypatch.setattr(prepared, "_kinds", {})
            alone.append(call(at))
        for at in (*range(len(calls)), *range(len(calls))):
            assert all(map(torch.equal, call(at), alone[at])), calls[at][1]
        kinds = len(prepared._kinds)
        run(student, teacher, labels, backend="triton", temperature=1.7, reduction="sum", alpha=0.3)
        assert len(prepared._kinds) == kinds, "numbers are no part of a kind"
        monkeypatch.setattr(prepared, "MOST_KINDS", kinds)
        run(student, teacher, labels, reduction="batchmean", **SETTINGS)
        assert len(prepared._kinds) < kinds


def test_long_rows_are_split_until_the_device_is_full() -> None:
    h100 = launch.Gpu("cuda", 32, 132)  # of fewer rows some have no number of whole tiles that fills it
    for rows_, vocab in itertools.product((*range(43, 300), 420, 530, 1000), (50257, 151936, 262144)):
        segments, segment = launch.split_row(rows_, vocab, 2048, h100)
        assert (segments - 1) * segment < vocab <= segments * segment
        assert segments <= launch.SEGMENTS
        assert launch.busy_share(rows_ * segments, h100.multiprocessors) >= 0.8, (rows_, segments)
    options = kdfast.kd_loss.__kwdefaults__
    student, labels = torch.empty(65, 151936, dtype=BF16), torch.zeros(65, dtype=torch.long)
    with gpu.kernels():
        for divergence in DIVERGENCES:
            given = options | {"divergence": divergence, "label_smoothing": 0.1, "softcap": 30.0}
            settings = check_settings(given, has_labels=True)
            made = call.Call(student, *check_inputs(student, student, labels, given, settings))
            assert launch.busy_share(65 * made.segments, made.gpu.multiprocessors) >= 0.8, divergence


def test_every_size_has_a_plan_that_fits() -> None:
    for warp in (32, 64):
        for vocab in (*range(1, 600), 2**10, 2**15, 2**15 + 1, 2**18, 2**30):
            for tensors in ([torch.empty(0, dtype=BF16)] * 2, [torch.empty(0)] * 2, [torch.empty(0)] * 9):
                plan = launch.plan(vocab, tensors, warp, launch.FULL_BUDGET)
                assert plan.warps * warp == plan.lanes
                assert math.log2(plan.lanes).is_integer()
                assert plan.tiles == 0 or plan.tiles * plan.lanes * plan.vec >= vocab
                held = plan.tiles * plan.vec * sum(t.element_size() for t in tensors)
                assert held <= launch.FULL_BUDGET.bytes
