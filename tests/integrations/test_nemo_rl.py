"""NeMo-RL's distillation loss: kdfast's, from logits, beside NeMo-RL's formula."""

import enum
import importlib.util
import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol

import pytest
import torch
from documentation import blocks
from nemo_rl_cases import (
    BATCH,
    CONFIGS,
    VOCABULARY,
    batch,
    nemo_rl_loss,
    random_logits,
    spoil_dropped,
    valid_tokens,
)
from torch import Tensor, nn

from kdfast.integrations import nemo_rl

names = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c["kl_type"] + "-outside" * c["zero_outside_topk"])


def assert_equal_to_formula(loss: Tensor, logits: Tensor, expected: Tensor, their_logits: Tensor) -> None:
    """Losses and gradients, in fp64. The normalizer is fp32, whose 1e-8 is rounded away."""
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, their_logits.grad, rtol=1e-7, atol=1e-12)


@names
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "no masks"])
def test_loss_gradient_and_metrics_are_nemo_rls(config, masked):
    logits = random_logits()
    data = batch(logits)
    total = valid_tokens(data) * 3  # of all micro-batches
    if not masked:
        del data["token_mask"]
    loss, metrics = nemo_rl.DistillationLossFn(config)(
        logits=logits, data=data, global_valid_seqs=torch.tensor(BATCH), global_valid_toks=total
    )
    theirs = logits.detach().clone().requires_grad_()
    assert metrics == {"loss": loss.item(), "num_valid_samples": BATCH}
    assert_equal_to_formula(loss, logits, nemo_rl_loss(theirs, data, config, total), theirs)


@names
def test_a_model_trains_as_with_nemo_rls_formula(config):
    """Five steps of AdamW in fp64, over four micro-batches each: parameters within 1e-7."""
    models = [nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    loss_fn = nemo_rl.DistillationLossFn(config)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    for _ in range(5):
        tokens = torch.randint(VOCABULARY, (4, 8))
        data = batch(torch.empty(4, 8, VOCABULARY))
        total = valid_tokens(data)
        for at in range(4):
            micro = {name: value[at : at + 1] for name, value in data.items()}
            loss_fn(models[0](tokens[at : at + 1]), micro, None, total)[0].backward()
        nemo_rl_loss(models[1](tokens), data, config, total).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@names
def test_logits_in_bf16_are_no_further_from_the_formula_than_its_own_rounding(config):
    logits = random_logits().detach().bfloat16().requires_grad_()
    data = batch(logits)
    exact = logits.detach().double().requires_grad_()
    loss, _ = nemo_rl.DistillationLossFn(config)(logits, data, None, valid_tokens(data))
    loss.backward()
    nemo_rl_loss(exact, data, config, valid_tokens(data)).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2**-8, atol=1e-6)


@names
def test_positions_that_do_not_count_may_hold_anything(config):
    logits = random_logits()
    data = batch(logits)
    loss_fn = nemo_rl.DistillationLossFn(config)
    loss, _ = loss_fn(logits, data, None, valid_tokens(data))
    (expected,) = torch.autograd.grad(loss, logits)
    dropped = spoil_dropped(data)
    spoiled = torch.where(dropped.unsqueeze(-1), torch.nan, logits.detach()).requires_grad_()
    loss_fn(spoiled, data, None, valid_tokens(data))[0].backward()
    torch.testing.assert_close(spoiled.grad, expected, rtol=0, atol=0)


@names
def test_a_micro_batch_without_valid_tokens_has_loss_and_gradient_0(config):
    logits = random_logits()
    data = batch(logits)
    data["sample_mask"].zero_()
    loss, _ = nemo_rl.DistillationLossFn(config)(logits, data, None, torch.tensor(0))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@names
def test_logits_may_be_padded_further_than_the_data(config):
    """Of a packed sequence NeMo-RL passes data without padding, and logits with it."""
    logits = random_logits()
    data = batch(logits)
    short = {name: value[:, :6] if value.dim() > 1 else value for name, value in data.items()}
    theirs = logits.detach()[:, :6].clone().requires_grad_()
    total = valid_tokens(short)
    loss, _ = nemo_rl.DistillationLossFn(config)(logits, short, None, total)
    loss.backward()
    nemo_rl_loss(theirs, short, config, total).backward()
    torch.testing.assert_close(logits.grad[:, :6], theirs.grad, rtol=1e-7, atol=1e-12)
    assert not logits.grad[:, 6:].any()
    with pytest.raises(ValueError, match="teacher_topk_indices: has 8 positions, but the logits have 6"):
        nemo_rl.DistillationLossFn(config)(logits[:, :6], data, None, total)


def test_a_teachers_logits_of_minus_infinity_are_outside_of_its_top_k():
    logits = random_logits()
    data = batch(logits)
    fewer = data | {name: data[name][..., :3] for name in ("teacher_topk_logits", "teacher_topk_indices")}
    data["teacher_topk_logits"][..., 3] = -torch.inf
    for config in CONFIGS:
        losses = [nemo_rl.DistillationLossFn(config)(logits, each, None, 5)[0] for each in (data, fewer)]
        torch.testing.assert_close(*losses)


def test_the_config_is_a_mapping_or_an_object_and_has_nemo_rls_defaults():
    for config in ({"kl_type": "reverse"}, SimpleNamespace(kl_type="reverse", other=1)):
        loss_fn = nemo_rl.DistillationLossFn(config)
        assert (loss_fn.kl_type, loss_fn.mixed_kl_weight, loss_fn.zero_outside_topk) == ("reverse", 0.5, False)
    assert nemo_rl.DistillationLossFn({}).kl_type == "mixed"
    with pytest.raises(ValueError, match="kl_type: 'jsd' is not one of 'forward', 'reverse', 'mixed'"):
        nemo_rl.DistillationLossFn({"kl_type": "jsd"})
    with pytest.raises(ValueError, match=r"mixed_kl_weight: 1.5 must lie in \[0, 1\]"):
        nemo_rl.DistillationLossFn({"mixed_kl_weight": 1.5})


def stub_modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of NeMo-RL that are imported, with what is used of them."""
    modules: dict[str, Any] = {}
    for name in (
        "nemo_rl",
        ".algorithms",
        ".algorithms.loss",
        ".algorithms.loss.interfaces",
        ".algorithms.distillation",
    ):
        full = "nemo_rl" + name.removeprefix("nemo_rl")
        modules[full] = ModuleType(full)
        monkeypatch.setitem(sys.modules, full, modules[full])
    interfaces = modules["nemo_rl.algorithms.loss.interfaces"]
    interfaces.LossType = enum.Enum("LossType", {"TOKEN_LEVEL": "token_level"})
    interfaces.LossInputType = enum.Enum("LossInputType", {"LOGIT": "logit"})
    interfaces.LossFunction = type("LossFunction", (Protocol,), {})
    modules["nemo_rl"].__version__ = "0.7.0"
    modules["nemo_rl.algorithms.distillation"].DistillationLossFn = object
    return modules


def test_beside_nemo_rl_the_class_is_one_of_its_losses(monkeypatch):
    """NeMo-RL compares input_type with its own enum, so the class has to have that one's member."""
    interfaces = stub_modules(monkeypatch)["nemo_rl.algorithms.loss.interfaces"]
    spec = importlib.util.spec_from_file_location("beside_nemo_rl", nemo_rl.__file__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss_fn = module.DistillationLossFn({})
    assert interfaces.LossFunction in type(loss_fn).__mro__
    assert loss_fn.input_type is interfaces.LossInputType.LOGIT
    assert loss_fn.loss_type is interfaces.LossType.TOKEN_LEVEL


def test_patch_puts_the_class_where_distillation_is_set_up(monkeypatch):
    distillation = stub_modules(monkeypatch)["nemo_rl.algorithms.distillation"]
    with nemo_rl.patch():
        assert distillation.DistillationLossFn is nemo_rl.DistillationLossFn
    assert distillation.DistillationLossFn is object


def test_the_documentations_code_patches(monkeypatch):
    distillation = stub_modules(monkeypatch)["nemo_rl.algorithms.distillation"]
    (code,) = blocks("NeMo-RL")
    exec(code, {})
    assert distillation.DistillationLossFn is nemo_rl.DistillationLossFn


def test_the_loss_can_be_sent_to_another_process():
    sent = pickle.loads(pickle.dumps(nemo_rl.DistillationLossFn({"kl_type": "reverse"})))
    assert sent.kl_type == "reverse"
