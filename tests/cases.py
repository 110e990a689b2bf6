"""What tests are about: backends, divergences, dtypes; and logits to try them on. calls.py has the list of calls."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast import divergences

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# What a backend is asked for by name; one that is not usable here is skipped with its own reason.
BACKENDS = ("reference", "cpu", "triton", "cuda")
ON_GPU = ("triton", "cuda")  # whose kernels are compiled for each kind of call, or emulated

DIVERGENCES = (*divergences.DIVERGENCES, "dkd", "logit_mse")
# One of each way that kernels take sums: along with the teacher's exps, with both sides', in their own pass, no exps.
KINDS = ("cross_entropy", "symmetric_kl", "jsd", "logit_mse")
TARGETS = ("logits", "probs", "log_probs")
ENSEMBLES = ("arithmetic", "geometric")
REDUCTIONS = ("mean", "sum", "batchmean", "none")
DTYPES = (F32, BF16, F16, F64)
SMALL_VOCABS = (17, 2049)  # a tail; a second block: where the length is not the point


def dtypes_for(backend: str) -> tuple[torch.dtype, ...]:
    """The CUDA kernels take no float64, which Triton's have."""
    return DTYPES if backend != "cuda" else DTYPES[:-1]


def divergences_for(backend: str) -> tuple[str, ...]:
    return DIVERGENCES if backend != "cuda" else tuple(d for d in DIVERGENCES if d != "dkd")


def arithmetics(backend: str) -> tuple[torch.dtype, ...]:
    """The two that kernels have: logits of 16 bits are computed in fp32."""
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
    """A student that has learned a part of its teacher: logits of standard deviation 2, as those of real heads."""
    generator = torch.Generator("cpu").manual_seed(1_000_003 * vocab + 1009 * rows + seed)
    noise = torch.randn(2, rows, vocab, generator=generator, dtype=F64, device="cpu")  # the same numbers everywhere
    teacher = scale * noise[0] + offset
    student = scale * (0.7 * noise[0] + 0.7 * noise[1]) + offset
    labels = torch.randint(vocab, (rows,), generator=generator, device="cpu")
    return Batch(*here((student.to(dtype), teacher.to(teacher_dtype or dtype), labels)))


def labels_for(divergence: str, labels: Tensor, wanted: bool = False) -> Tensor | None:
    """The labels where they are wanted; elsewhere none, but for the divergence that cannot do without."""
    return labels if wanted or divergence == "dkd" else None


def moved(value: Any, device: torch.device | str) -> Any:
    """The tensors in dicts, lists and tuples on a device; those without data, and all else, as they are."""
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([moved(v, device) for v in value])
    return value.to(device) if isinstance(value, Tensor) and value.device.type != "meta" else value


def here(value: Any) -> Any:
    """What was made elsewhere, such as a test's parameter, on the device that the test's tensors are made on."""
    return moved(value, torch.get_default_device())


def as_target(teacher: Tensor, target: str, temperature: float | Tensor = 1.0) -> Tensor:
    """Teacher logits as what `target` names, tempered, in the logits' dtype."""
    if target == "logits":
        return teacher
    if isinstance(temperature, Tensor):
        temperature = temperature.double().unsqueeze(-1)
    z = teacher.double() / temperature
    return (torch.softmax(z, -1) if target == "probs" else torch.log_softmax(z, -1)).to(teacher.dtype)


def name(value: object) -> str:
    """A grid's value as it is shown in a test's name."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "-".join(map(name, value))
    return str(value)
