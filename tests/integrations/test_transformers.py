"""kdfast.integrations.transformers in the Trainer itself, beside a plain PyTorch loop over whole batches."""

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trainer_cases import (
    ROWS,
    TEMPERATURE,
    arguments,
    collate,
    images,
    kd,
    losses,
    pair,
    parameters,
    plain_loss,
    plain_steps,
    same,
    texts,
    trained,
    trainer,
)

import kdfast
from kdfast.integrations.transformers import Distill

SPLITS = {"whole batches": {}, "4 micro-batches": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}}
LINEAR = pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])


@pytest.mark.parametrize("split", SPLITS)
@LINEAR
@pytest.mark.parametrize("model", tiny_models.MODELS)
def test_causal_language_models_train_as_in_a_plain_loop(model: str, linear: bool, split: str) -> None:
    student, teacher = pair(tiny_models.MODELS[model])
    want = plain_steps(student, teacher, texts())
    copied, teacher = pair(tiny_models.MODELS[model])
    found = trained(copied, teacher, texts(), SPLITS[split], linear=linear)
    same(parameters(copied), parameters(student), 1e-8)  # Gemma's norms round to fp32
    torch.testing.assert_close(losses(found), want, rtol=1e-6, atol=0)  # Trainer adds them in fp32


@pytest.mark.parametrize("split", SPLITS)
def test_an_image_classifier_trains_as_in_a_plain_loop(split: str) -> None:
    student, teacher = pair(tiny_models.vit)
    plain_steps(student, teacher, images(), shift=False)
    copied, teacher = pair(tiny_models.vit)
    trained(copied, teacher, images(), SPLITS[split])
    same(parameters(copied), parameters(student))


def llama_of(vocab_size: int) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**tiny_models.SHAPE | tiny_models.TOKENS | {"vocab_size": vocab_size})
    )


def llama_for(task: type) -> Any:
    return task(transformers.LlamaConfig(**tiny_models.SHAPE, **tiny_models.TOKENS, num_labels=5))


@pytest.mark.parametrize("tokens", [False, True], ids=["sequences", "tokens"])
def test_classifiers_of_sequences_and_of_tokens_do_not_shift_labels(tokens: bool) -> None:
    task = transformers.LlamaForTokenClassification if tokens else transformers.LlamaForSequenceClassification
    data = texts()
    for i, text in enumerate(data):
        text["labels"] = (
            torch.where(text["labels"] == -100, -100, text["labels"] % 5) if tokens else torch.tensor(i % 5)
        )
    student, teacher = pair(lambda: llama_for(task))
    plain_steps(student, teacher, data, shift=False)
    copied, teacher = pair(lambda: llama_for(task))
    trained(copied, teacher, data, SPLITS["4 micro-batches"])
    same(parameters(copied), parameters(student))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, dropout_rate=0.0, vocab_size=97, decoder_start_token_id=0, pad_token_id=0)
    )


@LINEAR
def test_an_encoder_decoder_gets_its_decoder_inputs_from_the_labels(linear: bool) -> None:
    student, teacher = pair(t5)
    data = texts(ROWS)
    batch = collate(data)
    decoder = {"decoder_input_ids": student.prepare_decoder_input_ids_from_labels(batch["labels"])}
    want = plain_loss(student, teacher, batch | decoder, shift=False)
    found = trained(student, teacher, data, {"max_steps": 1}, linear=linear)
    torch.testing.assert_close(losses(found), [want.item()], rtol=1e-6, atol=0)


class UsualTrainer(transformers.Trainer):
    """The override that most recipes have."""

    teacher: Any

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return plain_loss(model, self.teacher, inputs, shift=True)


def test_the_usual_override_has_four_times_the_gradient_with_four_micro_batches() -> None:
    found = []
    for changes in ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {}):
        data = texts()
        for text in data:
            text["labels"] = text["input_ids"].clone()  # as many in each micro-batch
        for kind in (UsualTrainer, None):
            student, teacher = pair(tiny_models.llama)
            before = student.lm_head.weight.detach().clone()
            if kind is None:
                trained(student, teacher, data, changes | {"max_steps": 1})
            else:
                usual = kind(student, arguments(max_steps=1, **changes), train_dataset=data)
                usual.teacher = teacher.eval()
                usual.train()
            found.append(student.lm_head.weight.detach() - before)
    usual_of_4, ours_of_4, usual_of_1, ours_of_1 = found
    torch.testing.assert_close(usual_of_4, 4 * usual_of_1, rtol=1e-9, atol=1e-15)
    for ours in (ours_of_4, ours_of_1):
        torch.testing.assert_close(ours, usual_of_1, rtol=1e-9, atol=1e-15)


@LINEAR
def test_a_batch_without_a_label_trains_nothing_and_evaluates_to_nothing(linear: bool) -> None:
    data = texts(2 * ROWS)
    for text in data[ROWS:]:
        text["labels"] = torch.full_like(text["labels"], -100)
    student, teacher = pair(tiny_models.llama)
    found = trained(student, teacher, data, {"max_steps": 1}, linear=linear)
    after_one = parameters(student)
    found = trained(student, teacher, data[ROWS:], {"max_steps": 2}, linear=linear)
    assert losses(found) == [0.0, 0.0]
    same(parameters(student), after_one, 0.0)
    whole, half = (found.evaluate(x)["eval_loss"] for x in (data, data[:ROWS]))
    assert whole == half and math.isfinite(half)


def test_evaluation_has_the_mean_over_its_labels_with_and_without_logits() -> None:
    student, teacher = pair(tiny_models.gemma2)
    data = texts(ROWS)
    want = plain_loss(student.eval(), teacher.eval(), collate(data), shift=True).item()
    seen: list[Any] = []

    def count(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"rows": len(prediction.predictions)}

    logits = student(**{k: v for k, v in collate(data).items() if k != "labels"}).logits
    for linear in (False, True):
        for metrics in (None, count):
            teacher.train()  # as a careless caller leaves it
            found = trainer(student, teacher, data, linear=linear, compute_metrics=metrics, eval_dataset=data)
            assert found.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-6)
            assert not teacher.training
    assert len(seen) == 2
    for predictions in seen:
        torch.testing.assert_close(torch.from_numpy(predictions), logits.detach(), rtol=1e-6, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_unlabelled_tokens_and_images_are_distilled_without_a_hard_term() -> None:
    data = texts(2 * ROWS)
    for text in data:
        text["attention_mask"][8:] = 0  # tokens 1 to 7 are predicted
    changes = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    labelled = [x | {"labels": torch.where(x["attention_mask"] == 0, -100, x["input_ids"])} for x in data]
    found = []
    for rows, options in ((labelled, kd(alpha=1.0)), ([dict(x) for x in data], kd(alpha=None))):
        if rows is not labelled:
            for x in rows:
                del x["labels"]
        student, teacher = pair(tiny_models.llama)
        trained(student, teacher, rows, changes, kd=options)
        found.append(parameters(student))
    same(*found)
    student, teacher = pair(tiny_models.vit)
    pixels = [{"pixel_values": x["pixel_values"]} for x in images()]
    result = trained(student, teacher, pixels, changes, kd=kd(alpha=None))
    _, want = pair(tiny_models.vit)
    batch = torch.stack([x["pixel_values"] for x in pixels[:ROWS]])
    student, _ = pair(tiny_models.vit)
    loss = kd(alpha=None)(student(batch).logits, want(batch).logits)
    assert losses(result) == pytest.approx([loss.item()], rel=1e-6)


def test_a_run_that_is_resumed_ends_where_it_would_have_without(tmp_path: Path) -> None:
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2}
    student, teacher = pair(tiny_models.llama)
    trained(student, teacher, texts(), settings)
    changes = settings | {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    stopped, _ = pair(tiny_models.llama)
    trained(stopped, teacher, texts(), changes | {"max_steps": 2}, linear=True)
    resumed, _ = pair(tiny_models.llama)
    found = trainer(resumed, teacher, texts(), changes, linear=True)
    found.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same(parameters(resumed), parameters(student), 1e-9)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert loaded.state_dict().keys() == tiny_models.llama().state_dict().keys() == resumed.state_dict().keys()


@LINEAR
def test_the_model_is_its_own_again_after_training(linear: bool, tmp_path: Path) -> None:
    student, teacher = pair(tiny_models.llama)
    trained(student, teacher, texts(), {"max_steps": 1}, linear=linear)
    student.eval()
    batch = collate(texts(2))
    fresh = tiny_models.llama().double().eval()
    fresh.load_state_dict(student.state_dict())
    want = fresh(**batch)
    torch.save(student, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=False)
    copied = copy.deepcopy(student)
    with torch.no_grad():
        student.lm_head.weight.zero_()  # copies have parameters of their own
    for model in (saved, copied):
        got = model(**batch)
        torch.testing.assert_close((got.loss, got.logits), (want.loss, want.logits))
        tokens = model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
        assert torch.equal(tokens, fresh.generate(batch["input_ids"], max_new_tokens=3, do_sample=False))


class Largest(TorchDispatchMode):
    """The bytes of the largest memory of a tensor that an operator has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@LINEAR
def test_linear_makes_no_tensor_of_the_size_of_the_logits(linear: bool) -> None:
    student, teacher = pair(lambda: llama_of(1500))
    options = kdfast.LinearKDLoss(temperature=TEMPERATURE, chunk_rows=8) if linear else kd()
    with Largest() as largest:
        trained(student, teacher, texts(), {"max_steps": 1}, linear=linear, kd=options)
    logits = 8 * ROWS * 10 * 1500
    assert (largest.bytes < logits) == linear


def scaled_models() -> dict[str, Any]:
    """Models that scale or cap their logits, or their head's input, each by another setting."""
    shape = tiny_models.SHAPE | tiny_models.TOKENS
    granite = {"embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}
    make = transformers
    return {
        "granite": lambda: make.GraniteForCausalLM(make.GraniteConfig(**shape, **granite, logits_scaling=4.0)),
        "cohere": lambda: make.CohereForCausalLM(make.CohereConfig(**shape, logit_scale=0.25)),
        "hyperclovax": lambda: make.HyperCLOVAXForCausalLM(make.HyperCLOVAXConfig(**shape, logits_scaling=0.25)),
        "nanochat": lambda: make.NanoChatForCausalLM(make.NanoChatConfig(**shape, final_logit_softcapping=2.0)),
        "gemma2": lambda: tiny_models.gemma2(final_logit_softcapping=2.0),
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


def test_label_smoothing_factor_smooths_the_hard_term() -> None:
    found = []
    for changes, options in (({"label_smoothing_factor": 0.2}, kd()), ({}, kd(label_smoothing=0.2)), ({}, kd())):
        student, teacher = pair(tiny_models.llama)
        trained(student, teacher, texts(), changes | {"max_steps": 1}, kd=options)
        found.append(parameters(student))
    same(found[0], found[1], 0.0)
    assert not torch.equal(found[0][-1], found[2][-1])


def test_alpha_0_is_the_models_own_loss_and_reads_no_teacher() -> None:
    found = []
    for own in (True, False):
        student, _ = pair(tiny_models.llama)
        if own:
            transformers.Trainer(student, arguments(), train_dataset=texts()).train()
        else:
            trained(student, None, texts(), kd=kd(alpha=0.0), linear=True)
        found.append(parameters(student))
    same(*found, 1e-7)  # its loss is computed in fp32


def test_metrics_are_logged_as_means_over_rows() -> None:
    student, teacher = pair(tiny_models.llama)
    data = texts(ROWS)
    batch = collate(data)
    logits = [model.eval()(batch["input_ids"]).logits[:, :-1] for model in (student, teacher)]
    _, want = kd(return_metrics=True)(*logits, batch["labels"][:, 1:].contiguous())
    for linear in (False, True):
        changes = {"max_steps": 1, "learning_rate": 0.0, **SPLITS["4 micro-batches"]}
        found = trained(student, teacher, data, changes, linear=linear, kd=kd(return_metrics=True))
        result = found.evaluate(data)
        for name, value in want._asdict().items():
            assert losses(found, f"kd_{name}") == pytest.approx([value.item()], rel=1e-5), name
            assert result[f"eval_kd_{name}"] == pytest.approx(value.item(), rel=1e-5), name


def test_bf16_makes_the_products_bf16_and_both_ways_agree() -> None:
    found: list[Any] = []
    for linear in (False, True):
        student, teacher = pair(tiny_models.llama, torch.float32)
        seen: list[Any] = []
        student.lm_head.register_forward_hook(lambda m, i, o, seen=seen: seen.append(torch.is_autocast_enabled("cpu")))
        result = trained(student, teacher, texts(), {"bf16": True}, linear=linear)
        assert seen and all(seen)
        assert all(p.dtype == torch.float32 for p in student.parameters())
        found.append(parameters(student))
    start = parameters(pair(tiny_models.llama, torch.float32)[0])
    moved = max((x - y).abs().max().item() for x, y in zip(found[0], start, strict=True))
    same(*found, 0.02 * moved)
    assert math.isfinite(result.evaluate(texts(ROWS))["eval_loss"])


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


def test_what_has_no_meaning_here_is_an_error() -> None:
    student, teacher = pair(tiny_models.llama)
    data = texts(ROWS)

    def refused(message: str, changes: Any = None, model: Any = student, **options: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            trainer(model, options.pop("teacher", teacher), data, changes, **options)

    refused("^kd: must be a KDLoss, not dict", kd={})
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
