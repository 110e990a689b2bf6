"""The grids of the tests, each value with its reason. How numbers are judged is in judge.py.

Triton compiles for each combination of dtypes, divergence, target, given and missing tensors, and number of tiles, some
half a second each, and the emulator takes as long for a launch of the CUDA kernels. So for both the products of grids
are thinned, each with its reason: `thinned_to` leaves parameters out, `combined` pairs values in rotation.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kdfast import divergences

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

# What a backend is asked for by name; one that is not usable here is skipped with its own reason.
BACKENDS = ("reference", "cpu", "triton", "cuda")
THINNED = ("triton", "cuda")  # whose grids are thinned: the emulator that runs both takes a while for a launch

DIVERGENCES = (*divergences.DIVERGENCES, "dkd", "logit_mse")
# One of each way that kernels take sums: along with the teacher's exps, with both sides', in their own pass, no exps.
# dkd's, along with both sides' but for the label's, have rows and limits of their own in test_options and test_limits.
KINDS = ("cross_entropy", "symmetric_kl", "jsd", "logit_mse")
TARGETS = ("logits", "probs", "log_probs")
ENSEMBLES = ("arithmetic", "geometric")
REDUCTIONS = ("mean", "sum", "batchmean", "none")
DTYPES = (F32, BF16, F16, F64)

# Student's and teacher's dtypes.
DTYPE_PAIRS = (
    *((dtype, dtype) for dtype in DTYPES),
    (BF16, F32),  # autocast's student, a teacher kept in fp32
    (F32, BF16),  # a student in training, a teacher loaded small
    (F16, BF16),  # the two 16-bit formats meet: neither may be read as the other
    (F32, F64),  # the wider teacher does not widen the sums
    (F64, F32),  # fp64 sums over fp32 reads
)

VOCABS = (
    1,  # one class has probability 1, and every softmax's gradient is 0
    2,  # the least that has a gradient
    7,  # less than any vector
    15,  # one short of an AVX-512 vector of fp32
    16,  # exactly one, or two of AVX2, or four of SSE
    17,  # a vector and a tail of one
    31,  # the same around a vector of 16-bit numbers
    33,
    100,  # CIFAR-100: vectors and a tail
    127,  # one short of eight vectors: unrolled loops end in a tail
    1000,  # ImageNet
    2047,  # one short of a kernel's block of classes
    2048,  # exactly a block
    2049,  # a second block of one class
    4097,  # two blocks and one class
    32000,  # Llama 2
    50257,  # GPT-2: odd, so that 16-bit rows begin off every alignment
    151936,  # Qwen 2.5: long enough to be split over threads
)
SMALL_VOCABS = (17, 2049)  # a tail; a second block: for grids whose point is not the length

TEMPERATURES = (
    1,  # no tempering; soft and hard term share their exponentials
    2,  # whole: a kernel may take exp(z) as exp(z / T) ** T
    3,
    4,  # the usual one for images
    20,  # the paper's for MNIST: whole, but too large a power
    3.7,  # not whole
    0.5,  # sharpens: z / T is larger than z
    0.1,  # logits / T reach 100: most exponentials underflow
    100,  # q - p is all cancellation
)

# Student = scale * noise + offset, the teacher likewise.
SCALES = (
    30.0,  # one class takes everything, exponentials underflow
    0.01,  # all classes alike: q - p is a difference of near equals
)
OFFSETS = (
    1000.0,  # exp of it overflows in every dtype
    -1e4,  # exp of it underflows
)

ROWS = (
    1,  # one row
    2,  # one for each of two threads
    3,  # not divisible by them
    65,  # one more than a round chunk of rows
    257,
)


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


def thinned_to(condition: Callable[..., bool]) -> pytest.MarkDecorator:
    """For Triton and CUDA only where `condition` of the test's parameters, by their names, holds; see conftest.py."""
    return pytest.mark.thinned_to.with_args(condition)  # called, it would take the condition for a test


def combined(backend: str, *grids: Sequence[Any], turn: int = 0) -> Iterable[tuple[Any, ...]]:
    """The product of grids; for Triton and CUDA just enough of it that each value occurs.

    turn: another one pairs other values.
    """
    if backend not in THINNED:
        return itertools.product(*grids)
    if backend == "cuda":
        grids = tuple([value for value in grid if takes(backend, value)] for grid in grids)
    steps = range(max(map(len, grids)))
    return [tuple(grid[(i + turn * k) % len(grid)] for k, grid in enumerate(grids)) for i in steps]


def _is_f64(value: Any) -> bool:
    """Whether a grid's value is, or holds, the dtype that the CUDA kernels do not take."""
    return value is F64 or (isinstance(value, tuple) and any(item is F64 for item in value))


def takes(backend: str, value: Any) -> bool:
    """Whether a grid's value is one for a backend."""
    return backend != "cuda" or not _is_f64(value)


def divergences_for(backend: str) -> Sequence[str]:
    """All; for Triton and CUDA, where the grid's point is another, one of each kind."""
    return KINDS if backend in THINNED else DIVERGENCES


def name(value: object) -> str:
    """A grid's value as it is shown in a test's name."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, tuple):
        return "-".join(map(name, value))
    return str(value)
