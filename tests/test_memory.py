"""What a call needs beside its inputs, by the process's own peak: what hides from autograd and profilers shows here."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps memory that was given back"
)

# case: how many tensors of the logits' size it may need beside its inputs
CASES = {
    "no_grad": 0,
    "none, forward": 0,
    "none, with backward": 1,
    "none, inplace, with backward": 0,
    "default": 1,
    "default, loss * 3": 1,
    "inplace": 0,
    "an ensemble under no_grad": 0,
    "no_grad, options, metrics": 0,
    "none, forward, options, metrics": 0,
    "default, options, metrics": 1,
    "inplace, options, metrics": 0,
    "inplace, dkd, metrics": 0,
}
SLACK = 0.15  # of such a tensor: scratch of the threads, the allocator's rounding

# A peak never comes down again, so nothing that was made is given back before the end.
SCRIPT = """
import json, sys, torch
from kdfast import kd_loss

def peak():
    with open("/proc/self/status") as status:  # getrusage's peak begins with that of the process it was forked from
        (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def run(case, student, teacher, labels):
    reduction = "none" if case.startswith("none") else "mean"
    teacher = [teacher, teacher] if "ensemble" in case else teacher
    options = {}
    if "options" in case:
        options = dict(label_smoothing=0.1, z_loss=1e-4, softcap=30.0, teacher_softcap=30.0, standardize=True)
    if "dkd" in case:
        options["divergence"] = "dkd"
    with torch.set_grad_enabled("no_grad" not in case):
        loss = kd_loss(student, teacher, labels, temperature=2.0, reduction=reduction, inplace="inplace" in case,
                       backend=sys.argv[1], return_metrics="metrics" in case, **options)
    if "metrics" in case:
        loss, metrics = loss
        kept.append(metrics)
    if "no_grad" in case or "forward" in case:
        return loss
    return torch.autograd.grad(loss.sum() * (3 if "3" in case else 1), student)

rows, vocab = 1024, 16384
teacher, kept, needs = torch.randn(rows, vocab), [], []
labels = torch.randint(vocab, (rows,))
for case in sys.argv[2:]:
    student = teacher.flip(0).requires_grad_()
    if "inplace" in case:
        student = student.clone()
    for _ in range(2):  # libraries and threads make what they keep
        kept.append(run(case, student[:8] * 1, teacher[:8], labels[:8]))
    before = peak()
    kept.append((run(case, student, teacher, labels), student))
    needs.append((peak() - before) / (4 * rows * vocab))
print(json.dumps(needs))
"""


def needs(backend: str, *cases: str) -> dict[str, float]:
    command = [sys.executable, "-c", SCRIPT, backend, *cases]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120).stdout
    return dict(zip(cases, json.loads(out), strict=True))


def test_each_call_needs_no_more_memory_than_the_gradient_it_returns(cpu):
    too_many = {case: need for case, need in needs(cpu, *CASES).items() if need > CASES[case] + SLACK}
    assert not too_many, f"in tensors of the logits' size: {too_many}"


def test_this_yardstick_sees_the_tensors_of_plain_pytorch():
    (seen,) = needs("reference", "no_grad").values()
    assert seen > 3


LINEAR_SCRIPT = """
import json, sys, torch
from kdfast import linear_kd_loss

def peak():
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

case, rows = sys.argv[1], int(sys.argv[2])
vocab, width, at_once = 32768, 64, 320  # a chunk is more than 32 MB, which malloc always gives back
torch.manual_seed(0)
hidden, weight = torch.randn(rows, width), torch.randn(vocab, width) / 8
dtype = torch.bfloat16 if "bf16" in case else torch.float32
hidden, weight, labels = hidden.to(dtype), weight.to(dtype), torch.randint(vocab, (rows,))
teacher = hidden.flip(0), weight.flip(0)
leaves = hidden.requires_grad_(), weight.requires_grad_("frozen" not in case)

def run(n):
    with torch.set_grad_enabled("no_grad" not in case):
        loss = linear_kd_loss(leaves[0][:n], leaves[1], teacher[0][:n], teacher[1], labels[:n], chunk_rows=at_once,
                              reduction="none" if "rows" in case else "mean")
        return loss if "no_grad" in case else torch.autograd.grad(loss.sum(), [x for x in leaves if x.requires_grad])

kept = [run(8), run(8)]  # libraries and threads make what they keep
before = peak()
kept.append(run(rows))
print(json.dumps((peak() - before) / (4 * at_once * vocab)))
"""

# case: tensors of a chunk's logits, of which there are two; the weight's gradient is a fifth of one, and at 16 bits
# there are 1.5 of it. The rest is hidden-sized.
LINEAR_CASES = {"no_grad": 2, "frozen weight": 2, "gradients": 2.2, "gradients by rows": 2.2, "bf16": 2.3}


@pytest.mark.parametrize("case", LINEAR_CASES)
def test_a_linear_loss_needs_two_chunks_of_logits_and_its_gradients_however_many_rows(cpu, case):
    for rows in (640, 2560):
        command = [sys.executable, "-c", LINEAR_SCRIPT, case, str(rows)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120).stdout
        assert json.loads(out) < LINEAR_CASES[case] + SLACK, rows
