"""`python -m benchmarks.linear`: time and memory of the loss from hidden states and heads.

Rows 1024, H = 512 for the student and 1024 for the teacher unless given, T = 2, alpha = 0.9 with labels; loss and all
gradients.

candidates
    products      the four products that are needed, each unsplit, into fresh memory: two give logits, two the gradients
                  in hidden states and weight
    kept products the same into memory that all calls share
    fp32 products as `products` with fp32 factors, which a CPU uses for 16-bit heads too, so that no logits are rounded
    kdfast        linear_kd_loss and backward
    eager         two heads, the recipe of recipes.py, backward
    kdfast jsd    the generalised Jensen-Shannon divergence, beta = 0.5
    chunked jsd   the same in plain PyTorch as in Liger-Kernel's chunked loss: for each chunk, of as many rows as
                  kdfast's, heads, loss and gradients by autograd, which are added up
    liger jsd     on a GPU: Liger-Kernel's own
memory
    the peak of one call, after a small one; without inputs, the gradients that it returns, and on a CPU, where it is in
    a process of its own, the fp32 accumulator of a 16-bit head's gradient

Examples:
    python -m benchmarks.linear                                       fp32, V = 32000 and 128000
    python -m benchmarks.linear --dtype bf16 --vocab 32000 --without products eager
    python -m benchmarks.linear --dtype bf16 --rows 2048 --hidden 1024 2048 --without eager 'chunked jsd'
    python -m benchmarks.linear --chunk-rows 64 128 256 512 1024      the measurements behind the rule for chunk_rows
    python -m benchmarks.linear --device cuda --dtype bf16 --rows 8192 --hidden 4096 4096 --vocab 151936
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

import kdfast
from benchmarks.memory import added, printed_by
from benchmarks.recipes import ALPHA, recipe, soft_terms
from benchmarks.timing import Candidate, medians
from kdfast import chunks

HIDDEN = 512, 1024  # the student's and the teacher's
TEMPERATURE = 2.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARMUP = 8  # rows of the small call


class Data:
    """Hidden states (rows, H), heads (V, H) and labels (rows,); logits have a standard deviation of 2."""

    def __init__(
        self, rows: int, vocab: int, dtype: torch.dtype, hidden: tuple[int, int] = HIDDEN, device: str = "cpu"
    ) -> None:
        student, teacher = hidden
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.empty(shape).normal_(0, scale, generator=generator).to(device, dtype)

        self.hidden, self.weight = normal(rows, student), normal(vocab, student, scale=2 * student**-0.5)
        self.teacher = normal(rows, teacher), normal(vocab, teacher, scale=2 * teacher**-0.5)
        self.labels = torch.randint(vocab, (rows,), generator=generator).to(device)
        self._factors: dict[torch.dtype, list[Tensor]] = {}

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The four factors in a dtype, cached, so that no cast is timed."""
        if dtype not in self._factors:
            self._factors[dtype] = [x.to(dtype) for x in (self.hidden, self.weight, *self.teacher)]
        return tuple(self._factors[dtype])

    @cached_property
    def kept(self) -> list[Tensor]:
        """The four products, into which others are written."""
        return four_products(self, None)

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

    def first(self, rows: int) -> "Data":
        few = object.__new__(Data)
        few.hidden, few.weight = self.hidden[:rows], self.weight
        few.teacher, few.labels = (self.teacher[0][:rows], self.teacher[1]), self.labels[:rows]
        return few


def four_products(data: Data, leaves: Any, dtype: torch.dtype | None = None, out: Any = (None,) * 4) -> list[Tensor]:
    hidden, weight, t, w = data.factors(dtype or data.weight.dtype)
    logits = torch.mm(hidden, weight.T, out=out[0])
    factors = (t, w.T), (logits, weight), (logits.T, hidden)
    return [logits, *(torch.mm(*pair, out=each) for pair, each in zip(factors, out[1:], strict=True))]


def fused(data: Data, leaves: Any, **settings: Any) -> Any:
    labels, settings = data.labels, {"temperature": TEMPERATURE, "alpha": ALPHA} | settings
    loss = kdfast.linear_kd_loss(*leaves, *data.teacher, labels, **settings)
    loss.backward()
    return loss


def eager(data: Data, leaves: Any) -> Any:
    loss = recipe(leaves[0] @ leaves[1].T, data.teacher[0] @ data.teacher[1].T, data.labels, TEMPERATURE)
    loss.backward()
    return loss


def chunked_jsd(data: Data, leaves: Any) -> Any:
    rows, at_once = len(data.labels), chunks.default_rows(len(data.weight), data.weight.device.type)
    at_once = -(-rows // -(-rows // at_once))  # as in kdfast
    grad_weight, grads, total = torch.zeros_like(data.weight), [], torch.zeros((), device=data.weight.device)
    for part in zip(*(x.split(at_once) for x in (data.hidden, data.teacher[0], data.labels)), strict=True):
        hidden, weight = part[0].detach().requires_grad_(), leaves[1]
        student, teacher = (hidden @ weight.T).float(), (part[1] @ data.teacher[1].T).float()
        soft = soft_terms("jsd", student, teacher, part[2], TEMPERATURE).sum()
        hard = F.cross_entropy(student, part[2], reduction="sum")
        loss = (ALPHA * soft + (1 - ALPHA) * hard) / rows
        hidden_grad, head_grad = torch.autograd.grad(loss, (hidden, weight))
        grads.append(hidden_grad)
        grad_weight += head_grad
        total += loss.detach()
    return total, torch.cat(grads), grad_weight


def liger_jsd(data: Data, leaves: Any) -> Any:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(weight_hard_loss=1 - ALPHA, weight_soft_loss=ALPHA, temperature=TEMPERATURE)
    loss = loss_of(*leaves, *data.teacher, data.labels)
    loss.backward()
    return loss


RUNS: dict[str, Callable[..., Any]] = {
    "products": four_products,
    "kept products": lambda data, leaves: four_products(data, leaves, out=data.kept),
    "fp32 products": lambda data, leaves: four_products(data, leaves, torch.float32),
    "kdfast": fused,
    "eager": eager,
    "kdfast jsd": lambda data, leaves: fused(data, leaves, divergence="jsd"),
    "chunked jsd": chunked_jsd,
    "liger jsd": liger_jsd,
}
LOSSES = ("kdfast", "eager", "kdfast jsd", "chunked jsd", "liger jsd")
LEFT_OUT = {"cpu": ("liger jsd",), "cuda": ("fp32 products",)}


def finished(result: Any) -> Any:
    """The result, once a GPU has computed it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result


def fits(data: Data, run: Callable[..., Any]) -> bool:
    """Whether a GPU has room for a call."""
    try:
        finished(run(data, data.leaves()))
    except torch.OutOfMemoryError:
        return False
    return True


def times(data: Data, runs: dict[str, Callable[..., Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each run, interleaved."""
    candidates = {}
    for name, run in runs.items():
        if data.weight.is_cuda and not fits(data, run):
            print(f"{name}: out of memory")
            continue
        candidates[name] = Candidate(data.leaves, lambda leaves, run=run: finished(run(data, leaves)))
    return medians(candidates, rounds, progress=lambda what: print(what, file=sys.stderr))


def shares(data: Data) -> dict[str, float]:
    """Shares of one call's time, by the profiler."""
    fused(data, data.leaves())
    with torch.profiler.profile() as profile:
        start = time.perf_counter()
        fused(data, data.leaves())
        seconds = time.perf_counter() - start
    spent = {event.key: event.self_cpu_time_total / 1e6 / seconds for event in profile.key_averages()}
    found = {
        "products": sum(spent.get(name, 0) for name in ("aten::mm", "aten::addmm", "aten::addmm_", "kdfast::matmul_")),
        "row kernel": spent["kdfast::loss_grad_"],
    }
    found["widening, rounding, copies"] = spent.get("aten::copy_", 0)
    return found | {"rest": 1 - sum(found.values())}


def gpu_added(function: Callable[[], Any]) -> int:
    """The bytes that the call allocates at its peak."""
    torch.cuda.reset_peak_memory_stats()
    before, result = torch.cuda.memory_allocated(), function()
    del result
    return torch.cuda.max_memory_allocated() - before


def peak(data: Data, name: str, dtype: torch.dtype) -> int:
    """The bytes that one call adds to this process at its peak, beyond gradients and the accumulator."""
    few, leaves = data.first(WARMUP), data.leaves()
    kept = RUNS[name](few, few.leaves())  # threads and libraries allocate what they keep
    del kept
    on_gpu = data.weight.is_cuda
    total = (gpu_added if on_gpu else added)(lambda: RUNS[name](data, leaves))
    returned = sum(x.nbytes for x in leaves)
    is_accumulated = dtype.itemsize == 2 and name.startswith("kdfast") and not on_gpu
    accumulator = 4 * data.weight.numel() if is_accumulated else 0
    return total - returned - accumulator


def peak_megabytes(name: str, rows: int, vocab: int, args: argparse.Namespace) -> float:
    """The peak in MB, of a CPU in a fresh process."""
    if args.device == "cuda":
        return peak(Data(rows, vocab, DTYPES[args.dtype], args.hidden, "cuda"), name, DTYPES[args.dtype]) / 1e6
    shape = "--rows", rows, "--vocab", vocab, "--hidden", *args.hidden, "--dtype", args.dtype
    return printed_by("benchmarks.linear", "--peak", name, *shape) / 1e6


def report(vocab: int, args: argparse.Namespace) -> None:
    names = [name for name in RUNS if name not in (*args.without, *LEFT_OUT[args.device])]
    names = [name for name in names if args.dtype != "fp32" or name != "fp32 products"]
    data = Data(args.rows, vocab, DTYPES[args.dtype], args.hidden, args.device)
    seconds = times(data, {name: RUNS[name] for name in names}, args.rounds)
    names = list(seconds)
    at_once = chunks.default_rows(vocab, args.device)
    title = f"({args.rows}, {vocab}) {args.dtype}, chunks of {at_once} rows"
    table = Table(Column(no_wrap=True), title=title)
    columns = [name for name in ("products", "kept products", "fp32 products", "eager", "chunked jsd") if name in names]
    for column in ("seconds", *(f"x {name}" for name in columns), "MB"):
        table.add_column(column, justify="right")
    for name in names:
        measured = name in LOSSES and not args.no_memory
        memory = f"{peak_megabytes(name, args.rows, vocab, args):.0f}" if measured else ""
        ratios = (f"{seconds[name] / seconds[each]:.3f}" for each in columns)
        table.add_row(name, f"{seconds[name]:.3f}", *ratios, memory)
    console = Console(width=100)
    console.print(table)
    if args.device == "cuda":
        return
    parts = ", ".join(f"{what} {100 * share:.1f} %" for what, share in shares(data).items())
    console.print(f"kdfast's time: {parts}\n", highlight=False)


def report_chunk_rows(vocab: int, args: argparse.Namespace) -> None:
    """The time of each size of chunks; the memory of their logits is computed."""
    data = Data(args.rows, vocab, DTYPES[args.dtype], args.hidden, args.device)
    runs = {str(rows): lambda data, leaves, rows=rows: fused(data, leaves, chunk_rows=rows) for rows in args.chunk_rows}
    seconds = times(data, {"products": four_products} | runs, args.rounds)
    table = Table("chunk_rows", title=f"({args.rows}, {vocab}) {args.dtype}")
    for column in ("seconds", "x products", "MB of logits"):
        table.add_column(column, justify="right")
    for rows, each in zip(args.chunk_rows, runs, strict=True):
        memory = f"{8 * rows * vocab / 1e6:.0f}"
        table.add_row(each, f"{seconds[each]:.3f}", f"{seconds[each] / seconds['products']:.3f}", memory)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=LEFT_OUT, default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, nargs=2, metavar=("STUDENT", "TEACHER"), default=HIDDEN)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without", nargs="+", choices=RUNS, default=[], metavar="CANDIDATE", help="leave out")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--growth", type=int, nargs="+", metavar="ROWS", help="only memory at these numbers of rows")
    parser.add_argument(
        "--chunk-rows", type=int, nargs="+", metavar="ROWS", help="only time at these numbers of rows a chunk"
    )
    parser.add_argument("--peak", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no GPU here")
    if args.peak:
        dtype = DTYPES[args.dtype]
        print(peak(Data(args.rows, args.vocab[0], dtype, args.hidden), args.peak, dtype))
        return
    for vocab in args.vocab:
        if args.growth:
            for rows in args.growth:
                print(f"({rows}, {vocab}) {args.dtype}: {peak_megabytes('kdfast', rows, vocab, args):.0f} MB")
        elif args.chunk_rows:
            report_chunk_rows(vocab, args)
        else:
            report(vocab, args)


if __name__ == "__main__":
    main()
