"""ms-swift's own GKDTrainer on a tiny Llama, with a template that takes tokens as they are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import swift_stubs  # noqa: F401, before ms-swift
import tiny_models
import tokenizers
import torch
import transformers
from swift.rlhf_trainers.arguments import GKDConfig
from swift.rlhf_trainers.gkd_trainer import GKDTrainer

LENGTH = 12


class Trainer(GKDTrainer):
    """Takes token ids and labels in place of messages, and makes no engine that generates."""

    def _encode_samples(self, samples: list[Any]) -> tuple[dict[str, torch.Tensor], None]:
        input_ids, labels = (torch.tensor([sample.extra[name] for sample in samples]) for name in ("ids", "targets"))
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}, None

    def _prepare_gradient_checkpointing(self, model: torch.nn.Module) -> None:
        pass

    def prepare_rollout(self) -> None:
        self._prepare_rollout_params()


def template() -> SimpleNamespace:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 2}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    return SimpleNamespace(
        tokenizer=tokenizer,
        processor=tokenizer,
        template_meta=SimpleNamespace(default_system=None, stop_words=[], suffix=[]),
        task_type="causal_lm",
        is_encoder_decoder=False,
        padding_free=False,
        padding_side="right",
        max_length=LENGTH,
        sequence_parallel_size=1,
        truncation_strategy="delete",
        use_chat_template=True,
        get_base_model=lambda model: model,
        register_post_encode_hook=lambda models: None,
        remove_post_encode_hook=lambda: None,
    )


def model(seed: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    llama = tiny_models.llama(initializer_range=0.2)  # so that student and teacher differ
    llama.model_meta = SimpleNamespace(is_multimodal=False, model_arch=None)
    llama.model_info = SimpleNamespace(is_moe_model=False)
    return llama


def examples(count: int) -> datasets.Dataset:
    """Each with another number of labels."""
    ids = torch.randint(3, tiny_models.VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(2))
    prompt = torch.arange(count).unsqueeze(1) * 3 % 9 + 1
    targets = ids.masked_fill(torch.arange(LENGTH) < prompt, -100)
    rows = zip(ids.tolist(), targets.tolist(), strict=True)
    return datasets.Dataset.from_list([{"messages": [], "ids": i, "targets": t} for i, t in rows])


def trained(
    folder: Path, batch: int, accumulation: int, steps: int = 4, topk: int | None = None, **changes: Any
) -> Any:
    """The trainer after these steps of SGD."""
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "use_cpu": True,
        "bf16": False,  # which TRL sets
        "lmbda": 0.0,  # nothing is generated
        "beta": 0.3,
        "temperature": 1.5,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "check_model": False,
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
    }
    trainer = Trainer(
        model=model(0),
        args=GKDConfig(**arguments | changes),
        template=template(),
        train_dataset=examples(16),
        teacher_model=model(1),
        gkd_logits_topk=topk,
    )
    trainer.train()
    return trainer
