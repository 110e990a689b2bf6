"""kdfast in a training loop: precision, loss scaling, checkpointing, accumulation, several processes."""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu  # before anything that imports Triton
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import BACKENDS, BF16, F16, F32, F64, ON_GPU
from judge import run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdfast import KDLoss, kd_loss

HIDDEN, VOCAB = 8, 50


def eager_loss(s: Tensor, t: Tensor, y: Tensor, temperature: float, alpha: float = 0.9) -> Tensor:
    """The usual recipe, in the logits' dtype: forward KL and cross-entropy, means over the rows."""
    soft = F.kl_div(F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1), reduction="batchmean")
    return alpha * temperature**2 * soft + (1 - alpha) * F.cross_entropy(s, y)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(HIDDEN, 32), nn.Tanh(), nn.Linear(32, VOCAB))


def data(rows: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, teacher's logits, and labels of which a third, all of them early, are ignored."""
    torch.manual_seed(1)
    y = torch.randint(VOCAB, (rows,))
    y[: rows // 3] = -100
    return torch.randn(rows, HIDDEN), 3 * torch.randn(rows, VOCAB), y


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


# each dtype and each reduction once: autocast has no part in a kernel
@pytest.mark.parametrize(("dtype", "reduction"), [(BF16, "mean"), (F16, "none")])
def test_autocast_changes_the_heads_dtype_and_nothing_in_the_loss(dtype, reduction, backend):
    x, t, y = data()
    model = net()
    with torch.autocast(x.device.type, dtype):
        logits = model(x)
        assert logits.dtype == dtype
        loss = kd_loss(logits, t, y, temperature=2.0, reduction=reduction, backend=backend)
    outside = kd_loss(logits, t, y, temperature=2.0, reduction=reduction, backend=backend)
    assert loss.dtype == F32
    assert torch.equal(loss, outside)
    grads = [torch.autograd.grad(each.sum(), logits, retain_graph=True)[0] for each in (loss, outside)]
    assert grads[0].dtype == dtype
    assert torch.equal(*grads)


def test_float16_with_a_loss_scaler_loses_no_gradient_at_real_sizes(backend):
    rows, vocab = 64, 32000  # a part of 4096 rows, each with the gradient that it has among all of them
    student = torch.randn(rows, vocab).mul_(2).half().requires_grad_()
    teacher, labels = student.detach().roll(1, 0), torch.randint(vocab, (rows,))
    scaler = torch.amp.GradScaler(student.device.type)  # its first factor is 65536
    settings = {"divergence": "forward_kl", "temperature": 2.0, "normalizer": 4096}
    loss = kd_loss(student, teacher, labels, backend=backend, **settings)
    scaler.scale(loss).backward()

    true_loss, true_grad = run(student.double(), teacher.double(), labels, backend="reference", **settings)
    torch.testing.assert_close(loss.detach().double(), true_loss, rtol=1e-5, atol=0)
    truth, ours = true_grad * 65536, student.grad
    lost = (ours == 0) & (truth.abs() > 2.0**-24)  # the smallest number above 0 that fp16 has
    assert not lost.any(), f"{lost.double().mean():.2%} of the gradient is lost"
    # rounded once, to nearest: half an ulp, of 2^-11 of the number or of 2^-24, and a little for fp32's own error
    torch.testing.assert_close(ours.double(), truth, rtol=1.02 * 2.0**-11, atol=1.02 * 2.0**-25)
    assert (true_grad.half() == 0).double().mean() > 0.5, "rounded before it was scaled, most of it would be lost"


def trained(optimizer: Callable[..., torch.optim.Optimizer], steps: int, dtype: torch.dtype, loss_of: Any) -> Any:
    """The losses on the way, and the weights at the end; in float16 with autocast and a loss scaler."""
    wide, narrow = torch.promote_types(dtype, F32), dtype == F16
    x, t, y = (each[8:] for each in data())
    x, t = x.to(wide), t.to(wide)
    model = net().to(wide)
    stepping = optimizer(model.parameters())
    scaler = torch.amp.GradScaler(x.device.type, init_scale=1024.0, enabled=narrow)
    curve = []
    for _ in range(steps):
        with torch.autocast(x.device.type, F16, enabled=narrow):
            loss = loss_of(model(x), t, y)
        stepping.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(stepping)
        scaler.update()
        curve.append(loss.detach())
    assert scaler.get_scale() == (1024.0 if narrow else 1.0), "no step was skipped"
    return torch.stack(curve), [p.detach() for p in model.parameters()]


def test_a_scaled_float16_step_matches_plain_pytorch(backend):
    ours = KDLoss(temperature=2.0, divergence="forward_kl", backend=backend)
    step = partial(trained, partial(torch.optim.SGD, lr=0.1), 3, F16)
    _, got = step(ours)
    _, want = step(lambda s, t, y: eager_loss(s.float(), t, y, 2.0))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [F32, pytest.param(F64, marks=pytest.mark.full)])
def test_training_follows_the_curve_of_plain_pytorch(dtype, backend):
    ours = KDLoss(temperature=3.0, alpha=0.7, divergence="forward_kl", backend=backend)
    train = partial(trained, partial(torch.optim.AdamW, lr=0.01), 25, dtype)
    got, _ = train(ours)
    want, _ = train(lambda s, t, y: eager_loss(s, t, y, 3.0, 0.7))
    assert got[-1] < 0.8 * got[0], "it learns"
    torch.testing.assert_close(got, want, rtol=1e-4 if dtype == F32 else 1e-9, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"inplace": True}])
def test_activation_checkpointing_changes_no_gradient(options, use_reentrant, backend):
    x, t, y = data()
    x.requires_grad_()

    def head_and_loss(model: nn.Module, x: Tensor) -> Tensor:
        return kd_loss(model(x), t, y, temperature=2.0, backend=backend, **options).sum()

    expected, model = net(), net()
    head_and_loss(expected, x).backward()
    checkpoint(head_and_loss, model, x, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(gradients(model), gradients(expected))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulation_with_a_normalizer_gives_the_big_batchs_gradient(as_tensor, backend):
    x, t, y = data()
    whole, parts = net(), net()
    kd_loss(whole(x), t, y, temperature=2.0, backend=backend).backward()
    tokens = (y != -100).sum()
    for i in (slice(0, 10), slice(10, 12), slice(12, None)):  # of 2, 2 and 12 tokens that count
        normalizer = tokens if as_tensor else tokens.item()
        kd_loss(parts(x[i]), t[i], y[i], temperature=2.0, normalizer=normalizer, backend=backend).backward()
    torch.testing.assert_close(gradients(parts), gradients(whole))


def _rank(rank: int, folder: str, backend: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with gpu.kernels() if backend in ON_GPU else contextlib.nullcontext():  # in a process of its own
        mine = slice(0, 10) if rank == 0 else slice(10, None)  # 2 tokens that count on one, 14 on the other
        x, t, y = (each[mine] for each in data())
        tokens = (y != -100).sum()
        dist.all_reduce(tokens)
        model = nn.parallel.DistributedDataParallel(net())
        # DDP averages over the ranks, hence the tokens of all of them by their number
        kd_loss(model(x), t, y, temperature=2.0, normalizer=tokens / 2, backend=backend).backward()
        torch.save(gradients(model), f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves while the other still reads from it makes that one abort
    os._exit(0)  # DDP's reducer, freed last, would join gloo's threads with the GIL held, which they may wait for


# the processes' own sums, of gradients that are a backend's as in the tests above: one backend shows it
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=() if name == "cpu" else pytest.mark.full) for name in BACKENDS], indirect=True
)
def test_ddp_ranks_with_unequal_tokens_get_the_big_batchs_gradient(tmp_path: Path, backend):
    x, t, y = data()
    whole = net()
    kd_loss(whole(x), t, y, temperature=2.0, backend=backend).backward()
    torch.multiprocessing.spawn(_rank, (str(tmp_path), backend), nprocs=2)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), gradients(whole))
