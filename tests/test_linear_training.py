"""The linear losses with torch.compile, activation checkpointing, DDP and FSDP2, and as a module."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import F64
from linear_cases import HIDDEN, VOCAB, Case
from ranks import gradients, results_of_ranks
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import kdfast


class Model(nn.Module):
    """A trunk, a head and the loss."""

    def __init__(self, checkpointed: bool = False, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(HIDDEN, 16), nn.Tanh(), nn.Linear(16, HIDDEN))
        self.head = nn.Linear(HIDDEN, VOCAB)
        self.loss, self.checkpointed = kdfast.LinearKDLoss(temperature=2.0, chunk_rows=4, **settings), checkpointed

    def forward(self, x: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor, **more: Any) -> Tensor:
        hidden = checkpoint(self.trunk, x, use_reentrant=False) if self.checkpointed else self.trunk(x)
        head = self.head
        return self.loss(hidden, head.weight, teacher_hidden, teacher_weight, labels, student_bias=head.bias, **more)


def batch(case: Case) -> tuple[Tensor, ...]:
    return case.hidden, case.teacher_hidden, case.teacher_weight, case.labels


def unfused_gradients(case: Case) -> list[Tensor]:
    model = Model()
    logits = model.head(model.trunk(case.hidden))
    kdfast.kd_loss(logits, case.teacher_logits(), case.labels, temperature=2.0, backend="reference").backward()
    return gradients(model)


@pytest.mark.parametrize(
    ("compiler", "settings"),
    [
        ("aot_eager", {}),
        ("aot_eager", {"reduction": "none"}),
        ("aot_eager", {"return_metrics": True}),
        ("inductor", {}),  # once: the other differences are inside of the operator
    ],
    ids=["mean", "none", "metrics", "inductor"],
)
def test_a_model_that_ends_in_the_loss_compiles_to_one_graph(settings: dict[str, Any], compiler: str) -> None:
    torch._dynamo.reset()
    case, model = Case(), Model(**settings)

    def step(*args: Tensor) -> Tensor:
        loss = model(*args)
        return (loss[0] if isinstance(loss, tuple) else loss).mean()

    with torch._inductor.utils.fresh_cache():
        compiled = torch.compile(step, fullgraph=True, backend=compiler)
        loss = compiled(*batch(case))
        loss.backward()
    got = gradients(model)
    model.zero_grad()
    want = step(*batch(case))
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(got, gradients(model))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*batch(case)), want)


def test_a_dynamic_number_of_rows_compiles_once(cpu: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (5, 13, 9):
        case = Case(rows=rows)
        inputs = batch(case)
        for i in (0, 1, 3):
            torch._dynamo.mark_dynamic(inputs[i], 0)
        model.zero_grad()
        compiled(*inputs).backward()
        torch.testing.assert_close(gradients(model), unfused_gradients(case))
    assert counter.frame_count == 1


def test_checkpointing_the_trunk_changes_no_gradient(backend: str) -> None:
    case = Case()
    model = Model(checkpointed=True, backend=backend)
    model(*batch(case)).backward()
    torch.testing.assert_close(gradients(model), unfused_gradients(case))


def gradients_of_rank(rank: int, kind: str) -> list[Tensor]:
    case = Case()
    x, hidden, weight, labels = batch(case)
    mine = slice(0, 6) if rank == 0 else slice(6, None)  # 5 kept tokens on one rank, 7 on the other
    model: Any = Model()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.trunk, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with pytest.raises(TypeError, match=r"^student_weight: is a DTensor.*unshard\(\)"):
            kdfast.linear_kd_loss(x, model.head.weight, hidden, weight)
    tokens = (labels != -100).sum()
    # DDP and FSDP average over the ranks: divide the tokens of all ranks by their number
    model(x[mine], hidden[mine], weight, labels[mine], normalizer=tokens / 2).backward()
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients(model)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ddp_and_fsdp_ranks_get_the_gradients_of_one_process(tmp_path: Path, kind: str) -> None:
    for found in results_of_ranks(tmp_path, gradients_of_rank, kind):
        torch.testing.assert_close(found, unfused_gradients(Case()))


def test_a_teacher_that_requires_grad_gets_no_graph(cpu: str) -> None:
    case = Case()
    case.teacher_bias = torch.zeros(VOCAB, requires_grad=True)
    case.teacher_hidden.requires_grad_()
    case.teacher_weight.requires_grad_()
    loss, metrics = case.loss([case.hidden, case.weight], case.labels, return_metrics=True)
    assert not loss.requires_grad
    assert not metrics.kl.requires_grad


def test_double_backward_raises_an_error(cpu: str) -> None:
    case = Case()
    for reduction in ("mean", "none"):
        leaves = case.leaves()
        loss = case.loss(leaves, case.labels, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss, leaves, create_graph=True)


def test_the_module_calls_linear_kd_loss_and_can_be_copied(cpu: str) -> None:
    case = Case()
    settings = {"temperature": 3.0, "divergence": "jsd", "beta": 0.3, "chunk_rows": 5, "accumulate_dtype": F64}
    loss = kdfast.LinearKDLoss(**settings)
    tensors = case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.labels
    want = kdfast.linear_kd_loss(*tensors, student_bias=case.bias, normalizer=9, **settings)
    for module in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(module(*tensors, student_bias=case.bias, normalizer=9), want)
    with pytest.raises(TypeError, match=r"LinearKDLoss\(\) got an unexpected keyword argument 'T'"):
        kdfast.LinearKDLoss(T=2.0)
    assert not loss.state_dict()
    assert repr(loss) == (
        "LinearKDLoss(temperature=3.0, alpha=None, divergence='jsd', beta=0.3, chunk_rows=5, "
        "accumulate_dtype=torch.float64)"
    )
