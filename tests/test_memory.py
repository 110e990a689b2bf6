"""The memory that a call allocates besides its inputs.

For the row kernels it is the process's peak, which also has what autograd and profilers do not see. For the linear
losses, which only allocate tensors around those kernels and products, it is counted by PyTorch's allocator.
"""

import ctypes
import gc
import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import ALL_OPTIONS
from cases import BF16, F16, F32, name, python_output

import kdfast
from kdfast import products

OPTIONS, METRICS = ALL_OPTIONS, {"return_metrics": True}
ROWS, INPLACE = {"reduction": "none"}, {"inplace": True}
# how many tensors of the logits' size a call may allocate; what is done with its loss; its settings
CASES: tuple[tuple[int, str, dict[str, Any]], ...] = (
    (0, "no_grad", {}),
    (0, "forward", ROWS),
    (1, "backward", ROWS),
    (0, "backward", ROWS | INPLACE),
    (1, "backward", {}),
    (1, "backward of loss * 3", {}),
    (0, "backward", INPLACE),
    (0, "no_grad", {"ensemble": "arithmetic"}),
    (0, "no_grad", OPTIONS | METRICS),
    (0, "forward", ROWS | OPTIONS | METRICS),
    (1, "backward", OPTIONS | METRICS),
    (0, "backward", INPLACE | OPTIONS | METRICS),
    (0, "backward", INPLACE | METRICS | {"divergence": "dkd"}),
    # what plain PyTorch allocates; the last, since a later call would reuse its memory unseen
    (3, "no_grad", {"backend": "reference"}),
)
SLACK = 0.15  # of a tensor: the threads' scratch, the allocator's rounding

# A peak never falls, so nothing is freed before the end.
SCRIPT = """
import json, sys, torch
from kdfast import kd_loss

def peak():
    with open("/proc/self/status") as status:  # getrusage's peak starts at that of the parent process
        (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def run(how, settings, student, teacher, labels):
    teacher = [teacher, teacher] if "ensemble" in settings else teacher
    with torch.set_grad_enabled(how != "no_grad"):
        loss = kd_loss(student, teacher, labels, **{"backend": "cpu", "temperature": 2.0} | settings)
    if "return_metrics" in settings:
        loss, metrics = loss
        kept.append(metrics)
    return torch.autograd.grad(loss.sum() * (3 if "3" in how else 1), student) if "backward" in how else loss

rows, vocab = 1024, 16384
teacher, kept, needs = torch.randn(rows, vocab), [], []
labels = torch.randint(vocab, (rows,))
for _, how, settings in json.loads(sys.argv[1]):
    student = teacher.flip(0).requires_grad_()
    if "inplace" in settings:
        student = student.clone()
    for _ in range(2):  # libraries and threads allocate what they keep
        kept.append(run(how, settings, student[:8] * 1, teacher[:8], labels[:8]))
    before = peak()
    kept.append((run(how, settings, student, teacher, labels), student))
    needs.append((peak() - before) / (4 * rows * vocab))
print(json.dumps(needs))
"""


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory")
def test_each_call_needs_no_more_memory_than_the_gradient_it_returns(cpu: str) -> None:
    *needs, plain = json.loads(python_output("-c", SCRIPT, json.dumps(CASES)))
    assert plain > CASES[-1][0], "plain PyTorch's allocations are not seen"
    too_many = [(need, *case) for need, case in zip(needs, CASES, strict=False) if need > case[0] + SLACK]
    assert not too_many, f"in tensors of the logits' size: {too_many}"


def peak_bytes(function: Callable[[], Any]) -> int:
    """The peak of a function's tensors, with those that it returns, by PyTorch's allocator."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        kept = function()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    del kept
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=name)
@pytest.mark.parametrize("wanted", ["hidden and weight", "hidden", "nothing"])
def test_a_linear_loss_needs_two_chunks_of_logits_and_its_gradients(
    cpu: str, wanted: str, dtype: torch.dtype, reduction: str
) -> None:
    """Only tensors count: the scratch of products is the library's and differs."""
    width, vocab, chunk_rows = 16, 8192, 64
    weight = torch.randn(vocab, width).to(dtype).requires_grad_(wanted == "hidden and weight")
    allowed = 2 * 4 * chunk_rows * vocab
    if dtype != F32:
        allowed += 2 * 4 * products.SLICE * width  # each head's widened slice
    if weight.requires_grad:
        allowed += 4 * weight.numel()  # the gradient's accumulator
        allowed += weight.nbytes if dtype == BF16 else 0  # its rounded copy; float16's is made in backward
    for rows in (2 * chunk_rows, 10 * chunk_rows):
        hidden = torch.randn(rows, width).to(dtype).requires_grad_(wanted != "nothing")
        teacher, labels = (torch.randn(rows, width).to(dtype), weight.detach()), torch.randint(vocab, (rows,))

        def call(hidden=hidden, teacher=teacher, labels=labels) -> Any:
            loss = kdfast.linear_kd_loss(hidden, weight, *teacher, labels, chunk_rows=chunk_rows, reduction=reduction)
            leaves = [x for x in (hidden, weight) if x.requires_grad]
            return torch.autograd.grad(loss.sum(), leaves) if leaves else loss

        of_rows = 4 * width + 172  # the gradient in hidden states, and each row's numbers: 72 bytes are its table
        assert peak_bytes(call) <= allowed + rows * of_rows, f"{rows} rows"


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (field, ctypes.c_size_t)
        for field in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer has its own malloc")
def test_calls_leave_no_memory_behind(cpu: str) -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc 2.33 or later")
    libc.mallinfo2.restype = MallocInfo
    student, teacher = torch.randn(2, 8, 10).unbind()
    student.requires_grad_()
    labels = torch.randint(10, (8,))

    def left_by(calls: int) -> int:
        before = libc.mallinfo2().uordblks
        for _ in range(calls):
            for reduction in ("mean", "none"):
                kdfast.kd_loss(student, teacher, labels, reduction=reduction, backend=cpu).sum().backward()
                student.grad = None
        gc.collect()
        return libc.mallinfo2().uordblks - before

    left_by(50)
    assert left_by(1000) < 50_000  # torch's conversion of strings would leave 480 bytes a call
