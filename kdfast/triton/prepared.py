"""What the host works out once for calls of one kind, and remembers: their Spec, plans and compiled kernels.

A kind is what these depend on: the device; shapes, strides, dtypes and alignments; which of the rows' tensors there
are; those settings that are no numbers, and of the numbers which are not used. The numbers themselves, which schedules
change at every step, are arguments of the kernels.
"""

import operator
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.arguments import Settings
from kdfast.row_math import table_columns
from kdfast.triton import launch, matrices, row_kernels
from kdfast.triton.divergences import DIVERGENCES, running_sums
from kdfast.triton.per_row import COUNTED_ROWS
from kdfast.triton.spec import Spec

MOST_KINDS = 512
ALIGNMENT = 64  # bytes of 8 classes in fp64: as many as a vector has where another dtype has 16 bits
MOST_32_BITS = 2**31 - 1

Kept = TypeVar("Kept")
_kinds: dict[Hashable, Any] = {}
_is_amd = torch.version.hip is not None
_is_compiled = isinstance(row_kernels.stats, triton.JITFunction)  # else the interpreter's


def remember(kind: Hashable, make: Callable[[], Kept]) -> Kept:
    """What `make` has made for this kind on this driver's current device."""
    key = (triton.runtime.driver.active if _is_compiled else None, kind)
    found = _kinds.get(key)
    if found is None:
        found = make()
        if len(_kinds) >= MOST_KINDS:
            _kinds.clear()
        _kinds[key] = found
    return found


def pointer_kind(tensor: Tensor | None) -> Hashable:
    """What a kernel is compiled for when it takes a pointer to this tensor, or None."""
    if tensor is None:
        return None
    if not _is_amd:
        return tensor.dtype, tensor.data_ptr() % ALIGNMENT
    return tensor.dtype, tensor.data_ptr() % ALIGNMENT, tensor.untyped_storage().nbytes() > MOST_32_BITS


def matrix_kind(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), pointer_kind(tensor)


class Kernels:
    """The compiled kernels of one kind of call."""

    def __init__(self) -> None:
        self.compiled: dict[Hashable, tuple[Any, list[Any]]] = {}

    def launch(
        self,
        kernel: Any,
        programs: int,
        args: tuple[Any, ...],
        kind: Hashable,
        constants: Callable[[], dict[str, Any]],
        options: Callable[[], dict[str, Any]],
    ) -> None:
        """kernel[(programs,)](*args, **constants(), **options()), where `kind` is all that these depend on.

        Triton hashes the constants and looks at each argument to find the kernel that it has compiled, which takes
        longer than all else here. It returns that kernel, which can be launched again by itself.
        """
        found = self.compiled.get((kernel.__name__, kind))
        if found is not None:
            compiled, values = found
            compiled[programs, 1, 1](*args, *values)
            return
        named = constants()
        compiled = kernel[(programs,)](*args, **named, **options())
        if compiled is not None:  # the interpreter has none
            self.compiled[kernel.__name__, kind] = compiled, list(named.values())


class Prepared(Kernels):
    """A loss's kind."""

    def __init__(
        self, student: Tensor, teachers: list[Tensor], spec: Spec, settings: Settings, summed: bool,
        one_temperature: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rows, self.width = matrices.row_count(student), student.shape[-1]
        self.vocab = self.width if settings.vocab_size < 0 else settings.vocab_size
        self.gpu = launch.gpu_properties(student.device)
        self.read = [torch.empty(0, dtype=each.dtype) for each in (student, *teachers)]  # what launch.py asks of them
        counted = summed and self.rows <= COUNTED_ROWS.value and not settings.metrics
        self.spec = spec = spec._replace(counted=counted)
        self.columns = table_columns("kdfast_triton", student.device.type, len(teachers))
        self.budget = launch.register_budget(self.spec, self.read)
        self.plan = launch.plan(self.vocab, self.read, self.gpu.warp, self.budget)
        self.sweep = launch.sweep_plan(self.vocab, self.read, self.gpu.warp, self.budget)
        self.segments, self.segment = 1, self.vocab
        if not self.plan.tiles and launch.may_be_split(spec):
            tile = self.sweep.lanes * self.sweep.vec
            self.segments, self.segment = launch.split_row(self.rows, self.vocab, tile, self.gpu)
        self.choice = next(self.choices())
        tiny = self.width <= launch.TINY_CLASSES and spec.dtype == tl.float32 and len(teachers) <= 2
        plain = one_temperature and not (spec.dkd or spec.standardize or spec.metrics)
        self.tiny = launch.tiny_plan(self.width, self.gpu.warp) if tiny and plain else None

    def choices(self) -> Iterator[tuple[launch.Plan, int]]:
        """Plans and numbers of programs of the kernels that make loss and gradient at once."""
        return launch.candidates(self.rows, self.vocab, self.read, self.gpu, self.budget)


def _pick_fields(*types: Any) -> Callable[[Settings], tuple[Any, ...]]:
    return operator.itemgetter(*(at for at, kind in enumerate(Settings.__annotations__.values()) if kind in types))


# Lists have a number for each teacher, or are of a fixed length.
_names, _numbers = _pick_fields(bool, int, str), _pick_fields(float)


def power_of(settings: Settings, by_row: bool) -> int:
    """exp(s) as a power of exp(s / T); 0 where it is none."""
    t = settings.temperature
    return int(t) if not by_row and t in (1, 2, 3, 4) and not settings.standardize else 0


def prepare(
    student: Tensor, teachers: list[Tensor], by_row: list[Tensor | None], normalizer: Tensor | None,
    settings: Settings, summed: bool,
) -> Prepared:  # fmt: skip
    """by_row: labels, weights, temperatures, teacher_temperatures; summed: the divisor is the sum of rows' weights."""
    labels, _, temperatures, teacher_temperatures = by_row
    power = power_of(settings, temperatures is not None)
    kind = (
        student.device, _names(settings), *map(bool, _numbers(settings)), power, summed,
        settings.logit_scale == 1, settings.teacher_logit_scale == 1,  # unused, as other numbers are at 0
        id(DIVERGENCES.get(settings.divergence)),  # a program may replace it; the one found is kept in a Spec
        *map(pointer_kind, by_row), pointer_kind(normalizer), matrix_kind(student), *map(matrix_kind, teachers),
    )  # fmt: skip

    def make() -> Prepared:
        spec = make_spec(student, teachers, labels is not None, power, settings)
        one_temperature = temperatures is None and teacher_temperatures is None
        return Prepared(student, teachers, spec, settings, summed, one_temperature)

    return remember(kind, make)


def make_spec(student: Tensor, teachers: list[Tensor], labelled: bool, power: int, settings: Settings) -> Spec:
    several = len(teachers) > 1
    difference = bool(teachers) and settings.divergence == "logit_mse"
    divergence, teacher = None, "none"
    if difference and settings.metrics:
        teacher = "softmaxed"
    elif teachers and not difference:
        if settings.divergence not in DIVERGENCES:  # one that a program has added to the reference alone
            raise ValueError(f"divergence: no Triton kernel for {settings.divergence!r}")
        divergence = DIVERGENCES[settings.divergence]
        mixed = several and settings.ensemble == "arithmetic"
        given = settings.target != "logits" and (mixed or not several)
        teacher = "given" if given else "softmaxed"
    joint = teacher != "softmaxed" or not several or settings.ensemble == "geometric"
    linear = divergence is None or (
        divergence.phi is None
        and (joint or not (divergence.log_p or settings.metrics))
        and not settings.standardize
    )  # fmt: skip
    return Spec(
        matrices.arithmetic_dtype(student), teacher, divergence, linear, settings.target, joint,
        hard=settings.hard_weight != 0 or settings.z_loss != 0 or (settings.metrics and labelled),
        power=power, t_squared=settings.t_squared,
        running=running_sums(divergence if linear else None, settings.metrics, joint and teacher != "none"),
        labelled=settings.hard_weight != 0, difference=difference,
        dkd=bool(teachers) and settings.divergence == "dkd",
        smoothed=settings.label_smoothing != 0, z_loss=settings.z_loss != 0, softcap=settings.softcap != 0,
        teacher_softcap=bool(teachers) and settings.teacher_softcap != 0,
        standardize=settings.standardize, metrics=settings.metrics,
        members=0 if teacher == "none" else 1 if joint else len(teachers),
    )  # fmt: skip
