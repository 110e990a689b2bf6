"""Sparse teachers in a training loop: metrics, autocast, loss scaling, checkpointing, workers' batches.

test_compile.py has torch.compile, and test_training.py DDP, which sees no teacher.
"""

import gpu  # before anything that imports Triton
import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F16, F32, F64
from sparse_cases import FORMS, INF, NAN, kd, options, plain_losses, sparse_batch
from torch import nn
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_collate

from kdfast import KDMetrics, TopKTargets, kd_loss, linear_kd_loss, topk_targets

MASSES = ("student_mass", "teacher_mass")


@pytest.mark.parametrize("missing", FORMS)
def test_metrics_have_the_masses_of_the_entries(backend: str, missing: str) -> None:
    T, (student, teacher, labels) = 2.0, sparse_batch(6, 12, 4, temperature=2.0, gaps=True)
    labels[1] = -100
    weight = torch.linspace(1, 2, 6)
    settings = options(missing, temperature=T, row_weight=weight, backend=backend, return_metrics=True)
    _, rows = kd_loss(student, teacher, labels, reduction="none", **settings)
    absent = teacher.log_probs == -INF
    q = torch.softmax(student / T, -1).gather(-1, teacher.indices.clamp(min=0)).masked_fill(absent, 0)
    want = {
        "student_mass": q.sum(-1),
        "teacher_mass": teacher.log_probs.exp().sum(-1),
        "soft": T * T * plain_losses(student / T, teacher, missing, settings["divergence"]),
        "kl": plain_losses(student / T, teacher, missing, "forward_kl"),
        "student_entropy": torch.distributions.Categorical(logits=student / T).entropy(),
        "agreement": (student.argmax(-1) == teacher.indices[:, 0]).double(),
        "accuracy": (student.argmax(-1) == labels).double(),
        "hard": F.cross_entropy(student, labels, reduction="none"),
    }
    keep = torch.arange(6) != 1
    _, mean = kd_loss(student, teacher, labels, **settings)
    for name, value in want.items():
        got = getattr(rows, name)
        torch.testing.assert_close(got[keep], value[keep])
        assert got[1].isnan(), name
        wanted = (value * weight)[keep].sum() / weight[keep].sum()
        torch.testing.assert_close(getattr(mean, name), wanted)


def test_a_dense_teacher_has_no_masses_and_a_row_without_entries_has_0(backend: str) -> None:
    student, teacher, _ = sparse_batch(3, 12, 4, F32)
    _, metrics = kd_loss(student, torch.randn(3, 12), return_metrics=True, backend=backend)
    assert isinstance(metrics, KDMetrics)
    teacher.log_probs[1] = -INF
    _, metrics = kd_loss(student, teacher, return_metrics=True, reduction="none", backend=backend)
    assert all(getattr(metrics, name)[1] == 0 for name in (*MASSES, "soft", "kl", "teacher_entropy", "agreement"))
    dropped = torch.zeros(3)
    _, metrics = kd_loss(student, teacher, row_weight=dropped, return_metrics=True, backend=backend)
    assert all(getattr(metrics, name).isnan() for name in MASSES)


def test_metrics_change_neither_loss_nor_gradient(backend: str) -> None:
    student, teacher, labels = sparse_batch(5, 300, 4, F32, gaps=True)
    for missing in FORMS:
        settings = options(missing, temperature=2.0, backend=backend)
        want = kd(student, teacher, labels, **settings)
        leaf = student.clone().requires_grad_()
        loss, _ = kd_loss(leaf, teacher, labels, return_metrics=True, **settings)
        loss.backward()
        torch.testing.assert_close(loss.detach(), want[0])
        torch.testing.assert_close(leaf.grad, want[1])


def test_metrics_of_terms_without_a_weight_cannot_reach_the_loss(backend: str) -> None:
    student, teacher, labels = sparse_batch(3, 12, 4, F32)
    teacher.log_probs[:] = NAN
    loss, metrics = kd_loss(student, teacher, labels, alpha=0, return_metrics=True, backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(student, labels))
    assert metrics.soft.isnan()


@pytest.mark.parametrize("missing", FORMS)
def test_checkpointing_and_autocast_change_no_gradient(backend: str, missing: str) -> None:
    torch.manual_seed(0)
    head, x = nn.Linear(8, 40), torch.randn(6, 8)
    teacher = topk_targets(torch.randn(6, 40), 5)
    settings = options(missing, backend=backend)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return kd_loss(head(x), teacher, **settings)

    loss(x).backward()
    want = head.weight.grad.clone()
    head.weight.grad = None
    checkpoint(loss, x, use_reentrant=False).backward()
    torch.testing.assert_close(head.weight.grad, want)
    head.weight.grad = None
    with torch.autocast(x.device.type, BF16):
        logits = head(x)
        assert logits.dtype == BF16
        value = kd_loss(logits, teacher, **settings)
    assert value.dtype == F32
    value.backward()
    torch.testing.assert_close(head.weight.grad, want, rtol=0.1, atol=0.02)


def test_float16_with_a_loss_scaler_loses_no_gradient(backend: str) -> None:
    """1 / rows alone would make most of the classes' gradients 0 in float16."""
    student, teacher, _ = sparse_batch(64, 4000, 8, F16)
    scaler = torch.amp.GradScaler(student.device.type)  # its first factor is 65536
    for missing in ("tail", "conditional"):
        settings = options(missing, normalizer=2.0**12, backend=backend)
        leaf = student.clone().requires_grad_()
        scaler.scale(kd_loss(leaf, teacher, **settings)).backward()
        want = kd(student.float(), teacher, **settings)[1]
        torch.testing.assert_close(leaf.grad.float() / 65536, want, rtol=2e-3, atol=1e-11)


def test_workers_batches_are_sparse_teachers() -> None:
    """default_collate and pytree know named tuples; .to() moves both, and casts the log-probabilities alone."""
    samples = [(torch.randn(7), *topk_targets(torch.randn(3, 50), 4)) for _ in range(6)]
    rows = [(x, TopKTargets(indices, log_probs)) for x, indices, log_probs in samples]
    loader = DataLoader(rows, batch_size=3, num_workers=0 if gpu.ON_DEVICE else 2)
    for _, teacher in loader:
        assert type(teacher) is TopKTargets
        assert teacher.indices.shape == teacher.log_probs.shape == (3, 3, 4)
        assert kd_loss(torch.randn(3, 3, 50), teacher).isfinite()
    teacher = default_collate(rows)[1]
    doubled = _pytree.tree_map(lambda x: torch.cat([x, x]), teacher)
    assert type(doubled) is TopKTargets
    assert doubled.indices.shape == (12, 3, 4)
    moved = teacher.to("meta", F16, non_blocking=True)
    assert (moved.indices.device.type, moved.indices.dtype) == ("meta", torch.int64)
    assert (moved.log_probs.device.type, moved.log_probs.dtype) == ("meta", F16)
    assert teacher.to(dtype=F64).indices is teacher.indices
    assert teacher.to(teacher.log_probs.device).log_probs is teacher.log_probs
    assert teacher.to(F32, copy=True).indices is not teacher.indices


def test_linear_and_plain_losses_train_alike(backend: str) -> None:
    torch.manual_seed(0)
    x, teacher = torch.randn(20, 8), topk_targets(3 * torch.randn(20, 40), 5)
    losses = []
    for linear in (False, True):
        torch.manual_seed(1)
        head = nn.Linear(8, 40)
        optimizer = torch.optim.SGD(head.parameters(), lr=2.0)
        settings = {"missing": "conditional", "backend": backend}
        for _ in range(10):
            if linear:
                loss = linear_kd_loss(x, head.weight, teacher, None, student_bias=head.bias, **settings)
            else:
                loss = kd_loss(head(x), teacher, **settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
