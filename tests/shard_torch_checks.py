"""Checks of split vocabularies with DTensors, torch.compile, checkpointing, DDP and FSDP2, on every rank of a group."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import F32, F64
from linear_cases import HIDDEN, Case, plain_results
from shard_checks import VOCAB, data
from shard_promises import raises
from shards import Group, as_pair, grad_output, part, same, whole_results
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import kdfast


def mesh_of(group: Group) -> DeviceMesh:
    return init_device_mesh("cpu", (group.ranks,), mesh_dim_names=("tp",))


def chunk(group: Group, vocab: int) -> slice:
    most = -(-vocab // group.ranks)
    return slice(min(group.rank * most, vocab), min((group.rank + 1) * most, vocab))


def dtensors_need_neither_group_nor_start(group: Group) -> None:
    mesh, (s, t, y) = mesh_of(group), data()
    own = chunk(group, VOCAB)
    rows = {"row_weight": torch.linspace(0, 2, len(y))}
    for divergence in ("cross_entropy", "jsd", "dkd"):
        want = whole_results(s, t, y, divergence=divergence, reduction="none", **rows)
        for teacher, labels, weight in (
            (distribute_tensor(t, mesh, [Shard(1)]), y, rows["row_weight"]),
            (
                distribute_tensor(t, mesh, [Replicate()]),
                *(distribute_tensor(x, mesh, [Replicate()]) for x in (y, rows["row_weight"])),
            ),
            (t, y, rows["row_weight"]),
        ):
            leaf = distribute_tensor(s, mesh, [Shard(-1)]).requires_grad_()
            loss = kdfast.kd_loss(leaf, teacher, labels, divergence=divergence, reduction="none", row_weight=weight)
            assert not isinstance(loss, DTensor)
            loss.backward(grad_output(loss))
            assert leaf.grad.placements == (Shard(1),)
            same(divergence, (loss.detach(), leaf.grad.to_local(), ()), want, own)
    leaf = distribute_tensor(s, mesh, [Replicate()]).requires_grad_()
    loss = kdfast.kd_loss(leaf, distribute_tensor(t, mesh, [Replicate()]), y)
    loss.backward(grad_output(loss))
    same("whole", (loss.detach(), leaf.grad.to_local(), ()), whole_results(s, t, y), slice(None))


def other_layouts_of_dtensors_are_errors_that_say_what_to_do(group: Group) -> None:
    mesh, (s, t, y) = mesh_of(group), data()
    split = distribute_tensor(s, mesh, [Shard(1)])
    rows = distribute_tensor(s, mesh, [Shard(0)])
    words = ("to_local()", "process_group", "normalizer")
    for logits in (rows, DTensor.from_local(s, mesh, [Partial()], run_check=False)):
        for word in words:
            raises(group, TypeError, word, lambda x=logits: kdfast.kd_loss(x, t, y))
    raises(group, TypeError, "teacher: is a DTensor", lambda: kdfast.kd_loss(split, rows, y))
    raises(
        group,
        TypeError,
        "labels: is a DTensor",
        lambda: kdfast.kd_loss(split, t, distribute_tensor(y, mesh, [Shard(0)])),
    )
    raises(group, TypeError, "pass to_local()", lambda: kdfast.kd_loss(s, split, y))
    raises(
        group,
        ValueError,
        "process_group: given with",
        lambda: kdfast.kd_loss(split, t, y, process_group=dist.group.WORLD),
    )
    raises(group, TypeError, "of a DeviceMesh pass get_group()", lambda: kdfast.kd_loss(s, t, y, process_group=mesh))
    leaf = split.detach().requires_grad_()
    raises(group, RuntimeError, "is a leaf", lambda: kdfast.kd_loss(leaf, t, y, inplace=True))


def colwise_parallel_heads_work_beside_loss_parallel(group: Group) -> None:
    mesh, case = mesh_of(group), Case(F64)
    want = plain_results(case, case.labels, F64, temperature=2.0)
    for inside in (False, True):
        head = nn.Linear(HIDDEN, len(case.weight), dtype=F64)
        head.load_state_dict({"weight": case.weight, "bias": case.bias})
        parallelize_module(head, mesh, ColwiseParallel(use_local_output=False))
        hidden = case.hidden.clone().requires_grad_()
        if inside:
            with loss_parallel():
                logits = head(hidden)
                loss = kdfast.kd_loss(logits, case.teacher_logits(), case.labels, temperature=2.0)
                loss.backward(grad_output(loss) / 0.7)
        else:
            loss = kdfast.kd_loss(head(hidden), case.teacher_logits(), case.labels, temperature=2.0)
            loss.backward()
        found = [hidden.grad, head.weight.grad.full_tensor(), head.bias.grad.full_tensor()]
        torch.testing.assert_close([loss.detach(), *found], [want[0], *want[1]], rtol=1e-11, atol=1e-13)


def heads_that_are_dtensors_are_split_as_they_are(group: Group) -> None:
    mesh, case = mesh_of(group), Case(F64)
    want = plain_results(case, case.labels, F64, divergence="jsd")
    for given in ("group", "hidden", "partial"):
        hidden = case.hidden.clone().requires_grad_()
        weight, bias = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (case.weight, case.bias))
        x: Any = hidden
        options: dict[str, Any] = {"process_group": mesh.get_group()}
        if given != "group":
            x, options = DTensor.from_local(hidden, mesh, [Replicate()]), {"reduce_hidden": given == "hidden"}
        teacher = distribute_tensor(case.teacher_weight, mesh, [Shard(0)])
        loss = kdfast.linear_kd_loss(
            x, weight, case.teacher_hidden, teacher, case.labels, student_bias=bias, divergence="jsd", **options
        )
        loss.backward()
        found = [hidden.grad, weight.grad.full_tensor(), bias.grad.full_tensor()]
        torch.testing.assert_close([loss.detach(), *found], [want[0], *want[1]], rtol=1e-11, atol=1e-13)
    for words in ("unshard()", "process_group=mesh.get_group"):  # it may be FSDP2's
        raises(group, TypeError, words, lambda: kdfast.linear_kd_loss(hidden, weight, case.teacher_hidden, teacher))
    split = distribute_tensor(case.hidden, mesh, [Shard(0)])
    raises(
        group,
        TypeError,
        "student_hidden: is a DTensor",
        lambda: kdfast.linear_kd_loss(split, weight, None, None, case.labels, alpha=0),
    )


def a_call_compiles_to_one_graph(group: Group) -> None:
    s, t, y = data(F32)
    own = group.own(VOCAB)
    calls: list[dict[str, Any]] = [
        {"divergence": "jsd", "temperature": 2.0},
        {"divergence": "dkd", "vocab_start": None},
        {"reduction": "none", "return_metrics": True},
        {"inplace": True},
    ]
    for options in calls:
        options = {"process_group": dist.group.WORLD, "vocab_start": own.start, "backend": None, **options}

        def step(x: Tensor, teacher: Tensor, labels: Tensor, o: Any = options) -> Any:
            return kdfast.kd_loss(x * 1, teacher, labels, **o)

        torch._dynamo.reset()
        results = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaf = s[:, own].clone().requires_grad_()
            loss, metrics = as_pair(function(leaf, part(t, own), y))
            loss.backward(grad_output(loss))
            results.append((loss.detach(), leaf.grad, metrics))
        same(str(options), results[1], results[0], slice(None), 1e-6)
    case = Case(F32, bias=False)
    own = group.own(len(case.weight))
    for options in ({}, {"reduction": "none"}):
        options = {"process_group": dist.group.WORLD, "vocab_start": own.start, "temperature": 2.0, **options}

        def linear(x: Tensor, w: Tensor, o: Any = options) -> Any:
            return kdfast.linear_kd_loss(x, w, case.teacher_hidden, case.teacher_weight[own], case.labels, **o)

        torch._dynamo.reset()
        found = []
        for function in (linear, torch.compile(linear, fullgraph=True, backend="aot_eager")):
            hidden, weight = case.hidden.clone().requires_grad_(), case.weight[own].clone().requires_grad_()
            loss = function(hidden, weight)
            loss.backward(grad_output(loss))
            found.append([loss.detach(), hidden.grad, weight.grad])
        torch.testing.assert_close(found[1], found[0])


def checkpointing_computes_it_again(group: Group) -> None:
    s, t, y = data()
    own = group.own(VOCAB)
    for name in ("jsd", "dkd"):
        leaf = s[:, own].clone().requires_grad_()
        options = {"divergence": name, "process_group": dist.group.WORLD, "vocab_start": own.start}
        loss = checkpoint(lambda x, o=options: kdfast.kd_loss(x * 1, t[:, own], y, **o), leaf, use_reentrant=False)
        loss.backward(grad_output(loss))
        same(name, (loss.detach(), leaf.grad, ()), whole_results(s, t, y, divergence=name), own)


class Model(nn.Module):
    """A trunk, a head that is split where the others are not, and the loss."""

    def __init__(self, case: Case, own: slice, loss: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(HIDDEN, 16), nn.Tanh(), nn.Linear(16, HIDDEN)).to(F64)
        self.head = nn.Parameter(case.weight[own].clone())
        self.loss = loss

    def forward(self, case: Case, rows: slice, own: slice, normalizer: Any) -> Tensor:
        hidden = self.trunk(case.hidden[rows])
        teacher = case.teacher_hidden[rows], case.teacher_weight[own]
        return self.loss(hidden, self.head, *teacher, case.labels[rows], normalizer=normalizer)


def data_and_tensor_parallel_ranks_get_one_process_s_gradients(group: Group) -> None:
    """2 x 2 processes: FSDP2 or DDP over rows, and a head split over classes."""
    case = Case(F64, bias=False)
    whole = Model(case, slice(None), kdfast.LinearKDLoss(temperature=2.0, backend="reference"))
    whole(case, slice(None), slice(None), None).backward()
    mesh = init_device_mesh("cpu", (group.ranks // 2, 2), mesh_dim_names=("dp", "tp"))
    half, rank = len(case.weight) // 2 + 4, mesh.get_local_rank("tp")
    own = slice(0, half) if rank == 0 else slice(half, None)
    rows = slice(0, 6) if mesh.get_local_rank("dp") == 0 else slice(6, None)
    tokens = (case.labels != -100).sum()
    for kind in ("ddp", "fsdp"):
        loss = kdfast.LinearKDLoss(temperature=2.0, process_group=mesh.get_group("tp"), vocab_start=own.start or 0)
        model: Any = Model(case, own, loss)
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("dp"))
        else:
            fully_shard(model.trunk, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
        # data-parallel ranks average: the tokens of all of them, divided by their number
        model(case, rows, own, tokens / 2).backward()
        found = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        want = [p.grad for p in whole.parameters()]
        for x, (name, y) in zip(found, zip(dict(whole.named_parameters()), want, strict=True), strict=True):
            y = y[own] if name == "head" else y
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13, msg=lambda m, n=f"{kind}: {name}": f"{n}: {m}")
        if kind == "fsdp":  # the sharded head, outside of its module's forward
            hidden = case.hidden[rows]
            raises(
                group,
                TypeError,
                "unshard()",
                lambda m=model, h=hidden: kdfast.linear_kd_loss(h, m.head, None, None, case.labels[rows], alpha=0),
            )
            options = {"process_group": mesh.get_group("tp"), "vocab_start": own.start or 0}
            raises(
                group,
                ValueError,
                "unshard()",
                lambda m=model, h=hidden, o=options: kdfast.linear_kd_loss(
                    h, m.head, None, None, case.labels[rows], alpha=0, **o
                ),
            )
            model.unshard()
            logits = F.linear(hidden, case.weight)
            want_loss = kdfast.kd_loss(logits, None, case.labels[rows], alpha=0)
            got = kdfast.linear_kd_loss(hidden, model.head, None, None, case.labels[rows], alpha=0, **options)
            torch.testing.assert_close(got, want_loss)
            model.reshard()


CHECKS = [
    dtensors_need_neither_group_nor_start,
    other_layouts_of_dtensors_are_errors_that_say_what_to_do,
    colwise_parallel_heads_work_beside_loss_parallel,
    heads_that_are_dtensors_are_split_as_they_are,
    a_call_compiles_to_one_graph,
    checkpointing_computes_it_again,
]
DTENSORS = CHECKS[:4]
ON_FOUR = [data_and_tensor_parallel_ranks_get_one_process_s_gradients]
