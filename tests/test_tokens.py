"""token_log_probs gives log q of tokens, the entropy and the log of the rest, and their gradients."""

import itertools
import math
from typing import Any

import pytest
import torch
from cases import BF16, F32, F64, ON_GPU, batch, dtypes_for, name, to_default_device
from token_cases import NAMES, factors, gradient, judge, plain, tokens
from torch import Tensor

import kdfast

# One class; none of a vector's length; two blocks of a CPU's kernels; a long odd one
VOCABS = (1, 2, 7, 33, 2049, 40_001)
ON_GPU_TOO = (7, 2049)
# One id for each row, several, more than there are classes
ENTRIES = (None, 3, 40)


def ids_for(rows: int, vocab: int, entries: int | None, seed: int = 0) -> Tensor:
    """Random ids; of several, the second row has one twice, the third an absent one, the last nothing else."""
    made = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    ids = torch.randint(vocab, (rows, entries or 1), **made)
    if entries:
        ids[1, 1], ids[2, 1], ids[3, :] = ids[1, 0], -1, -1
    return to_default_device(ids if entries else ids[:, 0])


@pytest.mark.parametrize("entries", ENTRIES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_values_and_gradients_are_right_at_every_length(
    backend: str, vocab: int, entries: int | None, full: bool
) -> None:
    if backend in ON_GPU and not full and (vocab not in ON_GPU_TOO or entries == 40):
        pytest.skip("only in `make test-full`: each length and number of ids compiles")
    judge(tokens(backend), batch(4, vocab).student, ids_for(4, vocab, entries), temperature=1.3)


@pytest.mark.parametrize("dtype_at", range(4), ids=("F32", "BF16", "F16", "F64"))
def test_values_and_gradients_are_right_in_every_dtype(backend: str, dtype_at: int) -> None:
    if dtype_at >= len(dtypes_for(backend)):
        return
    for vocab, entries in ((17, 3), (2049, None)) if backend not in ON_GPU else ((17, 3),):
        logits = batch(4, vocab, dtypes_for(backend)[dtype_at]).student
        judge(tokens(backend), logits, ids_for(4, vocab, entries))


OPTIONS: dict[str, dict[str, Any]] = {
    "a low temperature": {"temperature": 0.1},
    "temperatures of rows": {"temperature": torch.tensor([0.5, 1.0, 2.0, 3.7])},
    "a 0-dim tensor": {"temperature": torch.tensor(2.0)},
    "logit_scale": {"logit_scale": 0.0625, "temperature": 0.5},
    "softcap": {"softcap": 5.0},
    "vocab_size": {"vocab_size": 30},
    "all": {"temperature": torch.tensor([0.5, 1.0, 2.0, 3.7]), "logit_scale": 3.0, "softcap": 4.0, "vocab_size": 31},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_values_and_gradients_are_right_with_every_option(backend: str, option: str) -> None:
    settings = to_default_device(OPTIONS[option])
    logits = batch(4, 37).student
    logits[:, 31:] += 50 if "vocab_size" in settings else 0  # what padding holds
    judge(tokens(backend), logits, ids_for(4, 30, 3), **settings)


COMBINATIONS = [which for count in (1, 2, 3) for which in itertools.combinations(NAMES, count)]


@pytest.mark.parametrize("which", COMBINATIONS, ids=name)
def test_any_of_the_results_may_have_a_gradient(backend: str, which: tuple[str, ...]) -> None:
    for dtype in (F64,) if backend == "reference" else dtypes_for(backend)[:2]:
        for entries in (None, 3):
            judge(tokens(backend), batch(4, 33, dtype).student, ids_for(4, 33, entries), which, temperature=0.7)


def test_a_constant_gradient_may_have_no_memory_of_its_own(backend: str) -> None:
    logits, ids = batch(4, 33, F32).student, ids_for(4, 33, 3)[:2]
    leaf, other = (logits[:2].clone().requires_grad_() for _ in range(2))
    sum(x.sum() for x in kdfast.token_log_probs(leaf, ids, backend=backend)).backward()
    sum(x.sum() for x in plain(other, ids)).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_without_entropy_the_others_are_the_same(backend: str) -> None:
    logits, ids = batch(4, 33).student, ids_for(4, 33, 3)
    both = ("log_probs", "log_rest")
    want, of_want = gradient(tokens(backend), logits, ids, both)
    leaf = logits.clone().requires_grad_()
    got = kdfast.token_log_probs(leaf, ids, entropy=False, backend=backend)
    assert got.entropy is None
    torch.testing.assert_close((got.log_probs, got.log_rest), (want.log_probs, want.log_rest))
    g, _, r = factors(ids, logits)
    outputs = [x.masked_fill(x.isinf(), 0) for x in (got.log_probs, got.log_rest)]
    torch.testing.assert_close(torch.autograd.grad(outputs, leaf, [g, r])[0], of_want)


@pytest.mark.parametrize("result", NAMES)
@pytest.mark.parametrize("entries", [None, 3])
def test_gradients_of_the_reference_are_those_of_finite_differences(result: str, entries: int | None) -> None:
    ids = ids_for(3, 6, None) if entries is None else torch.tensor([[0, 5, 0], [1, -1, 2], [3, 3, 3]])
    settings = {"temperature": torch.tensor([0.5, 1.0, 2.0]), "softcap": 3.0, "vocab_size": 6}

    def call(s: Tensor) -> Tensor:
        value = getattr(kdfast.token_log_probs(s, ids, backend="reference", **settings), result)
        return value[value.isfinite()]

    assert torch.autograd.gradcheck(call, batch(3, 8, F64).student.requires_grad_())


@pytest.mark.parametrize("entries", [None, 3])
def test_an_ignored_row_is_0_whatever_it_holds(backend: str, entries: int | None) -> None:
    logits, ids = batch(6, 33).student, ids_for(6, 33, entries)
    temperature = torch.linspace(1, 2, 6)
    want, of_want = gradient(tokens(backend), logits, ids, temperature=temperature)
    ignored = torch.tensor([False, True, False, False, True, True])
    ids[ignored] = 7 if entries else -7
    for bad in (math.nan, math.inf, -math.inf):
        logits[ignored], temperature[ignored] = bad, bad
        settings = {"temperature": temperature, "ignore_index": int(ids[1].max())}
        got, grad = gradient(tokens(backend), logits, ids, **settings)
        for value, expected in zip((*got, grad), (*want, of_want), strict=True):
            assert not value[ignored].any()
            assert torch.equal(value[~ignored], expected[~ignored])


def test_among_several_ids_ignore_index_is_a_class_or_absent(backend: str) -> None:
    logits = batch(2, 9).student
    for index, ids in ((-100, [[3, -100], [4, -5]]), (3, [[3, 4], [4, 3]])):
        judge(tokens(backend), logits, torch.tensor(ids), ignore_index=index)


def test_an_absent_id_is_no_class_and_one_that_is_there_twice_is_one(backend: str) -> None:
    logits = batch(6, 9).student
    ids = torch.tensor([[0, -1], [-1, 0], [-1, -2], [0, 0], [8, 8], [-(2**62), 8]])
    for which in (NAMES, NAMES[2:]):
        judge(tokens(backend), logits, ids, which)


def test_a_tokens_log_probability_is_never_above_0_and_as_exact_as_eagers(backend: str) -> None:
    """Tokens that have nearly all of q, and what is left of it."""
    rows = list(itertools.product((3.0, 8.0, 14.0, 17.0, 25.0, 60.0), (-20.0, 0.0, 33.3)))
    for dtype in (F32,) if backend in ON_GPU else dtypes_for(backend):
        logits, _, ids = batch(len(rows), 1000, dtype)
        for row, (gap, top) in enumerate(rows):
            logits[row] += top - gap - math.log(1000) - logits[row].amax()
            logits[row, ids[row]] = top
        got = kdfast.token_log_probs(logits, ids, backend=backend)
        truth = plain(logits.double(), ids)
        eager = plain(logits if dtype == F64 else logits.float(), ids)
        assert (got.log_probs <= 0).all()
        assert (got.entropy >= 0).all()
        for value, theirs, want in zip(got[:2], eager, truth, strict=False):
            assert (value - want).abs().max() <= 2 * (theirs - want).abs().max() + 1e-8
        torch.testing.assert_close(got.log_rest.double(), truth.log_rest, rtol=1e-6, atol=1e-5)


def test_far_padded_and_masked_logits_are_right(backend: str) -> None:
    logits = batch(6, 33).student
    logits[0] += 1e4
    logits[1, 5:] = -math.inf
    logits[2, :5], logits[3, 5:], logits[4] = -1e30, torch.finfo(F32).min, -1e10
    ids = torch.tensor([0, 7, 0, 3, 9, 1])  # the second has probability 0, and so has the third
    got, grad = gradient(tokens(backend), logits, ids)
    want, of_want = gradient(plain, logits.double(), ids)
    for value, expected in zip((*got, grad), (*want, of_want), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=2e-3)  # 1e4 has no more digits
    assert grad.isfinite().all()


def test_nan_or_infinity_affects_its_row_alone(backend: str) -> None:
    logits, ids = batch(4, 33).student, ids_for(4, 33, 3)
    want, of_want = gradient(tokens(backend), logits, ids)
    logits[0, 5], logits[2, 5], logits[3] = math.nan, math.inf, -math.inf
    got, grad = gradient(tokens(backend), logits, ids)
    for value, expected in zip((*got, grad), (*want, of_want), strict=True):
        assert torch.equal(value[1], expected[1])
        assert value[[0, 2]].isnan().any()
    assert got.entropy[[0, 2, 3]].isnan().all()


def test_logits_and_ids_may_have_any_shape_and_strides(backend: str) -> None:
    logits, ids = batch(12, 33).student, ids_for(12, 33, 3)
    wide = torch.nn.functional.pad(logits, (0, 3), value=math.nan)
    for given, indices in (
        (logits.view(2, 3, 2, 33), ids.view(2, 3, 2, 3)),
        (wide[:, :33], ids.t().contiguous().t()),
        (logits.t().contiguous().t(), ids),
        (logits[:1].expand(12, 33), ids[:1].expand(12, 3)),
        (logits[0], ids[0]),
        (logits[0], ids[0, 0]),
        (logits[:0], ids[:0]),
    ):
        got, grad = gradient(tokens(backend), given, indices)
        want, of_want = gradient(plain, given.double(), indices)
        assert got.entropy.shape == got.log_rest.shape == given.shape[:-1]
        assert got.log_probs.shape == indices.shape
        torch.testing.assert_close([x.double() for x in (*got, grad)], [*want, of_want], rtol=2e-6, atol=2e-6)


def test_ids_may_be_int32(backend: str) -> None:
    logits, ids = batch(4, 33).student, ids_for(4, 33, 3)
    (got, grad), (want, of_want) = (gradient(tokens(backend), logits, x) for x in (ids.int(), ids))
    for value, expected in zip((*got, grad), (*want, of_want), strict=True):
        assert torch.equal(value, expected)


def test_autograd_saves_the_logits_and_a_few_numbers_for_each_row(backend: str) -> None:
    leaf, ids = batch(5, 1000, BF16).student.requires_grad_(), ids_for(5, 1000, 3)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kdfast.token_log_probs(leaf, ids, backend=backend)
    assert [x.data_ptr() for x in saved if x.numel() >= 1000] == [leaf.data_ptr()]
