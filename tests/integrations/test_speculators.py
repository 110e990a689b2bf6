"""kdfast.integrations.speculators: the losses of --loss-implementation fused, and drafters trained with them."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import speculators.train.trainer
import torch
from documentation import section
from speculators.losses import (
    compound_loss,
    dflash_loss_decay,
    dpace_loss_decay,
    eager,
    exp_loss_decay,
    resolve_loss_config,
    utils,
)
from speculators.models.dspark.config import DSparkSpeculatorConfig
from speculators.models.dspark.core import DSparkDraftModel
from speculators.models.eagle3.config import Eagle3SpeculatorConfig
from speculators.models.eagle3.core import Eagle3DraftModel
from speculators.train.trainer import Trainer, TrainerConfig
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from kdfast.integrations.speculators import LOSSES, register

V, HIDDEN, LENGTH, BLOCK, STEPS = 97, 32, 24, 4, 5
NAMES = ["kl_div", "rkl", "jsd", "ce", "tv", "nla", "lk_hybrid"]
DECAYS = {
    "none": None,
    "exponential": partial(exp_loss_decay, gamma=0.8),  # Eagle3
    "DFlash": partial(dflash_loss_decay, gamma=4.0),
    "DSpark": partial(dflash_loss_decay, gamma=4.0, sample_from_anchor=True),
}


class InFloat64:
    """torch for speculators' eager losses, which convert logits to torch.float32: here to float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def precise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "torch", InFloat64())


@pytest.fixture
def registered() -> Iterator[None]:
    with register():
        yield


def logits(close: float = 1.0) -> tuple[Tensor, Tensor]:
    """A draft's and its target's; `close` is how far they are apart."""
    targets = 3 * torch.randn(1, LENGTH, V, dtype=torch.float64)
    return (targets + close * torch.randn_like(targets)).requires_grad_(), targets


def value_and_gradient(loss_fn: Any, draft: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    rows = loss_fn(draft, targets)
    (gradient,) = torch.autograd.grad(rows, draft, torch.linspace(-1, 2, LENGTH, dtype=rows.dtype).view(1, -1))
    return rows.detach(), gradient


# --- losses ------------------------------------------------------------------------------------------------------


def test_every_loss_of_speculators_is_here() -> None:
    assert sorted(utils._FUSED_LOSS_FN_MAP) == sorted(utils._EAGER_LOSS_FN_MAP) == sorted(NAMES)
    assert len(LOSSES) == len(NAMES)


@pytest.mark.parametrize("close", [0.01, 1.0, 8.0])  # 8: acceptance rates down to 1e-5 and below, where nla clamps
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_and_its_gradient_are_speculators_own(name: str, close: float, precise: None, registered: None) -> None:
    draft, targets = logits(close)
    theirs = value_and_gradient(utils._EAGER_LOSS_FN_MAP[name], draft, targets)
    ours = value_and_gradient(utils._FUSED_LOSS_FN_MAP[name], draft, targets)
    assert ours[0].shape == (1, LENGTH)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-10, atol=1e-13)


def test_a_rejected_draft_has_no_gradient_in_nla(precise: None, registered: None) -> None:
    """Acceptance rates below 1e-5 are clamped to it, in both."""
    draft = torch.full((1, 1, V), 0.0, dtype=torch.float64)
    draft[..., 0], targets = 40, -draft.clone()
    targets[..., 1] = 40
    for table in (utils._EAGER_LOSS_FN_MAP, utils._FUSED_LOSS_FN_MAP):
        leaf = draft.clone().requires_grad_()
        loss = table["nla"](leaf, targets)
        loss.sum().backward()
        torch.testing.assert_close(loss.detach(), torch.tensor([[1e-5]], dtype=torch.float64).log().neg())
        assert leaf.grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_narrow_logits_have_float32_losses(name: str, dtype: torch.dtype, precise: None, registered: None) -> None:
    """Gradients are rounded once; lk_hybrid, here and there, adds up those of two losses."""
    draft, targets = (x.detach().to(dtype) for x in logits())
    theirs = value_and_gradient(utils._EAGER_LOSS_FN_MAP[name], draft.double().requires_grad_(), targets.double())
    ours = value_and_gradient(utils._FUSED_LOSS_FN_MAP[name], draft.requires_grad_(), targets)
    assert (ours[0].dtype, ours[1].dtype) == (torch.float32, dtype)
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-6, atol=1e-6)
    rounding = max(1e-5, torch.finfo(dtype).eps / 2)
    of_sum = rounding * float(theirs[1].abs().max()) if name == "lk_hybrid" else 0
    torch.testing.assert_close(ours[1].double(), theirs[1], rtol=rounding, atol=1e-6 + of_sum)


def test_eta_of_lk_hybrid_is_taken(precise: None, registered: None) -> None:
    draft, targets = logits()
    theirs = value_and_gradient(partial(eager.lk_hybrid_loss, eta=1.0), draft, targets)
    ours = value_and_gradient(partial(utils.lk_hybrid_loss, eta=1.0), draft, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("decay", DECAYS)
def test_masks_and_decays_are_speculators_own(decay: str, precise: None, registered: None) -> None:
    draft, targets = logits()
    mask, position = torch.arange(LENGTH).view(1, -1) % 5 != 2, torch.arange(LENGTH).view(1, -1) % BLOCK
    results = []
    for implementation in ("eager", "fused"):
        config = resolve_loss_config('{"ce": 0.1, "tv": 0.9}', implementation)
        total, terms = compound_loss(draft, targets, mask, position, config, DECAYS[decay])
        results.append((total.detach(), terms["ce_loss"], torch.autograd.grad(total, draft)[0]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-13)
    assert results[1][-1][0, ~mask[0]].count_nonzero() == 0


def test_weights_by_confidence_are_speculators_own(precise: None, registered: None) -> None:
    """D-PACE makes its weights of the losses themselves, which must be cross-entropy."""
    draft, targets = logits()
    mask, position = torch.arange(LENGTH).view(1, -1) % 5 != 2, torch.arange(LENGTH).view(1, -1) % BLOCK
    decay = partial(dpace_loss_decay, loss_mask=mask, block_size=BLOCK, dpace_alpha=0.5)
    totals = [
        compound_loss(draft, targets, mask, position, resolve_loss_config("ce", implementation), decay)[0]
        for implementation in ("eager", "fused")
    ]
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-6, atol=0)  # the weights are float32
    grads = [torch.autograd.grad(total, draft)[0] for total in totals]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-9)


def test_the_targets_get_no_gradient(registered: None) -> None:
    """As in speculators' fused losses."""
    draft, targets = logits()
    targets.requires_grad_()
    for name in NAMES:
        utils._FUSED_LOSS_FN_MAP[name](draft, targets).sum().backward()
    assert targets.grad is None


def test_a_loss_compiles_into_one_graph(registered: None) -> None:
    """speculators compiles its forward on a GPU."""
    draft, targets = logits()
    config = resolve_loss_config('{"kl_div": 0.5, "lk_hybrid": 0.5}', "fused")
    mask = torch.ones(1, LENGTH, dtype=torch.bool)

    def total(draft: Tensor) -> Tensor:
        return compound_loss(draft, targets, mask, mask.long(), config)[0]

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(draft), total(draft))


def test_undo_puts_speculators_own_losses_back() -> None:
    before = utils._fused_kernel
    patch = register()
    assert utils._fused_kernel is not before
    register().undo()  # registered already: this one has nothing to put back
    assert utils._fused_kernel is not before
    patch.undo()
    assert utils._fused_kernel is before


def test_a_loss_that_is_unknown_here_stays_speculators_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "_fused_kernel", lambda name: f"speculators' {name}")
    with register():
        assert utils._fused_kernel("fused_new_loss") == "speculators' fused_new_loss"
        assert utils._fused_kernel("fused_tv_loss") is LOSSES["fused_tv_loss"]


# --- drafters ----------------------------------------------------------------------------------------------------


def layers(kind: Any) -> Any:
    config = kind(
        vocab_size=V, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return config


def eagle3() -> Any:
    return Eagle3DraftModel(Eagle3SpeculatorConfig(transformer_layer_config=layers(LlamaConfig), draft_vocab_size=V))


def dspark() -> Any:
    config = DSparkSpeculatorConfig(
        transformer_layer_config=layers(Qwen3Config), draft_vocab_size=V, block_size=BLOCK, mask_token_id=V - 1,
        aux_hidden_state_layer_ids=[0, 1, 2], markov_rank=8,
    )  # fmt: skip
    return DSparkDraftModel(config)


def batch(seed: int) -> dict[str, Any]:
    """Hidden states of three layers of a verifier, and of its last one."""
    made = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, LENGTH, 3 * HIDDEN, generator=made, dtype=torch.float64),
        "verifier_last_hidden_states": torch.randn(1, LENGTH, HIDDEN, generator=made, dtype=torch.float64),
        "input_ids": torch.randint(1, V - 1, (1, LENGTH), generator=made),
        "document_ids": torch.zeros(1, LENGTH, dtype=torch.int64),
        "position_ids": torch.arange(1, LENGTH + 1).view(1, -1),
        "loss_mask": torch.arange(LENGTH).view(1, -1) >= 7,
        "error_records": 0,
    }


def train(make: Any, implementation: str, loss: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters before and after an epoch of speculators' Trainer, with SGD."""
    torch.manual_seed(0)
    model = make().double()
    for parameter in model.parameters():
        if parameter.isnan().any():  # what comes from the verifier
            torch.nn.init.normal_(parameter, std=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    asked = {"loss_fn": loss, "loss_implementation": implementation, "ttt_steps": 3, "ttt_step_loss_decay": 0.8}
    kwargs, _ = model.get_trainer_kwargs(**asked, max_anchors=4)
    loader = torch.utils.data.DataLoader([batch(seed) for seed in range(STEPS)], batch_size=None)
    config = TrainerConfig(
        1e-3, 1, "unused", train_call_kwargs=kwargs, hidden_states_dtype=torch.float64, scheduler_type="none"
    )
    trainer = Trainer(model, config._replace(log_freq=1000), loader)
    trainer.optimizers = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)]
    trainer.device_type, trainer.global_step = "cpu", 1  # step 0 logs, and waits for a GPU
    torch.manual_seed(0)  # anchors are drawn
    trainer.train_epoch(0)
    return before, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # of float64, which it leaves alone
@pytest.mark.parametrize(
    ("make", "loss"),
    [(eagle3, "kl_div"), (eagle3, "lk_hybrid"), (dspark, '{"ce": 0.1, "tv": 0.9}'), (dspark, "nla")],
)
def test_training_ends_in_the_same_parameters(make: Any, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """speculators' losses are float32 within a float64 drafter."""
    monkeypatch.setattr(speculators.train.trainer, "get_local_rank", lambda: "cpu")
    before, theirs = train(make, "eager", loss)
    with register():
        _, ours = train(make, "fused", loss)
    moved = max(float((theirs[name] - before[name]).abs().max()) for name in theirs)
    apart = max(float((theirs[name] - ours[name]).abs().max()) for name in theirs)
    assert moved > 1e-2
    assert apart < 1e-7


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults of a drafter, which are imported by name, run on a CPU."""
    (snippet,) = re.findall(r"```python\n(.*?)```", section("speculators"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    try:
        draft, targets = logits()
        from speculators.models.dspark.metrics import compute_metrics, tv_loss

        loss, metrics = compute_metrics(
            draft, targets, None, torch.ones(1, LENGTH), BLOCK, resolve_loss_config("tv"), tv_loss
        )
        torch.testing.assert_close(metrics["accept_rate_sum"], LENGTH - tv_loss(draft, targets).sum())
        loss.backward()
    finally:
        names["patch"].undo()
