"""TRL's trainers on tiny random models, a tokenizer made on the spot and a few conversations."""

import os
import tempfile
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tiny_models
import tokenizers
import torch
import transformers
from datasets import Dataset
from torch import Tensor

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LETTERS = [chr(i) for i in range(33, 33 + tiny_models.VOCABULARY - len(SPECIAL) - 2)]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
STEPS = 5


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A letter, a space or a new line for each of the models' classes, as bytes: GOLD takes no other kind."""
    ids = {token: i for i, token in enumerate([*SPECIAL.values(), "\u0120", "\u010a", *LETTERS])}
    letters = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token="<unk>"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = tokenizers.decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, padding_side="left", **SPECIAL)
    made.chat_template = TEMPLATE
    return made


def models(name: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A student and a teacher, the same ones each time."""
    torch.manual_seed(1)
    made = []
    for factor in (1.0, 8.0):
        # a small random model has nearly equal logits: these differ, and reach a softcap of 2
        changes = {"final_logit_softcapping": 2.0} if name == "gemma2" else {}
        model = tiny_models.MODELS[name](initializer_range=0.1, **changes)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(factor)
        made.append(model.to(dtype))
    return made[0], made[1]


def conversations(number: int = 8) -> Dataset:
    """Prompts and answers of one to seven letters."""
    draw = torch.Generator().manual_seed(2)

    def words(count: int) -> str:
        return "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (count,), generator=draw).tolist())

    rows = []
    for i in range(number):
        question = {"role": "user", "content": words(1 + i % 4)}
        rows.append({"question": question, "answer": {"role": "assistant", "content": words(1 + (3 * i) % 7)}})
    return Dataset.from_list(rows)


class Teachers:
    """In the place of trl.generation.vllm_client.VLLMClient: what a vLLM server sends, computed here."""

    def __init__(self, **connection: Any) -> None:
        self.model = models(dtype=torch.float64)[1]

    @torch.no_grad()
    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, temperature: float
    ) -> dict[str, list[Any]]:
        sent: dict[str, list[Any]] = {"logprobs": [], "logprob_token_ids": [], "actual_logprobs": []}
        for tokens, start in zip(sequences, prompt_lengths, strict=True):
            ids = torch.tensor([tokens])
            log_p = torch.log_softmax(self.model(ids).logits[0] / temperature, -1)[start - 1 : -1]
            values, indices = log_p.topk(top_logprobs, -1)
            sent["logprobs"].append(values.tolist())
            sent["logprob_token_ids"].append(indices.tolist())
            sent["actual_logprobs"].append(log_p.gather(-1, ids[0, start:, None]).tolist())
        return sent


def _length_is_even(completions: list[Any], **given: Any) -> list[float]:
    return [float(len(each[0]["content"]) % 2) for each in completions]


def _messages(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [row["question"], row["answer"]]}


def _prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": [row["question"]]}


def _privileged(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": [row["question"]], "privileged_context": row["answer"]["content"]}


def trainer(name: str, student: Any, teacher: Any, folder: str, **options: Any) -> Any:
    """One of TRL's trainers by its name, with that data that it takes."""
    from importlib import import_module

    path, made = {
        "distillation": ("trl.trainer", "Distillation"),
        "gkd": ("trl.experimental.gkd", "GKD"),
        "gold": ("trl.experimental.gold", "GOLD"),
        "iw_opd": ("trl.experimental.iw_opd", "IWOPD"),
        "sdft": ("trl.experimental.sdft", "SDFT"),
        "sdpo": ("trl.experimental.sdpo", "SDPO"),
        "server": ("trl.experimental.server_distillation", "ServerDistillation"),
    }[name]
    module = import_module(path)
    given: dict[str, Any] = {"teacher_model": teacher}
    columns = _messages
    length = {"max_new_tokens" if name == "gkd" else "max_completion_length": 4}
    if name in ("sdft", "sdpo"):
        given = {} if name == "sdft" else {"reward_funcs": _length_is_even}
        options["num_generations"] = 2
        student.save_pretrained(folder)
        student.config._name_or_path = folder
        columns = _privileged
    elif name in ("distillation", "server"):
        columns = _prompt
        if name == "server":
            given, options["teacher_model_server_url"] = {}, "http://nowhere"
    else:
        options["max_length"] = 64
    if name == "iw_opd":
        tokenizer().save_pretrained(folder)
        teacher.config._name_or_path = folder
    rows = conversations()
    arguments = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return getattr(module, made + "Trainer")(
        model=student,
        args=getattr(module, made + "Config")(**(arguments | length | options)),
        train_dataset=rows.map(columns, remove_columns=rows.column_names),
        processing_class=tokenizer(),
        **given,
    )


def trained(name: str, model: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> SimpleNamespace:
    """The parameters, one after another, and what was logged, after some steps."""
    student, teacher = models(model, dtype)
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(name, student, teacher, folder, **options)
        made.train()
    logged = [
        {key: value for key, value in each.items() if not key.endswith(("time", "second", "_flos"))}
        for each in made.state.log_history
    ]
    parameters: Tensor = torch.cat([each.detach().flatten() for each in student.parameters()])
    return SimpleNamespace(parameters=parameters, logged=logged)
