"""kdfast in a training loop: precision, loss scaling, checkpointing, accumulation, several processes."""

import contextlib
import os
from pathlib import Path

import gpu  # before anything that imports Triton
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import BACKENDS, BF16, F16, F32, F64, ON_GPU
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
        wide = kd_loss(logits.float(), t, y, temperature=2.0, reduction=reduction, backend=backend)
    outside = kd_loss(logits, t, y, temperature=2.0, reduction=reduction, backend=backend)
    assert loss.dtype == wide.dtype == F32
    assert torch.equal(loss, outside)
    torch.testing.assert_close(loss, wide, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(each.sum(), logits, retain_graph=True)[0] for each in (loss, outside)]
    assert grads[0].dtype == dtype
    assert torch.equal(*grads)


def test_a_loss_scaler_in_float16_loses_no_gradient_at_real_sizes(backend):
    # a part of the rows, each with the gradient that it has among all of them
    total, vocab, some = 4096, 32000, 64
    rows = some if backend == "triton" else 256
    student = torch.randn(rows, vocab).mul_(2).half().requires_grad_()
    teacher = student.detach().roll(1, 0)
    labels = torch.randint(vocab, (rows,))
    scaler = torch.amp.GradScaler(student.device.type)  # its first factor is 65536
    loss = kd_loss(
        student, teacher, labels, divergence="forward_kl", temperature=2.0, normalizer=total, backend=backend
    )
    scaler.scale(loss).backward()

    with torch.no_grad():
        parts = zip(student.split(256), teacher.split(256), labels.split(256), strict=True)
        eager = sum(eager_loss(s.float(), t.float(), y, 2.0) * len(y) / total for s, t, y in parts)
    torch.testing.assert_close(loss.detach(), eager, rtol=1e-5, atol=0)

    s = student.detach()[:some].double().requires_grad_()
    (eager_loss(s, teacher[:some].double(), labels[:some], 2.0) * some / total).backward()
    truth, ours = s.grad * 65536, student.grad[:some]
    lost = (ours == 0) & (truth.abs() > 2.0**-24)  # the smallest number above 0 that fp16 has
    assert not lost.any(), f"{lost.double().mean():.2%} of the gradient is lost"
    # rounded once, to nearest: half an ulp, of 2^-11 of the number or of 2^-24, and a little for fp32's own error
    torch.testing.assert_close(ours.double(), truth, rtol=1.02 * 2.0**-11, atol=1.02 * 2.0**-25)
    assert (s.grad.half() == 0).double().mean() > 0.5, "rounded before it was scaled, most of it would be lost"


def test_a_scaled_step_in_float16_moves_the_weights_as_plain_pytorch_does(backend):
    x, t, y = data()
    x, t, y = x[8:], t[8:], y[8:]
    weights = []
    for loss_of in (lambda s: kd_loss(s, t, y, divergence="forward_kl", temperature=2.0, backend=backend), None):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler(x.device.type, init_scale=1024.0)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast(x.device.type, F16):
                logits = model(x)
                loss = loss_of(logits) if loss_of else eager_loss(logits.float(), t, y, 2.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 1024.0, "no step was skipped"
        weights.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"inplace": True}])
def test_activation_checkpointing_around_head_and_loss_changes_no_gradient(options, use_reentrant, backend):
    x, t, y = data()
    x.requires_grad_()

    def head_and_loss(model: nn.Module, x: Tensor) -> Tensor:
        return kd_loss(model(x), t, y, temperature=2.0, backend=backend, **options).sum()

    expected, model = net(), net()
    head_and_loss(expected, x).backward()
    checkpoint(head_and_loss, model, x, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(gradients(model), gradients(expected))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_accumulated_gradients_with_a_normalizer_are_the_big_batchs(as_tensor, backend):
    x, t, y = data()
    whole, parts = net(), net()
    kd_loss(whole(x), t, y, temperature=2.0, backend=backend).backward()
    tokens = (y != -100).sum()
    for i in (slice(0, 10), slice(10, 12), slice(12, None)):  # of 2, 2 and 12 tokens that count
        normalizer = tokens if as_tensor else tokens.item()
        kd_loss(parts(x[i]), t[i], y[i], temperature=2.0, normalizer=normalizer, backend=backend).backward()
    torch.testing.assert_close(gradients(parts), gradients(whole))


def _rank(rank: int, folder: str, backend: str) -> None:
    with gpu.kernels() if backend in ON_GPU else contextlib.nullcontext():  # in a process of its own
        _train_rank(rank, folder, backend)


def _train_rank(rank: int, folder: str, backend: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, t, y = data()
    mine = slice(0, 10) if rank == 0 else slice(10, None)  # 2 tokens that count on one, 14 on the other
    x, t, y = x[mine], t[mine], y[mine]
    tokens = (y != -100).sum()
    dist.all_reduce(tokens)
    model = nn.parallel.DistributedDataParallel(net())
    # DDP averages over the ranks, hence the tokens of all of them by their number
    kd_loss(model(x), t, y, temperature=2.0, normalizer=tokens / 2, backend=backend).backward()
    torch.save(gradients(model), f"{folder}/{rank}.pt")
    dist.barrier()  # a rank that leaves while the other still reads from it makes that one abort
    dist.destroy_process_group()


# the processes' own sums, of gradients that are a backend's as in the tests above: one backend shows it
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=() if name == "cpu" else pytest.mark.full) for name in BACKENDS], indirect=True
)
def test_data_parallel_ranks_with_unequal_tokens_get_the_big_batchs_gradient(tmp_path: Path, backend):
    x, t, y = data()
    whole = net()
    kd_loss(whole(x), t, y, temperature=2.0, backend=backend).backward()
    torch.multiprocessing.spawn(_rank, (str(tmp_path), backend), nprocs=2)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), gradients(whole))


@pytest.mark.parametrize("dtype", [F32, pytest.param(F64, marks=pytest.mark.full)])
def test_a_net_trained_with_kdfast_follows_the_curve_of_plain_pytorch(dtype, backend):
    x, t, y = data()
    x, t, y = x[8:].to(dtype), t[8:].to(dtype), y[8:]
    loss_of = KDLoss(temperature=3.0, alpha=0.7, divergence="forward_kl", backend=backend)
    curves = []
    for loss_function in (loss_of, lambda s, t, y: eager_loss(s, t, y, 3.0, 0.7)):
        model = net().to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        curve = []
        for _ in range(25):
            loss = loss_function(model(x), t, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    assert curves[0][-1] < 0.8 * curves[0][0], "it learns"
    torch.testing.assert_close(*curves, rtol=1e-4 if dtype == F32 else 1e-9, atol=0)
