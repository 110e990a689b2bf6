"""What a call needs beside its inputs.

By the process's own peak for the row kernels, where what hides from autograd and profilers shows too. By PyTorch's
allocator for the linear losses, which make nothing but tensors around those kernels and the library's products.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, name
from hanging import SECONDS

import kdfast
from kdfast import products

OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0, "teacher_softcap": 30.0, "standardize": True}
MEASURED = {"return_metrics": True}
ROWS, INPLACE = {"reduction": "none"}, {"inplace": True}
# how many tensors of the logits' size a call may need beside its inputs; what it does with its loss; its settings
CASES: tuple[tuple[int, str, dict[str, Any]], ...] = (
    (0, "no_grad", {}),
    (0, "forward", ROWS),
    (1, "backward", ROWS),
    (0, "backward", ROWS | INPLACE),
    (1, "backward", {}),
    (1, "backward of loss * 3", {}),
    (0, "backward", INPLACE),
    (0, "no_grad", {"ensemble": "arithmetic"}),
    (0, "no_grad", OPTIONS | MEASURED),
    (0, "forward", ROWS | OPTIONS | MEASURED),
    (1, "backward", OPTIONS | MEASURED),
    (0, "backward", INPLACE | OPTIONS | MEASURED),
    (0, "backward", INPLACE | MEASURED | {"divergence": "dkd"}),
    # what plain PyTorch makes; the last, for the next call would take unseen what this one gives back
    (3, "no_grad", {"backend": "reference"}),
)
SLACK = 0.15  # of such a tensor: scratch of the threads, the allocator's rounding

# A peak never comes down again, so nothing that was made is given back before the end.
SCRIPT = """
import json, sys, torch
from kdfast import kd_loss

def peak():
    with open("/proc/self/status") as status:  # getrusage's peak begins with that of the process it was forked from
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
    for _ in range(2):  # libraries and threads make what they keep
        kept.append(run(how, settings, student[:8] * 1, teacher[:8], labels[:8]))
    before = peak()
    kept.append((run(how, settings, student, teacher, labels), student))
    needs.append((peak() - before) / (4 * rows * vocab))
print(json.dumps(needs))
"""


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps memory that was given back"
)
def test_each_call_needs_no_more_memory_than_the_gradient_it_returns(cpu: str) -> None:
    command = [sys.executable, "-c", SCRIPT, json.dumps(CASES)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=SECONDS).stdout
    *needs, plain = json.loads(out)
    assert plain > CASES[-1][0], "what plain PyTorch makes is not seen"
    too_many = [(need, *case) for need, case in zip(needs, CASES, strict=False) if need > case[0] + SLACK]
    assert not too_many, f"in tensors of the logits' size: {too_many}"


def most_bytes(function: Callable[[], Any]) -> int:
    """What tensors a function has at its most, those that it returns among them, by PyTorch's allocator."""
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
    """In tensors alone: what a product needs beside its factors and its result is the library's, and differs."""
    width, vocab, chunk_rows = 16, 8192, 64
    weight = torch.randn(vocab, width).to(dtype).requires_grad_(wanted == "hidden and weight")
    allowed = 2 * 4 * chunk_rows * vocab
    if dtype != F32:
        allowed += 2 * 4 * products.SLICE * width  # of each head what is widened
    if weight.requires_grad:
        allowed += 4 * weight.numel()  # what the gradient is added up in
        allowed += weight.nbytes if dtype == BF16 else 0  # to which it is rounded; float16's waits for backward
    for rows in (2 * chunk_rows, 10 * chunk_rows):
        hidden = torch.randn(rows, width).to(dtype).requires_grad_(wanted != "nothing")
        teacher, labels = (torch.randn(rows, width).to(dtype), weight.detach()), torch.randint(vocab, (rows,))

        def call(hidden=hidden, teacher=teacher, labels=labels) -> Any:
            loss = kdfast.linear_kd_loss(hidden, weight, *teacher, labels, chunk_rows=chunk_rows, reduction=reduction)
            leaves = [x for x in (hidden, weight) if x.requires_grad]
            return torch.autograd.grad(loss.sum(), leaves) if leaves else loss

        of_rows = 4 * width + 172  # the gradient in hidden states, and what is known of each: 72 are its table
        assert most_bytes(call) <= allowed + rows * of_rows, f"{rows} rows"
