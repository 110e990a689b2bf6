"""NeMo-RL's distillation loss of logits that are split over 2 context-parallel x 2 tensor-parallel processes."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nemo_rl_cases import CONFIGS, batch, nemo_rl_loss, random_logits, spoil_dropped, valid_tokens
from ranks import results_of_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from kdfast.integrations import nemo_rl


def own_positions(x: Tensor, rank: int, ranks: int) -> Tensor:
    """NeMo-RL's balanced order: of 2 n chunks of the sequence the r-th from either end."""
    chunks = x.chunk(2 * ranks, 1)
    return torch.cat((chunks[rank], chunks[-1 - rank]), 1)


class NeMoRLsGather(torch.autograd.Function):
    """What AllGatherCPTensor of nemo_rl/distributed/model_utils.py does for two ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(2)]
        dist.all_gather(parts, x, group=group)
        (first, last), (second, third) = (part.chunk(2, 1) for part in parts)
        return torch.cat((first, second, third, last), 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return own_positions(total, dist.get_rank(ctx.group), 2), None


def megatron(tp: Any, cp: Any) -> Any:
    return SimpleNamespace(
        model_parallel_is_initialized=lambda: True,
        get_tensor_model_parallel_group=lambda: tp,
        get_context_parallel_group=lambda: cp,
    )


def on_rank(
    rank: int, logits: Tensor, data: dict[str, Tensor], spoiled: dict[str, Tensor], total: Tensor
) -> dict[str, Any]:
    """For each config and kind of call the loss and the gradient of this process's part of the logits.

    spoiled: the data, with other values where they do not count. The losses are scaled as NeMo-RL's workers do, but for
    the ranks whose gradients are then summed.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    cp, tp = mesh.get_group("cp"), mesh.get_group("tp")
    alone = dist.new_subgroups(1)[0]  # a group of this process, which Megatron has where nothing is split
    classes = logits.chunk(2, -1)[mesh.get_local_rank("tp")]
    both = own_positions(classes, mesh.get_local_rank("cp"), 2)
    positions = own_positions(logits, mesh.get_local_rank("cp"), 2)
    results: dict[str, Any] = {}

    def add(name: str, part: Tensor, loss_fn: Any, wrap: Any = lambda x: x, scale: float = 1, **groups: Any) -> None:
        part = part.clone().requires_grad_()
        loss, metrics = loss_fn(wrap(part), spoiled, None, total, **groups)
        (loss * scale).backward()
        results[name] = loss.item(), metrics["loss"], part.grad

    for config in CONFIGS:
        loss_fn = nemo_rl.DistillationLossFn(config)
        name = f"{config['kl_type']} {config['zero_outside_topk']}"
        add(f"{name} tp", classes, loss_fn, vocab_parallel_group=tp)
        add(f"{name} cp", positions, loss_fn, scale=1 / 2, context_parallel_group=cp)
        sys.modules["megatron.core.parallel_state"] = megatron(tp, cp)
        add(f"{name} both", both, loss_fn, scale=1 / 2)  # the worker divides by cp
        sys.modules["megatron.core.parallel_state"] = megatron(alone, alone)
        add(f"{name} whole", logits, loss_fn)
        del sys.modules["megatron.core.parallel_state"]
        split = Shard(1), Shard(-1)
        add(f"{name} both by DTensor", both, loss_fn, lambda x: DTensor.from_local(x, mesh, split))  # noqa: B023
        whole = Replicate(), Shard(2)
        add(f"{name} tp by DTensor", classes, loss_fn, lambda x: DTensor.from_local(x, mesh, whole))  # noqa: B023
    part = positions.clone().requires_grad_()
    theirs = nemo_rl_loss(NeMoRLsGather.apply(part, cp)[:, :7], data, CONFIGS[0], total)
    theirs.backward()
    results["NeMo-RL by DTensor"] = theirs.item(), theirs.item(), part.grad
    for placements in ((Shard(0), Shard(2)), (Partial(), Shard(2))):
        with pytest.raises(TypeError, match="logits: is a DTensor with placements"):
            loss_fn(DTensor.from_local(both, mesh, placements), data, None, total)
    return results


def test_each_process_gets_its_part_of_one_processes_gradient(tmp_path: Path):
    """Seven positions of data with eight of logits, as where NeMo-RL pads sequences to a multiple of 2 cp.

    NeMo-RL's own is cp times too large in automodel's workers, which do not divide the loss by cp as Megatron's do.
    """
    logits = random_logits().detach()
    data = batch(logits)
    data = {name: value[:, :7] if value.dim() > 1 else value for name, value in data.items()}
    total, spoiled = valid_tokens(data), dict(data)
    spoil_dropped(spoiled)
    ranks = results_of_ranks(tmp_path, on_rank, logits, data, spoiled, total, ranks=4, start_method="fork")
    for config in CONFIGS:
        whole = logits.clone().requires_grad_()
        expected = nemo_rl_loss(whole[:, :7], data, config, total)
        expected.backward()
        for rank, results in enumerate(ranks):
            c, t = divmod(rank, 2)
            classes = whole.grad.chunk(2, -1)[t]
            name = f"{config['kl_type']} {config['zero_outside_topk']}"
            parts = {
                f"{name} tp": classes,
                f"{name} cp": own_positions(whole.grad, c, 2),
                f"{name} both": own_positions(classes, c, 2),
                f"{name} whole": whole.grad,
                f"{name} both by DTensor": own_positions(classes, c, 2),
                f"{name} tp by DTensor": classes,
            }
            if config is CONFIGS[0]:
                parts["NeMo-RL by DTensor"] = 2 * own_positions(whole.grad, c, 2)
            for name, gradient in parts.items():
                loss, metric, own = results[name]
                assert (loss, metric) == pytest.approx((expected.item(), expected.item()), rel=1e-7), name
                torch.testing.assert_close(own, gradient, rtol=1e-7, atol=1e-12, msg=lambda m: f"{name}: {m}")  # noqa: B023
