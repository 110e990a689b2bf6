"""A minute on a GPU, before anything else: each GPU backend against the reference in float64 on the CPU.

`make gpu-smoke` runs it. It prints a table, and fails where a backend is not usable, raises, or is off.
"""

import sys
import time
import traceback

import torch
from cases import BF16, batch
from torch import Tensor

import kdfast

SHAPES = ((8, 1000), (8, 4099), (8, 128_256))  # a warp's rows; unaligned ones; longer than any that stay in registers
REDUCTIONS = ("mean", "none")  # the gradient is made in forward; in backward, from a table
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2**-8  # bfloat16's, of the largest in a row


def loss_and_grad(batch: list[Tensor], reduction: str, backend: str) -> tuple[Tensor, Tensor]:
    student, teacher, labels = batch
    student = student.detach().requires_grad_()
    loss = kdfast.kd_loss(student, teacher, labels, temperature=2.0, reduction=reduction, backend=backend)
    (2 * loss.sum()).backward()  # not 1, so that backward has something to scale
    return loss.detach(), student.grad


def compare(backend: str, device: str, rows: int, vocab: int, reduction: str) -> tuple[float, float, float]:
    """The largest errors of loss and gradient, relative to the truth, and the seconds of the backend's call."""
    student, teacher, labels = batch(rows, vocab, BF16)
    want, want_grad = loss_and_grad([student.double(), teacher.double(), labels], reduction, "reference")
    start = time.perf_counter()
    found, grad = loss_and_grad([x.to(device) for x in (student, teacher, labels)], reduction, backend)
    if device == "cuda":
        torch.cuda.synchronize()  # here a kernel's error is raised
    seconds = time.perf_counter() - start
    loss = ((found.cpu() - want) / want).abs().max()
    off = (grad.cpu().double() - want_grad).abs().amax(-1) / want_grad.abs().amax(-1)
    return float(loss), float(off.max()), seconds


def check(backend: str, device: str, shapes: tuple[tuple[int, int], ...] = SHAPES) -> bool:
    """Prints a line for each call; whether all are right."""
    facts = kdfast.backends()[backend]
    if not facts["usable"]:
        print(f"{backend:<10} NOT USABLE: {facts['why_not']}")
        return False
    right = True
    for (rows, vocab), reduction in ((shape, reduction) for shape in shapes for reduction in REDUCTIONS):
        line = f"{backend:<10} {rows} x {vocab:<8} {reduction:<5}"
        try:
            loss, gradient, seconds = compare(backend, device, rows, vocab, reduction)
        except Exception as error:  # the next call may tell more
            traceback.print_exc()
            print(f"{line} FAILED: {type(error).__name__}: {error}")
            right = False
            continue
        is_right = loss < LOSS_TOLERANCE and gradient < GRADIENT_TOLERANCE  # not if one is NaN
        right &= is_right
        numbers = f"loss off by {loss:.1e}, gradient by {gradient:.1e}, first call {seconds:6.2f} s"
        print(f"{line} {numbers}  {'ok' if is_right else 'WRONG'}", flush=True)
    return right


def main() -> int:
    platform = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    print(f"torch {torch.__version__}, {platform}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    backends = ("cuda", "triton") if torch.version.cuda else ("triton",)
    return 0 if all([check(backend, "cuda") for backend in backends]) else 1


if __name__ == "__main__":
    sys.exit(main())
