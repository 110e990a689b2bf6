"""Data, Trainers and a plain PyTorch loop that the tests of kdfast.integrations.transformers compare."""

import gc
import tempfile
from collections.abc import Callable
from typing import Any

import tiny_models
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import kdfast
from kdfast.integrations.transformers import Distill

TEMPERATURE, ALPHA, RATE = 2.0, 0.7, 0.5
STEPS, ROWS, LENGTH = 5, 8, 10  # of a batch, over all micro-batches and processes

gc.freeze()  # Trainer collects garbage each time, which takes long where all that is imported is looked through


class DistillTrainer(Distill, transformers.Trainer):
    pass


def kd(**options: Any) -> kdfast.KDLoss:
    return kdfast.KDLoss(**{"temperature": TEMPERATURE, "alpha": ALPHA, "divergence": "forward_kl"} | options)


def texts(count: int = STEPS * ROWS) -> list[dict[str, Tensor]]:
    """Tokens of which the first few, another number in each text, have no label."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for i in range(count):
        tokens = torch.randint(3, tiny_models.VOCABULARY, (LENGTH,), generator=generator)
        labels = tokens.clone()
        labels[: 1 + i * 5 % (LENGTH - 1)] = -100
        found.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return found


def images(count: int = STEPS * ROWS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)
    return [{"pixel_values": x, "labels": i % 10} for i, x in enumerate(pixels)]


def pair(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A student and a teacher, without dropout, whose logits are no longer almost 0."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(3)
        models.append(model.to(dtype))
    return models[0], models[1]


def llama_of(vocab_size: int) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**tiny_models.SHAPE | tiny_models.TOKENS | {"vocab_size": vocab_size})
    )


def arguments(**changes: Any) -> transformers.TrainingArguments:
    """Five steps of SGD over the data in their order."""
    return transformers.TrainingArguments(
        **{
            "output_dir": tempfile.mkdtemp(prefix="kdfast-"),
            "max_steps": STEPS,
            "per_device_train_batch_size": ROWS,
            "per_device_eval_batch_size": ROWS,
            "optim": "sgd",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        | changes
    )


def trainer(
    student: nn.Module, teacher: Any, data: list[Any], changes: dict[str, Any] | None = None, **options: Any
) -> Any:
    options = {"kd": kd()} | options
    return DistillTrainer(student, arguments(**changes or {}), train_dataset=data, teacher=teacher, **options)


def trained(
    student: nn.Module, teacher: Any, data: list[Any], changes: dict[str, Any] | None = None, **options: Any
) -> Any:
    found = trainer(student, teacher, data, changes, **options)
    found.train()
    return found


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def collate(data: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(x[name]) for x in data]) for name in data[0]}


def plain_loss(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], shift: bool) -> Tensor:
    """The mean over all labels of a batch, in functions of PyTorch."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    s, labels = student(**inputs).logits, batch["labels"]
    with torch.no_grad():
        t = teacher(**inputs).logits
    if shift:
        s, t, labels = s[:, :-1], t[:, :-1], labels[:, 1:]
    s, t = s[labels != -100], t[labels != -100]
    log_q, log_p = F.log_softmax(s / TEMPERATURE, -1), F.log_softmax(t / TEMPERATURE, -1)
    soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * TEMPERATURE**2
    return ALPHA * soft + (1 - ALPHA) * F.cross_entropy(s, labels[labels != -100])


def plain_steps(student: nn.Module, teacher: nn.Module, data: list[Any], shift: bool = True) -> list[float]:
    """Trains the student; returns the losses."""
    optimizer, losses = torch.optim.SGD(student.parameters(), RATE), []
    teacher.eval()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = plain_loss(student, teacher, collate(data[step * ROWS : (step + 1) * ROWS]), shift)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses(found: Any, name: str = "loss") -> list[float]:
    return [logs[name] for logs in found.state.log_history if name in logs]


def same(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)
