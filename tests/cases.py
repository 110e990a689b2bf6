"""What the tests share: names of backends, divergences and dtypes; batches of logits; a Python process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kdfast
from kdfast import divergences

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# A backend that is not usable here is skipped with its own reason.
BACKENDS = ("reference", "cpu", "triton", "cuda")
ON_GPU = ("triton", "cuda")  # whose kernels are compiled for each kind of call, or emulated

DIVERGENCES = (*divergences.DIVERGENCES, "dkd", "logit_mse")
# One for each kind of sums: with the teacher's exps, with both sides' exps, in a pass of their own, without exps.
KINDS = ("cross_entropy", "symmetric_kl", "jsd", "logit_mse")
TARGETS = ("logits", "probs", "log_probs")
ENSEMBLES = ("arithmetic", "geometric")
REDUCTIONS = ("mean", "sum", "batchmean", "none")
DTYPES = (F32, BF16, F16, F64)
SMALL_VOCABS = (17, 2049)  # a tail; a second block: where the length does not matter
PACKAGE = Path(kdfast.__file__).parent
TIMEOUT = 600  # seconds after which a process hangs: before faulthandler_timeout ends the test


def dtypes_for(backend: str) -> tuple[torch.dtype, ...]:
    """The CUDA kernels do not support float64."""
    return DTYPES if backend != "cuda" else DTYPES[:-1]


def divergences_for(backend: str) -> tuple[str, ...]:
    return DIVERGENCES if backend != "cuda" else tuple(d for d in DIVERGENCES if d != "dkd")


def arithmetics(backend: str) -> tuple[torch.dtype, ...]:
    """The dtypes that kernels compute in: fp32 also for logits of 16 bits."""
    return tuple(dtype for dtype in dtypes_for(backend) if dtype in (F32, F64))


class Batch(NamedTuple):
    student: Tensor  # (rows, vocab)
    teacher: Tensor  # (rows, vocab)
    labels: Tensor  # (rows,)


def batch(
    rows: int,
    vocab: int,
    dtype: torch.dtype = F32,
    teacher_dtype: torch.dtype | None = None,
    scale: float = 2.0,
    offset: float = 0.0,
    seed: int = 0,
) -> Batch:
    """A student that has learned a part of its teacher: logits of standard deviation 2, as real heads have."""
    generator = torch.Generator("cpu").manual_seed(1_000_003 * vocab + 1009 * rows + seed)
    noise = torch.randn(2, rows, vocab, generator=generator, dtype=F64, device="cpu")  # the same numbers everywhere
    teacher = scale * noise[0] + offset
    student = scale * (0.7 * noise[0] + 0.7 * noise[1]) + offset
    labels = torch.randint(vocab, (rows,), generator=generator, device="cpu")
    return Batch(*to_default_device((student.to(dtype), teacher.to(teacher_dtype or dtype), labels)))


def leaf_batch(rows: int, vocab: int, dtype: torch.dtype = F32) -> Batch:
    """A batch whose student requires grad, and whose second row is ignored."""
    student, teacher, labels = batch(rows, vocab, dtype)
    labels[1] = -100
    return Batch(student.requires_grad_(), teacher, labels)


def labels_for(divergence: str, labels: Tensor, wanted: bool = False) -> Tensor | None:
    """The labels where they are wanted or the divergence needs them; else none."""
    return labels if wanted or divergence == "dkd" else None


def to_device(value: Any, device: torch.device | str) -> Any:
    """Copies the tensors in dicts, lists and tuples to a device; meta tensors and all else stay as they are."""
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)([to_device(v, device) for v in value])
    if isinstance(value, kdfast.TopKTargets):
        return kdfast.TopKTargets(*(to_device(v, device) for v in value))
    return value.to(device) if isinstance(value, Tensor) and value.device.type != "meta" else value


def to_default_device(value: Any) -> Any:
    """Copies tensors, such as a test's parameter, to the device that the test's tensors are made on."""
    return to_device(value, torch.get_default_device())


def as_target(teacher: Tensor, target: str, temperature: float | Tensor = 1.0) -> Tensor:
    """Teacher logits as the tempered `target`, in the logits' dtype."""
    if target == "logits":
        return teacher
    if isinstance(temperature, Tensor):
        temperature = temperature.double().unsqueeze(-1)
    z = teacher.double() / temperature
    return (torch.softmax(z, -1) if target == "probs" else torch.log_softmax(z, -1)).to(teacher.dtype)


def name(value: object) -> str:
    """A grid's value as it is shown in a test's id."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "-".join(map(name, value))
    return str(value)


def run_python(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, which imports this kdfast unless PYTHONPATH is given."""
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    command, environment = [sys.executable, *map(str, arguments)], os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd=cwd, env=environment)


def python_output(*arguments: object, cwd: Path | None = None, **environment: str) -> str:
    """What such a process prints; it must succeed."""
    done = run_python(*arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout
