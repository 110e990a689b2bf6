"""Model-Optimizer's losses and trainers: its own code beside kdfast's, in one process and over two."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modelopt.torch.distill as mtd
import pytest
import tiny_models
import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state
from modelopt.torch.distill.plugins import huggingface, megatron
from ranks import results_of_ranks
from torch import Tensor, nn
from trainer_ranks import become_rank, failures

import kdfast
from kdfast.integrations import modelopt, modelopt_megatron
from kdfast.integrations.patching import FallbackWarning

VOCAB = 24
ORIGINALS = {name: getattr(mtd, name) for name in ("LogitsDistillationLoss", "MFTLoss")}


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2


def with_gradient(loss: Callable[..., Tensor], student: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """The loss and the student's gradient; of row losses, that of their sum with weights."""
    leaf = student.clone().requires_grad_()
    value = loss(leaf, *others)
    weights = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).view(value.shape)
    (value * weights).sum().backward()
    return value.detach(), leaf.grad


def assert_same(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_logits_distillation_loss_is_model_optimizers(reduction: str, temperature: float) -> None:
    student, teacher = logits(3, 5, VOCAB), logits(3, 5, VOCAB, seed=1)
    ours, theirs = (
        with_gradient(loss(temperature, reduction), student, teacher)
        for loss in (modelopt.LogitsDistillationLoss, ORIGINALS["LogitsDistillationLoss"])
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("threshold", [0.2, 0.9])  # at 0.9 some labels are capped at probability 1
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_mft_loss_is_model_optimizers(reduction: str, threshold: float) -> None:
    student, teacher, labels = logits(6, VOCAB), logits(6, VOCAB, seed=1) * 2, torch.arange(6) * 3
    labels[:3] = teacher[:3].argmax(-1)
    ours, theirs = (
        with_gradient(loss(2.0, threshold, reduction), student, teacher, labels)
        for loss in (modelopt.MFTLoss, ORIGINALS["MFTLoss"])
    )
    assert_same(ours, theirs)


def test_mft_loss_of_single_classes_is_the_originals_with_a_warning() -> None:
    arguments = logits(6, VOCAB), logits(6, VOCAB, seed=1), torch.arange(6)
    with pytest.warns(FallbackWarning, match="MFTLoss"):
        ours = modelopt.MFTLoss(reduction="none")(*arguments)
    assert_same(ours, ORIGINALS["MFTLoss"](reduction="none")(*arguments))


def tp_config(ranks: int = 1) -> SimpleNamespace:
    return SimpleNamespace(tensor_model_parallel_size=ranks, sequence_parallel=False)


def token_losses(criterion: nn.Module, sum_over_ranks: bool = False) -> Callable[..., Tensor]:
    """(b, s) row losses, as Megatron's loss function makes them of what a criterion returns."""

    def loss(predictions: Tensor, targets: Tensor) -> Tensor:
        rows, tp_reduce, is_sequence_parallel = criterion((predictions, None), (targets, None))
        assert tp_reduce == sum_over_ranks and not is_sequence_parallel
        if tp_reduce:
            rows = rows - rows.detach() + all_reduced(rows.detach())
        return rows

    return loss


def all_reduced(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def kl_of_rows(student: Tensor, teacher: Tensor, temperature: float, reverse: bool) -> Tensor:
    """The formula, (b, s) of (s, b, V)."""
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    if reverse:
        log_q, log_p = log_p, log_q
    return (log_p.exp() * (log_p - log_q)).sum(-1).T


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 7])
def test_megatron_losses_of_one_process_are_model_optimizers(
    top_k: int | None, temperature: float, reverse: bool
) -> None:
    student, teacher = logits(5, 3, VOCAB), logits(5, 3, VOCAB, seed=1)
    name, options = ("LogitsKLLoss", {}) if top_k is None else ("TopKLogitsKLLoss", {"top_k": top_k})
    arguments = (tp_config(), temperature, reverse)
    ours = getattr(modelopt_megatron, name)(*arguments, **options)
    theirs = getattr(megatron, name)(*arguments, **options)
    classes = teacher.topk(VOCAB if top_k is None else top_k).indices

    def formula(s: Tensor, t: Tensor) -> Tensor:
        return kl_of_rows(s.gather(-1, classes), t.gather(-1, classes), temperature, reverse)

    want = with_gradient(formula, student, teacher)
    assert_same(with_gradient(token_losses(ours), student, teacher), want)
    its_own = with_gradient(lambda s, t: theirs(s, t)[0], student, teacher)
    assert_same((its_own[0].double(), its_own[1]), want, 1e-5)  # it computes in fp32


def test_top_k_above_the_number_of_classes_is_an_error() -> None:
    criterion = modelopt_megatron.TopKLogitsKLLoss(tp_config(), top_k=VOCAB + 1)
    with pytest.raises(ValueError, match=f"top_k: {VOCAB + 1} must be at most {VOCAB}"):
        criterion(logits(2, 2, VOCAB), logits(2, 2, VOCAB))


# ---- two processes ----


def own(x: Tensor, rank: int) -> Tensor:
    return x[..., rank * VOCAB // 2 : (rank + 1) * VOCAB // 2].contiguous()


def check_logits_kl_loss(rank: int) -> None:
    """kdfast's loss and gradient are one process's; so are Model-Optimizer's."""
    student, teacher = logits(4, 3, VOCAB), logits(4, 3, VOCAB, seed=1)
    for temperature, reverse in ((1.0, False), (2.0, True)):
        want, grad = with_gradient(kl_of_rows, student, teacher, temperature, reverse)
        arguments = (tp_config(2), temperature, reverse)
        for criterion, to_sum, tolerance in (
            (modelopt_megatron.LogitsKLLoss(*arguments), False, 1e-12),
            (megatron.LogitsKLLoss(*arguments), True, 1e-5),
        ):
            loss, own_grad = with_gradient(token_losses(criterion, to_sum), own(student, rank), own(teacher, rank))
            assert_same((loss.double(), own_grad), (want, own(grad, rank)), tolerance)


def check_top_k_loss(rank: int) -> None:
    """kdfast's gradient is one process's; Model-Optimizer's is larger by the number of processes."""
    student, teacher = logits(4, 3, VOCAB), logits(4, 3, VOCAB, seed=1)
    for k, reverse in ((7, False), (VOCAB // 2 + 3, True)):  # also more than a process has
        classes = teacher.topk(k).indices
        want, grad = with_gradient(
            lambda s, c=classes, r=reverse: kl_of_rows(s.gather(-1, c), teacher.gather(-1, c), 2.0, r), student
        )
        for criterion, factor, tolerance in (
            (modelopt_megatron.TopKLogitsKLLoss(tp_config(2), 2.0, reverse, k), 1, 1e-12),
            (megatron.TopKLogitsKLLoss(tp_config(2), 2.0, reverse, k), 2, 1e-5),
        ):
            loss, own_grad = with_gradient(token_losses(criterion), own(student, rank), own(teacher, rank))
            assert_same((loss.double(), own_grad), (want, factor * own(grad, rank)), tolerance)


def check_setup(rank: int) -> None:
    """Under the patch, Model-Optimizer's own set-up makes kdfast's losses."""
    config = SimpleNamespace(tensor_model_parallel_size=2, sequence_parallel=False, hidden_size=8)
    for topk, name in ((None, "LogitsKLLoss"), (5, "TopKLogitsKLLoss")):
        with modelopt.patch():
            given = megatron.DistillationConfig(logit_kl_topk=topk, logit_kl_temperature=2.0)
            made = megatron.setup_distillation_config(given, config, config).criterion
        (criterion,) = made.values()
        assert type(criterion) is getattr(modelopt_megatron, name) and criterion._temperature == 2


CHECKS = [check_logits_kl_loss, check_top_k_loss, check_setup]


def run_checks(rank: int) -> dict[str, str | None]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    return failures(CHECKS, rank)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(check: Any, of_two_processes: list[dict[str, str | None]]) -> None:
    for found in of_two_processes:
        assert found[check.__name__] is None, found[check.__name__]


# ---- the trainer ----


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return tiny_models.llama(initializer_range=0.2), tiny_models.llama(initializer_range=0.2)


def trained(
    folder: Path,
    batch: int = 4,
    accumulation: int = 1,
    steps: int = 4,
    criterion: Any = None,
    prompts: Tensor | None = None,
    ddp_backend: str | None = None,
) -> nn.Module:
    """A Llama after some steps of Model-Optimizer's KDTrainer, at temperature 2; prompts: their lengths, (16, 1)."""
    student, teacher = models()
    input_ids = torch.randint(3, tiny_models.VOCABULARY, (16, 10), generator=torch.Generator().manual_seed(2))
    prompts = torch.arange(16).unsqueeze(1) * 3 % 8 if prompts is None else prompts
    labels = input_ids.masked_fill(torch.arange(10) < prompts, -100)
    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend=ddp_backend,
    )
    trainer = huggingface.KDTrainer(
        student,
        arguments,
        train_dataset=[{"input_ids": i, "labels": y} for i, y in zip(input_ids, labels, strict=True)],
        distill_args={"teacher_model": teacher, "temperature": 2.0},
    )
    if criterion is not None:
        trainer._kd_criterion = criterion
    if ddp_backend is not None:
        trainer._teacher_prepared = True  # it would wrap the teacher in DDP, which refuses a frozen model
    trainer.train()
    return student


def parameters(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_kd_loss_module_is_the_trainers_criterion(tmp_path: Path) -> None:
    kd = kdfast.KDLoss(temperature=2.0, divergence="forward_kl", reduction="none")
    theirs = parameters(trained(tmp_path))
    assert_same(parameters(trained(tmp_path, criterion=kd)), theirs, 1e-7)
    with modelopt.patch():
        assert_same(parameters(trained(tmp_path)), theirs, 1e-7)
        assert_same(parameters(trained(tmp_path, criterion=kd)), theirs, 1e-7)


def test_gradient_accumulation_changes_model_optimizers_gradient_and_not_kdfasts(tmp_path: Path) -> None:
    """Its KDTrainer takes each micro-batch's own mean, and Trainer does not divide these by their number."""
    start, alike = parameters(models()[0]), torch.full((16, 1), 3)  # each example has as many labels
    one, four = (parameters(trained(tmp_path, *split, steps=1, prompts=alike)) for split in ((4, 1), (1, 4)))
    assert_same(four - start, 4 * (one - start), 1e-6)
    whole = parameters(trained(tmp_path))
    with modelopt.patch():
        assert_same(parameters(trained(tmp_path, batch=1, accumulation=4)), whole, 1e-7)


def trained_on_rank(rank: int, folder: str) -> Tensor:
    become_rank(rank)
    with modelopt.patch():
        return parameters(trained(Path(folder), batch=2, ddp_backend="gloo"))


def test_two_processes_train_as_one_with_kdfasts_loss(tmp_path: Path) -> None:
    """Each has other tokens, and another number of them."""
    with modelopt.patch():
        whole = parameters(trained(tmp_path))
    for rank in results_of_ranks(tmp_path, trained_on_rank, str(tmp_path), start_method="fork"):
        assert_same(rank, whole, 1e-7)


def fake_trainer(criterion: nn.Module, teacher: Tensor) -> SimpleNamespace:
    return SimpleNamespace(_kd_criterion=criterion, _last_teacher_outputs=SimpleNamespace(logits=teacher))


def test_trainer_without_labels_has_the_mean_over_all_tokens() -> None:
    outputs, teacher = SimpleNamespace(logits=logits(2, 5, VOCAB)), logits(2, 5, VOCAB, seed=1)
    criterion = ORIGINALS["LogitsDistillationLoss"](2.0, "none")
    want = huggingface.KDTrainer._standard_kd_loss(fake_trainer(criterion, teacher), outputs, None)
    with modelopt.patch():
        got = huggingface.KDTrainer._standard_kd_loss(fake_trainer(criterion, teacher), outputs, None)
    assert_same(got.float(), want, 1e-6)


class Squares(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().mean(-1)


class SquaresAsLogitsLoss(Squares, ORIGINALS["LogitsDistillationLoss"]):
    pass


class SquaresAsKDLoss(Squares, kdfast.KDLoss):
    pass


@pytest.mark.parametrize("kind", [Squares, SquaresAsLogitsLoss, SquaresAsKDLoss])
def test_criterion_of_somebody_else_stays_the_trainers_with_a_warning(kind: type[nn.Module]) -> None:
    outputs, teacher = SimpleNamespace(logits=logits(2, 5, VOCAB)), logits(2, 5, VOCAB, seed=1)
    labels = torch.ones(2, 5, dtype=torch.int64)
    want = huggingface.KDTrainer._standard_kd_loss(fake_trainer(kind(), teacher), outputs, labels)
    with modelopt.patch(), pytest.warns(FallbackWarning, match=f"{kind.__name__},"):
        got = huggingface.KDTrainer._standard_kd_loss(fake_trainer(kind(), teacher), outputs, labels)
    assert_same(got, want)


def converted(criterion: nn.Module) -> Tensor:
    """The parameters of a model of mtd.convert after some steps."""
    torch.manual_seed(0)
    student, teacher = nn.Linear(8, VOCAB), nn.Linear(8, VOCAB)
    config = {"teacher_model": teacher, "criterion": criterion, "loss_balancer": mtd.StaticLossBalancer(0.7)}
    model = mtd.convert(student, mode=[("kd_loss", config)])
    optimizer = torch.optim.SGD([model.weight, model.bias], lr=1.0)
    for _ in range(5):
        x, labels = torch.randn(16, 8), torch.randint(VOCAB, (16,))
        loss = model.compute_kd_loss(student_loss=nn.functional.cross_entropy(model(x), labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return parameters(nn.ParameterList([model.weight, model.bias]))


@pytest.mark.filterwarnings("ignore:.*weights do not sum")
def test_model_of_convert_trains_as_with_model_optimizers_loss() -> None:
    theirs = converted(ORIGINALS["LogitsDistillationLoss"](2.0, "batchmean"))
    assert_same(converted(modelopt.LogitsDistillationLoss(2.0, "batchmean")), theirs, 1e-7)


def test_patch_is_undone() -> None:
    places = [(mtd, "LogitsDistillationLoss"), (mtd, "MFTLoss"), (huggingface, "LogitsDistillationLoss")]
    places += [(megatron, "LogitsKLLoss"), (megatron, "TopKLogitsKLLoss"), (huggingface.KDTrainer, "_standard_kd_loss")]
    before = [getattr(*place) for place in places]
    with modelopt.patch():
        modelopt.patch()  # does nothing
        assert all(getattr(*place) is not old for place, old in zip(places, before, strict=True))
    assert all(getattr(*place) is old for place, old in zip(places, before, strict=True))
