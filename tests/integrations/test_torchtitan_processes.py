"""torchtitan: kdfast's DistillationLoss on two processes, of data in parallel and of a head that is split over tp."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import spmd_types as spmd
import torch
import torch.distributed as dist
from ranks import results_of_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import cross_entropy
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.distributed.spmd_types import set_current_spmd_mesh
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan_cases import (
    HARD_ALONE,
    KD,
    VOCABULARY,
    batches,
    micro_batches,
    models,
    one_batch,
    plain_loss,
    train,
    train_plainly,
)

from kdfast.integrations.torchtitan import DistillationLoss


class SummedSGD(torch.optim.SGD):
    """torchtitan's FSDP sums gradients over the ranks, since it divides by the tokens of all of them."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                dist.all_reduce(parameter.grad)
        super().step()


def data_parallel(rank: int, mesh: DeviceMesh) -> list[Tensor]:
    """Parameters after the steps: each rank has two of the four samples, in two micro-batches."""
    student, teacher = models(torch.float64)
    dims = SimpleNamespace(
        dp_enabled=True,
        pp_enabled=False,
        cp_enabled=False,
        ep_enabled=False,
        get_mesh=lambda name: mesh,
        get_optional_mesh=lambda name: None,
    )
    optimizer = SummedSGD(student.parameters(), lr=0.5)
    steps = [micro_batches(batch, 2)[rank] for batch in batches()]
    loss_fn = DistillationLoss.Config(kd=KD).build()
    train(loss_fn, student, teacher, steps, pieces=2, parallel_dims=dims, optimizers=optimizer)
    return [p.detach() for p in student.parameters()]


def split_vocabulary(mesh: DeviceMesh, backend: str) -> dict[str, Any]:
    """Loss and gradient of this process's classes, by kdfast and, of labels alone, by torchtitan."""
    set_spmd_backend(backend)
    own = mesh.get_local_rank("tp")
    student, teacher, labels, tokens = one_batch(torch.float32)
    results = {}

    def result(loss_fn: Any, **teachers: Tensor) -> tuple[float, Tensor]:
        part = student.detach().chunk(2, -1)[own].clone().requires_grad_()
        if backend == "spmd_types":
            with set_current_spmd_mesh(mesh):
                loss, _ = loss_fn(part, labels, tokens, **teachers)
        else:
            loss, _ = loss_fn(DTensor.from_local(part, mesh["tp"], [Shard(2)]), labels, tokens, **teachers)
        loss.backward()
        return loss.item(), part.grad

    loss_fn = DistillationLoss.Config(kd=KD).build()
    results["a whole teacher"] = result(loss_fn, teacher_logits=teacher)
    split = teacher.chunk(2, -1)[own]
    if backend != "spmd_types":
        split = DTensor.from_local(split, mesh["tp"], [Shard(2)])
    results["a split teacher"] = result(loss_fn, teacher_logits=split)
    results["labels alone"] = result(DistillationLoss.Config(kd=HARD_ALONE).build())
    results["torchtitan"] = result(CrossEntropyLoss.Config(global_vocab_size=VOCABULARY).build())
    return results


def type_checked(mesh: DeviceMesh) -> float:
    """A call under torchtitan's type checking of parallel tensors, which asserts what type the loss has."""
    from spmd_types.checker import typecheck

    set_spmd_backend("spmd_types")
    student, teacher, labels, tokens = one_batch(torch.float32)
    part = student.detach().chunk(2, -1)[mesh.get_local_rank("tp")].clone().requires_grad_()
    with typecheck(), set_current_spmd_mesh(mesh):
        spmd.assert_type(part, {"dp": spmd.S(0), "cp": spmd.S(1), "tp": spmd.S(2)})
        spmd.assert_type(labels, {"dp": spmd.S(0), "cp": spmd.S(1), "tp": spmd.I})
        loss, _ = DistillationLoss.Config(kd=KD).build()(part, labels, tokens, teacher_logits=teacher)
        assert spmd.I in spmd.get_local_type(loss).values()
    return loss.item()


def on_rank(rank: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    batch_mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("batch",))
    mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("dp", "cp", "tp"))
    results = {backend: split_vocabulary(mesh, backend) for backend in ("partial_dtensor", "spmd_types")}
    return {**results, "types": type_checked(mesh), "data": data_parallel(rank, batch_mesh)}


def test_two_processes_train_as_one(tmp_path: Path):
    """Of data in parallel, and of a head that torchtitan splits over tp, in both of its ways to hold such logits."""
    ranks = results_of_ranks(tmp_path, on_rank, start_method="fork")
    student, teacher, labels, tokens = one_batch()
    losses = {
        "a whole teacher": plain_loss(student, teacher, labels) / tokens,
        "labels alone": cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="sum") / tokens,
    }
    losses["a split teacher"], losses["torchtitan"] = losses["a whole teacher"], losses["labels alone"]
    for name, expected in losses.items():
        (gradient,) = torch.autograd.grad(expected, student, retain_graph=True)
        for rank, results in enumerate(ranks):
            for backend in ("partial_dtensor", "spmd_types"):
                loss, own = results[backend][name]
                assert loss == pytest.approx(expected.item(), rel=1e-6), (name, backend)
                torch.testing.assert_close(own.double(), gradient.chunk(2, -1)[rank], rtol=1e-5, atol=1e-8)
    assert [results["types"] for results in ranks] == pytest.approx([losses["a whole teacher"].item()] * 2, rel=1e-6)
    expected_parameters = list(train_plainly().parameters())
    for results in ranks:
        for own, expected in zip(results["data"], expected_parameters, strict=True):
            torch.testing.assert_close(own.double(), expected, rtol=0, atol=1e-7)
