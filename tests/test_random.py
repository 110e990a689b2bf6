"""Any combination of arguments gives the reference's numbers or a documented error, and never a crash.

As a program this file makes many valid and wrong calls from a seed: the subprocess of the last test.
"""

import collections
import contextlib
import os
import random
import sys
from typing import Any

import emulated
import gpu  # before anything that imports Triton
import hypothesis.strategies as st
import torch
from cases import (
    DIVERGENCES,
    ENSEMBLES,
    F32,
    F64,
    ON_GPU,
    REDUCTIONS,
    TARGETS,
    as_target,
    batch,
    divergences_for,
    dtypes_for,
    run_python,
)  # fmt: skip
from hypothesis import HealthCheck, Phase, given, seed, settings
from judge import judge
from torch import Tensor

import kdfast
from kdfast import divergences

SEED = int(os.environ["KDFAST_TEST_SEED"])  # a new one each day: conftest.py sets it, and the report's header shows it
# Examples that are judged, in `make test` and in `make test-full`: nearly each of Triton's compiles for a second.
EXAMPLES = {"reference": (20, 100), "cpu": (150, 1000), "triton": (6, 40), "cuda": (60, 400)}
# Calls that must not crash.
CALLS = {"reference": (500, 5000), "cpu": (3000, 10_000), "triton": (30, 200), "cuda": (150, 1500)}
ERRORS = (TypeError, ValueError, RuntimeError, IndexError)  # what kd_loss documents


@st.composite
def calls(draw: Any, backend: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Valid arguments of kd_loss; for CUDA only those that its kernels support."""
    dtypes, plain = dtypes_for(backend), backend == "cuda"
    shape = draw(st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 2)]))
    rows = torch.Size(shape).numel()
    vocab = draw(st.integers(1, 70) | st.integers(2040, 2060))  # around vectors; around a block
    padding, teacher_padding = draw(st.sampled_from([(None, None), (0, 0), (3, 0), (0, 5), (8, 1)]))
    dtype, number = draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**20))
    scale, offset = draw(st.sampled_from([0.1, 1.0, 3.0, 20.0])), draw(st.sampled_from([0.0, -50.0, 300.0]))
    student, _, labels = batch(rows, vocab, dtype, scale=scale, offset=offset, seed=number)

    def padded(x: Tensor, by: int | None) -> Tensor:
        x = torch.nn.functional.pad(x, (0, by or 0), value=9.0)
        return x.view(*shape, x.shape[-1])

    def per_row(values: st.SearchStrategy[float], kinds: Any = (F32, F64)) -> Tensor:
        drawn = draw(st.lists(values, min_size=rows, max_size=rows))
        return torch.tensor(drawn, dtype=draw(st.sampled_from(kinds))).view(shape)

    def perhaps(argument: str, values: st.SearchStrategy[Any]) -> None:
        if draw(st.booleans()):
            options[argument] = draw(values)

    temperatures = st.sampled_from([1.0, 2.0, 3.0, 4.0, 0.5, 20.0]) | st.floats(0.3, 30)
    known = divergences_for(backend)
    # dkd needs other classes than the label's
    options: dict[str, Any] = {"divergence": draw(st.sampled_from([d for d in known if vocab > 1 or d != "dkd"]))}
    mse, entry = options["divergence"] == "logit_mse", divergences.DIVERGENCES.get(options["divergence"])
    if entry is not None and entry.beta is not None:
        perhaps("beta", st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0.01, 0.99))
    options["temperature"] = per_row(temperatures) if draw(st.booleans()) else draw(temperatures)
    options["target"] = "logits" if mse or plain else draw(st.sampled_from(TARGETS))
    count = 1 if plain else draw(st.sampled_from([1, 1, 2, 3]))
    # known: KL(q, p) is infinite on a GPU where p of an arithmetic mixture underflows
    geometric = count > 1 and (mse or scale == 20.0)
    options["ensemble"] = "geometric" if geometric else draw(st.sampled_from(ENSEMBLES))
    kinds = [dtype if plain else draw(st.sampled_from(dtypes)) for _ in range(count)]
    teachers = [batch(rows, vocab, kind, scale=scale, seed=number + i).teacher for i, kind in enumerate(kinds)]
    teachers = [as_target(t, options["target"], 2) for t in teachers]
    if options["target"] == "probs":  # none is 0, where a KL is infinite
        teachers = [t.clamp_min(torch.finfo(t.dtype).tiny) for t in teachers]
    teachers = [padded(t, teacher_padding) for t in teachers]
    teacher: Any = teachers[0] if count == 1 and draw(st.booleans()) else teachers
    if isinstance(teacher, list):
        perhaps("teacher_weights", st.lists(st.floats(0.1, 3), min_size=count, max_size=count))

    given_labels = None
    if options["divergence"] == "dkd" or draw(st.booleans()):
        ignored = torch.tensor(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
        options["ignore_index"] = draw(st.sampled_from([-100, 0, -1]))
        given_labels = torch.where(ignored, options["ignore_index"], labels).view(shape)
        options["alpha"] = draw(st.none() | st.sampled_from([0.0, 1.0]) | st.floats(0.01, 1))
        perhaps("hard_weight", st.sampled_from([0.0, 1.0]) | st.floats(0.01, 10))
        perhaps("label_smoothing", st.sampled_from([0.0, 0.1, 1.0]) | st.floats(0.01, 1))
    if options["divergence"] == "dkd":
        weights = st.sampled_from([0.0, 1.0, 8.0]) | st.floats(0.01, 10)
        perhaps("dkd_weights", st.tuples(weights, weights))
    caps = st.sampled_from([30.0, 0.5, 1e4]) | st.floats(1, 100)
    scales = st.sampled_from([0.0625, 2.0]) | st.floats(0.05, 3)
    perhaps("z_loss", st.sampled_from([0.0, 1e-4]) | st.floats(0.01, 1))
    perhaps("logit_scale", scales)
    if options["target"] == "logits":
        perhaps("teacher_temperature", temperatures)
        perhaps("teacher_logit_scale", scales)
    if not plain:
        perhaps("softcap", caps)
    if options["target"] == "logits" and not plain:
        perhaps("teacher_softcap", caps)
        # logits that rounding makes equal have no deviation, and no digits
        options["standardize"] = offset == 0 and vocab > 2 and draw(st.booleans())
    if draw(st.booleans()):
        options["row_weight"] = per_row(st.sampled_from([0.0, 1.0]) | st.floats(0.01, 10))
    options["t_squared"], options["reduction"] = draw(st.booleans()), draw(st.sampled_from(REDUCTIONS))
    options["inplace"], options["return_metrics"] = draw(st.booleans()), draw(st.booleans())
    if options["reduction"] == "mean":
        perhaps("normalizer", st.floats(0.5, 100))
    if padding is not None:
        options["vocab_size"] = vocab
    return (padded(student, padding), teacher, given_labels), options


def test_any_valid_call_gives_the_references_numbers(backend: str, full: bool) -> None:
    @seed(SEED)
    @settings(
        deadline=None,
        database=None,
        max_examples=EXAMPLES[backend][full],
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking would compile and judge many examples
        print_blob=True,
    )
    @given(call=calls(backend))
    def check(call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        inputs, options = call
        judge(*inputs, backend=backend, **options)

    check()


def _pools(
    rng: random.Random, shape: tuple[int, ...], vocab: int, dtypes: tuple[torch.dtype, ...]
) -> dict[str, list[Any]]:
    """Valid and wrong values of each argument."""
    dtype = torch.int32 if rng.random() < 0.01 else rng.choice(dtypes)

    def logits(*size: int) -> Tensor:
        x = torch.randn(size)
        if rng.random() < 0.2 and x.numel():  # special values
            x.view(-1)[rng.randrange(x.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf, 1e4])
        if rng.random() < 0.2 and x.dim() > 1:  # other strides
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        return x

    teachers = [logits(*shape, vocab + rng.choice([0, 0, 0, 2])).to(rng.choice(dtypes)) for _ in range(3)]
    rows, labels, wrong = torch.rand(shape), torch.randint(vocab, shape), rng.choice([-1, vocab])
    student = logits(*shape, vocab).to(dtype)
    return {
        "student_logits": [*[student] * 8, student.requires_grad_() if student.is_floating_point() else student, None],
        "teacher": [*[teachers[0]] * 6, teachers, teachers[:1], [], None, "t", torch.randn(*shape, vocab, 2)],
        "labels": [None, *[labels] * 14, torch.where(labels == labels.flatten()[:1], wrong, labels), rows, [0]],
        "temperature": [1.0, 2, 3.7, 1e-30, 1e30, rows + 0.5, rows, 0, -1.0, torch.nan, "2", None, torch.ones(7)],
        "teacher_temperature": [*[None] * 8, 2.0, rows + 0.5, 0.0, "2"],
        "alpha": [*[None] * 5, 0, 0.5, 1, 7.0, -1, torch.nan, "a"],
        "hard_weight": [*[None] * 5, 0, 0.5, 3, -1, torch.inf, []],
        "divergence": [*DIVERGENCES * 3, "jsd?", 3],
        "beta": [*[None] * 12, 0, 0.3, 1, 1.5, "b"],
        "target": [*["logits"] * 6, *TARGETS * 2, "logit"],
        "vocab_size": [*[None] * 6, 1, vocab - 1, vocab, 0, vocab + 1, -1, 2.0],
        "t_squared": [True, False],
        "row_weight": [*[None] * 6, rows, rows.double(), rows > 0.5, -rows, torch.ones(7), 2.0],
        "ignore_index": [*[-100] * 5, 0, -1, 2**62, None, 0.5],
        "reduction": [*REDUCTIONS * 3, "max", None],
        "normalizer": [*[None] * 8, 3, 0.5, torch.tensor(2.0), torch.tensor(0.0), 0, "n", torch.ones(2)],
        "teacher_weights": [*[None] * 8, [1], [1, 2, 3], [0, 0, 1], [0, 0, 0], [-1, 1, 1], 3, "abc"],
        "ensemble": [*ENSEMBLES * 4, "sum"],
        "inplace": [*[False] * 5, True],
        "label_smoothing": [*[0.0] * 6, *[0, 0.1, 1.0] * 2, 1.1, None],
        "z_loss": [*[0.0] * 6, *[1e-4, 1, 1e30] * 2, -1, "z"],
        "logit_scale": [*[1.0] * 6, *[0.0625, 2, 1e30] * 2, 0, "s"],
        "teacher_logit_scale": [*[1.0] * 6, *[0.5, 1e-30] * 3, torch.inf, True],
        "softcap": [*[None] * 6, *[30.0, 0.5, 1, 1e30] * 2, 0, "c"],
        "teacher_softcap": [*[None] * 6, *[30.0, 1e-30] * 3, torch.inf, True],
        "standardize": [*[False] * 6, *[True] * 6, 1],
        "return_metrics": [*[False] * 6, *[True] * 6, "kl"],
        "dkd_weights": [*[(1.0, 8.0)] * 10, [1, 8], (2, 1), (0, 0), (1,), (1, -1)],
    }


BEYOND_CUDA = ("teacher", "target", "divergence", "softcap", "teacher_softcap", "standardize")


def kernels_of(backend: str) -> Any:
    if backend == "cuda" and not gpu.ON_DEVICE:
        return emulated.kernels()
    return gpu.kernels() if backend in ON_GPU else contextlib.nullcontext()


def many_calls(backend: str, number_of_calls: int) -> None:
    """Prints how many calls succeed and how many raise each error; only documented errors are accepted."""
    dtypes = dtypes_for(backend) if backend != "triton" else (F32,)  # each pair would be compiled
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    torch.set_num_threads(1 if backend == "reference" else 2)
    counts: collections.Counter[str] = collections.Counter()
    for number in range(number_of_calls):
        shape = rng.choice([(), (0,), (1,), (4,), (2, 3), (33,)])
        vocab = rng.choice([1, 2, 7, 17, 33, 100])
        pools = _pools(rng, shape, vocab, dtypes if backend != "cuda" else (rng.choice(dtypes),))
        if backend == "cuda":  # most values would be errors there
            pools = {k: v[:6] if k in BEYOND_CUDA else v for k, v in pools.items()}
        chosen = {argument: pool[0] for argument, pool in pools.items()}
        for argument in ("labels", *rng.sample(list(pools), rng.choice([0, 1, 2, 3, 5, 8]))):
            chosen[argument] = rng.choice(pools[argument])
        try:
            loss = kdfast.kd_loss(chosen.pop("student_logits"), backend=backend, **chosen)
            loss = loss[0] if isinstance(loss, tuple) else loss
            if loss.requires_grad:
                loss.backward(torch.ones_like(loss))
            counts["fine"] += 1
        except ERRORS as error:
            counts[type(error).__name__] += 1
            if ": " not in str(error).split("\n")[0]:
                raise SystemExit(f"call {number}: {type(error).__name__} without a name: {error}") from error
    print(" ".join(f"{name}={count}" for name, count in sorted(counts.items())))


def test_thousands_of_random_calls_do_not_crash(backend: str, full: bool) -> None:
    number = CALLS[backend][full]
    done = run_python("-X", "faulthandler", __file__, backend, number)
    assert done.returncode == 0, f"seed {SEED}, exit {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    counts = {name: int(count) for name, count in (pair.split("=") for pair in done.stdout.split())}
    assert sum(counts.values()) == number
    assert counts["fine"] > 0.3 * number  # there are enough valid calls
    for error in ERRORS if number >= 3000 else ():
        assert counts.get(error.__name__, 0) > 0.001 * number, counts


if __name__ == "__main__":
    with kernels_of(sys.argv[1]):
        many_calls(sys.argv[1], int(sys.argv[2]))
