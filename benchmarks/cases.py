"""All cases of a CPU and of a GPU, each with its reason, those of a CPU with bars and goals.

A workload is measured in one interleaved run. A case is a call of kdfast on a workload, and the candidates that it is
compared with. candidates.py explains their names.
"""

import itertools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Workload:
    """Logits of one shape; the loss has labels and alpha = 0.9 throughout."""

    rows: int
    vocab: int
    dtype: str = "fp32"
    temperature: float = 2.0
    isa: str = "best"  # kdfast's instruction set; "best": the one that it picks itself

    @property
    def name(self) -> str:
        parts = [f"{self.rows}x{self.vocab}", self.dtype]
        parts += [f"T{self.temperature:g}"] * (self.temperature != 2.0) + [self.isa] * (self.isa != "best")
        return "-".join(parts)

    @property
    def nbytes(self) -> int:
        """The size of the student's logits, and so of the teacher's and of the gradient."""
        return self.rows * self.vocab * {"fp32": 4, "bf16": 2}[self.dtype]

    @property
    def cold(self) -> bool:
        """Whether a CPU's caches are flushed before each call. Small logits stay warm, as in training, where the last
        layer of the model has just written them."""
        return self.nbytes > 32 << 20

    @property
    def repeats(self) -> int:
        """Calls per sample on a CPU: a single one of a few microseconds would measure the clock."""
        return 50 if self.nbytes < 1 << 16 else 1


@dataclass(frozen=True)
class Bound:
    """A limit on the ratio of a time to another candidate's: at most `bar` times a floor or the default divergence, at
    least `bar` times faster than anything else. None: no limit."""

    against: str
    bar: float | None
    goal: float | None = None

    @property
    def is_cost(self) -> bool:
        return self.against.startswith(("floor", "cross_entropy"))

    def value(self, seconds: float, against: float) -> float:
        return seconds / against if self.is_cost else against / seconds

    def meets(self, value: float, limit: float | None) -> bool:
        return limit is None or (value <= limit if self.is_cost else value >= limit)

    def text(self, limit: float | None) -> str:
        return "" if limit is None else f"{'≤' if self.is_cost else '≥'} {limit:g}"


@dataclass(frozen=True)
class Case:
    workload: Workload
    kind: str  # ends the name
    measured: str  # the candidate whose time this case is about
    bounds: tuple[Bound, ...]
    reason: str
    also: tuple[str, ...] = ()  # further candidates, without a bound
    quick: bool = False  # part of --quick
    device: str = "cpu"  # "cuda", or "dry run"

    @property
    def name(self) -> str:
        return f"{self.workload.name}-{self.kind}".removesuffix("-")

    @property
    def candidates(self) -> list[str]:
        """All candidates to measure, each once."""
        return list(dict.fromkeys([self.measured, *(bound.against for bound in self.bounds), *self.also]))

    def first(self, prefix: str) -> str | None:
        """The first candidate whose name begins so: the floor, or eager."""
        return next((name for name in self.candidates if name.startswith(prefix)), None)

    @property
    def nbytes(self) -> int:
        """The minimum memory traffic: both logits are read, the gradient is written; without one, two arrays move."""
        return (2 if self.measured.endswith(("forward", "softmax")) else 3) * self.workload.nbytes


LLM = (1024, 32000)  # a micro-batch of tokens, Llama 2's vocabulary: 131 MB in fp32, beyond any cache
WIDE = (256, 151936)  # Qwen's vocabulary: a row is 600 kB in fp32, which no longer fits into a core's caches
DTYPES = ("fp32", "bf16")
_KEPT, _FRESH = "floor kept", "floor fresh"


def _variants() -> list[Case]:
    """inplace=True on other shapes, temperatures and instruction sets, compared with the floor alone."""
    three_exps = "without exp(z/T)^T: three exps an element"
    avx2 = "most desktops and half of the cloud have no AVX-512"
    both = f"{avx2}; {three_exps}"
    bars = [  # and goals, of fp32 and of bf16
        ((WIDE,), 2.0, "best", ((1.8, 1.25), (2.6, 1.8)), "rows longer than a core's caches"),
        ((LLM, WIDE), 3.7, "best", ((2.1, 1.6), (3.3, 2.5)), three_exps),
        ((LLM, WIDE), 2.0, "avx2", ((1.9, 1.6), (3.2, 2.6)), avx2),
        ((LLM, WIDE), 3.7, "avx2", ((2.4, 1.7), (4.0, 3.0)), both),
    ]
    return [
        Case(Workload(*shape, dtype, temperature, isa), "inplace", "kdfast inplace", (Bound(_KEPT, *bar),), reason)
        for shapes, temperature, isa, limits, reason in bars
        for shape in shapes
        for dtype, bar in zip(DTYPES, limits, strict=True)
    ]


def _family() -> list[Case]:
    """Every divergence, compared with the default one and with its own recipe."""
    running = (1.2, 1.05), (15, 30), "its sums are taken together with those of the exps"
    own_pass = (1.7, 1.4), (15, 30), "a pass of its own over p and q, with up to two logarithms a class"
    as_forward = (1.2, 1.0), (15, 30), "forward_kl's sums without the label, and a copy of its block"
    no_exps = (1.2, 1.0), (12, 30), "only the hard term has exps"
    kinds = {"forward_kl": running, "reverse_kl": running, "symmetric_kl": running, "jsd": own_pass}
    kinds |= {name: own_pass for name in ("skew_forward_kl", "skew_reverse_kl", "tvd", "hellinger")}
    cases = []
    for dtype in DTYPES:
        for name, (of_default, faster, reason) in (kinds | {"dkd": as_forward, "logit_mse": no_exps}).items():
            bounds = Bound("cross_entropy inplace", *of_default), Bound(f"eager {name}", *faster)
            cases.append(_llm(f"{dtype}-{name}", f"{name} inplace", reason, bounds))
    return cases


def _options() -> list[Case]:
    """Each option, compared with the call without it."""
    bars = {  # and goals
        "metrics": (1.12, 1.05, "three more sums, and two maxima"),
        "smoothing": (1.05, None, "the sum of the logits"),
        "z_loss": (1.05, None, "a number per row"),
        "weights": (1.05, None, "a number per row"),
        "softcap": (1.5, 1.3, "a tanh a class"),
        "both softcaps": (1.8, 1.5, "two tanh a class"),
        "standardize": (1.5, 1.3, "mean and deviation first, no exp(z/T)^T, a dot product for the gradient"),
    }
    return [
        _llm(f"{dtype}-{name.replace(' ', '-')}", f"with {name}", reason, (Bound("cross_entropy inplace", *bar),))
        for dtype in DTYPES
        for name, (*bar, reason) in bars.items()
    ]


def _llm(
    ends: str, measured: str, reason: str, bounds: tuple[Bound, ...], also: tuple[str, ...] = (), quick: bool = False
) -> Case:
    """The main shape; ends: dtype and kind, which end the name."""
    dtype, kind = ends.split("-", 1)
    return Case(Workload(*LLM, dtype), kind, measured, bounds, reason, also, quick)


def _small(rows: int, vocab: int, bound: Bound, reason: str, also: str, quick: bool = True) -> Case:
    return Case(Workload(rows, vocab), "", "kdfast", (bound,), reason, (also,), quick)


def _threads_and_forward() -> list[Case]:
    two = "rows are independent: a second core should nearly halve the time"
    value = "evaluation under no_grad: nothing of the logits' size is written"
    bounds = Bound("kdfast inplace", 1.0), Bound("eager forward", 30), Bound("floor reads", None, 1.0)
    return [
        *(_llm(f"{dtype}-threads", "2 threads", two, (Bound("1 thread", 1.7, 1.9),)) for dtype in DTYPES),
        *(_llm(f"{dtype}-forward", "kdfast forward", value, bounds) for dtype in DTYPES),
    ]


def _gpu(rows: int, vocab: int, dtype: str, reason: str, calls: str = "default inplace", **settings: Any) -> list[Case]:
    """Each kind of call on each backend, with its peers; no bars."""
    cases = []
    for backend, call in itertools.product(("cuda", "triton"), calls.split()):
        end = " forward" if call == "forward" else ""
        measured = f"kdfast {backend} {call}".removesuffix(" default")
        peers = ("eager", "torch.compile", "liger") if call in ("default", "forward") else ("eager",)
        bounds = tuple(Bound(name + end, None) for name in ("floor copy", *peers))
        settings = {"device": "cuda"} | settings
        cases.append(Case(Workload(rows, vocab, dtype), f"{backend}-{call}", measured, bounds, reason, **settings))
    return cases


CASES = [
    _llm(
        "fp32-inplace",
        "kdfast inplace",
        "the main case: a language model's logits, overwritten by their gradient",
        (Bound(_KEPT, 1.2, 1.1), Bound("eager", 30), Bound("torch.compile", 7)),
        ("liger",),
        quick=True,
    ),
    _llm(
        "fp32-default",
        "kdfast",
        "the default: a fresh gradient, whose pages the system maps and zeroes first",
        (Bound(_FRESH, 0.65, 0.55), Bound("eager", 15)),
        ("torch.compile",),
        quick=True,
    ),
    _llm(
        "bf16-default",
        "kdfast",
        "the same in the dtype that most models are trained in",
        (Bound(_FRESH, 0.75, 0.65), Bound("eager", 15)),
        ("torch.compile", "eager in fp32"),
    ),
    _llm(
        "bf16-inplace",
        "kdfast inplace",
        "half the bytes and the same arithmetic: further from the floor than fp32",
        (Bound(_KEPT, 1.7, 1.4), Bound("eager", 30)),
        ("torch.compile", "eager in fp32", "liger"),
        quick=True,
    ),
    *_variants(),
    *_family(),
    *_options(),
    _small(4096, 1000, Bound("torch.compile", 7, 10), "ImageNet: rows shorter than a block", "eager", quick=False),
    _small(
        65536,
        10,
        Bound("torch.compile", 5, 8),
        "CIFAR-10, or a dense prediction with ten classes: rows shorter than a vector",
        "eager",
    ),
    _small(8, 10, Bound("eager", 1.67, 2.2), "one small call and its backward: only overhead", "torch.compile"),
    *_threads_and_forward(),
    _llm(
        "fp32-softmax", "kdfast softmax", "tempered_softmax alone, into a fresh tensor; no bar", (), ("eager softmax",)
    ),
    *_gpu(4096, 32000, "bf16", "a language model's micro-batch, Llama 2's vocabulary", quick=True),
    *_gpu(2048, 128256, "bf16", "Llama 3's: rows of 250 kB, which no longer fit into registers"),
    *_gpu(1024, 151936, "bf16", "Qwen's, the widest of the common ones"),
    *_gpu(4096, 50257, "bf16", "GPT-2's: odd, so that rows are unaligned"),
    *_gpu(8, 128256, "bf16", "as in a decoding step: mostly overhead, which a graph avoids", "default inplace graph"),
    *_gpu(65536, 1000, "bf16", "ImageNet, or a dense prediction: many short rows"),
    *_gpu(4096, 32000, "fp32", "twice the bytes for the same arithmetic"),
    *_gpu(4096, 32000, "bf16", "under no_grad: nothing of the logits' size is written", "forward"),
    *_gpu(4, 300, "bf16", "a short row that is no multiple of a block", device="dry run"),
    *_gpu(2, 4096, "bf16", "a longer one", "default inplace graph", device="dry run"),
    *_gpu(4, 300, "fp32", "the other dtype", device="dry run"),
    *_gpu(2, 4096, "bf16", "without a gradient", "forward", device="dry run"),
]
