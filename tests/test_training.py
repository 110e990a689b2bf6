"""kdfast in a training loop: autocast, loss scaling, activation checkpointing, DDP."""

import contextlib
from pathlib import Path
from typing import Any

import gpu  # before anything that imports Triton
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import BACKENDS, BF16, F16, F32, F64, ON_GPU
from judge import run
from ranks import gradients, results_of_ranks
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
    """Inputs, teacher's logits, and labels; the first third is ignored."""
    torch.manual_seed(1)
    y = torch.randint(VOCAB, (rows,))
    y[: rows // 3] = -100
    return torch.randn(rows, HIDDEN), 3 * torch.randn(rows, VOCAB), y


# each dtype and each reduction once: kernels do not depend on autocast
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
    rows, vocab = 64, 32000  # some of 4096 rows
    student = torch.randn(rows, vocab).mul_(2).half().requires_grad_()
    teacher, labels = student.detach().roll(1, 0), torch.randint(vocab, (rows,))
    scaler = torch.amp.GradScaler(student.device.type)  # its first factor is 65536
    settings = {"divergence": "forward_kl", "temperature": 2.0, "normalizer": 4096}
    loss = kd_loss(student, teacher, labels, backend=backend, **settings)
    scaler.scale(loss).backward()

    true_loss, true_grad = run(student.double(), teacher.double(), labels, backend="reference", **settings)
    torch.testing.assert_close(loss.detach().double(), true_loss, rtol=1e-5, atol=0)
    truth, ours = true_grad * 65536, student.grad
    lost = (ours == 0) & (truth.abs() > 2.0**-24)  # fp16's smallest number above 0
    assert not lost.any(), f"{lost.double().mean():.2%} of the gradient is lost"
    # rounded once: half an ulp, 2^-11 of the number or of 2^-24, and a little for fp32's error
    torch.testing.assert_close(ours.double(), truth, rtol=1.02 * 2.0**-11, atol=1.02 * 2.0**-25)
    assert (true_grad.half() == 0).double().mean() > 0.5, "most of it would be lost if it were rounded before scaling"


def loss_curve(dtype: torch.dtype, loss_of: Any) -> Tensor:
    x, t, y = (each[8:] for each in data())
    x, t, model = x.to(dtype), t.to(dtype), net().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    curve = []
    for _ in range(25):
        loss = loss_of(model(x), t, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve)


@pytest.mark.parametrize("dtype", [F32, pytest.param(F64, marks=pytest.mark.full)])
def test_training_follows_the_curve_of_plain_pytorch(dtype, backend):
    got = loss_curve(dtype, KDLoss(temperature=3.0, alpha=0.7, divergence="forward_kl", backend=backend))
    want = loss_curve(dtype, lambda s, t, y: eager_loss(s, t, y, 3.0, 0.7))
    assert got[-1] < 0.8 * got[0], "the loss falls"
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


def gradients_of_rank(rank: int, backend: str) -> list[Tensor]:
    with gpu.kernels() if backend in ON_GPU else contextlib.nullcontext():  # in a process of its own
        mine = slice(0, 10) if rank == 0 else slice(10, None)  # 2 kept tokens on one rank, 14 on the other
        x, t, y = (each[mine] for each in data())
        tokens = (y != -100).sum()
        dist.all_reduce(tokens)
        model = nn.parallel.DistributedDataParallel(net())
        # DDP averages over the ranks: divide the tokens of all ranks by their number
        kd_loss(model(x), t, y, temperature=2.0, normalizer=tokens / 2, backend=backend).backward()
        return gradients(model)


# DDP sums the gradients, whatever their backend: one is enough
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=() if name == "cpu" else pytest.mark.full) for name in BACKENDS], indirect=True
)
def test_ddp_ranks_with_unequal_tokens_get_the_big_batchs_gradient(tmp_path: Path, backend):
    x, t, y = data()
    whole = net()
    kd_loss(whole(x), t, y, temperature=2.0, backend=backend).backward()
    for found in results_of_ranks(tmp_path, gradients_of_rank, backend):
        torch.testing.assert_close(found, gradients(whole))
