"""linear_kd_loss gives the numbers of kd_loss of the heads' logits, a chunk of rows at a time.

The list of calls is judged by judge.py, the other tests by linear_cases.py.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import ALL_OPTIONS, Call, all_calls
from cases import BF16, F16, F32, F64, REDUCTIONS
from judge import judge, truth_of
from judge_metrics import judge_metrics
from linear_cases import HIDDEN, ROWS, VOCAB, Case, check, fused_results, plain_results
from torch import Tensor

import kdfast

CHUNKS = (
    1,
    4,  # the last chunk is smaller
    ROWS,  # one chunk
    None,  # the default
)


# How many calls of the list. The kernels are kd_loss's, and the code around them is the same for all backends.
FAST = {"reference": 10, "cpu": 120, "triton": 9}


def grid() -> Iterator[Any]:
    for number, call in enumerate(all_calls()):
        # on a GPU a float16 gradient is rounded once more, in the products; all options take long to compile
        by_triton = call["dtypes"][0] != F16 and call["option"] is not ALL_OPTIONS
        for backend, fast in FAST.items():
            if backend == "cpu" or (number < fast and (by_triton or backend != "triton")):
                marks = () if number < fast else pytest.mark.full
                yield pytest.param(call, backend, marks=marks, id=f"{number}: {call.id}, {backend}")


def loss_of_heads(student: Tensor, teacher: Any, *labels: Tensor | None, **settings: Any) -> Any:
    """kd_loss by linear_kd_loss: the head is the logits transposed; hidden states select rows, without rounding."""
    rows = student.shape[:-1].numel()

    def side(logits: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.eye(rows, dtype=logits.dtype).view(*logits.shape[:-1], rows)
        return hidden, logits.reshape(rows, logits.shape[-1]).t()

    has_head = isinstance(teacher, Tensor) and settings.get("target", "logits") == "logits"
    teachers = side(teacher) if has_head else (teacher, None)
    return kdfast.linear_kd_loss(*side(student), *teachers, *labels, chunk_rows=math.ceil(rows / 3), **settings)


@pytest.mark.parametrize(("call", "backend"), list(grid()), indirect=["backend"])
def test_linear_kd_loss_gives_the_numbers_of_kd_loss(call: Call, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, settings = call.arguments()
    settings.pop("inplace", None)  # linear losses do not have it
    truth = truth_of(*arguments, settings)
    with monkeypatch.context() as patch:
        patch.setattr(kdfast, "kd_loss", loss_of_heads)
        judge(*arguments, backend=backend, truth=truth, **settings)
    if settings.pop("return_metrics", False):
        measured = lambda *args, **more: loss_of_heads(*args, return_metrics=True, **more)[1]._asdict()  # noqa: E731
        monkeypatch.setattr("judge_metrics.compute_metrics", measured)
        judge_metrics(*arguments, backend=backend, **settings)


def test_alpha_0_needs_no_teacher(cpu: str) -> None:
    case = Case()
    want = kdfast.kd_loss(F.linear(case.hidden, case.weight), None, case.labels, alpha=0)
    for weight in (None, case.teacher_weight):
        loss = kdfast.linear_kd_loss(case.hidden, case.weight, None, weight, case.labels, alpha=0)
        torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_chunk_rows_changes_no_number(cpu: str, reduction: str, chunk_rows: int | None) -> None:
    weight = torch.linspace(0.5, 2, ROWS)
    for case in (Case(F32), Case(F64)):
        settings = {"reduction": reduction, "row_weight": weight, "return_metrics": True, "chunk_rows": chunk_rows}
        check(case, case.labels, backend=cpu, **settings)
    assert torch.equal(weight, torch.linspace(0.5, 2, ROWS))


@pytest.mark.parametrize(("rows", "shape"), [(0, ()), (slice(0), (0,))], ids=["one", "none"])
def test_hidden_states_may_be_one_row_or_none(cpu: str, rows: int | slice, shape: tuple[int, ...]) -> None:
    case = Case(rows=1)
    case.hidden, case.teacher_hidden, labels = case.hidden[rows], case.teacher_hidden[rows], case.labels[rows] % 9
    for reduction in REDUCTIONS:
        loss, _, metrics = check(case, labels, reduction=reduction, return_metrics=True, backend=cpu)
        assert loss.shape == (shape if reduction == "none" else ())
        assert metrics.kl.isnan().all() == (shape == (0,))


def test_a_batch_of_ignored_rows_has_loss_and_gradient_0(backend: str) -> None:
    case = Case()
    loss, grads, metrics = fused_results(case, torch.full_like(case.labels, -100), return_metrics=True, backend=backend)
    assert loss == 0
    assert not any(g.any() for g in grads)
    assert all(m.isnan() for m in metrics[:7])


@pytest.mark.parametrize("dtype", [F32, F16])  # the divisor inside of the kernels, and at the end
def test_a_normalizer_of_0_without_kept_rows_gives_loss_and_gradients_0(backend: str, dtype: torch.dtype) -> None:
    case = Case(dtype)
    ignored = torch.full_like(case.labels, -100)
    loss, grads, _ = fused_results(case, ignored, normalizer=torch.tensor(0.0), backend=backend)
    assert loss == 0
    assert not any(g.count_nonzero() for g in grads)  # counts NaN too


def test_bad_row_values_of_dropped_rows_have_no_effect(backend: str) -> None:
    case = Case()
    weight, temperature = torch.linspace(0, 2, ROWS), torch.linspace(1, 2, ROWS)
    want = fused_results(case, case.labels, row_weight=weight, temperature=temperature, chunk_rows=4, backend=backend)
    labels, bad_weight, bad = case.labels.clone(), weight.clone(), temperature.clone()
    labels[0] = 10**6  # of weight 0
    bad_weight[labels < 0] = math.nan
    bad[(labels < 0) | (weight == 0)] = 0
    got = fused_results(case, labels, row_weight=bad_weight, temperature=bad, chunk_rows=4, backend=backend)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_values_of_ignored_rows_have_no_effect(backend: str) -> None:
    case = Case()
    want = fused_results(case, case.labels, chunk_rows=4, return_metrics=True, backend=backend)
    case.hidden[case.labels < 0] = float("nan")
    case.teacher_hidden[case.labels < 0] = float("inf")
    got = fused_results(case, case.labels, chunk_rows=4, return_metrics=True, backend=backend)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_teacher_sliced_from_a_sequence_is_copied_chunk_by_chunk(cpu: str) -> None:
    case = Case(rows=12)
    case.hidden = case.hidden.view(3, 4, -1)
    sequence = torch.randn(3, 5, VOCAB)
    labels = case.labels.view(3, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        got = fused_results(case, labels, sequence[:, :-1], chunk_rows=2)
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten::empty"))
    assert largest == VOCAB * HIDDEN * 4 < 12 * VOCAB * 4, "the weight's gradient"
    torch.testing.assert_close(got, plain_results(case, labels, F32, sequence[:, :-1]))


def test_a_teachers_head_may_have_its_own_bias_dtype_and_widths(backend: str) -> None:
    case = Case(vocab=64)
    case.teacher_hidden, case.teacher_weight = case.teacher_hidden.to(BF16), case.teacher_weight[:VOCAB].to(BF16)
    case.teacher_bias = torch.randn(VOCAB).to(BF16)
    real = 47  # classes: both heads and their biases are padded
    _, grads, _ = check(case, case.labels.clamp_max(real - 1), vocab_size=real, chunk_rows=4, backend=backend)
    for grad in grads[1:]:
        assert grad[real - 1].any()
        assert not grad[real:].any()


def test_a_teacher_from_inference_mode_is_accepted(cpu: str) -> None:
    case = Case()
    with torch.inference_mode():
        case.teacher_hidden, case.teacher_weight = case.teacher_hidden * 1, case.teacher_weight * 1
        logits = case.teacher_logits()
    for reduction in ("mean", "none"):
        for teacher in (None, logits):
            check(case, case.labels, teacher, reduction=reduction, backend=cpu)
