"""Whether tensors of a GPU get the CUDA or the Triton kernels: one table, whose first rule that applies decides."""

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.arguments import Settings
from kdfast.divergences import names

LEAST_CAPABILITY = 80
SPLIT_CLASSES = 32768  # Triton's kernels split rows with more than this


class Case(NamedTuple):
    """What the table looks at."""

    operator: str
    settings: Settings | None  # None: of an operator that takes none
    teachers: int  # how many are read
    dtypes: frozenset[torch.dtype]  # of the student, or what is scaled, and of the teachers
    same_alignment: bool  # whether student and teacher have their 16-byte vectors at the same classes
    rows: int
    vocab: int
    capability: int  # 90: sm_90
    multiprocessors: int


class Rule(NamedTuple):
    backend: str
    applies: Callable[[Case], bool]
    reason: str
    must: bool = False  # the CUDA kernels cannot do it


def _setting(check: Callable[[Settings], bool], needs_teacher: bool = False) -> Callable[[Case], bool]:
    return lambda c: c.settings is not None and (c.teachers > 0 or not needs_teacher) and check(c.settings)


def busy_share(programs: int, multiprocessors: int) -> float:
    """Of a device, while so many programs of a long row, or of a part of one, are worked off: two a multiprocessor."""
    at_once = 2 * multiprocessors
    return programs / (-(-programs // at_once) * at_once)


def are_split(rows: int, vocab: int, multiprocessors: int) -> bool:
    """Whether Triton's kernels split rows over programs.

    A fifth of the device may be idle before they do, for the second sweep over a whole row is from the L2 in part.
    """
    return rows > 0 and vocab > SPLIT_CLASSES and busy_share(rows, multiprocessors) < 0.8


_IN_CUDA = frozenset(names()) - {"dkd"}  # kdfast's own divergences, and no program's
_SUMS = ("sums", "pointwise_sums", "losses_and_coefficients")
_SOFTMAX = ("tempered_softmax", "tempered_softmax_backward")
_TOKENS = ("token_stats", "token_grad", "token_grad_as")

# The preferences go by bytes that the emulator counts: none is measured on a device yet.
RULES = (
    Rule("triton", lambda c: c.capability < LEAST_CAPABILITY, f"a device before sm_{LEAST_CAPABILITY}", must=True),
    Rule("triton", lambda c: c.operator in _SOFTMAX, "tempered_softmax", must=True),
    Rule("triton", lambda c: c.operator in _TOKENS, "token_log_probs", must=True),
    Rule("triton", lambda c: c.operator in _SUMS, "the sums of a shard's classes", must=True),
    Rule("triton", _setting(lambda s: s.missing != ""), "a sparse teacher", must=True),
    Rule("triton", lambda c: torch.float64 in c.dtypes, "float64", must=True),
    Rule("triton", lambda c: len(c.dtypes) > 1, "a teacher of another dtype than student_logits", must=True),
    Rule("triton", lambda c: c.teachers > 1, "several teachers", must=True),
    Rule("triton", _setting(lambda s: s.target != "logits", True), "target='probs' and 'log_probs'", must=True),
    Rule("triton", _setting(lambda s: s.softcap != 0), "softcap", must=True),
    Rule("triton", _setting(lambda s: s.teacher_softcap != 0), "teacher_softcap", must=True),
    Rule("triton", _setting(lambda s: s.standardize), "standardize", must=True),
    Rule("triton", _setting(lambda s: s.divergence == "dkd", True), "divergence='dkd'", must=True),
    Rule("triton", _setting(lambda s: s.divergence not in _IN_CUDA, True), "a program's own divergence", must=True),
    Rule(
        "triton",
        lambda c: not c.same_alignment,
        "student and teacher are aligned differently in memory: Triton's kernels read them as they are, CUDA's need "
        "copies",
    ),
    Rule(
        "triton",
        lambda c: c.capability < 90 and are_split(c.rows, c.vocab, c.multiprocessors),
        "before sm_90, rows of more than 32768 classes that leave a fifth of the device idle or more, two of them to a "
        "multiprocessor: Triton's kernels split them, a CUDA kernel's row has one block where there are no clusters",
    ),
    Rule(
        "cuda",
        lambda c: True,
        "each logit is read once, 6 bytes a bf16 pair, to V = 262144 on sm_90 and 40 thousand on sm_80, where "
        "Triton's kernels do so to 32768; beyond, both read it twice. Counted, not yet measured on a device",
    ),
)


def table() -> list[tuple[str, str]]:
    """The rules as `backends()` shows them."""
    return [(r.backend, f"there is no CUDA kernel for {r.reason}" if r.must else r.reason) for r in RULES]


def gpu_backend(
    usable: Collection[str], operator: str, first: Tensor, teachers: Sequence[Tensor], settings: Settings | None
) -> str:
    """The backend of an operator whose first tensor is `first`; usable: of "cuda" and "triton"."""
    if "cuda" not in usable:
        return "triton" if "triton" in usable else "reference"
    rule = _find_rule(operator, first, teachers, settings)
    if rule.backend == "triton" and "triton" not in usable:
        return "reference" if rule.must else "cuda"
    return rule.backend


def check_cuda(first: Tensor, teachers: Sequence[Tensor], settings: Settings) -> None:
    """An error where backend="cuda" is given for what the CUDA kernels cannot do."""
    rule = _find_rule("loss_grad", first, teachers, settings)
    if rule.must:
        raise ValueError(
            f"backend: 'cuda' has no kernel for {rule.reason}; use backend=\"triton\", or None, which chooses by call"
        )


def _find_rule(operator: str, first: Tensor, teachers: Sequence[Tensor], settings: Settings | None) -> Rule:
    case = Case(
        operator,
        settings,
        len(teachers),
        frozenset(t.dtype for t in (first, *teachers)),
        all(_alignment(t) == _alignment(first) for t in teachers),
        first.shape[:-1].numel(),
        first.shape[-1],
        *((capability(first.device), multiprocessors(first.device)) if first.is_cuda else (90, 132)),  # none: tests
    )
    return next(rule for rule in RULES if rule.applies(case))


def _alignment(x: Tensor) -> tuple[int, ...]:
    """Of the rows' beginnings, modulo 16 bytes; -1: classes are not contiguous."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return (-1,)
    size = x.element_size()
    steps = (stride * size % 16 for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1)
    return (x.data_ptr() % 16, *steps)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache
def capability(device: torch.device | int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
