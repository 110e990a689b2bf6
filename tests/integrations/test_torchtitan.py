"""torchtitan: kdfast's DistillationLoss in its Trainer, beside its own CrossEntropyLoss and beside plain formulas."""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import spmd_types as spmd
import torch
import torch.distributed as dist
from documentation import blocks
from ranks import results_of_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import cross_entropy, kl_div
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import set_current_spmd_mesh
from torchtitan.distributed.utils import set_spmd_backend

import kdfast
from kdfast.integrations.torchtitan import Distill, DistillationLoss

VOCABULARY, WIDTH, LENGTH, BATCH, STEPS, T, ALPHA = 30, 8, 6, 4, 5, 2.0, 0.7
KD = {"temperature": T, "alpha": ALPHA, "divergence": "forward_kl"}
HARD_ALONE = {"alpha": 0.0, "hard_weight": 1.0}


class Model(nn.Module):
    """As torchtitan's decoders are called. Those have flex attention, which would have to be compiled on a CPU."""

    _skip_lm_head = False

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden = (self.tok_embeddings(tokens) + positions.unsqueeze(-1) / LENGTH).tanh()
        return hidden if self._skip_lm_head else self.lm_head(hidden)


def models(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A student and its teacher, the same in each call."""
    torch.manual_seed(1)
    return Model().to(dtype), Model().to(dtype).eval()


def batches() -> list[tuple[dict[str, Tensor], Tensor]]:
    """STEPS batches; samples have different numbers of ignored tokens."""
    torch.manual_seed(2)
    made = []
    for _ in range(STEPS):
        tokens, labels = torch.randint(VOCABULARY, (2, BATCH, LENGTH))
        labels[torch.arange(LENGTH) < torch.tensor([[0], [1], [2], [5]])] = -100
        made.append(({"input": tokens, "positions": torch.arange(LENGTH).expand(BATCH, LENGTH)}, labels))
    return made


def micro_batches(batch: tuple[dict[str, Tensor], Tensor], pieces: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    inputs, labels = batch
    chunks = [x.chunk(pieces) for x in (inputs["input"], inputs["positions"], labels)]
    return [({"input": tokens, "positions": at}, own) for tokens, at, own in zip(*chunks, strict=True)]


def trainer_class() -> Any:
    """torchtitan's Trainer. Its import asks for tensorboard, which it logs to and nothing here does."""
    name = "torch.utils.tensorboard"
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].SummaryWriter = object  # type: ignore[attr-defined]
    from torchtitan.trainer import Trainer

    return Trainer


def train(loss_fn: Any, model: nn.Module, teacher: nn.Module | None = None, steps: Any = None, **changes: Any) -> None:
    """Trainer.train_step for each batch. What is not the loss's is replaced: set-up, data, schedules, checkpoints."""
    Trainer = trainer_class()
    kind = type("DistillTrainer", (Distill, Trainer), {}) if teacher is not None else Trainer
    trainer = kind.__new__(kind)
    pieces = changes.pop("pieces", 1)
    values = {
        "loss_fn": loss_fn,
        "teacher": teacher,
        "model_parts": [model],
        "model_config": None,
        "optimizers": torch.optim.SGD(model.parameters(), lr=0.5),
        "parallel_dims": SimpleNamespace(
            dp_enabled=False, pp_enabled=False, cp_enabled=False, ep_enabled=False, get_optional_mesh=lambda name: None
        ),
        "config": SimpleNamespace(
            training=SimpleNamespace(disable_cuda_graphs=True, max_norm=1e9),
            parallelism=SimpleNamespace(spmd_backend="partial_dtensor"),
        ),
        "lr_schedulers": SimpleNamespace(get_metrics=dict, step=lambda: None),
        "metrics_processor": SimpleNamespace(should_log=lambda step: False),
        "checkpointer": SimpleNamespace(maybe_wait_for_staging=lambda: None),
        "gradient_accumulation_steps": pieces,
        "num_pipeline_parallel_microbatches": 1,
        "device": torch.device("cpu"),
        "train_context": nullcontext,
        "fwd_bwd_fn": trainer._forward_backward_body,
        "step": 0,
        "ntokens_seen": 0,
    } | changes
    for name, value in values.items():
        setattr(trainer, name, value)
    for batch in batches() if steps is None else steps:
        trainer.train_step(iter(micro_batches(batch, pieces)))


def plain_loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over tokens of alpha T^2 KL(p, q) + (1 - alpha) CE."""
    kept = labels != -100
    s, t = logits[kept], teacher_logits[kept]
    soft = kl_div((s / T).log_softmax(-1), (t / T).softmax(-1), reduction="sum") * T**2
    return ALPHA * soft + (1 - ALPHA) * cross_entropy(s, labels[kept], reduction="sum")


def train_plainly() -> nn.Module:
    """The same steps in plain PyTorch and fp64."""
    student, teacher = models(torch.float64)
    for inputs, labels in batches():
        student.zero_grad()
        with torch.no_grad():
            teacher_logits = teacher(inputs["input"], inputs["positions"])
        logits = student(inputs["input"], inputs["positions"])
        (plain_loss(logits, teacher_logits, labels) / (labels != -100).sum()).backward()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter -= 0.5 * parameter.grad
    return student


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("pieces", [1, 4])
def test_labels_alone_train_as_torchtitans_cross_entropy(pieces):
    ours, theirs = models()[0], models()[0]
    train(DistillationLoss.Config(kd=HARD_ALONE).build(), ours, pieces=pieces)
    train(CrossEntropyLoss.Config().build(), theirs, pieces=pieces)
    assert_same(ours, theirs)
    assert not torch.equal(ours.lm_head.weight, models()[0].lm_head.weight), "it was trained"


@pytest.mark.parametrize("pieces", [1, 2, 4], ids=lambda n: f"{n} micro-batches")
def test_a_teacher_trains_as_the_plain_formula_over_the_whole_batch(pieces):
    student, teacher = models(torch.float64)
    before = [p.clone() for p in teacher.parameters()]
    train(DistillationLoss.Config(kd=KD).build(), student, teacher, pieces=pieces)
    assert_same(student, train_plainly())
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(teacher.parameters(), before, strict=True))


@pytest.mark.parametrize("skips", [False, True], ids=["the teacher's logits", "the teacher's hidden states"])
def test_the_chunked_loss_wrapper_trains_as_the_loss_alone(skips):
    student, teacher = models(torch.float64)
    loss_fn = ChunkedLossWrapper.Config(num_chunks=3, loss_fn=DistillationLoss.Config(kd=KD)).build()
    loss_fn.set_lm_head(student.lm_head)
    student._skip_lm_head, teacher._skip_lm_head = True, skips
    loss_fn.loss_fn.set_teacher_head(teacher.lm_head)
    train(loss_fn, student, teacher, pieces=2)
    assert_same(student, train_plainly())


def one_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of a student and of a teacher, labels, and the number of tokens of all batches."""
    torch.manual_seed(3)
    student, teacher = (torch.randn(2, BATCH, LENGTH, VOCABULARY, dtype=torch.float64) * 2).to(dtype)
    labels = batches()[0][1]
    return student.requires_grad_(), teacher, labels, (labels != -100).sum() * 3


@pytest.mark.parametrize("is_divided", [True, False], ids=["global_valid_tokens", "none"])
def test_the_loss_is_a_sum_over_global_valid_tokens(is_divided):
    student, teacher, labels, tokens = one_batch()
    total = tokens if is_divided else None
    loss, metrics = DistillationLoss.Config(kd=KD).build()(student, labels, total, teacher_logits=teacher)
    expected = plain_loss(student, teacher, labels) / (tokens if is_divided else 1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)))
    assert metrics == {}


def test_a_teachers_top_k_is_two_tensors():
    student, teacher, labels, tokens = one_batch()
    top = kdfast.topk_targets(teacher, 5, temperature=T)
    loss_fn = DistillationLoss.Config(kd=KD).build()
    loss, _ = loss_fn(student, labels, tokens, teacher_indices=top.indices, teacher_log_probs=top.log_probs)
    assert loss == kdfast.kd_loss(student, top, labels, normalizer=tokens, **KD)


def test_validation_reports_torchtitans_cross_entropy():
    student, _, labels, tokens = one_batch(torch.float32)
    loss_fn = DistillationLoss.Config(kd={**KD, "label_smoothing": 0.1, "z_loss": 0.1}).build()
    for total in (None, tokens):
        loss, _ = loss_fn(student.detach(), labels, total)
        expected, _ = CrossEntropyLoss.Config().build()(student.detach(), labels, total)
        torch.testing.assert_close(loss, expected)


def test_training_without_a_teacher_is_an_error():
    student, _, labels, tokens = one_batch()
    with pytest.raises(TypeError, match="teacher: must be a tensor"):
        DistillationLoss.Config(kd=KD).build()(student, labels, tokens)
    with pytest.raises(ValueError, match="teacher_hidden: given without a head"):
        DistillationLoss.Config(kd=KD).build()(student, labels, tokens, teacher_hidden=student)


def test_arguments_that_torchtitan_decides_are_refused_and_others_checked():
    for name, value in (("reduction", "mean"), ("ignore_index", 0), ("process_group", None), ("return_metrics", True)):
        with pytest.raises(ValueError, match=f"kd: '{name}' is torchtitan's to decide"):
            DistillationLoss.Config(kd={name: value}).build()
    with pytest.raises(ValueError, match="temperature: 0 must be finite and > 0"):
        DistillationLoss.Config(kd={"temperature": 0}).build()
    assert DistillationLoss.Config(kd=KD).to_dict() == {"kd": KD}


def test_a_compiled_loss_is_the_same():
    student, teacher, labels, tokens = one_batch()
    config = CompileConfig(enable=True, components=["loss"], backend="aot_eager")
    loss_fn = DistillationLoss.Config(kd=KD).build(compile_config=config)
    assert loss_fn.fn is not kdfast.kd_loss
    loss, _ = loss_fn(student, labels, tokens, teacher_logits=teacher)
    expected = plain_loss(student, teacher, labels) / tokens
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)))


def test_the_documentations_code_makes_a_loss_and_a_trainer():
    class Trainer:
        def __init__(self, config: Any) -> None:
            self.config = config

    namespace: dict[str, Any] = {"Trainer": Trainer, "load_teacher": lambda config: Model().train()}
    for code in blocks("torchtitan"):
        exec(code, namespace)
    assert (loss_fn := namespace["loss"].build()).kd["temperature"] == 2 and loss_fn.kd["alpha"] == 0.9
    trainer = namespace["DistillTrainer"]("config")
    assert isinstance(trainer, Distill) and not trainer.teacher.training


# -- two processes -----------------------------------------------------------------------------------------------------


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
    ranks = results_of_ranks(tmp_path, on_rank)
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
