"""The loops of docs/trainers.md for DDP, Accelerate, Lightning and timm train as one process with the whole batch.

The losses that they are held to are formulas of plain PyTorch in fp64, and timm's own task.
"""

import enum
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from documentation import blocks
from ranks import results_of_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.nn.parallel import DistributedDataParallel

import kdfast

VOCABULARY, LENGTH, BATCH, STEPS, T, ALPHA = 30, 6, 4, 5, 2.0, 0.7
Batch = tuple[Tensor, Tensor]


def defined(heading: str, **names: Any) -> dict[str, Any]:
    """What the code below a heading defines, run with these names and those that it takes as imported."""
    namespace = {"torch": torch, "dist": dist, "nullcontext": nullcontext, "kdfast": kdfast, **names}
    for code in blocks(heading):
        exec(compile(code, f"docs/trainers.md, {heading}", "exec"), namespace)
    return namespace


def models() -> tuple[nn.Module, nn.Module]:
    """A student and its teacher in fp64, the same in each call and process."""
    torch.manual_seed(1)
    student, teacher = (nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)).double() for _ in range(2))
    return student, teacher.requires_grad_(False)


def batches() -> list[Batch]:
    """Tokens and labels; samples have different numbers of ignored labels, and one has no other ones."""
    torch.manual_seed(2)
    made = []
    for _ in range(STEPS):
        tokens, labels = torch.randint(VOCABULARY, (2, BATCH, LENGTH))
        labels[torch.arange(LENGTH) < torch.tensor([[0], [1], [2], [LENGTH]])] = -100
        made.append((tokens, labels))
    return made


def micro_batches(batch: Batch, pieces: int) -> list[Batch]:
    return list(zip(*(x.chunk(pieces) for x in batch), strict=True))


def plain_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor, t: float = T, alpha: float = ALPHA) -> Tensor:
    """alpha T^2 KL(p, q) + (1 - alpha) CE, the mean over labels that are not ignored."""
    kept = labels != -100
    q, p = (logits[kept] / t).log_softmax(-1), (teacher_logits[kept] / t).softmax(-1)
    hard = cross_entropy(logits[kept], labels[kept])
    return alpha * t * t * kl_div(q, p, reduction="batchmean") + (1 - alpha) * hard


def train_plainly() -> list[Tensor]:
    student, teacher = models()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for tokens, labels in batches():
        plain_loss(student(tokens), teacher(tokens), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(student.parameters())


def assert_trained_plainly(parameters: Any) -> None:
    for ours, plain in zip(parameters, train_plainly(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-7)


def loss() -> kdfast.KDLoss:
    return kdfast.KDLoss(temperature=T, alpha=ALPHA)  # cross_entropy has forward KL's gradient


# -- DDP and Accelerate: two processes, with two micro-batches each ----------------------------------------------------


def train_by_ddp(rank: int, ranks: int, pieces: int) -> list[Tensor]:
    student, teacher = models()
    ddp, optimizer = DistributedDataParallel(student), torch.optim.SGD(student.parameters(), lr=0.5)
    train_step = defined("DDP")["train_step"]
    for batch in batches():
        own = micro_batches(batch, ranks)[rank]
        train_step(ddp, teacher, loss(), optimizer, micro_batches(own, pieces))
    return [p.detach() for p in student.parameters()]


def train_by_accelerate(rank: int, ranks: int, pieces: int) -> list[Tensor]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # of an Accelerator that was made before in this process
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=pieces)
    assert accelerator.num_processes == ranks
    model, teacher = models()
    student, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
    train_step = defined("Accelerate")["train_step"]
    for batch in batches():
        own = micro_batches(batch, ranks)[rank]
        train_step(accelerator, student, teacher, loss(), optimizer, micro_batches(own, pieces))
    return [p.detach() for p in model.parameters()]


def on_rank(rank: int, port: int) -> dict[str, list[Tensor]]:
    torch.set_num_threads(1)
    ranked = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ranked.items()}  # as torchrun does, for Accelerate
    trained = {f"ddp {pieces}": train_by_ddp(rank, 2, pieces) for pieces in (1, 2)}
    return trained | {f"accelerate {pieces}": train_by_accelerate(rank, 2, pieces) for pieces in (1, 2)}


def test_two_processes_train_as_one_by_ddp_and_by_accelerate(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for rank in results_of_ranks(tmp_path, on_rank, port, start_method="fork"):
        assert len(rank) == 4
        for parameters in rank.values():
            assert_trained_plainly(parameters)


@pytest.mark.parametrize("pieces", [1, 4], ids=lambda n: f"{n} micro-batches")
def test_accelerate_trains_alike_with_accumulation(pieces):
    assert_trained_plainly(train_by_accelerate(0, 1, pieces))


# -- Lightning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 4], ids=lambda n: f"{n} micro-batches")
def test_lightning_trains_alike_with_accumulation(pieces, tmp_path):
    lightning = pytest.importorskip("lightning")
    student, teacher = models()
    module = defined("Lightning", lightning=lightning)["Distill"](student, teacher.train(), pieces)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet = {"enable_model_summary": False, "default_root_dir": tmp_path, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=1, **silent, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    assert_trained_plainly(student.parameters())
    assert not teacher.training


# -- timm --------------------------------------------------------------------------------------------------------------


class Stub(ModuleType):
    """A module whose attributes are empty classes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    """timm, imported without torchvision: no wheel on PyPI is for the CPU build of this torch.

    timm's modules import FrozenBatchNorm2d, transforms and datasets of it; nothing here uses them. The stubs are there
    while timm is imported only, because transformers looks for torchvision too.
    """
    below = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets")
    names = [f"torchvision{name}" for name in below]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, Stub(name))
            if "." in name:
                parent, _, own = name.rpartition(".")
                setattr(sys.modules[parent], own, sys.modules[name])
        modes = enum.Enum("InterpolationMode", "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS")
        sys.modules["torchvision.transforms.functional"].InterpolationMode = modes  # type: ignore[attr-defined]
        import timm
        import timm.task
    yield timm


def image_models(timm: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    student, teacher = (timm.create_model("test_vit", num_classes=10, img_size=32).double() for _ in range(2))
    return student, teacher.requires_grad_(False).eval()


def images() -> list[Batch]:
    torch.manual_seed(4)
    return [(torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(10, (4,))) for _ in range(STEPS)]


@pytest.mark.parametrize(
    "weights",
    [
        {"distill_loss_weight": 2.0, "task_loss_weight": 0.3},
        {"task_loss_weight": 0.3},  # timm gives the teacher the rest
        {},  # 1 and 1
    ],
    ids=["both weights", "one weight", "no weights"],
)
def test_timms_task_trains_as_timms_own(timm, weights):
    trained = []
    for kind in (defined("timm", timm=timm, loader=[])["KDTask"], timm.task.LogitDistillationTask):
        student, teacher = image_models(timm)
        task = kind(student, teacher, temperature=3.0, dtype=torch.float64, verbose=False, **weights).train()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        losses = []
        for inputs, labels in images():
            result = task(inputs, labels)
            assert result["output"].shape == (4, 10)
            result["loss"].backward()
            losses.append(result["loss"].detach())
            optimizer.step()
            optimizer.zero_grad()
        trained.append((losses, list(student.parameters())))
    (our_losses, ours), (their_losses, theirs) = trained
    torch.testing.assert_close(our_losses, their_losses)
    for own, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, their, rtol=0, atol=1e-7)
    assert not torch.equal(ours[-1], list(image_models(timm)[0].parameters())[-1]), "it was trained"


def test_timms_loop_trains_as_the_plain_formula(timm):
    student, teacher = image_models(timm)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    defined("timm", timm=timm, loader=images(), student=student, teacher=teacher, optimizer=optimizer)
    plain, _ = image_models(timm)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for inputs, labels in images():
        plain_loss(plain(inputs), teacher(inputs), labels, 4.0, 0.7).backward()
        optimizer.step()
        optimizer.zero_grad()
    for own, expected in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-7)
