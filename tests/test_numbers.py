"""No number is further from the fp64 truth than eager PyTorch's, but for a few ulp: the rule is judge.py's."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import (
    BF16,
    DIVERGENCES,
    DTYPE_PAIRS,
    DTYPES,
    F16,
    F32,
    F64,
    KINDS,
    OFFSETS,
    ROWS,
    SCALES,
    SMALL_VOCABS,
    TEMPERATURES,
    THINNED,
    VOCABS,
    batch,
    combined,
    divergences_for,
    labels_for,
    name,
    thinned_to,
)
from gpu import INTERPRETED
from judge import judge, run

LINEAR = ("forward_kl", "reverse_kl", "symmetric_kl", "dkd")
MAIN = ((F32, F32), (BF16, BF16))  # for Triton every length; what other pairs add is their loads, short rows and long
PROMISED = (1, 2, 7, 127, 1000, 4097, 32000, 50257, 151936)  # lengths that get two divergences of Triton's, not one


def _divergences(backend: str, vocab: int, pair: tuple[torch.dtype, torch.dtype]) -> Sequence[str]:
    """All; for Triton others of them at each length, since no divergence knows of lengths."""
    turn = VOCABS.index(vocab) + DTYPE_PAIRS.index(pair)
    if backend not in THINNED:
        return DIVERGENCES
    return DIVERGENCES[turn % 5 :: 5] if pair in MAIN and vocab in PROMISED else (DIVERGENCES[turn % 11],)


@thinned_to(lambda vocab, pair: pair in MAIN or vocab in SMALL_VOCABS)
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=name)
@pytest.mark.parametrize("vocab", VOCABS)
def test_every_length_and_dtype(backend: str, vocab: int, pair: tuple[torch.dtype, torch.dtype]) -> None:
    rows = 1 if vocab > 100_000 else 3
    student, teacher, labels = batch(rows, vocab, *pair)
    for divergence in _divergences(backend, vocab, pair):
        judge(student, teacher, labels, backend=backend, divergence=divergence, temperature=2)


@thinned_to(lambda temperature, dtype: dtype == F32 or temperature in (2, 0.1))  # a temperature meets fp32, or fp64
@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=name)  # F16 differs from BF16 in its rounding alone
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_every_temperature(backend: str, temperature: float, dtype: torch.dtype) -> None:
    # the teacher's own: a different one, and 1, where only the student's is tempered
    ways = (
        (True, {}),
        (False, {"t_squared": False}),
        (False, {"teacher_temperature": 1.5}),
        (True, {"teacher_temperature": 1}),
    )
    turn = TEMPERATURES.index(temperature)
    for vocab, divergence, (labelled, options) in combined(
        backend, SMALL_VOCABS, divergences_for(backend)[:-1], ways, turn=turn
    ):
        student, teacher, labels = batch(3, vocab, dtype)
        settings = {"backend": backend, "divergence": divergence, "temperature": temperature} | options
        # Triton: the same arithmetic by row, which it would compile again
        judge(student, teacher, labels_for(divergence, labels, labelled), by_row=backend not in THINNED, **settings)


@thinned_to(lambda temperature, dtype: dtype != BF16 or temperature == 1)  # whose arithmetic is fp32's
@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=name)
@pytest.mark.parametrize("temperature", (0.5, 1, 3.7))  # sharper, none, softer
def test_logits_of_every_size(backend: str, temperature: float, dtype: torch.dtype) -> None:
    for divergence, vocab in combined(backend, divergences_for(backend), SMALL_VOCABS, turn=temperature == 1):
        for scale in SCALES:
            inputs = batch(3, vocab, dtype, scale=scale)
            judge(*inputs, backend=backend, divergence=divergence, temperature=temperature)
        for offset in OFFSETS:
            # the offset of one side alone: nothing may lean on both sides' maxima being near each other
            student, _, labels = batch(3, vocab, dtype, offset=offset)
            for teacher in (batch(3, vocab, dtype, offset=offset).teacher, batch(3, vocab, dtype).teacher):
                judge(student, teacher, labels, backend=backend, divergence=divergence, temperature=temperature)


def _rising(x: torch.Tensor) -> torch.Tensor:
    return x + torch.linspace(0, 200, x.shape[-1])


def _falling(x: torch.Tensor) -> torch.Tensor:
    return x + torch.linspace(200, 0, x.shape[-1])


def _first_block(value: float):
    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., :2048] = value
        return x

    return change


# Kernels go through a row in blocks and merge what they have at one maximum with what they find at another.
ROW_SHAPES = {
    "rising": _rising,  # each block's sums are rescaled away by the next
    "falling": _falling,  # each next block adds nothing
    "first block masked by -1e4": _first_block(-1e4),  # a mask's usual sentinel
    "first block masked by the smallest number": _first_block(torch.finfo(F16).min),  # another, and it is finite
    "one class above all, in the last block": lambda x: torch.cat([x[..., :-1], x[..., -1:] + 90], -1),
}


@thinned_to(lambda dtype: dtype in (F32, F64))  # the arithmetic's two
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", ROW_SHAPES)
def test_blocks_of_different_size(backend: str, shape: str, dtype: torch.dtype) -> None:
    student, teacher, labels = batch(2, 5000, F32)  # two blocks of 2048, and a short one
    labels = labels.clamp_min(2048)  # a masked label's loss is the sentinel itself: no number to judge
    both = [ROW_SHAPES[shape](x).to(dtype) for x in (student, teacher)]
    for divergence, temperature in combined(backend, divergences_for(backend), (2, 0.5), turn=dtype.itemsize == 4):
        judge(*both, labels, backend=backend, divergence=divergence, temperature=temperature)


@thinned_to(lambda dtype, divergence: not INTERPRETED and (dtype == BF16 or divergence in KINDS))  # it takes an hour
@pytest.mark.parametrize("dtype", (F32, BF16), ids=name)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_many_long_rows(backend: str, divergence: str, dtype: torch.dtype) -> None:
    # Triton splits no more than 64 rows, and of more than 32768 classes
    rows = 65 if backend != "cuda" else 2  # whose kernels take no number of rows for another
    judge(*batch(rows, 33_000, dtype), backend=backend, divergence=divergence, temperature=2)


@pytest.mark.parametrize("rows", ROWS)
def test_every_number_of_rows(backend: str, rows: int) -> None:
    for vocab in (7, 1000):  # many rows to a chunk of work, and few
        for dtype in (F32, BF16):
            judge(*batch(rows, vocab, dtype), backend=backend, temperature=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_inplace_is_the_same_to_the_bit(backend: str, dtype: torch.dtype) -> None:
    for divergence, vocab in combined(backend, divergences_for(backend), SMALL_VOCABS):
        student, teacher, labels = batch(3, vocab, dtype)
        for reduction, factor in (("mean", None), ("none", torch.tensor([1.0, -2.0, 0.5]))):
            settings = {"backend": backend, "divergence": divergence, "temperature": 2, "reduction": reduction}
            factor = factor if factor is None else factor.to(F64 if dtype == F64 else F32)
            fresh = run(student, teacher, labels, factor, **settings)
            assert all(map(torch.equal, fresh, run(student, teacher, labels, factor, inplace=True, **settings)))


def test_any_number_of_threads_gives_the_same_bits(cpu: str) -> None:
    # one row that is split, rows fewer than threads, rows that do not divide by them
    for rows, vocab in ((1, 151936), (3, 50257), (65, 1000), (257, 7)):
        for dtype in (F32, BF16):
            inputs = batch(rows, vocab, dtype)
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(run(*inputs, temperature=2, backend=cpu))
            for loss, grad in results[1:]:
                assert torch.equal(loss, results[0][0])
                assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("divergence", DIVERGENCES[1:-1])
def test_near_equality_a_divergence_keeps_its_digits(backend: str, divergence: str) -> None:
    """p within 1e-3 of q, and equal to it: where the terms of a sum over probabilities cancel."""
    _, teacher, labels = batch(8, 4097)
    labels = labels_for(divergence, labels)
    settings = {"backend": backend, "divergence": divergence, "temperature": 2, "alpha": 1}
    judge(teacher + 1e-3 * torch.randn_like(teacher), teacher, labels, by_row=False, **settings)
    settings["t_squared"] = False
    loss, grad = by_row(teacher, teacher, labels, **settings)
    assert loss.abs().max() <= 1e-9
    q = torch.softmax(teacher.double() / 2, -1)
    if backend == "reference":
        return  # it is as careful as eager PyTorch
    # one rounding of psi and one of its sum; a KL's has the logarithms of p and q too, each rounded, at most 5 ulp
    eps = torch.finfo(F32).eps
    if divergence == "dkd":  # whose are among the classes that are not the label's, and weigh 8 and 1
        q = 9 * q / (1 - q.gather(-1, labels.unsqueeze(-1)))
    assert (grad.abs() * 2 <= (5 * eps if divergence in LINEAR else eps) * q).all()
    if divergence not in LINEAR:  # whose loss is judged above: eager's too is a difference of such logarithms
        for distance in (1e-3, 1e-5):
            loss, _ = by_row(teacher + distance * torch.randn_like(teacher), teacher, labels, **settings)
            assert loss.min() >= -1e-9


def by_row(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor | None, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return run(student, teacher, labels, torch.ones(student.shape[0]), reduction="none", **settings)
