"""All cases, each with its bar, its goal and its reason.

A workload is measured in one interleaved run. A case is one line of the table: a call of kdfast on a workload, and the
candidates that it is compared with. candidates.py explains their names.
"""

from dataclasses import dataclass


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
        """Whether caches are flushed before each call. Small logits stay warm, as in training, where the model's last
        layer has just written them."""
        return self.nbytes > 32 << 20

    @property
    def repeats(self) -> int:
        """Calls per sample: a single one of a few microseconds would measure the clock."""
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
        against = "floor" if self.against.startswith("floor") else self.against
        return "" if limit is None else f"{'≤' if self.is_cost else '≥'} {limit:g}x {against}"


@dataclass(frozen=True)
class Case:
    name: str
    workload: Workload
    measured: str  # the candidate whose time this case is about
    bounds: tuple[Bound, ...]
    reason: str
    also: tuple[str, ...] = ()  # further candidates, without a bound
    quick: bool = False  # part of --quick

    @property
    def candidates(self) -> list[str]:
        """All candidates to measure, each once."""
        return list(dict.fromkeys([self.measured, *(bound.against for bound in self.bounds), *self.also]))


LLM = (1024, 32000)  # a micro-batch of tokens, Llama 2's vocabulary: 131 MB in fp32, beyond any cache
WIDE = (256, 151936)  # Qwen's vocabulary: a row is 600 kB in fp32, which no longer fits into a core's caches
_KEPT, _FRESH = "floor kept", "floor fresh"


def _inplace(
    shape: tuple[int, int],
    dtype: str,
    bar: float,
    goal: float,
    reason: str,
    temperature: float = 2.0,
    isa: str = "best",
) -> Case:
    """inplace=True, compared with the floor alone."""
    workload = Workload(*shape, dtype, temperature, isa)
    return Case(f"{workload.name}-inplace", workload, "kdfast inplace", (Bound(_KEPT, bar, goal),), reason)


def _variants() -> list[Case]:
    """Other shapes, temperatures and instruction sets: bars and goals against the floor, of fp32 and of bf16."""
    three_exps = "without exp(z/T)^T: three exps an element"
    avx2 = "most desktops and half of the cloud have no AVX-512"
    cases = []
    for dtype, bar, goal in (("fp32", 1.8, 1.25), ("bf16", 2.6, 1.8)):
        cases.append(_inplace(WIDE, dtype, bar, goal, "rows longer than a core's caches"))
    for shape in (LLM, WIDE):
        for dtype, bar, goal in (("fp32", 2.1, 1.6), ("bf16", 3.3, 2.5)):
            cases.append(_inplace(shape, dtype, bar, goal, three_exps, temperature=3.7))
    for shape in (LLM, WIDE):
        for temperature, reason in ((2.0, avx2), (3.7, f"{avx2}; {three_exps}")):
            for dtype, bar, goal in (("fp32", 2.4, 1.7), ("bf16", 4.0, 3.0)):
                cases.append(_inplace(shape, dtype, bar, goal, reason, temperature, "avx2"))
    return cases


def _family() -> list[Case]:
    """Every divergence, compared with the default one and with its own recipe."""
    running = (1.2, 1.05), (15, 30), "its sums are taken together with those of the exps"
    own_pass = (2.0, 1.4), (15, 30), "a pass of its own over p and q, with up to two logarithms a class"
    as_forward = (1.2, 1.0), (15, 30), "forward_kl's sums without the label, and a copy of its block"
    no_exps = (1.2, 1.0), (12, 30), "only the hard term has exps"
    kinds = {"forward_kl": running, "reverse_kl": running, "symmetric_kl": running, "jsd": own_pass}
    kinds |= {name: own_pass for name in ("skew_forward_kl", "skew_reverse_kl", "tvd", "hellinger")}
    cases = []
    for dtype in ("fp32", "bf16"):
        workload = Workload(*LLM, dtype)
        for name, (of_default, faster, reason) in (kinds | {"dkd": as_forward, "logit_mse": no_exps}).items():
            bounds = Bound("cross_entropy inplace", *of_default), Bound(f"eager {name}", *faster)
            cases.append(Case(f"{workload.name}-{name}", workload, f"{name} inplace", bounds, reason))
    return cases


def _options() -> list[Case]:
    """Each option, compared with the call without it."""
    bars = {
        "metrics": (1.1, "three more sums, and two maxima"),
        "smoothing": (1.05, "the sum of the logits"),
        "z_loss": (1.05, "a number per row"),
        "weights": (1.05, "a number per row"),
        "softcap": (1.8, "a tanh a class"),
        "both softcaps": (1.8, "two tanh a class"),
        "standardize": (1.3, "mean and deviation first, no exp(z/T)^T, a dot product for the gradient"),
    }
    cases = []
    for dtype in ("fp32", "bf16"):
        workload = Workload(*LLM, dtype)
        for name, (bar, reason) in bars.items():
            bound = Bound("cross_entropy inplace", bar)
            cases.append(Case(f"{workload.name}-{name.replace(' ', '-')}", workload, f"with {name}", (bound,), reason))
    return cases


def _forward(dtype: str) -> Case:
    return Case(
        f"1024x32000-{dtype}-forward",
        Workload(*LLM, dtype),
        "kdfast forward",
        (Bound("kdfast inplace", 1.0), Bound("eager forward", 30), Bound("floor reads", None, 1.0)),
        "evaluation under no_grad: nothing of the logits' size is written",
    )


def _threads(dtype: str) -> Case:
    return Case(
        f"1024x32000-{dtype}-threads",
        Workload(*LLM, dtype),
        "2 threads",
        (Bound("1 thread", 1.7, 1.9),),
        "rows are independent: a second core should nearly halve the time",
    )


CASES = [
    Case(
        "1024x32000-fp32-inplace",
        Workload(*LLM),
        "kdfast inplace",
        (Bound(_KEPT, 1.6, 1.25), Bound("eager", 30), Bound("torch.compile", 7)),
        "the main case: a language model's logits, overwritten by their gradient",
        also=("liger",),
        quick=True,
    ),
    Case(
        "1024x32000-fp32-default",
        Workload(*LLM),
        "kdfast",
        (Bound(_FRESH, 0.8, 0.55), Bound("eager", 15)),
        "the default: a fresh gradient, whose pages the system maps and zeroes first",
        also=("torch.compile",),
        quick=True,
    ),
    Case(
        "1024x32000-bf16-default",
        Workload(*LLM, "bf16"),
        "kdfast",
        (Bound(_FRESH, 1.0, 0.7), Bound("eager", 15)),
        "the same in the dtype that most models are trained in",
        also=("torch.compile", "eager in fp32"),
    ),
    Case(
        "1024x32000-bf16-inplace",
        Workload(*LLM, "bf16"),
        "kdfast inplace",
        (Bound(_KEPT, 2.4, 1.8), Bound("eager", 30)),
        "half the bytes and the same arithmetic: further from the floor than fp32",
        also=("torch.compile", "eager in fp32", "liger"),
        quick=True,
    ),
    *_variants(),
    *_family(),
    *_options(),
    Case(
        "4096x1000-fp32",
        Workload(4096, 1000),
        "kdfast",
        (Bound("torch.compile", 5, 10),),
        "ImageNet: rows shorter than a block",
        also=("eager",),
    ),
    Case(
        "65536x10-fp32",
        Workload(65536, 10),
        "kdfast",
        (Bound("torch.compile", 2, 5),),
        "CIFAR-10, or a dense prediction with ten classes: rows shorter than a vector",
        also=("eager",),
        quick=True,
    ),
    Case(
        "8x10-fp32",
        Workload(8, 10),
        "kdfast",
        (Bound("eager", 1.0, 2.0),),
        "one small call and its backward: only overhead",
        also=("torch.compile",),
        quick=True,
    ),
    _threads("fp32"),
    _threads("bf16"),
    _forward("fp32"),
    _forward("bf16"),
    Case(
        "1024x32000-fp32-softmax",
        Workload(*LLM),
        "kdfast softmax",
        (),
        "tempered_softmax alone, forward, into a fresh tensor; no bar",
        also=("eager softmax",),
    ),
]
