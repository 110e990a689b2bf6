"""kdfast.integrations.verl's form for Megatron: a vocabulary that is split over two gloo processes, as in one."""

import functools
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import verl.trainer.distillation.megatron.losses as megatron_losses
from documentation import section
from megatron.core import parallel_state
from ranks import results_of_ranks
from torch import Tensor
from verl_runs import LENGTHS, K, loss_config, nested, teacher

from kdfast.integrations.verl import TAIL, register

RANKS, V = 2, 96
CASES = {  # mode, the clamp of log-probabilities, how verl packs tokens
    "packed": ("forward_kl_topk", None, "thd"),
    "packed, clamped": ("forward_kl_topk", -4.0, "thd"),
    "padded": ("forward_kl_topk", None, "bshd"),
    "tail": (TAIL, None, "thd"),
}
BOTH = [name for name in CASES if name != "tail"]


def student(data_format: str) -> Tensor:
    """Logits of all tokens of the sequences, one after the other or padded."""
    shape = (1, sum(LENGTHS), V) if data_format == "thd" else (len(LENGTHS), max(LENGTHS), V)
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def numbers(function: Any, case: str, own: slice) -> dict[str, Tensor]:
    """What Megatron's compute_forward_kl_topk returns for these tokens of the vocabulary, and the gradient."""
    mode, least, data_format = CASES[case]
    logits = student(data_format)[..., own].clone().requires_grad_()
    log_p, ids = map(nested, teacher(K, V))
    results = function(logits, log_p, ids, loss_config(mode, log_prob_min_clamp=least), data_format)
    rows = results["distillation_losses"]
    weights = torch.linspace(-1, 2, rows.numel()).to(rows.dtype).view(rows.shape)
    (gradient,) = torch.autograd.grad(rows, logits, weights)
    return {**{name: each.detach() for name, each in results.items()}, "gradient": gradient}


def processed(own: slice, narrow: torch.dtype) -> dict[str, Tensor]:
    """verl's logits processor: a top-k loss and sampled tokens of the same logits, which Megatron's own overwrites."""
    from verl.trainer.distillation.losses import distillation_ppo_loss
    from verl.workers.config import ActorConfig
    from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

    log_p, ids = map(nested, teacher(K, V))
    actor = ActorConfig(strategy="megatron", rollout_n=1, use_dynamic_bsz=True)
    config = loss_config("forward_kl_topk", log_prob_min_clamp=None)
    leaf = student("thd")[..., own].to(narrow).requires_grad_()
    labels = torch.arange(leaf.shape[1]).view(1, -1) * 5 % V
    wanted = {"calculate_sum_pi_squared": False, "calculate_entropy": False, "distillation_only": False}
    results = MegatronEngineWithLMHead._lm_head_logits_processor(
        SimpleNamespace(),
        leaf * 1,
        labels,
        torch.full(labels.shape, 0.7),
        **wanted,
        distillation_use_topk=True,
        logits_processor_func=functools.partial(distillation_ppo_loss, actor, config),
        batch={"teacher_logprobs": log_p, "teacher_ids": ids},
        data_format="thd",
    )
    (results["distillation_losses"].sum() + 2 * results["log_probs"].sum()).backward()
    names = "distillation_losses", "log_probs"
    return {**{name: results[name].detach() for name in names}, "gradient": leaf.grad}


def found(rank: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """verl's own numbers, kdfast's, and kdfast's of one process with all tokens."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    own = slice(rank * V // RANKS, (rank + 1) * V // RANKS)
    theirs = {case: numbers(megatron_losses.compute_forward_kl_topk, case, own) for case in BOTH}
    theirs["processed"] = processed(own, torch.float32)
    with register():
        ours = {case: numbers(megatron_losses.compute_forward_kl_topk, case, own) for case in CASES}
        ours["processed"] = processed(own, torch.float32)
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
        whole = {case: numbers(megatron_losses.compute_forward_kl_topk, case, slice(None)) for case in CASES}
        whole["processed"] = processed(slice(None), torch.float32)
    return theirs, ours, whole


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return results_of_ranks(tmp_path_factory.mktemp("ranks"), found, start_method="fork")


def test_each_process_that_imports_verl_registers_kdfast() -> None:
    """With the environment variable of the page."""
    (variable,) = re.findall(r"^export (VERL_\w+)=(.*)$", section("verl"), flags=re.MULTILINE)
    asks = (
        "import verl.trainer.distillation.megatron.losses as m, verl.trainer.distillation.losses as d; "
        f"assert m.compute_forward_kl_topk.kdfast_original and {TAIL!r} in d.DISTILLATION_LOSS_REGISTRY"
    )
    environment = os.environ | dict([variable])
    done = subprocess.run([sys.executable, "-c", asks], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("case", [*BOTH, "processed"])
def test_a_split_vocabulary_gives_verls_own_numbers(case: str, ranks: list[Any]) -> None:
    """verl's are float32."""
    for theirs, ours, _ in ranks:
        assert list(ours[case]) == list(theirs[case])
        for name, want in theirs[case].items():
            assert ours[case][name].shape == want.shape
            torch.testing.assert_close(ours[case][name].double(), want.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [*CASES, "processed"])
def test_two_processes_give_the_numbers_of_one(case: str, ranks: list[Any]) -> None:
    exact = 1e-5 if case == "processed" else 1e-11
    for rank, (_, ours, whole) in enumerate(ranks):
        for name, want in whole[case].items():
            if name == "gradient":
                want = want[..., rank * V // RANKS : (rank + 1) * V // RANKS]
                assert want.abs().max() > 0.1
            torch.testing.assert_close(ours[case][name], want, rtol=exact, atol=exact / 10)


def test_two_processes_give_the_same_bits(ranks: list[Any]) -> None:
    for case in CASES:
        for name in ranks[0][1][case]:
            if name != "gradient":
                assert torch.equal(ranks[0][1][case][name], ranks[1][1][case][name])


def test_masses_are_those_of_clamped_log_probabilities(ranks: list[Any]) -> None:
    """verl's form for Megatron has them so, and the one for FSDP not."""
    _, ours, _ = ranks[0]
    assert (ours["packed, clamped"]["student_mass"] > ours["packed"]["student_mass"] + 1e-4).any()
