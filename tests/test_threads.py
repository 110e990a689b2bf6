"""Threads: kernels use torch's, any number gives the same bits, and calls may come from other threads and forks."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import BF16, F16, F32, F64, REDUCTIONS, TIMEOUT, batch, python_output
from judge import run
from torch import Tensor

from kdfast import kd_loss, tempered_softmax

# (rows, vocab, dtype): work is split by these
SHAPES = (
    (4099, 10, F32),  # many short rows: several to a chunk, the last chunk is not full
    (257, 1000, BF16),  # more rows than threads, not divisible by 2, 3 or 5
    (7, 4097, F64),  # about as many rows as threads
    (3, 32000, F16),  # fewer rows than threads: rows are split
    (1, 151936, F32),  # a single row, split
    (2, 151936, BF16),
)
COUNTS = (1, 2, 3, 5)  # threads: numbers that divide neither rows nor blocks too


def bits(tensors: tuple[Tensor, ...]) -> list[bytes]:
    return [x.flatten().view(torch.uint8).numpy().tobytes() for x in tensors]


def is_same_for_all_counts(compute: Callable[[], tuple[Tensor, ...]]) -> bool:
    found = []
    for count in (*COUNTS, COUNTS[-1]):  # the last one twice: the same threads give the same bits
        torch.set_num_threads(count)
        found.append(bits(compute()))
    return all(each == found[0] for each in found)


OPTIONS = (
    *({"reduction": reduction} for reduction in REDUCTIONS),
    {"ensemble": "arithmetic"},
    {"ensemble": "geometric"},
    {"divergence": "logit_mse"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "".join(options.values()))
@pytest.mark.parametrize(("rows", "vocab", "dtype"), SHAPES)
def test_any_number_of_threads_gives_the_same_bits(rows, vocab, dtype, options, cpu):
    s, t, y = batch(rows, vocab, dtype)
    teacher = [t, t.flip(-1), t.double()] if "ensemble" in options else t
    if rows > 1:
        y[rows // 2] = -100
    settings = options | {"row_weight": None if "reduction" in options else torch.linspace(1, 0, rows), "backend": cpu}
    assert is_same_for_all_counts(lambda: run(s, teacher, y, temperature=2.0, **settings))
    with torch.no_grad():
        assert is_same_for_all_counts(lambda: (kd_loss(s, teacher, y, **settings),))


@pytest.mark.parametrize(("rows", "vocab", "dtype"), SHAPES)
def test_softmax_gives_the_same_bits_with_any_number_of_threads(rows, vocab, dtype, cpu):
    s, t, _ = batch(rows, vocab, dtype)

    def compute() -> tuple[Tensor, Tensor]:
        leaf = s.detach().requires_grad_()
        p = tempered_softmax(leaf, 2.0)
        return p.detach(), torch.autograd.grad(p, leaf, t)[0]

    assert is_same_for_all_counts(compute)


def test_concurrent_calls_from_python_threads_give_right_numbers(backend):
    cases = [batch(*shape) for shape in ((300, 100, F32), (5, 40000, F32), (64, 1000, BF16), (1, 60000, F32))] * 4
    expected = [run(*case, backend=backend) for case in cases]
    together = threading.Barrier(len(cases))

    def work(index: int) -> list[tuple[Tensor, Tensor]]:
        together.wait()
        return [run(*cases[index], backend=backend) for _ in range(8)]

    tolerance = {"rtol": 0, "atol": 0} if backend == "cpu" else {}  # plain PyTorch's sums have any order
    with ThreadPoolExecutor(len(cases)) as pool:
        for want, results in zip(expected, pool.map(work, range(len(cases))), strict=True):
            for got in results:
                torch.testing.assert_close(got, want, **tolerance)


# the parent has used several threads, which a forked child does not have
@pytest.mark.parametrize(("rows", "vocab"), [(512, 1000), (1, 151936)])
def test_a_forked_child_neither_hangs_nor_errs(rows, vocab, cpu):
    torch.set_num_threads(2)
    arguments = batch(rows, vocab)
    expected = bits(run(*arguments))

    def compare() -> None:
        sys.exit(0 if all(bits(run(*arguments)) == expected for _ in range(3)) else 3)

    fork = multiprocessing.get_context("fork")  # the function inherits its variables
    children = [fork.Process(target=compare) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(TIMEOUT)
        child.kill()  # if it hangs
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert bits(run(*arguments)) == expected, "the parent is unchanged"


THREADS_SCRIPT = """
import os, sys, torch
torch.set_num_threads(1)
from kdfast import kd_loss, tempered_softmax

def run():
    for rows, vocab in ((512, 1000), (1, 151936)):
        student = torch.ones(rows, vocab, requires_grad=True)
        for reduction in ("mean", "none"):
            kd_loss(student, torch.zeros(rows, vocab), reduction=reduction, backend=sys.argv[1]).sum().backward()
        tempered_softmax(student).sum().backward()

before = len(os.listdir("/proc/self/task"))
run()
one = len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
run()
print(before, one, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc, which is not there")
@pytest.mark.parametrize("backend", ("reference", "cpu"), indirect=True)  # Triton's kernels use no CPU threads
def test_set_num_threads_is_obeyed(backend):
    before, one, three = map(int, python_output("-W", "ignore", "-c", THREADS_SCRIPT, backend).split())
    assert one == before, "one thread is the caller's"
    assert three == before + 2, "three threads are the caller's and two of torch's, without another pool"
