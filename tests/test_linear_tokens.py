"""linear_token_log_probs gives the numbers of token_log_probs of the head's logits, a chunk of rows at a time."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import BF16, DTYPES, F32, F64, ON_GPU, batch
from judge import one_thread
from linear_cases import HIDDEN, ROWS, VOCAB, Case, judge
from test_tokens import ENTRIES, OPTIONS, ids_for
from token_cases import NAMES, factors, plain
from token_cases import judge as judge_tokens
from torch import Tensor

import kdfast

Results = tuple[list[Tensor], list[Tensor]]


def results_of(results: Any, leaves: list[Tensor], logits: Tensor, ids: Tensor) -> Results:
    """The three results, and the gradients of the leaves that want one."""
    grads = [x.to(y.dtype) for x, y in zip(factors(ids, logits), results, strict=True)]
    grads = [torch.where(y.isinf(), 0, x) for x, y in zip(grads, results, strict=True)]
    wanted = [x for x in leaves if x.requires_grad]
    found = torch.autograd.grad(list(results), wanted, grads)
    return [x.detach() for x in results], list(found)


def fused(case: Case, ids: Tensor, leaves: list[Tensor] | None = None, **settings: Any) -> Results:
    leaves = case.leaves() if leaves is None else leaves
    bias = leaves[2] if len(leaves) > 2 else None
    results = kdfast.linear_token_log_probs(leaves[0], leaves[1], ids, bias=bias, **settings)
    return results_of(results, leaves, F.linear(*(x.detach() for x in leaves)), ids)


def by_logits(case: Case, ids: Tensor, dtype: torch.dtype, **settings: Any) -> Results:
    leaves = case.leaves(dtype)
    logits = F.linear(*leaves)
    return results_of(plain(logits, ids, **settings), leaves, logits, ids)


def check(case: Case, ids: Tensor, backend: str, **settings: Any) -> None:
    own = {k: settings.pop(k) for k in ("chunk_rows", "accumulate_dtype") if k in settings}
    got = fused(case, ids, backend=backend, **own, **settings)
    kind = F64 if case.hidden.dtype == F64 else F32
    with one_thread():
        truth = by_logits(case, ids, F64, **settings)
        eager = truth if kind == F64 else by_logits(case, ids, kind, **settings)
    assert [x.dtype for x in got[0]] == [kind] * 3
    assert [x.dtype for x in got[1]] == [case.hidden.dtype] * len(got[1])
    names = (*NAMES, "gradient in hidden", "gradient in weight", "gradient in bias")
    for name, *values in zip(names, [*got[0], *got[1]], [*truth[0], *truth[1]], [*eager[0], *eager[1]], strict=False):
        finite = values[1].isfinite()  # an absent token's is -inf
        assert torch.equal(values[0].isfinite(), finite)
        judge(name, *(torch.where(finite, x, 0) for x in values), kind)


@pytest.mark.parametrize("entries", ENTRIES[:2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_those_of_the_heads_logits(
    backend: str, dtype: torch.dtype, entries: int | None
) -> None:
    if backend in ON_GPU and dtype not in (F32, BF16):
        return  # the kernels get the logits in fp32
    case, ids = Case(dtype), ids_for(ROWS, VOCAB, entries)
    ids[5] = -100
    for chunk_rows in (4, None) if backend not in ON_GPU else (4,):
        check(case, ids, backend, temperature=0.7, chunk_rows=chunk_rows)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_that_of_the_logits(backend: str, option: str) -> None:
    settings = dict(OPTIONS[option])
    if isinstance(T := settings.get("temperature"), Tensor) and T.dim():
        settings["temperature"] = torch.linspace(0.5, 3, ROWS)
    check(Case(), ids_for(ROWS, 30, 3), backend, chunk_rows=4, **settings)


@pytest.mark.parametrize("chunk_rows", [1, 4, ROWS, 100])
def test_chunk_rows_changes_no_number(cpu: str, chunk_rows: int) -> None:
    for case in (Case(F32), Case(F64, bias=False)):
        check(case, ids_for(ROWS, VOCAB, 3), cpu, chunk_rows=chunk_rows)


def test_logits_are_not_rounded_before_the_softmax(backend: str) -> None:
    """The head is the logits transposed, in bf16; hidden states select rows."""
    logits, ids = 20 * batch(6, 300, F32).student, ids_for(6, 300, 3)
    high, low = logits.to(BF16), (logits - logits.to(BF16)).to(BF16)  # their sum has 16 bits
    weight = torch.cat([high, low]).t().contiguous()
    found = kdfast.linear_token_log_probs(torch.eye(6, dtype=BF16).repeat(1, 2), weight, ids, backend=backend)
    for got, want in zip(found, plain(high.double() + low.double(), ids), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-5)


def test_an_ignored_row_may_hold_anything_and_gets_no_gradient(backend: str) -> None:
    case, ids = Case(), ids_for(ROWS, VOCAB, 3)
    ids[[0, 7]] = -100
    temperature = torch.linspace(0.5, 2, ROWS)
    want = fused(case, ids, chunk_rows=4, temperature=temperature, backend=backend)
    case.hidden[[0, 7]], temperature[[0, 7]] = math.nan, math.inf
    got = fused(case, ids, chunk_rows=4, temperature=temperature, backend=backend)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not any(x[[0, 7]].any() for x in (*got[0], got[1][0]))


def test_without_entropy_the_others_are_the_same(backend: str) -> None:
    case, ids = Case(), ids_for(ROWS, VOCAB, 3)
    ids[4] = -100
    for grad in (True, False):
        hidden = case.hidden.clone().requires_grad_(grad)
        call = {"bias": case.bias, "chunk_rows": 4, "backend": backend}
        got = kdfast.linear_token_log_probs(hidden, case.weight, ids, entropy=False, **call)
        want = kdfast.linear_token_log_probs(hidden, case.weight, ids, **call)
        assert got.entropy is None
        assert got.log_rest.requires_grad == grad
        torch.testing.assert_close((got.log_probs, got.log_rest), (want.log_probs, want.log_rest))


def test_no_rows_and_ignored_rows_alone_have_results_and_gradients(backend: str) -> None:
    case = Case()
    values, grads = fused(case, torch.full((ROWS,), -100), backend=backend)
    assert not any(x.count_nonzero() for x in (*values, *grads))
    case.hidden = case.hidden[:0]
    values, grads = fused(case, torch.zeros(0, 2, dtype=torch.int64), backend=backend)
    assert [tuple(x.shape) for x in values] == [(0, 2), (0,), (0,)]
    assert not any(x.count_nonzero() for x in grads)


@pytest.mark.parametrize("frozen", range(3))
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(cpu: str, frozen: int) -> None:
    case, ids = Case(), ids_for(ROWS, VOCAB, None)
    leaves = case.leaves()
    leaves[frozen].requires_grad_(False)
    want = fused(case, ids)[1]
    torch.testing.assert_close(fused(case, ids, leaves)[1], [x for i, x in enumerate(want) if i != frozen])


def test_hidden_states_may_have_any_shape_and_strides(cpu: str) -> None:
    case, ids = Case(rows=12), ids_for(12, VOCAB, 3)
    want = fused(case, ids, chunk_rows=5)
    flat = case.hidden
    case.hidden = flat.view(3, 4, HIDDEN).transpose(0, 1).contiguous().transpose(0, 1)
    got = fused(case, ids.view(3, 4, 3), chunk_rows=5)
    torch.testing.assert_close([x.reshape(y.shape) for x, y in zip(got[0], want[0], strict=True)], want[0])
    torch.testing.assert_close([x.reshape(y.shape) for x, y in zip(got[1], want[1], strict=True)], want[1])


def test_autocast_casts_heads_as_it_does_for_linear_and_leaves_logits(cpu: str) -> None:
    case, ids = Case(), ids_for(ROWS, VOCAB, None)
    narrow = Case()
    narrow.hidden, narrow.weight, narrow.bias = (x.to(BF16) for x in (case.hidden, case.weight, case.bias))
    with torch.autocast("cpu", BF16):
        values, grads = fused(case, ids)
    want = fused(narrow, ids)
    torch.testing.assert_close(values, want[0], rtol=0, atol=0)
    assert [x.dtype for x in grads] == [F32] * 3
    torch.testing.assert_close([x.to(BF16) for x in grads], want[1], rtol=0, atol=0)
    with torch.autocast("cpu", BF16):
        judge_tokens(lambda s, ids, **more: kdfast.token_log_probs(s, ids, **more), batch(4, 33).student, ids[:4] % 33)


def test_no_tensor_of_all_rows_and_classes_is_made(cpu: str) -> None:
    rows, vocab = 64, 4096
    hidden, weight = torch.randn(rows, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        results = kdfast.linear_token_log_probs(hidden, weight, torch.arange(rows), chunk_rows=2)
        sum(x.sum() for x in results).backward()
    largest = max(event.cpu_memory_usage for event in profile.events() if event.name.startswith("aten::empty"))
    assert largest == vocab * 8 * 4 < rows * vocab * 4, "the weight's gradient"
