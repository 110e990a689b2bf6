"""The candidates, all on the same logits: calls of kdfast, the memory floors, and the peers.

kdfast
    kdfast          kd_loss and backward, the default call: a fresh gradient for a leaf
    kdfast inplace  with inplace=True: the gradient overwrites the logits
    1, 2 threads    the same with this number of threads
    kdfast softmax  tempered_softmax under no_grad
    jsd inplace     kdfast inplace with that divergence; the same for the others
    with metrics    kdfast inplace with that option; the same for the others of OPTIONS
    kdfast cuda     on a GPU: by this backend and no other, with forward_kl, whose value is the recipe's; also triton
    ... graph       the call as a CUDA graph that is replayed, without the host's time
floors
    floor kept      reads both logits and writes a third array, always the same one
    floor fresh     writes one that each call allocates
    floor reads     reads both logits
    floor copy      on a GPU: a copy of as many bytes as a call must move; it reads half and writes half
peers
    eager           the usual recipe, in the logits' own dtype: the yardstick for bf16 too
    eager jsd       the recipe with that divergence; the same for the others
    eager in fp32   the recipe on logits.float()
    eager softmax   torch.softmax(logits / T)
    torch.compile   the recipe compiled
    liger           on a CPU, Liger-Kernel's chunked loss without the head, compiled as Liger compiles it; its other
                    losses need Triton; on a GPU, the recipe with Liger-Kernel's divergence
    trl             TRL's generalized_jsd_loss for beta = 0, without a hard term
... forward         the same under no_grad
"""

import functools
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kdfast
from benchmarks import floor, recipes
from benchmarks.cases import Workload
from benchmarks.recipes import ALPHA
from benchmarks.timing import Candidate
from kdfast.divergences import names

LIGER_CHUNK = 1024  # rows, Liger's default
_LIGER = torch.func.grad_and_value(recipes.liger_chunk)
GPU_BACKENDS = ("cuda", "triton")  # by name, so that no other one takes the call

OPTIONS: dict[str, dict[str, Any]] = {
    "metrics": {"return_metrics": True},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-4},  # PaLM's
    "softcap": {"softcap": 30.0},  # Gemma 2's
    "both softcaps": {"softcap": 30.0, "teacher_softcap": 30.0},
    "standardize": {"standardize": True},
}


class Data:
    """The tensors of a workload: at most four arrays of the logits' size."""

    def __init__(self, workload: Workload, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(0)
        shape = (workload.rows, workload.vocab)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[workload.dtype]
        logits = [torch.randn(shape, generator=generator, dtype=dtype, device=device).mul_(3) for _ in range(2)]
        self.temperature = workload.temperature
        self.student, self.teacher = logits  # (rows, vocab)
        self.labels = torch.randint(workload.vocab, shape[:1], generator=generator, device=device)  # (rows,)
        self._spare: dict[str, Tensor] = {}

    @property
    def arguments(self) -> tuple[Tensor, Tensor, float]:
        """Those of a loss, after the student."""
        return self.teacher, self.labels, self.temperature

    def spare(self, use: str) -> Tensor:
        """An array of the student's size whose pages are mapped; made at its first use."""
        if use not in self._spare:
            self._spare[use] = self.student.clone()
        return self._spare[use]

    def leaf(self) -> Tensor:
        """The student as a leaf without a gradient."""
        return self.student.detach().requires_grad_()

    def non_leaf(self) -> Tensor:
        """A copy of the student as the output of a layer: inplace=True does not accept a leaf."""
        logits = self.spare("inplace").copy_(self.student).detach()
        return _Layer.apply(torch.zeros((), requires_grad=True), logits)


class _Layer(torch.autograd.Function):
    """Makes logits a non-leaf without copying them."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at the first use: the compiler alone takes seconds to import."""
    return torch.compile(function, dynamic=False)


def liger(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> list[Tensor]:
    """The gradient, chunk by chunk, computed in forward as in Liger."""
    gradient = _compiled(_LIGER)
    chunks = zip(*(x.split(LIGER_CHUNK) for x in (student, teacher, labels)), strict=True)
    return [gradient(s, t, y, temperature, len(labels))[0] for s, t, y in chunks]


def kd_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, **kwargs: Any) -> Any:
    return kdfast.kd_loss(student, teacher, labels, temperature=temperature, alpha=ALPHA, **kwargs)


def _step(data: Data, loss: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    def step(student: Tensor) -> Tensor:
        found = loss(student, *data.arguments)
        value = found[0] if isinstance(found, tuple) else found  # with metrics
        value.backward()
        return value.detach()

    return step


def _trained(data: Data, loss: Callable[..., Tensor], divergence: str | None) -> Candidate:
    """Loss and gradient for a leaf."""
    return Candidate(data.leaf, _step(data, loss), divergence=divergence)


def _inplace(data: Data, threads: int | None = None, is_checked: bool = True, **options: Any) -> Candidate:
    """The gradient overwrites the logits."""
    divergence = options.get("divergence", "cross_entropy") if is_checked else None
    return Candidate(data.non_leaf, _step(data, partial(kd_loss, inplace=True, **options)), threads, divergence)


def _forward(function: Callable[..., Any], *args: Any, divergence: str | None = None) -> Candidate:
    """The value alone, under no_grad."""
    without_grad = torch.no_grad()(function)
    return Candidate(lambda: None, lambda _: without_grad(*args), divergence=divergence)


def _captured(data: Data, loss: Callable[..., Tensor]) -> Candidate:
    """The replay of a CUDA graph of a step."""
    student, step, side = data.leaf(), _step(data, loss), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(student)  # the first call compiles and loads, which a capture does not allow
    torch.cuda.current_stream().wait_stream(side)
    student.grad = None  # the graph has memory of its own for it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step(student)

    def replay(_: Tensor) -> Tensor:
        graph.replay()
        return value

    return Candidate(lambda: student, replay, divergence="forward_kl")


def _copy(nbytes: int, device: torch.device) -> Candidate:
    """Reads and writes `nbytes` in all. Its arrays are freed after each call, to leave memory for the peers."""

    def prepare() -> list[Tensor]:
        return [torch.empty(nbytes // 2, dtype=torch.uint8, device=device) for _ in range(2)]

    return Candidate(prepare, lambda pair: pair[0].copy_(pair[1]))


LOSSES: dict[str, tuple[Callable[..., Tensor], str]] = {  # and the divergence whose value it has
    "kdfast": (kd_loss, "cross_entropy"),
    **{
        f"kdfast {name}": (partial(kd_loss, divergence="forward_kl", backend=name), "forward_kl")
        for name in GPU_BACKENDS
    },
    "eager": (recipes.recipe, "forward_kl"),
    "eager in fp32": (recipes.recipe_in_fp32, "forward_kl"),
    "torch.compile": (lambda *args: _compiled(recipes.recipe)(*args), "forward_kl"),
    "liger": (recipes.liger_divergence, "forward_kl"),
}


def candidate(name: str, data: Data) -> Candidate:
    """The candidate of this name; the top of this file lists them."""
    student, teacher, temperature = data.student, data.teacher, data.temperature
    makers: dict[str, Callable[[], Candidate]] = {
        "kdfast inplace": lambda: _inplace(data),
        "1 thread": lambda: _inplace(data, threads=1),
        "2 threads": lambda: _inplace(data, threads=2),
        "kdfast softmax": lambda: _forward(kdfast.tempered_softmax, student, temperature),
        "floor kept": lambda: Candidate(
            lambda: data.spare("floor"), lambda out: floor.read_write(student, teacher, out)
        ),
        "floor fresh": lambda: _forward(lambda: floor.read_write(student, teacher, torch.empty_like(student))),
        "floor reads": lambda: _forward(floor.read_only, student, teacher),
        "floor copy": lambda: _copy(3 * student.nbytes, student.device),
        "floor copy forward": lambda: _copy(2 * student.nbytes, student.device),
        "eager softmax": lambda: _forward(lambda: torch.softmax(student / temperature, dim=-1)),
        "trl": lambda: _trained(data, recipes.trl, None),
        "with weights": lambda: _inplace(data, is_checked=False, row_weight=torch.rand(len(student)) + 0.5),
    }
    for key, (loss, divergence) in LOSSES.items():
        makers[key] = partial(_trained, data, loss, divergence)
        makers[f"{key} forward"] = partial(_forward, loss, student, *data.arguments, divergence=divergence)
    for backend in GPU_BACKENDS:
        makers[f"kdfast {backend} inplace"] = partial(_inplace, data, divergence="forward_kl", backend=backend)
        makers[f"kdfast {backend} graph"] = partial(_captured, data, LOSSES[f"kdfast {backend}"][0])
    for divergence in names():
        makers[f"{divergence} inplace"] = partial(_inplace, data, divergence=divergence)
        makers[f"eager {divergence}"] = partial(_trained, data, recipes.family_recipe(divergence), None)
    for option, settings in OPTIONS.items():
        makers[f"with {option}"] = partial(_inplace, data, is_checked=False, **settings)
    if student.device.type == "cpu":
        makers["liger"] = lambda: Candidate(lambda: None, lambda _: liger(student, *data.arguments))
    return makers[name]()


def why_not(name: str, device: str) -> str:
    """Why a candidate of a GPU cannot run here; empty where it can."""
    is_dry = device == "dry run"
    backend = next((word for word in name.split() if word in GPU_BACKENDS), None)
    if backend == "cuda" and (is_dry or torch.version.cuda is None):
        return "left out: needs an NVIDIA GPU"
    if is_dry and name.startswith("torch.compile"):
        return "left out: would compile for the CPU"
    if is_dry and (name.endswith("graph") or name.startswith("liger")):
        return "left out: needs a GPU"
    if device == "cuda" and name.startswith("liger") and not importlib.util.find_spec("liger_kernel"):
        return "left out: liger-kernel is not installed"
    return kdfast.backends()[backend]["why_not"] or "" if backend else ""
