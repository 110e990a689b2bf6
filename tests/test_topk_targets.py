"""TopKTargets from a teacher's logits and from a server: topk_targets and from_vllm."""

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import BF16, DTYPES, F16, F32, F64, batch, name, python_output
from sparse_cases import INF, NAN, gradient, plain_losses

from kdfast import TopKTargets, kd_loss, topk_targets


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("k", (1, 5, 30))
def test_the_likeliest_classes_have_their_log_probabilities_of_the_whole_softmax(k: int, dtype: torch.dtype) -> None:
    logits = batch(6, 30, dtype).teacher.view(2, 3, 30)
    got = topk_targets(logits, k, 2.0)
    values, indices = torch.log_softmax(logits.double() / 2, -1).topk(30, -1)
    wide = F64 if dtype == F64 else F32
    assert got.log_probs.dtype == wide
    assert got.indices.dtype == torch.int64
    assert got.indices.shape == (2, 3, k)
    torch.testing.assert_close(got.log_probs, values[..., :k].to(wide))
    torch.testing.assert_close(logits.gather(-1, got.indices), logits.gather(-1, indices[..., :k]))  # ties may swap
    assert (got.log_probs.diff(dim=-1) <= 0).all()


def test_scale_cap_padding_and_temperatures_are_those_of_kd_loss() -> None:
    logits = 10 * batch(4, 20, F64).teacher
    padded = torch.nn.functional.pad(logits, (0, 4), value=1e4)
    T = torch.tensor([1.0, 2.0, 0.5, 3.0])
    got = topk_targets(padded, 6, T, logit_scale=0.5, softcap=10.0, vocab_size=20)
    z = 10 * torch.tanh(0.5 * logits / 10) / T.double().unsqueeze(-1)
    values, _ = torch.log_softmax(z, -1).topk(6, -1)
    torch.testing.assert_close(got.log_probs, values)
    assert got.indices.max() < 20
    student = batch(4, 20, F64).student
    whole = topk_targets(padded, 20, T, logit_scale=0.5, softcap=10.0, vocab_size=20)
    more = {"temperature": T, "backend": "reference"}
    want = kd_loss(student, padded, vocab_size=20, teacher_logit_scale=0.5, teacher_softcap=10.0, **more)
    torch.testing.assert_close(kd_loss(student, whole, **more), want)


def test_the_entries_of_topk_targets_make_the_loss_of_their_formula() -> None:
    student, logits, _ = batch(5, 30, F64)
    teacher = topk_targets(logits.requires_grad_(), 4, 2.0)
    assert not teacher.log_probs.requires_grad
    settings = {"divergence": "jsd", "beta": 0.7, "reduction": "none", "backend": "reference"}
    got = gradient(lambda s: kd_loss(s, teacher, temperature=2.0, **settings), student)
    torch.testing.assert_close(got, gradient(lambda s: 4 * plain_losses(s / 2, teacher, "tail", "jsd"), student))


def test_a_masked_class_is_an_absent_entry_and_other_rows_keep_their_numbers() -> None:
    logits = batch(3, 6).teacher
    logits[0, 1:], logits[1, 2] = -INF, NAN
    got = topk_targets(logits, 3)
    assert got.log_probs[0].tolist() == [0, -INF, -INF]
    assert got.log_probs[1].isnan().any()
    assert got.log_probs[2].isfinite().all()


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": 0}, ValueError, r"^k: 0 must lie in \[1, 5\], the number of classes"),
    ({"k": 6}, ValueError, r"^k: 6 must lie in \[1, 5\], the number of classes"),
    ({"k": 5, "vocab_size": 4}, ValueError, r"^k: 5 must lie in \[1, 4\], the number of classes"),
    ({"k": 2.0}, TypeError, "^k: must be an int, not 2.0"),
    ({"k": True}, TypeError, "^k: must be an int, not True"),
    ({"teacher_logits": [1.0]}, TypeError, "^teacher_logits: must be a tensor, not list"),
    ({"teacher_logits": torch.zeros(3, 5, dtype=torch.int64)}, RuntimeError, "^teacher_logits: has dtype torch.int64"),
    ({"teacher_logits": torch.zeros(())}, ValueError, r"^teacher_logits: has shape \(\)"),
    ({"temperature": 0}, ValueError, "^temperature: 0 must be finite and > 0"),
    (
        {"temperature": torch.ones(2)},
        ValueError,
        r"^temperature: .*\(2,\), but with teacher_logits of .*\(3,\)",
    ),
    ({"logit_scale": 0}, ValueError, "^logit_scale: 0 must be finite and > 0"),
    ({"softcap": -1.0}, ValueError, "^softcap: -1.0 must be finite and > 0"),
    ({"vocab_size": 6}, ValueError, r"^vocab_size: 6 must lie in \[1, 5\], the classes of teacher_logits"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: str(list(case[0].items()))[:40])
def test_a_wrong_argument_of_topk_targets_raises_a_named_error(
    case: tuple[dict[str, Any], type[Exception], str],
) -> None:
    given, error, words = case
    arguments = {"teacher_logits": torch.zeros(3, 5), "k": 2} | given
    with pytest.raises(error, match=words) as caught:
        topk_targets(**arguments)
    assert type(caught.value) is error


@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=name)
def test_nothing_else_of_the_size_of_the_logits_is_made(cpu: str, dtype: torch.dtype) -> None:
    """Measured in a process of its own: the most memory during a call, beyond the logits."""
    code = f"""
import resource, torch, kdfast
torch.set_num_threads(1)
logits = torch.randn(16, 1000).to({dtype})
kdfast.topk_targets(logits, 8)
logits = torch.zeros(512, 100_000, dtype={dtype}).add_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kdfast.topk_targets(logits, 8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / logits.nbytes)
"""
    assert float(python_output("-c", code)) < 0.2


# --- from_vllm ---------------------------------------------------------------------------------------------------


def logprob(value: float, rank: int = 1) -> Any:
    """As vLLM's Logprob has it."""
    return SimpleNamespace(logprob=value, rank=rank, decoded_token="x")


OBJECTS = [None, {7: logprob(-0.5), 3: logprob(-1.5)}, {2: logprob(-2.0), 9: logprob(-0.1), 4: logprob(-3.0)}]
DICTS = [None, *({k: vars(v) for k, v in row.items()} for row in OBJECTS[1:] if row)]
FORMS = {
    "objects": OBJECTS,
    "dicts": DICTS,
    "JSON": json.loads(json.dumps(DICTS)),  # whose keys are strings
    "numbers": [None, *({k: v.logprob for k, v in row.items()} for row in OBJECTS[1:] if row)],
}


@pytest.mark.parametrize("form", FORMS)
def test_from_vllm_takes_objects_dicts_json_and_numbers(form: str) -> None:
    got = TopKTargets.from_vllm(FORMS[form])
    assert got.indices.tolist() == [[7, 3, -1], [9, 2, 4]]
    assert got.indices.dtype == torch.int64
    assert got.log_probs.dtype == F32
    torch.testing.assert_close(got.log_probs, torch.tensor([[-0.5, -1.5, -INF], [-0.1, -2.0, -3.0]]))


@pytest.mark.parametrize(("k", "indices"), [(1, [[7], [9]]), (2, [[7, 3], [9, 2]]), (5, [[7, 3, -1], [9, 2, 4]])])
def test_k_keeps_the_likeliest_entries_of_a_row(k: int, indices: list[list[int]]) -> None:
    """vLLM gives k + 1 where the prompt's own token is not among the top k."""
    assert TopKTargets.from_vllm(OBJECTS, k).indices.tolist() == indices


def test_row_i_of_from_vllm_belongs_to_the_logits_that_predict_token_i_plus_1() -> None:
    logits = batch(4, 30, F64).teacher
    served: list[Any] = [None]
    for row in torch.log_softmax(logits, -1)[:-1]:  # the last logits score no token of the prompt
        values, indices = row.topk(5)
        served.append({i: logprob(x) for i, x in zip(indices.tolist(), values.tolist(), strict=True)})
    got, want = TopKTargets.from_vllm(served), topk_targets(logits[:-1], 5)
    assert torch.equal(got.indices, want.indices)
    torch.testing.assert_close(got.log_probs, want.log_probs.float())
    assert kd_loss(torch.randn(3, 30), got, backend="reference").isfinite()


def test_from_vllm_takes_empty_rows_and_prompts() -> None:
    for served in ([None], []):
        assert TopKTargets.from_vllm(served).indices.shape == (0, 1)
    got = TopKTargets.from_vllm([None, {}, {5: -1.0, 6: -INF}])
    assert got.indices[:, 0].tolist() == [-1, 5]
    assert kd_loss(torch.randn(2, 8), got, reduction="none", backend="reference")[0] == 0
    assert TopKTargets.from_vllm([None, {3: -1.0}], device="meta").log_probs.device.type == "meta"


@pytest.mark.parametrize(
    ("served", "k", "error", "words"),
    [
        ([None, {1: -1.0}, None], None, ValueError, "entry 2 is None, but only the first may be"),
        ([None, [1, 2]], None, TypeError, "entry 1 must map token ids to numbers, not list"),
        ([None, {"a": -1.0}], None, ValueError, r"entry 1 must map token ids to numbers, .*'logprob', but .*'a'"),
        ([None, {1: {"rank": 1}}], None, ValueError, "entry 1 must map token ids to numbers, .*'rank'"),
        ([None, {1: None}], None, ValueError, "entry 1 must map token ids to numbers, .*None"),
        (OBJECTS, 0, ValueError, "k: 0 must be at least 1"),
        (OBJECTS, 1.5, TypeError, "k: must be an int, not 1.5"),
    ],
)
def test_from_vllm_names_the_entry_that_is_wrong(served: Any, k: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^({re.escape('prompt_logprobs: ')})?{words}"):
        TopKTargets.from_vllm(served, k)
