"""The one list of calls that every backend is tested with: `covering(AXES)`, and then SPECIAL.

`covering` finds few calls that contain every pair of values of different axes. It is deterministic, and its first calls
contain the most new pairs, so that a prefix of the list is its best subset. `python tests/calls.py` prints the list. A
new promise about numbers is a new value of an axis, or a call in SPECIAL, with its reason.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from cases import BF16, DIVERGENCES, F16, F32, F64, as_target, batch, name, to_default_device
from torch import Tensor
from torch.nn.functional import pad

from kdfast import TopKTargets, divergences

# --- the memory layout of logits ---------------------------------------------------------------------------------


def _view(size: Callable[..., tuple[int, int]], take: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """x in a view of a larger tensor of NaN: a read outside of the view makes the row NaN; so does such an index."""
    outside = {torch.int32: 2**31 - 1, torch.int64: 2**63 - 1}
    return lambda x: take(torch.full(size(*x.shape), outside.get(x.dtype, torch.nan), dtype=x.dtype), *x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "padded rows": _view(lambda r, v: (r, v + 24), lambda b, r, v: b[:, :v]),  # a padded head, sliced
    "odd padding": _view(lambda r, v: (r, v + 1), lambda b, r, v: b[:, :v]),  # each row aligned differently
    "offset by one": _view(lambda r, v: (r + 1, v), lambda b, r, v: b.view(-1)[1 : 1 + r * v].view(r, v)),  # unaligned
    "every second row": _view(lambda r, v: (2 * r, v), lambda b, r, v: b[::2]),
    "every second class": _view(lambda r, v: (r, 2 * v), lambda b, r, v: b[:, ::2]),
    "transposed": lambda x: x.t().contiguous().t(),  # classes are far apart
    "one row expanded": lambda x: x[:1].expand(x.shape),
}

# --- the values of logits ----------------------------------------------------------------------------------------


def _change_both(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda s, t: (change(s), change(t))


def _masked(x: Tensor) -> Tensor:
    """Masks the first block of classes, or the first third of a short row, by a usual sentinel, which is finite."""
    x = x.clone()
    x[:, : first_unmasked(x.shape[1])] = torch.finfo(F16).min
    return x


def first_unmasked(vocab: int) -> int:
    return 2048 if vocab > 2048 else vocab // 3


def _ramp(start: float, end: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + torch.linspace(start, end, x.shape[-1], dtype=x.dtype)


# Kernels go through a row in blocks, and rescale their sums where a block has another maximum.
LOGITS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "usual": lambda s, t: (s, t),
    "tiny": lambda s, t: (0.005 * s, 0.005 * t),  # q - p is a difference of nearly equal numbers
    "large": lambda s, t: (15 * s, 15 * t),  # one class takes everything, exponentials underflow
    "both up": lambda s, t: (s + 1000, t + 1000),  # exp of it overflows in every dtype
    "student down": lambda s, t: (s - 1e4, t),  # it underflows; the maxima of both sides are far apart
    "rising": _change_both(_ramp(0, 200)),  # each block's sums are rescaled away by the next
    "falling": lambda s, t: (_ramp(200, 0)(s), _ramp(0, 200)(t)),  # later blocks add nothing; the teacher's logits rise
    "masked": _change_both(_masked),
    "the last above all": lambda s, t: tuple(torch.cat([x[:, :-1], x[:, -1:] + 90], -1) for x in (s, t)),
}
FAR = ("both up", "student down")  # from 0
EXTREME = tuple(LOGITS)[2:]  # all but "usual" and "tiny"


# --- teachers ----------------------------------------------------------------------------------------------------


class Teacher(NamedTuple):
    target: str = "logits"
    count: int | None = None  # of an ensemble
    weights: list[float] | None = None
    ensemble: str = "arithmetic"
    missing: str | None = None  # of a sparse teacher


TEACHERS = {
    "logits": Teacher(),
    "probs": Teacher("probs"),
    "log_probs": Teacher("log_probs"),
    "a list of one": Teacher(count=1),
    "arithmetic": Teacher(count=2, weights=[3, 1]),
    "geometric": Teacher(count=2, weights=[3, 1], ensemble="geometric"),
    "arithmetic probs": Teacher("probs", 3, [1, 0, 2]),  # one of them has no weight
    "geometric probs": Teacher("probs", 2, None, "geometric"),
    "arithmetic log_probs": Teacher("log_probs", 4, [0.1, 0.2, 0.3, 0.4]),
    "geometric log_probs": Teacher("log_probs", 2, None, "geometric"),
    # their number of entries, the indices' dtype and which are absent are drawn for each shape: see _sparse
    "tail": Teacher(missing="tail"),
    "conditional": Teacher(missing="conditional"),
    "renormalize": Teacher(missing="renormalize"),
    "truncate": Teacher(missing="truncate"),
}
SPARSE = tuple(k for k, v in TEACHERS.items() if v.missing)
SEVERAL = tuple(k for k, v in TEACHERS.items() if v.count and v.count > 1)
OTHER_DTYPES = (None, BF16, F16, F32)  # of an ensemble's teachers; None: the call's

# --- rows --------------------------------------------------------------------------------------------------------


def _row_numbers(rows: int) -> Tensor:
    return torch.arange(rows, dtype=F64)


# Which rows count: labels that are ignored, and weights; the first row always counts, and its weight is not 1.
KEPT: dict[str, tuple[int | None, Callable[[int], Tensor | None]]] = {
    "all": (None, lambda rows: None),
    "some ignored": (-100, lambda rows: None),
    "ignored by 0": (0, lambda rows: None),  # an ignore_index that is a class; "weighted in fp64" has one far beyond
    "weighted": (None, lambda rows: 0.25 + (_row_numbers(rows) % 4).to(F32)),
    "some of weight 0": (-100, lambda rows: (2 - _row_numbers(rows) % 3).to(F32)),
    "weighted in bf16": (None, lambda rows: (0.3 + _row_numbers(rows) % 3).to(BF16)),
    "weighted in fp64": (10**6, lambda rows: 0.3 + _row_numbers(rows) % 5),
    "whole weights": (None, lambda rows: (3 - _row_numbers(rows) % 3).to(torch.int64)),
    "a mask": (None, lambda rows: _row_numbers(rows) % 3 != 1),
}


def _per_row(*values: float, dtype: torch.dtype = F32) -> Callable[[int], Tensor]:
    return lambda rows: torch.tensor([values[i % len(values)] for i in range(rows)], dtype=dtype)


ALL_OPTIONS = {
    "label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 1.5, "teacher_logit_scale": 0.7, "softcap": 20.0,
    "teacher_softcap": 30.0, "standardize": True,
}  # fmt: skip


def options_for(backend: str) -> dict[str, Any]:
    """All options that the backend's kernels support."""
    plain = ("label_smoothing", "z_loss", "logit_scale", "teacher_logit_scale")
    return {k: v for k, v in ALL_OPTIONS.items() if backend != "cuda" or k in plain}


AXES: dict[str, dict[str, Any]] = {
    "divergence": {d: {"divergence": d} for d in DIVERGENCES},
    "shape": {
        shape: shape
        for shape in (
            "3x1",  # one class has probability 1, and every softmax's gradient is 0
            "2x2",  # the least that has a gradient
            "257x7",  # less than any vector; many rows to a chunk of work
            "17x15",  # one short of an AVX-512 vector of fp32; rows by columns have a last group that is not full
            "3x16",  # exactly one, or two of AVX2, or four of SSE
            "3x17",  # a vector and a tail of one
            "1x31",  # the same around a vector of 16-bit numbers
            "5x33",
            "5x100",  # CIFAR-100: vectors and a tail
            "3x127",  # one short of eight vectors: unrolled loops end in a tail
            "65x1000",  # ImageNet; one more than a round chunk of rows
            "2x2047",  # one short of a kernel's block of classes
            "3x2048",  # exactly a block
            "5x2049",  # a second block of one class
            "2x4097",  # two blocks and one class
            "1x32000",  # Llama 2
            "2x40001",  # odd, so that 16-bit rows begin off every alignment; so long that Triton splits it
            "1x151936",  # Qwen 2.5: long enough to be split over threads
        )
    },
    "dtypes": {
        "-".join(map(name, dict.fromkeys(pair))): pair
        for pair in (
            *((dtype, dtype) for dtype in (F32, BF16, F16, F64)),
            (BF16, F32),  # autocast's student, a teacher kept in fp32
            (F32, BF16),  # a student in training, a teacher loaded small
            (F16, BF16),  # both 16-bit formats: neither may be read as the other
            (F32, F64),  # the wider teacher does not widen the sums
            (F64, F32),  # fp64 sums over fp32 reads
        )
    },
    "teacher": TEACHERS,
    "temperature": {
        "T 1": {"temperature": 1},  # soft and hard term share their exps
        "T 2": {"temperature": 2},  # whole: a kernel may take exp(z) as exp(z / T) ** T
        "T 3": {"temperature": 3, "t_squared": False},
        "T 4": {"temperature": 4},  # the usual one for images
        "T 20": {"temperature": 20},  # the paper's for MNIST: whole, but too large a power
        "T 3.7": {"temperature": 3.7},  # not whole
        "T 0.5": {"temperature": 0.5, "t_squared": False},  # sharpens: z / T is larger than z
        "T 0.1": {"temperature": 0.1},  # logits / T reach 100: most exponentials underflow
        "T 100": {"temperature": 100},  # q - p is all cancellation
        "T by row": {"temperature": _per_row(1.0, 2.0, 3.7, 0.5, 20.0)},
        "T 2 of 1.5": {"temperature": 2, "teacher_temperature": 1.5},  # the teacher's own
        "T 2.5 of 1": {"temperature": 2.5, "teacher_temperature": 1},  # only the student is tempered
        "T 2.5 of rows": {"temperature": 2.5, "teacher_temperature": _per_row(2.0, 1.0, 3.0, dtype=F64)},
        "T by row of rows": {
            "temperature": _per_row(1.0, 2.0, 3.7, dtype=BF16),
            "teacher_temperature": _per_row(2.0, 0.5),
        },
    },
    "terms": {
        "default terms": {},
        "no labels": {},
        "alpha 0": {"alpha": 0},
        "alpha 0.25": {"alpha": 0.25},
        "alpha 1": {"alpha": 1},
        "1 + 1": {"alpha": 1, "hard_weight": 1},  # timm's and DKD's
        "0.7 + 0": {"alpha": 0.7, "hard_weight": 0},
        "0 + 2.5": {"alpha": 0, "hard_weight": 2.5},
        "100 + 0.5": {"alpha": 100, "hard_weight": 0.5},  # a large one
    },
    "kept": KEPT,
    "reduction": {
        "mean": {},
        "sum": {"reduction": "sum"},
        "batchmean": {"reduction": "batchmean"},
        "none": {"reduction": "none"},
        "normalizer 17": {"normalizer": 17},
        "a normalizer of fp64": {"normalizer": torch.tensor(0.3, dtype=F64)},
        "a normalizer of int64": {"normalizer": torch.tensor(3)},
    },
    "option": {
        "no option": {},
        "smoothing": {"label_smoothing": 0.1},  # the usual one
        "all smoothed": {"label_smoothing": 1.0},  # nothing is left of the label
        "small z-loss": {"z_loss": 1e-4},  # PaLM's
        "z-loss": {"z_loss": 1.0},  # outweighs the other terms
        "cap": {"softcap": 30.0},  # Gemma 2's final logits
        "caps": {"softcap": 0.5, "teacher_softcap": 0.5},  # saturate: most gradients vanish
        "a teacher's cap": {"teacher_softcap": 30.0},
        "a large cap": {"softcap": 1e4},  # does nothing
        "a scale": {"logit_scale": 0.0625},  # Cohere's
        "scales": {"logit_scale": 2.5, "teacher_logit_scale": 0.3},
        "standardized": {"standardize": True},
        "all options": ALL_OPTIONS,
    },
    # for the divergences that have a beta; dkd_weights for dkd
    "beta": {
        "default beta": {},
        "another beta": {"beta": 0.3, "dkd_weights": (2.0, 1.0)},  # ImageNet's weights are all small
        "beta 0": {"beta": 0, "dkd_weights": (1.0, 0.0)},  # the label's class alone
        "beta 1": {"beta": 1, "dkd_weights": (0.0, 8.0)},  # the other classes alone
    },
    "logits": LOGITS,
    "layout": LAYOUTS,
    "teacher's layout": {f"teacher {k}": v for k, v in LAYOUTS.items()},
    # classes beyond vocab_size, the student's and the teacher's, with values that would dominate every softmax
    "padding": {"no padding": None, "+0 +24": (0, 24), "+24 +0": (24, 0), "+24 +8": (24, 8), "+1 +0": (1, 0)},
    "dimensions": {"rows": lambda x: x, "(1, rows)": lambda x: x.unsqueeze(0), "(rows, 1)": lambda x: x.unsqueeze(1)},
    "output": {
        "a new gradient": {},
        "inplace": {"inplace": True},
        "metrics": {"return_metrics": True},
        "metrics inplace": {"inplace": True, "return_metrics": True},
    },
}
SIXTEEN = ("bfloat16", "float16", "bfloat16-float32", "float16-bfloat16", "float32-bfloat16")
STANDARDIZED = ("standardized", "all options")
NOT_LOGITS = tuple(k for k, v in TEACHERS.items() if v.target != "logits")
MIXED = tuple(k for k in SEVERAL if k.startswith("arithmetic"))
CAPPED = ("cap", "caps", "a teacher's cap", "all options")
# Values that no call combines, and why.
NEVER = (
    (("logit_mse",), (*NOT_LOGITS, *MIXED, *SPARSE)),  # logit_mse has no p
    (("dkd",), ("no labels", "alpha 0", "0 + 2.5", "3x1")),  # dkd needs labels, and other classes
    (("no labels",), ("smoothing", "all smoothed", "all options", "some ignored", "ignored by 0")),
    (("no labels",), ("some of weight 0", "weighted in fp64")),  # these ignore labels too
    (("dkd",), SPARSE),  # it needs all classes
    (("renormalize",), ("reverse_kl", "symmetric_kl", "beta 0", "beta 1")),  # infinite, as some ends of beta are
    (("truncate",), tuple(d for d in DIVERGENCES if d not in ("cross_entropy", "forward_kl"))),  # all that it takes
    (STANDARDIZED, (*NOT_LOGITS, *SPARSE)),
    (("caps", "scales", "a teacher's cap", *(k for k in AXES["temperature"] if " of " in k)), (*NOT_LOGITS, *SPARSE)),
    (STANDARDIZED, ("3x1", "2x2")),  # z is 0, or +-sqrt(1/2), whatever the logits: see test_numbers.py
    (("one row expanded",), ("inplace", "metrics inplace")),  # shared memory cannot be written
    (FAR, SIXTEEN),  # 16 bits have few numbers there
    (("masked",), ("smoothing", "all smoothed")),  # the loss would be the sentinel itself
    # Two extremes cost digits that judge.py's rule does not count: z = x / T is rounded before the maximum is
    # subtracted, the mean of several logits is too, and eager PyTorch's p underflows.
    (EXTREME, (*SEVERAL, *CAPPED, *STANDARDIZED, "all smoothed", "a large cap", "scales", "T 0.1", "T 0.5", "T 100")),
    (EXTREME, ("dkd",)),  # its other classes underflow: see test_limits.py
    (MIXED, ("T 0.1",)),
)  # fmt: skip


@dataclass(frozen=True)
class Call:
    """Names of values, one an axis."""

    values: tuple[str, ...]

    def __getitem__(self, axis: str) -> Any:
        return AXES[axis][self.named(axis)]

    def named(self, axis: str) -> str:
        return self.values[list(AXES).index(axis)]

    @property
    def id(self) -> str:
        """The values that are not their axis's first."""
        first = [next(iter(axis)) for axis in AXES.values()]
        shown = [v for i, (v, usual) in enumerate(zip(self.values, first, strict=True)) if v != usual or i < 3]
        return ", ".join(shown)

    def arguments(self) -> tuple[tuple[Tensor, Any, Tensor | None], dict[str, Any]]:
        """(student, teacher, labels) and the keywords of kd_loss."""
        rows, vocab = map(int, self.named("shape").split("x"))
        dtype, teacher_dtype = self["dtypes"]
        kind: Teacher = self["teacher"]
        settings: dict[str, Any] = {**self["divergence"], **self["terms"], **self["reduction"], **self["output"]}
        settings |= {k: v(rows) if callable(v) else v for k, v in self["temperature"].items()}
        settings |= self["option"] | self._beta()
        if self.named("divergence") == "logit_mse":  # it has no temperature
            settings = {k: v for k, v in settings.items() if "temperature" not in k}
        teacher_temperature = settings.get("teacher_temperature", settings.get("temperature", 1.0))

        student, teachers, labels = self._drawn(rows, vocab, kind.count or 1)
        student = student.to(dtype)
        indices = None
        if kind.missing:
            teachers, indices = _sparse(teachers[0], teacher_temperature, kind.missing, dtype)
        teachers = [
            as_target(t, kind.target, teacher_temperature).to(OTHER_DTYPES[i % 4] or teacher_dtype)
            for i, t in enumerate(teachers)
        ]
        if kind.target == "probs":  # none is 0 in fp32, where a KL is infinite
            teachers = [t.clamp_min(max(torch.finfo(x).tiny for x in (t.dtype, F32))) for t in teachers]
        ignored, weight = KEPT[self.named("kept")]
        if ignored is not None:
            ignored = ignored if vocab > 1 else -100  # of one class, 0 would be all rows
            settings["ignore_index"] = ignored
            labels = torch.where(labels == ignored, vocab - 1, labels)
            labels[1::4] = ignored
        settings["row_weight"] = weight(rows)
        if self["padding"] is not None:
            padding, teacher_padding = self["padding"]
            settings["vocab_size"] = vocab
            student = pad(student, (0, padding), value=1e4)
            # an ensemble's teachers differ
            if indices is None:
                teachers = [pad(t, (0, teacher_padding * (1 + i % 2)), value=torch.nan) for i, t in enumerate(teachers)]
        student = self["layout"](student)
        teachers[0] = self["teacher's layout"](teachers[0])
        indices = None if indices is None else self["teacher's layout"](indices)
        settings["target"] = kind.target
        if kind.count:
            settings |= {"ensemble": kind.ensemble, "teacher_weights": kind.weights}
        shaped = self["dimensions"]
        teacher: Any = [shaped(t) for t in teachers] if kind.count else shaped(teachers[0])
        if indices is not None:
            teacher, settings["missing"] = TopKTargets(shaped(indices), teacher), kind.missing
        settings = {k: shaped(v) if isinstance(v, Tensor) and v.dim() else v for k, v in settings.items()}
        given = None if self.named("terms") == "no labels" else shaped(labels)
        if settings.get("alpha") == 0 and not settings.get("return_metrics") and rows % 2:  # needs no teacher
            teacher, settings["teacher_weights"] = None, None
        arguments = (shaped(student), teacher, given)
        return to_default_device(arguments), to_default_device({k: v for k, v in settings.items() if v is not None})

    def _beta(self) -> dict[str, Any]:
        """beta or dkd_weights, where the divergence has them."""
        divergence = self.named("divergence")
        entry = divergences.DIVERGENCES.get(divergence)
        has = {"beta": entry is not None and entry.beta is not None, "dkd_weights": divergence == "dkd"}
        return {k: v for k, v in self["beta"].items() if has[k]}

    def _drawn(self, rows: int, vocab: int, count: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Logits of a student and of teachers, in fp64, and labels."""
        student, teacher, labels = batch(rows, vocab, F64)
        student, teacher = self["logits"](student, teacher)
        others = [batch(rows, vocab, F64, seed=i).teacher for i in range(1, count)]
        teachers = [teacher, *(self["logits"](t, t)[1] for t in others)]
        if self.named("logits") == "masked":  # no label is a masked class
            labels = labels.clamp_min(first_unmasked(vocab))
        return student, teachers, labels


def _sparse(logits: Tensor, temperature: Any, missing: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """log-probabilities, (rows, K), of 1, 5 or 64 classes, the teacher's likeliest and others, and their indices."""
    rows, vocab = logits.shape
    count = min(vocab, (1, 5, 64)[(rows + vocab) % 3])
    log_probs = as_target(logits, "log_probs", temperature)
    if missing == "tail" and count < vocab:
        log_probs = log_probs - 0.05  # some of the mass is the rest's, in every dtype: else KL(q, p) is infinite
    if missing in ("conditional", "renormalize"):
        log_probs = log_probs + 3  # they may be off by a constant
    noise = batch(rows, vocab, F64, seed=7).teacher
    indices = (logits + noise).topk(count, -1).indices
    log_probs = log_probs.gather(-1, indices)
    if count == 5:  # row by row 5, 4, ... 0 entries
        absent = torch.arange(5) >= 5 - torch.arange(rows).unsqueeze(-1) % 6
        log_probs, indices = log_probs.masked_fill(absent, -torch.inf), indices.masked_fill(absent, vocab + 5)
    return [log_probs], indices.to(torch.int32 if vocab % 2 else torch.int64)


def call(**values: str) -> Call:
    """A call of these values, and of the first of each other axis."""
    names = {axis.replace(" ", "_").replace("'", ""): axis for axis in AXES}
    chosen = {names[key]: value for key, value in values.items()}
    assert all(axis == "shape" or value in AXES[axis] for axis, value in chosen.items()), values
    return Call(tuple(chosen.get(axis, next(iter(AXES[axis]))) for axis in AXES))


# Calls that need more than a pair of values.
SPECIAL = (
    # more rows than a warp has lanes, which Triton splits too, until the device is full
    call(shape="65x33000", dtypes="bfloat16", temperature="T 2"),
    # the most classes of the CPU's short rows, and one more
    call(shape="17x64", temperature="T 2"),
    call(shape="17x65", temperature="T 2", padding="+1 +0"),
    # the gradient's padding of short rows and of split rows
    call(shape="17x15", temperature="T 2", padding="+1 +0", output="inplace"),
    call(shape="2x40001", temperature="T 2", padding="+24 +8", reduction="none"),
    call(shape="2x40001", temperature="T 2", option="standardized", dtypes="float32-bfloat16"),
    # a number of long rows that is no power of 2; an ensemble, whose table has more columns
    call(shape="3x40001", temperature="T 2", dtypes="bfloat16", kept="weighted"),
    call(shape="2x40001", temperature="T 2", dtypes="bfloat16", teacher="arithmetic", reduction="none"),
    # 16-bit pairs that are aligned differently from the student's
    call(shape="5x2049", temperature="T 2", dtypes="bfloat16", teachers_layout="teacher odd padding"),
    # an arithmetic ensemble whose blocks differ in size, with divergences that need no logarithm of p
    call(shape="2x4097", teacher="arithmetic", logits="rising", temperature="T 2"),
    call(divergence="jsd", shape="5x2049", teacher="arithmetic", logits="masked", temperature="T 2"),
)


def covering(axes: dict[str, dict[str, Any]], seed: int = 0) -> list[Call]:
    """Few calls that contain every pair of values of different axes but those of NEVER.

    Greedy: each call begins with the value that has the most open pairs, and takes axis after axis, in a random order,
    the value that closes the most pairs with those chosen before. Of some such calls the best is kept.
    """
    rng = random.Random(seed)
    values = [(axis, value) for axis, names in enumerate(axes.values()) for value in names]
    of_axis = [np.array([i for i, (axis, _) in enumerate(values) if axis == a]) for a in range(len(axes))]
    may = np.ones((len(values), len(values)), bool)
    for lefts, rights in NEVER:
        left, right = (np.array([value in side for _, value in values]) for side in (lefts, rights))
        may &= ~(np.outer(left, right) | np.outer(right, left))
    axis_of = np.array([axis for axis, _ in values])
    open_pairs = may & (axis_of[:, None] != axis_of[None, :])
    calls = []
    while open_pairs.any():
        best: tuple[int, list[int]] = (0, [])
        first = int(open_pairs.sum(1).argmax())
        for tried in range(200):
            if tried >= 12 and best[0]:
                break
            chosen = [first]
            rest = [a for a in range(len(axes)) if a != axis_of[first]]
            rng.shuffle(rest)
            closed = 0
            for axis in rest:
                candidates = of_axis[axis][may[of_axis[axis]][:, chosen].all(1)]
                if not len(candidates):
                    break
                gains = open_pairs[candidates][:, chosen].sum(1) + 0.5 * (open_pairs[candidates].sum(1) > 0)
                pick = rng.choice(np.flatnonzero(gains == gains.max()).tolist())
                closed += int(open_pairs[candidates[pick]][chosen].sum())
                chosen.append(int(candidates[pick]))
            if len(chosen) == len(axes) and closed > best[0]:
                best = closed, chosen
        closed, chosen = best
        assert chosen, f"no call contains {values[first]}"
        open_pairs[np.ix_(chosen, chosen)] = False
        calls.append(Call(tuple(values[i][1] for i in sorted(chosen))))
    return calls


# Values that the CUDA kernels do not support.
NOT_IN_CUDA: dict[str, tuple[str, ...]] = {
    "divergence": ("dkd",),
    "dtypes": tuple(k for k, pair in AXES["dtypes"].items() if pair[0] != pair[1] or F64 in pair),
    "teacher": tuple(k for k in TEACHERS if k not in ("logits", "a list of one")),
    "option": (*CAPPED, *STANDARDIZED[:1], "a large cap"),
}


@lru_cache
def all_calls() -> list[Call]:
    return [*covering(AXES), *SPECIAL]


@lru_cache
def plain_calls() -> list[Call]:
    """The calls of the CUDA kernels: a list that covers the values which they support."""
    axes = {a: {k: v for k, v in values.items() if k not in NOT_IN_CUDA.get(a, ())} for a, values in AXES.items()}
    special = [c for c in SPECIAL if all(c.named(axis) in values for axis, values in axes.items())]
    return [*covering(axes), *special]


if __name__ == "__main__":
    for number, each in enumerate(all_calls()):
        print(number, each.id)
