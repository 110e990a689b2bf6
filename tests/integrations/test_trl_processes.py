"""TRL's trainers and losses in two gloo processes: the steps and the gradients of one."""

import importlib
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from trl_runs import trained

import kdfast.integrations.trl as integration

RANKS, SECONDS = 2, 240
SAMPLED: dict[str, Any] = {"top_k": 1, "max_steps": 3}  # each process draws its own numbers, of one candidate here
GIVEN: dict[str, Any] = {"lmbda": 0.0, "max_steps": 1}
ROWS, H, VOCAB = 6, 8, 15  # an odd number of classes: shards of 8 and 7


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo")
    with integration.patch():
        results = {
            "distillation": trained(
                "distillation", dtype=torch.float32, per_device_train_batch_size=2, **SAMPLED
            ).parameters,
            "gkd": trained("gkd", per_device_train_batch_size=2, **GIVEN).logged[0],
            "apart": _sharded_apart(_divergence),
            "theirs": _sharded_apart(lambda *given: _divergence(*given, original=True)),
            "async": _of_async(rank),
        }
    results["gkd, theirs"] = trained("gkd", per_device_train_batch_size=2, **GIVEN).logged[0]
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process has found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = multiprocessing.start_processes(_rank, (port, str(folder)), RANKS, join=False, start_method="spawn")
    end = time.monotonic() + SECONDS
    while not started.join(max(0.0, end - time.monotonic())):  # which returns when one of them has ended
        if time.monotonic() > end:
            for process in started.processes:
                process.kill()
            pytest.fail(f"the processes took more than {SECONDS} seconds")
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_two_processes_make_the_steps_of_one(ranks: list[dict[str, Any]]) -> None:
    with integration.patch():
        one = trained("distillation", dtype=torch.float32, **SAMPLED).parameters
    for each in ranks:
        torch.testing.assert_close(each["distillation"], one, rtol=0, atol=1e-7)


def test_gkds_own_gradient_is_divided_by_the_processes_which_kdfast_leaves_as_it_is(
    ranks: list[dict[str, Any]],
) -> None:
    """It divides by the tokens of all processes, and DDP divides by the number of processes once more."""
    with integration.patch():
        one = trained("gkd", **GIVEN).logged[0]
    for name in ("gkd", "gkd, theirs"):
        assert ranks[0][name]["grad_norm"] == pytest.approx(one["grad_norm"] / RANKS, rel=1e-6)


# --- a head that FSDP2 shards apart from the model -------------------------------------------------------------------


class Student(nn.Module):
    """A trunk and a head; the loss is computed in its forward, as TRL's redirection does it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk, self.head = nn.Linear(H, H), nn.Linear(H, VOCAB)

    def forward(self, loss: Any, x: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
        return loss(self.trunk(x), *teacher, self.head)


def _divergence(hidden: Tensor, teacher: Tensor, teacher_head: Tensor, head: nn.Linear, original: bool = False) -> Any:
    loss = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    loss = getattr(loss, "kdfast_original", loss) if original else loss
    bias = head.bias
    return loss(hidden, teacher, head.weight, teacher_head, torch.ones(hidden.shape[:-1]), 0.5, 3, bias)[0]


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    shapes = (RANKS, 1, ROWS, H), (RANKS, 1, ROWS, H), (VOCAB, H)
    return tuple(torch.randn(*shape, generator=draw) for shape in shapes)


def _sharded_apart(loss: Any) -> list[Tensor]:
    """The gradients of a student of which each process has half, of a batch of its own."""
    student, (x, teacher, teacher_head) = Student(), _batch()
    fully_shard(student.head)
    fully_shard(student)
    assert isinstance(student.head.weight, DTensor)
    student(loss, x[dist.get_rank()], (teacher[dist.get_rank()], teacher_head)).backward()
    return [each.grad.full_tensor() for each in student.parameters()]


def _of_one_process() -> list[Tensor]:
    student, (x, teacher, teacher_head) = Student(), _batch()
    for i in range(RANKS):
        (student(_divergence, x[i], (teacher[i], teacher_head)) / RANKS).backward()
    return [each.grad for each in student.parameters()]


def test_a_head_that_is_sharded_apart_has_the_gradient_of_all_processes_and_in_trl_that_of_one(
    ranks: list[dict[str, Any]],
) -> None:
    with integration.patch():
        want = _of_one_process()
    for each in ranks:
        torch.testing.assert_close(each["apart"], want, rtol=1e-5, atol=1e-7)
    *trunk, weight, bias = ranks[0]["theirs"]
    torch.testing.assert_close(trunk, want[:2], rtol=1e-5, atol=1e-7)
    for wrong, right in ((weight, want[2]), (bias, want[3])):
        assert (wrong - right).norm() > 0.3 * right.norm()


def _of_async(rank: int) -> list[Tensor]:
    """The head that AsyncDistillationTrainer._compute_loss would gather itself, and its gradient."""
    from kdfast.integrations.trl.heads import whole_head_for

    student, (x, teacher, teacher_head) = Student(), _batch()
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    parts = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in student.head.parameters()]
    model = nn.Module()
    model.get_output_embeddings = lambda: SimpleNamespace(weight=parts[0], bias=parts[1])  # type: ignore[assignment]
    before = model.get_output_embeddings

    def compute_loss(trainer: None, unwrapped: Any, inputs: None) -> Tensor:
        return _divergence(student.trunk(x[rank]), teacher[rank], teacher_head, unwrapped.get_output_embeddings())

    whole_head_for(compute_loss)(None, model, None).backward()
    assert "get_output_embeddings" not in model.__dict__ or model.get_output_embeddings is before
    return [p.grad.full_tensor() for p in parts]


def test_async_distillation_gathers_a_head_in_the_same_way(ranks: list[dict[str, Any]]) -> None:
    with integration.patch():
        want = _of_one_process()[2:]
    for each in ranks:
        torch.testing.assert_close(each["async"], want, rtol=1e-5, atol=1e-7)
