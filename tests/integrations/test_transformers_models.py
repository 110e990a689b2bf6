"""kdfast.integrations.transformers with models that scale logits, have adapters, or are refused; and its page."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
import transformers
from torch import Tensor
from trainer_cases import (
    ROWS,
    TEMPERATURE,
    arguments,
    collate,
    images,
    kd,
    llama_of,
    losses,
    pair,
    parameters,
    plain_loss,
    same,
    texts,
    trained,
    trainer,
)

import kdfast
from kdfast.integrations.transformers import Distill

LINEAR = pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
DOCS = Path(__file__).parents[2] / "docs"


def scaled_models() -> dict[str, Any]:
    """Models that scale or cap their logits, each by another setting, or add a bias to them."""
    shape = tiny_models.SHAPE | tiny_models.TOKENS
    granite = {"embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}
    make = transformers
    return {
        "granite": lambda: make.GraniteForCausalLM(make.GraniteConfig(**shape, **granite, logits_scaling=4.0)),
        "cohere": lambda: make.CohereForCausalLM(make.CohereConfig(**shape, logit_scale=0.25)),
        "hyperclovax": lambda: make.HyperCLOVAXForCausalLM(make.HyperCLOVAXConfig(**shape, logits_scaling=0.25)),
        "nanochat": lambda: make.NanoChatForCausalLM(make.NanoChatConfig(**shape, final_logit_softcapping=2.0)),
        "gemma2": lambda: tiny_models.gemma2(final_logit_softcapping=2.0),
        "phi": lambda: make.PhiForCausalLM(make.PhiConfig(**shape)),  # its head has a bias
    }


@pytest.mark.parametrize("name", scaled_models())
def test_linear_applies_the_models_own_scale_and_softcap(name: str) -> None:
    found = []
    for linear in (False, True):
        student, _ = pair(scaled_models()[name])
        _, teacher = pair(scaled_models()["gemma2" if name == "granite" else name])
        result = trained(student, teacher, texts(), {"max_steps": 2}, linear=linear)
        found.append([losses(result), *parameters(student)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)


def test_options_apply_to_logits_after_the_models_own_scale() -> None:
    found = []
    for linear in (False, True):
        student, teacher = pair(scaled_models()["cohere"])
        options = kd(logit_scale=3.0, softcap=1.5, teacher_logit_scale=2.0)
        trained(student, teacher, texts(), {"max_steps": 1}, linear=linear, kd=options)
        found.append(parameters(student))
    same(*found, 1e-9)
    student, teacher = pair(tiny_models.gemma2)
    with pytest.raises(ValueError, match=r"^kd: logit_scale and softcap apply to logits that the model has capped"):
        trained(student, teacher, texts(), linear=True, kd=kd(softcap=5.0))


def with_adapter(model: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@LINEAR
def test_adapters_beside_the_head_train_and_adapters_on_it_are_refused(linear: bool) -> None:
    student, teacher = pair(tiny_models.llama)
    model = with_adapter(student, target_modules=["q_proj", "v_proj"])
    data = texts(ROWS)
    want = plain_loss(model, teacher.eval(), collate(data), shift=True).item()
    found = trained(model, teacher, data, {"max_steps": 1}, linear=linear)
    assert losses(found) == pytest.approx([want], rel=1e-6)
    for options in ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}):
        student, teacher = pair(tiny_models.llama)
        model = with_adapter(student, **{"target_modules": ["q_proj"]} | options)
        if linear:
            with pytest.raises(TypeError, match=r"^linear: the head: is wrapped by PEFT .*adapter"):
                trainer(model, teacher, data, linear=True)
        else:
            trained(model, teacher, data, {"max_steps": 1})


def test_a_teacher_with_an_adapter_on_its_head_gives_logits() -> None:
    found = []
    for linear in (False, True):
        student, teacher = pair(tiny_models.llama)
        teacher = with_adapter(teacher, target_modules=["lm_head"])
        trained(student, teacher, texts(), {"max_steps": 1}, linear=linear)
        found.append(parameters(student))
    same(*found)


def test_several_teachers_are_an_ensemble() -> None:
    found = []
    for linear in (False, True):
        student, teacher = pair(tiny_models.llama)
        trained(student, [teacher, pair(tiny_models.gpt2)[1]], texts(), {"max_steps": 1}, linear=linear)
        found.append(parameters(student))
    same(*found)
    student, teacher = pair(tiny_models.llama)
    trained(student, teacher, texts(), {"max_steps": 1})
    assert not torch.allclose(parameters(student)[-1], found[0][-1], rtol=1e-3)


def test_a_teacher_that_is_no_model_is_an_override() -> None:
    class Cached(Distill, transformers.Trainer):
        def teacher_targets(self, inputs: dict[str, Any], head: bool) -> Any:
            return kdfast.TopKTargets(inputs.pop("indices"), inputs.pop("log_probs"))

    student, teacher = pair(tiny_models.llama)
    data = texts(ROWS)
    logits = teacher(**{k: v for k, v in collate(data).items() if k != "labels"}).logits.detach()
    targets = kdfast.topk_targets(logits, 5, TEMPERATURE)
    for i, text in enumerate(data):
        text["indices"], text["log_probs"] = targets.indices[i], targets.log_probs[i]
    with torch.no_grad():
        batch = collate(data)
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        want = kd()(student(batch["input_ids"]).logits, targets, labels).item()
    for linear in (False, True):
        student, _ = pair(tiny_models.llama)
        settings = arguments(max_steps=1, remove_unused_columns=False)
        found = Cached(student, settings, train_dataset=data, teacher=None, kd=kd(), linear=linear)
        found.train()
        assert losses(found) == pytest.approx([want], rel=1e-6)


def test_padded_vocabularies_need_vocab_size() -> None:
    student, _ = pair(tiny_models.llama)
    _, teacher = pair(lambda: llama_of(128))
    for linear in (False, True):
        with pytest.raises(ValueError, match="97.*128|128.*97"):
            trained(student, teacher, texts(), linear=linear)
        trained(student, teacher, texts(), {"max_steps": 1}, linear=linear, kd=kd(vocab_size=97))


def test_torch_compile_changes_no_number() -> None:
    torch._dynamo.reset()
    student, teacher = pair(tiny_models.llama)
    trained(student, teacher, texts(), {"max_steps": 3}, linear=True)
    compiled, _ = pair(tiny_models.llama)
    torch._dynamo.utils.counters.clear()
    trained(compiled, teacher, texts(), {"max_steps": 3, "torch_compile_backend": "aot_eager"}, linear=True)
    same(parameters(compiled), parameters(student))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one of them to see the model's softcap
    assert not torch._dynamo.utils.counters["graph_break"]


class Squares(kdfast.KDLoss):
    def forward(self, student_logits: Tensor, teacher: Any, labels: Tensor | None = None, **rows: Any) -> Tensor:
        return (student_logits - teacher).square().mean()


def test_what_has_no_meaning_here_is_an_error() -> None:
    student, teacher = pair(tiny_models.llama)
    data = texts(ROWS)

    def refused(message: str, changes: Any = None, model: Any = student, **options: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            trainer(model, options.pop("teacher", teacher), data, changes, **options)

    refused("^kd: must be a KDLoss, not dict", kd={})
    refused("^kd: must be a KDLoss, whose options are read; Squares has a forward of its own", kd=Squares())
    refused("^kd: a LinearKDLoss needs linear=True", kd=kdfast.LinearKDLoss())
    refused("^kd: reduction must be 'mean'", kd=kd(reduction="sum"))
    refused("^kd: ignore_index must be -100", kd=kd(ignore_index=0))
    refused("^label_smoothing_factor: 0.1, but kd has", {"label_smoothing_factor": 0.1}, kd=kd(label_smoothing=0.2))
    refused("^compute_loss_func: must be None", compute_loss_func=lambda *args, **kwargs: 0)
    refused("^teacher: must be another model", teacher=student)
    refused("^linear: ViTForImageClassification has no output embeddings", model=tiny_models.vit(), linear=True)
    refused("^model: its problem_type is 'regression'", model=tiny_models.vit(problem_type="regression"))
    bart = transformers.BartForCausalLM(
        transformers.BartConfig(vocab_size=97, d_model=32, decoder_layers=1, decoder_attention_heads=2)
    )
    refused("^shift_labels: must be given for BartForCausalLM", model=bart)
    trainer(bart, teacher, data, shift_labels=False)

    class Biased(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:  # takes no labels, which the loss gets still
            outputs = super().forward(input_ids, **kwargs)
            outputs.logits = outputs.logits + torch.arange(outputs.logits.shape[-1])
            return outputs

    biased = Biased(tiny_models.llama().config)
    found = trainer(biased, teacher, data, linear=True)
    with pytest.raises(ValueError, match=r"^linear: Biased changes its logits by more than a scale and a softcap"):
        found.train()

    one = tiny_models.vit().double()
    one.classifier = torch.nn.Linear(32, 1).double()
    found = trainer(one, tiny_models.vit().double(), images())
    with pytest.raises(ValueError, match="^model: its logits have one class"):
        found.train()


class Own(transformers.GPT2LMHeadModel):
    """Takes no labels, by which Trainer knows what to keep of the data."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


def test_a_class_that_is_derived_from_a_language_model_has_its_labels_shifted_too() -> None:
    student, teacher = pair(lambda: Own(tiny_models.gpt2().config))
    want = plain_loss(student, teacher.eval(), collate(texts(ROWS)), shift=True).item()
    assert losses(trained(student, teacher, texts(), {"max_steps": 1})) == pytest.approx([want], rel=1e-6)


class Reader(transformers.LlamaPreTrainedModel):
    """Has the loss of causal language models, which its name does not say, as IdeficsForVisionText2Text."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = transformers.LlamaModel(config)
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class ReaderWithItsLoss(Reader):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids, **kwargs)


def test_a_class_whose_name_says_nothing_has_its_labels_shifted_as_by_its_loss() -> None:
    student, teacher = pair(lambda: Reader(tiny_models.llama().config))
    batch = collate(texts(ROWS))
    want = plain_loss(student, teacher.eval(), batch, shift=True).item()
    own = student.eval()(**batch).loss.item()
    assert losses(trained(student, teacher, texts(), {"max_steps": 1})) == pytest.approx([want], rel=1e-6)
    student, _ = pair(lambda: Reader(tiny_models.llama().config))
    assert losses(trained(student, None, texts(), {"max_steps": 1}, kd=kd(alpha=0.0))) == pytest.approx([own], rel=1e-6)
    student, teacher = pair(lambda: ReaderWithItsLoss(tiny_models.llama().config))
    with pytest.raises(ValueError, match="shift_labels: must be given for ReaderWithItsLoss"):
        trainer(student, teacher, texts())
    trainer(student, teacher, texts(), shift_labels=True)


def test_the_page_runs_as_shown() -> None:
    pages = [page.read_text() for page in DOCS.glob("trainers*.md")]
    (section,) = re.findall(r"^## transformers\.Trainer\n(.*?)(?=^## |\Z)", "\n".join(pages), re.M | re.S)
    student, teacher = pair(tiny_models.llama)
    names = {"student": student, "teacher": teacher, "args": arguments(max_steps=1), "data": texts(ROWS)}
    before = parameters(student)
    for code in re.findall(r"```python\n(.*?)```", section, re.S):
        exec(code, names)
    assert not torch.equal(before[-1], parameters(student)[-1])


@LINEAR
def test_liger_kernels_leave_the_loss_to_kdfast(linear: bool) -> None:
    """Trainer gives the model Liger's forward when training starts."""
    kernels = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy"), False)  # in Triton, for a GPU
    liger = {"use_liger_kernel": True, "liger_kernel_config": {**kernels, "fused_linear_cross_entropy": True}}
    found = []
    for changes in (liger, {}):
        student, teacher = pair(tiny_models.llama)
        result = trained(student, teacher, texts(), changes, linear=linear)
        found.append([*parameters(student), torch.tensor(result.evaluate(texts(ROWS))["eval_loss"])])
    same(*found)
