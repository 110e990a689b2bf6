"""How often the Triton kernels are launched and compiled, and that the host never waits for them."""

import itertools
import math
from typing import Any

import gpu
import pytest
import torch
from cases import BF16, DIVERGENCES, F32, batch
from judge import judge, run
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast import rows
from kdfast.options import check_inputs, check_settings
from kdfast.triton import call, launch, ops, reductions, row_kernels, tiny_rows

pytestmark = pytest.mark.skipif(not gpu.EMULATED, reason=gpu.NEEDS_EMULATOR)
SETTINGS: dict[str, Any] = {"backend": "triton", "temperature": 2}


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
    monkeypatch: pytest.MonkeyPatch, inplace: bool
) -> None:
    monkeypatch.delenv("KDFAST_AUTOTUNE", raising=False)
    monkeypatch.setattr(launch, "_best", {})
    inputs, settings = batch(2, 3000, F32), {"inplace": inplace, "reduction": "sum", **SETTINGS}
    with gpu.kernels() as reports:
        run(*inputs, **settings)
        assert not launch._best
        monkeypatch.setenv("KDFAST_AUTOTUNE", "1")
        judge(*inputs, **settings)
        (choice,) = launch._best.values()
        assert isinstance(choice[0], launch.Plan)
        measured = len(reports)
        run(*inputs, **settings)
    assert len(reports) - measured <= 4


def test_long_rows_are_split_until_the_device_is_full() -> None:
    h100 = launch.Gpu("cuda", 32, 132)  # of fewer rows some have no number of whole tiles that fills it
    for rows_, vocab in itertools.product((*range(43, 300), 420, 530, 1000), (50257, 151936, 262144)):
        segments, segment = launch.split_row(rows_, vocab, 2048, h100)
        assert (segments - 1) * segment < vocab <= segments * segment
        assert segments <= launch.SEGMENTS
        assert launch.busy_share(rows_ * segments, h100) >= 0.8, (rows_, segments)
    options = kdfast.kd_loss.__kwdefaults__
    student, labels = torch.empty(65, 151936, dtype=BF16), torch.zeros(65, dtype=torch.long)
    with gpu.kernels():
        for divergence in DIVERGENCES:
            given = options | {"divergence": divergence, "label_smoothing": 0.1, "softcap": 30.0}
            settings = check_settings(given, has_labels=True)
            made = call.Call(student, *check_inputs(student, student, labels, given, settings))
            assert launch.busy_share(65 * made.segments, made.gpu) >= 0.8, divergence


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
