"""Steps of torchtitan's Trainer with a small model and a teacher, and the same steps in plain PyTorch."""

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from kdfast.integrations.torchtitan import Distill

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
        assert trainer.loss_fn is loss_fn  # the teacher's logits of one batch are not kept for another


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


def one_batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of a student and of a teacher, labels, and the number of tokens of all batches."""
    torch.manual_seed(3)
    student, teacher = (torch.randn(2, BATCH, LENGTH, VOCABULARY, dtype=torch.float64) * 2).to(dtype)
    labels = batches()[0][1]
    return student.requires_grad_(), teacher, labels, (labels != -100).sum() * 3
