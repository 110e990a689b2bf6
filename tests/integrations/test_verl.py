"""kdfast.integrations.verl: verl's numbers of each token, and models trained by its engine."""

import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import verl.trainer.distillation.fsdp.losses as fsdp_losses
import verl.trainer.distillation.losses as losses
import verl.utils.torch_functional as torch_functional
import verl.workers.engine.fsdp.transformer_impl as engine_file
from documentation import section
from torch import Tensor
from verl_runs import SUPERVISED, K, Run, V, loss_config, nested, teacher

import kdfast.integrations.verl
from kdfast.integrations.verl import MEGATRON_ENGINE, TAIL, register

NAMES = ["distillation_losses", "student_mass", "teacher_mass", "overlap_count", "overlap_token_advantage"]


@pytest.fixture
def registered() -> Iterator[None]:
    with register():
        yield


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's engines are for GPUs and NPUs."""
    monkeypatch.setattr(engine_file, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(engine_file, "get_device_name", lambda: "cpu")


def student(vocabulary: int = V) -> Tensor:
    """Logits of all tokens, (1, tokens, V), near the teacher's in the first half."""
    log_p, ids = (torch.cat(each) for each in teacher(vocabulary, vocabulary))
    near = torch.zeros(len(ids), vocabulary).scatter_(-1, ids.long(), log_p)
    near[len(ids) // 2 :] = 0
    return (near + torch.randn_like(near)).double().unsqueeze(0)


def numbers(function: Any, logits: Tensor, config: Any, k: int = K) -> tuple[dict[str, Tensor], Tensor]:
    """What compute_forward_kl_topk returns, and the gradient of a weighted sum of its losses."""
    leaf = logits.clone().requires_grad_()
    log_p, ids = map(nested, teacher(k, logits.shape[-1]))
    results = function(leaf, log_p, ids, config, "thd")
    rows = results["distillation_losses"]
    (gradient,) = torch.autograd.grad(rows, leaf, torch.linspace(-1, 2, rows.shape[-1]).to(rows.dtype).view(1, -1))
    return {name: each.detach() for name, each in results.items()}, gradient


def plain_terms(logits: Tensor, least: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """p (log p - log q) of each of K tokens, and the masses, in float64."""
    log_p, ids = (torch.cat(each) for each in teacher(K))
    log_p, log_q = log_p.double(), torch.log_softmax(logits[0], -1).gather(-1, ids.long())
    masses = log_p.exp().sum(-1), log_q.exp().sum(-1)
    if least is not None:
        log_p, log_q = log_p.clamp(min=least), log_q.clamp(min=least)
    return log_p.exp() * (log_p - log_q), *masses


# --- top-k losses of FSDP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("least", [None, -10.0, -2.0])
def test_topk_losses_and_gradients_are_verls(least: float | None, chunked: bool) -> None:
    """verl's are rounded to float32."""
    config, logits = loss_config("forward_kl_topk", log_prob_min_clamp=least, use_chunked_topk=chunked), student()
    theirs, their_gradient = numbers(fsdp_losses.compute_forward_kl_topk, logits, config)
    with register():
        ours, gradient = numbers(fsdp_losses.compute_forward_kl_topk, logits, config)
    assert list(ours) == list(theirs) == NAMES
    for name in NAMES:
        assert ours[name].shape == theirs[name].shape == logits.shape[:2]
        torch.testing.assert_close(ours[name].double(), theirs[name].double(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-6)
    assert (ours["distillation_losses"] < 0).any()  # what is clamped to 0 later
    assert 0 < ours["overlap_count"].double().mean() < K


@pytest.mark.parametrize("least", [None, -2.0])
def test_topk_losses_are_the_formula(least: float | None, registered: None) -> None:
    config, logits = loss_config("forward_kl_topk", log_prob_min_clamp=least), student()
    ours, gradient = numbers(fsdp_losses.compute_forward_kl_topk, logits, config)
    leaf = logits.clone().requires_grad_()
    terms, p_mass, q_mass = plain_terms(leaf, least)
    rows = terms.sum(-1)
    torch.testing.assert_close(ours["distillation_losses"][0], rows.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours["student_mass"][0], q_mass.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours["teacher_mass"][0], p_mass, rtol=1e-10, atol=1e-12)
    (want,) = torch.autograd.grad(rows, leaf, torch.linspace(-1, 2, len(rows)).double())
    torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-12)


def test_bfloat16_logits_keep_their_digits(registered: None) -> None:
    """verl's log-softmax is bfloat16 itself, and off by a hundredth; kdfast's results are float32."""
    config, logits = loss_config("forward_kl_topk", log_prob_min_clamp=None), student().bfloat16()
    ours, gradient = numbers(fsdp_losses.compute_forward_kl_topk, logits, config)
    theirs, _ = numbers(fsdp_losses.compute_forward_kl_topk.kdfast_original, logits, config)
    want, wanted = numbers(fsdp_losses.compute_forward_kl_topk, logits.double(), config)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(ours["distillation_losses"].double(), want["distillation_losses"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2**-8, atol=1e-6)
    assert (theirs["distillation_losses"] - want["distillation_losses"]).abs().max() > 1e-3


def test_a_teachers_token_of_probability_0_adds_nothing(registered: None) -> None:
    """verl's form is NaN there."""
    config, logits = loss_config("forward_kl_topk", log_prob_min_clamp=None), student()
    log_p, ids = map(nested, teacher(K))
    log_p.values()[0, -2:] = -torch.inf
    found = []
    for function in (fsdp_losses.compute_forward_kl_topk, fsdp_losses.compute_forward_kl_topk.kdfast_original):
        leaf = logits.clone().requires_grad_()
        rows = function(leaf, log_p, ids, config, "thd")["distillation_losses"]
        found.append((rows.detach()[0, 0], torch.autograd.grad(rows[0, 0], leaf)[0]))
    assert found[1][0].isnan()
    terms, *_ = plain_terms(logits, None)
    torch.testing.assert_close(found[0][0], terms[0, :-2].sum(), rtol=1e-6, atol=1e-7)
    assert found[0][1].isfinite().all()


# --- the loss mode with a tail -----------------------------------------------------------------------------------


def test_the_tail_makes_it_a_divergence_of_k_plus_1_classes(registered: None) -> None:
    config, logits = loss_config(TAIL, log_prob_min_clamp=None), student()
    ours, gradient = numbers(fsdp_losses.compute_forward_kl_topk, logits, config)
    leaf = logits.clone().requires_grad_()
    terms, p_mass, q_mass = plain_terms(leaf, None)
    is_padding = p_mass > 1 + 1e-6
    rest = (1 - p_mass).clamp(min=0)
    rows = terms.sum(-1) + torch.where(is_padding, 0, rest * (rest.clamp(min=1e-30).log() - torch.log1p(-q_mass)))
    torch.testing.assert_close(ours["distillation_losses"][0], rows.detach(), rtol=1e-6, atol=1e-7)
    (want,) = torch.autograd.grad(rows, leaf, torch.linspace(-1, 2, len(rows)).double())
    torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-7)
    assert (ours["distillation_losses"] >= 0).all()
    assert is_padding.sum() == 4


def test_a_token_that_verl_drops_has_a_gradient_with_the_tail() -> None:
    """verl#7856: a negative row is clamped to 0, with its gradient, in the registered loss."""
    logits = student()
    with register():
        results = [
            numbers(fsdp_losses.compute_forward_kl_topk, logits, loss_config(mode, log_prob_min_clamp=None))
            for mode in ("forward_kl_topk", TAIL)
        ]
    dropped = results[0][0]["distillation_losses"][0] < 0
    assert dropped.sum() >= 3
    assert (results[1][1][0, dropped].abs().amax(-1) > 1e-4).all()


def test_near_the_teacher_rounding_leaves_no_negative_loss_and_takes_no_gradient(registered: None) -> None:
    config, (log_p, ids) = loss_config(TAIL, log_prob_min_clamp=None), (torch.cat(each) for each in teacher(V))
    exact = torch.zeros(len(ids), V).scatter_(-1, ids.long(), log_p) + 1e-4 * torch.randn(len(ids), V)
    narrow, gradient = numbers(fsdp_losses.compute_forward_kl_topk, exact.unsqueeze(0), config)
    wide, want = numbers(fsdp_losses.compute_forward_kl_topk, exact.unsqueeze(0).double(), config)
    kept = log_p.exp().sum(-1) < 1.5
    assert wide["distillation_losses"][0, kept].max() < 1e-6
    assert (narrow["distillation_losses"] >= 0).all()
    assert (narrow["distillation_losses"][0, kept] == 0).sum() > 3
    torch.testing.assert_close(gradient[0, kept].double(), want[0, kept], rtol=0.01, atol=1e-6)


def test_a_teacher_of_all_tokens_is_dense_forward_kl(registered: None) -> None:
    config, logits = loss_config(TAIL, log_prob_min_clamp=None), student()
    ours, gradient = numbers(fsdp_losses.compute_forward_kl_topk, logits, config, k=V)
    log_p, ids = (torch.cat(each) for each in teacher(V))
    kept = log_p.exp().sum(-1) < 1.5
    dense = torch.zeros(len(ids), V, dtype=torch.float64).scatter_(-1, ids.long(), log_p.double())
    want = (dense.exp() * (dense - torch.log_softmax(logits[0], -1))).sum(-1)
    torch.testing.assert_close(ours["distillation_losses"][0, kept], want[kept], rtol=1e-5, atol=1e-5)
    assert gradient.isfinite().all()


def test_the_tail_takes_no_clamp(registered: None) -> None:
    with pytest.raises(ValueError, match=r"log_prob_min_clamp: must be null .* but it is -10"):
        numbers(fsdp_losses.compute_forward_kl_topk, student(), loss_config(TAIL))


# --- log-probabilities of sampled tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(11,), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probabilities_of_sampled_tokens_are_verls(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits, labels = (4 * torch.randn(*shape, V)).to(dtype), torch.randint(V, shape)
    weights = torch.linspace(-1, 2, labels.numel(), dtype=torch.float64).view(shape)
    found = []
    for is_ours in (False, True):
        patch = register() if is_ours else None
        leaf = (logits if is_ours else logits.double()).clone().requires_grad_()
        values = torch_functional.logprobs_from_logits(leaf, labels)
        values.backward(weights.to(values.dtype))
        found.append((values.detach().double(), leaf.grad.double()))
        if patch:
            assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            patch.undo()
    exact = 1e-12 if dtype == torch.float64 else 2e-6
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found[1][0], found[0][0], rtol=exact, atol=exact)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=max(rounding, exact), atol=exact)


def flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn's cross-entropy, whose gradient overwrites the logits without autograd's knowledge."""

    class CrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, labels: Tensor, inplace: bool) -> Tensor:
            ctx.logits, ctx.labels, ctx.inplace = logits.detach(), labels, inplace
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            gradient = torch.softmax(ctx.logits, -1)
            gradient[torch.arange(len(gradient)), ctx.labels] -= 1
            gradient *= grad.unsqueeze(-1)
            if ctx.inplace:
                ctx.logits.data.copy_(gradient)
            return gradient, None, None

    def cross_entropy_loss(logits: Tensor, labels: Tensor, inplace_backward: bool) -> tuple[Tensor, None]:
        return CrossEntropy.apply(logits, labels, inplace_backward), None

    monkeypatch.setattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    monkeypatch.setattr(torch_functional, "cross_entropy_loss", cross_entropy_loss, raising=False)


@pytest.mark.parametrize("has_topk", [False, True])
def test_flash_attention_overwrites_only_what_is_not_read_again(
    has_topk: bool, registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backward runs before the top-k loss's, and the gradient would be silently wrong."""
    flash_attention(monkeypatch)
    monkeypatch.setattr(kdfast.integrations.verl, "_last_read", 0)  # memory of other tests may be used again
    config, log_p_ids = loss_config("forward_kl_topk"), teacher(K)
    labels = torch.randint(V, (student().shape[1],))
    found = []
    for inplace in (True, False):
        torch.manual_seed(1)
        leaf = student().requires_grad_()
        logits = (leaf * 1.0).squeeze(0)
        before = logits.detach().clone()
        total = torch.zeros(())
        if has_topk:
            given = logits.unsqueeze(0), *map(nested, log_p_ids), config, "thd"
            total = fsdp_losses.compute_forward_kl_topk(*given)["distillation_losses"].sum()
        total = total + torch_functional.logprobs_from_logits(logits, labels, inplace_backward=inplace).sum()
        total.backward()
        found.append(leaf.grad)
        assert torch.equal(before, logits.detach()) is (has_topk or not inplace)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


# --- training ----------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "top-k": {"mode": "forward_kl_topk", **SUPERVISED, "log_prob_min_clamp": None},
    "top-k, clamps, rewards, entropy": {
        "mode": "forward_kl_topk", "use_policy_gradient": False, "log_prob_min_clamp": -4.0, "loss_max_clamp": 2.0,
        "entropy_coeff": 0.01,
    },
    "k1 as a reward": {"mode": "k1", "use_task_rewards": False},
    "k2": {"mode": "k2", **SUPERVISED},
    "k3": {"mode": "k3", **SUPERVISED},
    "abs, rewards": {"mode": "abs", "use_policy_gradient": False},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_training_ends_in_the_same_parameters(name: str) -> None:
    """verl's own forward_step, at temperature 0.7; its top-k losses are rounded to float32."""
    theirs = Run(**RUNS[name])
    with register():
        ours = Run(**RUNS[name])
    apart = max(float((a - b).abs().max()) for a, b in zip(theirs.parameters, ours.parameters, strict=True))
    assert theirs.moved() > 1e-3
    assert apart < 1e-7
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
    for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
        assert list(mine) == list(other)
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-7)


def test_one_batch_and_four_of_a_sequence_each_end_in_the_same_parameters(registered: None) -> None:
    config = {"mode": TAIL, **SUPERVISED, "log_prob_min_clamp": None}
    one, four = Run(**config), Run(**config, accumulates=True)
    assert one.moved() > 1e-3
    assert four.losses == pytest.approx(one.losses, rel=1e-9)
    for a, b in zip(one.parameters, four.parameters, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10)


# --- registration ------------------------------------------------------------------------------------------------


def test_undo_puts_verls_own_code_back() -> None:
    modes = list(losses.DISTILLATION_LOSS_REGISTRY)
    megatron = sys.modules[MEGATRON_ENGINE]
    places = [
        (fsdp_losses, "compute_forward_kl_topk"),
        (torch_functional, "logprobs_from_logits_v2"),
        (torch_functional, "logprobs_from_logits_flash_attn"),
        (megatron, "vocab_parallel_log_probs_from_logits"),
    ]
    before = [getattr(*place) for place in places]
    patch = register()
    assert all(getattr(*place).kdfast_original is old for place, old in zip(places, before, strict=True))
    register().undo()  # registered already: this one has nothing to put back
    assert list(losses.DISTILLATION_LOSS_REGISTRY) == [*modes, TAIL]
    assert loss_config(TAIL).distillation_loss.loss_settings.use_topk
    patch.undo()
    assert [getattr(*place) for place in places] == before
    assert list(losses.DISTILLATION_LOSS_REGISTRY) == list(losses.DISTILLATION_SETTINGS_REGISTRY) == modes
    with pytest.raises(ValueError, match="Unsupported loss mode"):
        loss_config(TAIL)


def test_the_page_runs() -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", section("verl"), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    try:
        assert fsdp_losses.compute_forward_kl_topk.kdfast_original
        assert names["mode"] == TAIL
        assert names["patch"].tested in section("verl")
    finally:
        names["patch"].undo()
