"""ms-swift's trainer and its vocabulary-parallel losses, over two processes too. Run by test_swift.py."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state
from ranks import results_of_ranks
from swift_cases import (
    GKD,
    JSD,
    VOCAB,
    K,
    assert_same,
    batch,
    dense,
    library,
    logits,
    top_k,
    with_absent_entries,
    with_gradient,
)
from swift_trainer import trained
from torch import Tensor, nn
from trainer_ranks import become_rank, failures

from kdfast.integrations import swift
from kdfast.integrations.patching import FallbackWarning


def own(x: Tensor, rank: int) -> Tensor:
    return x[..., rank * x.shape[-1] // 2 : (rank + 1) * x.shape[-1] // 2].contiguous()


# ---- two processes, over which the classes are split ----


def load_megatron_functions() -> tuple[Any, Any]:
    """ms-swift's two files of vocabulary-parallel functions, without the trainers, whose imports take seconds."""
    package = Path(library.__file__).parent.parent
    for name in ("megatron", "megatron.trainers"):
        module = types.ModuleType(f"swift.{name}")
        module.__path__ = [str(package / name.replace(".", "/"))]
        sys.modules[module.__name__] = module
    from swift.megatron.trainers import gkd_utils, vocab_parallel_utils

    return gkd_utils, vocab_parallel_utils


def check_dense(rank: int, functions: dict[str, Any]) -> None:
    """kdfast's loss and gradient are one process's; so are ms-swift's."""
    student, teacher, labels = batch()
    for beta, temperature in ((0, 1.0), (0.3, 2.0), (1, 2.0)):
        loss, grad, count = with_gradient(GKD, student, dense(teacher, labels), labels, beta, temperature)
        arguments = dense(own(teacher, rank), labels), labels, beta, temperature
        for call in (library.gkd_loss, GKD):
            got = with_gradient(call, own(student, rank), *arguments, **functions)
            assert_same(got, (loss, own(grad, rank), count))


def check_top_k(rank: int, functions: dict[str, Any]) -> None:
    """The teacher's top k of all classes, by ms-swift's function; absent entries too, as of a server."""
    student, teacher, labels = batch()
    for beta in (0, 0.3, 1):
        values, indices = sys.modules["swift.megatron.trainers.gkd_utils"].vocab_parallel_topk(own(teacher, rank), K)
        made = library.TeacherOutput(topk_logprobs=values, topk_indices=indices, labels=labels)
        loss, grad, count = with_gradient(GKD, student, top_k(teacher, labels), labels, beta, 2.0)
        for call in (library.gkd_loss, GKD):
            got = with_gradient(call, own(student, rank), made, labels, beta, 2.0, **functions)
            assert_same(got, (loss, own(grad, rank), count))
        made = with_absent_entries(teacher, labels)
        loss, grad, count = with_gradient(library.gkd_loss, student, made, labels, beta, 2.0)
        got = with_gradient(library.gkd_loss, own(student, rank), made, labels, beta, 2.0, **functions)
        assert_same(got, (loss, own(grad, rank), count))


def check_other_teacher_sizes(rank: int, functions: dict[str, Any]) -> None:
    """The processes' parts of the two heads begin at other classes. ms-swift compares class i with another one."""
    for classes in (VOCAB - 6, VOCAB + 6):
        student, teacher, labels = batch(classes)
        loss, grad, count = with_gradient(library.gkd_loss, student, dense(teacher, labels), labels, 0.3, 2.0)
        arguments = dense(own(teacher, rank), labels), labels, 0.3, 2.0
        got = with_gradient(library.gkd_loss, own(student, rank), *arguments, **functions)
        assert_same(got, (loss, own(grad, rank), count))
        assert abs(GKD(own(student, rank), *arguments, **functions)[0] - loss) > 1e-2


def check_jsd_loss(rank: int, functions: dict[str, Any]) -> None:
    student, teacher = logits(9, VOCAB), logits(9, VOCAB, seed=1)
    loss, grad = with_gradient(JSD, student, teacher, 0.3)
    named = {name: functions[name] for name in ("log_softmax_fn", "kl_div_fn")}
    got = with_gradient(library.jsd_loss, own(student, rank), own(teacher, rank), 0.3, **named)
    assert_same(got, (loss, own(grad, rank)))


CHECKS = [check_dense, check_top_k, check_other_teacher_sizes, check_jsd_loss]


def run_checks(rank: int) -> dict[str, str | None]:
    """What each check raised."""
    gkd_utils, vocab_parallel_utils = load_megatron_functions()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    functions = {
        "gather_fn": gkd_utils.tp_gather_topk,
        "log_softmax_fn": vocab_parallel_utils.vocab_parallel_log_softmax,
        "kl_div_fn": vocab_parallel_utils.vocab_parallel_kl_div,
    }
    with swift.patch():
        return failures(CHECKS, rank, functions)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(check: Any, of_two_processes: list[dict[str, str | None]]) -> None:
    for found in of_two_processes:
        assert found[check.__name__] is None, found[check.__name__]


# ---- the trainer ----


def parameters(trainer: Any) -> Tensor:
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach()


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("changes", [{}, {"topk": 5, "beta": 1.0}], ids=["dense", "top-k"])
def test_trainer_makes_the_same_steps(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = trained(tmp_path, 4, 1, **changes)
    with swift.patch():
        ours = trained(tmp_path, 4, 1, **changes)
    assert_same(parameters(ours), parameters(theirs), 1e-7)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)


def test_gradient_accumulation_changes_ms_swifts_gradient_and_not_kdfasts(tmp_path: Path) -> None:
    """It takes the mean of each micro-batch's own tokens."""
    assert (parameters(trained(tmp_path, 1, 4)) - parameters(trained(tmp_path, 4, 1))).abs().max() > 1e-4
    with swift.patch():
        one, four = trained(tmp_path, 4, 1), trained(tmp_path, 1, 4, steps_per_generation=8)
    assert_same(parameters(four), parameters(one), 1e-7)


def test_steps_that_are_generated_apart_keep_ms_swifts_mean_with_a_warning(tmp_path: Path) -> None:
    arguments = {"batch": 1, "accumulation": 2, "steps": 3, "steps_per_generation": 3}
    theirs = parameters(trained(tmp_path, **arguments))
    with swift.patch(), pytest.warns(FallbackWarning, match="generated apart"):
        assert_same(parameters(trained(tmp_path, **arguments)), theirs, 1e-7)


def trained_on_rank(rank: int, folder: str) -> Tensor:
    become_rank(rank)
    with swift.patch():
        return parameters(trained(Path(folder), 2, 1, ddp_backend="gloo"))


def test_two_processes_train_as_one_with_kdfasts_loss(tmp_path: Path) -> None:
    """Each has other tokens, and another number of them."""
    with swift.patch():
        whole = parameters(trained(tmp_path, 4, 1))
    for rank in results_of_ranks(tmp_path, trained_on_rank, str(tmp_path), start_method="fork"):
        assert_same(rank, whole, 1e-7)
