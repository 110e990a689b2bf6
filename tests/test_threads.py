"""Threads: torch's own, as many as it is told, and the same bits with any number of them; from anywhere, forks too."""

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, F64, REDUCTIONS, batch
from hanging import SECONDS
from torch import Tensor

from kdfast import kd_loss, tempered_softmax

# (rows, vocab, dtype): how work is split depends on these
SHAPES = (
    (4099, 10, F32),  # many short rows: several to a chunk, and a last chunk that is not full
    (257, 1000, BF16),  # more rows than threads, not divisible by 2, 3 or 5
    (7, 4097, F64),  # about as many rows as threads
    (3, 32000, F16),  # fewer rows than threads: rows are split
    (1, 151936, F32),  # a single row, split
    (2, 151936, BF16),
)
COUNTS = (1, 2, 3, 5)  # of threads: one, this machine's least, and numbers that divide neither rows nor blocks


def loss_and_gradient(student: Tensor, teacher: Any, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    loss = kd_loss(leaf, teacher, labels, temperature=2.0, **options)
    loss.backward(torch.ones_like(loss))
    return loss.detach(), leaf.grad


def bits(tensors: tuple[Tensor, ...]) -> list[bytes]:
    return [x.flatten().view(torch.uint8).numpy().tobytes() for x in tensors]


def same_for_all_counts(compute: Callable[[], tuple[Tensor, ...]]) -> bool:
    seen = []
    for count in (*COUNTS, COUNTS[-1]):  # the last one twice: the same threads give the same bits again
        torch.set_num_threads(count)
        seen.append(bits(compute()))
    return all(each == seen[0] for each in seen)


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
    assert same_for_all_counts(lambda: loss_and_gradient(s, teacher, y, **settings))
    with torch.no_grad():
        assert same_for_all_counts(lambda: (kd_loss(s, teacher, y, **settings),))


@pytest.mark.parametrize(("rows", "vocab", "dtype"), SHAPES)
def test_softmax_gives_the_same_bits_with_any_number_of_threads(rows, vocab, dtype, cpu):
    s, t, _ = batch(rows, vocab, dtype)

    def compute() -> tuple[Tensor, Tensor]:
        leaf = s.detach().requires_grad_()
        p = tempered_softmax(leaf, 2.0)
        return p.detach(), torch.autograd.grad(p, leaf, t)[0]

    assert same_for_all_counts(compute)


def test_concurrent_calls_from_python_threads_give_right_numbers(backend):
    cases = [batch(*shape) for shape in ((300, 100, F32), (5, 40000, F32), (64, 1000, BF16), (1, 60000, F32))] * 4
    expected = [loss_and_gradient(*case, backend=backend) for case in cases]
    together = threading.Barrier(len(cases))

    def work(index: int) -> list[tuple[Tensor, Tensor]]:
        together.wait()
        return [loss_and_gradient(*cases[index], backend=backend) for _ in range(8)]

    tolerance = {"rtol": 0, "atol": 0} if backend == "cpu" else {}  # plain PyTorch's sums may come in any order
    with ThreadPoolExecutor(len(cases)) as pool:
        for want, results in zip(expected, pool.map(work, range(len(cases))), strict=True):
            for got in results:
                torch.testing.assert_close(got, want, **tolerance)


# the parent has used the kernels with several threads, of which a forked child has none
@pytest.mark.parametrize(("rows", "vocab"), [(512, 1000), (1, 151936)])
def test_a_forked_child_neither_hangs_nor_errs(rows, vocab, cpu):
    torch.set_num_threads(2)
    arguments = batch(rows, vocab)
    expected = bits(loss_and_gradient(*arguments))

    def is_right_again_and_again() -> None:
        sys.exit(0 if all(bits(loss_and_gradient(*arguments)) == expected for _ in range(3)) else 3)

    fork = multiprocessing.get_context("fork")  # of which a function inherits what it knows
    children = [fork.Process(target=is_right_again_and_again) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(SECONDS)
        child.kill()  # one that hangs
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert bits(loss_and_gradient(*arguments)) == expected, "and the parent goes on as before"


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
@pytest.mark.parametrize("backend", ("reference", "cpu"), indirect=True)  # Triton's kernels run on no thread of the CPU
def test_set_num_threads_is_obeyed(backend):
    command = [sys.executable, "-W", "ignore", "-c", THREADS_SCRIPT, backend]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=SECONDS).stdout
    before, one, three = map(int, out.split())
    assert one == before, "one thread means none beside the caller's"
    assert three == before + 2, "three threads are the caller's and two more, and no pool stands beside torch's"
