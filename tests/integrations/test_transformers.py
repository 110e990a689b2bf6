"""kdfast.integrations.transformers in the Trainer itself, beside a plain PyTorch loop over whole batches."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from largest import Largest
from trainer_cases import (
    ROWS,
    STEPS,
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
    plain_steps,
    same,
    texts,
    trained,
    trainer,
)

import kdfast

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
            found = trainer(student, teacher, data, linear=linear, compute_metrics=metrics, eval_dataset=data)
            teacher.train()  # as a careless caller leaves it
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


@LINEAR
def test_linear_makes_no_tensor_of_the_size_of_the_logits(linear: bool) -> None:
    student, teacher = pair(lambda: llama_of(1500))
    options = kdfast.LinearKDLoss(temperature=TEMPERATURE, chunk_rows=8) if linear else kd()
    with Largest() as largest:
        trained(student, teacher, texts(), {"max_steps": 1}, linear=linear, kd=options)
    logits = 8 * ROWS * 10 * 1500
    assert (largest.bytes < logits) == linear


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
        seen: list[bool] = []
        for module in (student.lm_head, teacher.model.norm):
            module.register_forward_pre_hook(lambda *_, seen=seen: seen.append(torch.is_autocast_enabled("cpu")))
        result = trained(student, teacher, texts(), {"bf16": True}, linear=linear)
        assert len(seen) >= 2 * STEPS and sum(seen) >= 2 * STEPS  # the teacher's softcap is looked for without
        assert all(p.dtype == torch.float32 for p in student.parameters())
        found.append(parameters(student))
    start = parameters(pair(tiny_models.llama, torch.float32)[0])
    moved = max((x - y).abs().max().item() for x, y in zip(found[0], start, strict=True))
    same(*found, 0.02 * moved)
    assert math.isfinite(result.evaluate(texts(ROWS))["eval_loss"])
