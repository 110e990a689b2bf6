"""`python -m benchmarks.linear`: time and memory of the loss from hidden states and heads.

Rows 1024, H = 512 for the student and 1024 for the teacher unless given, T = 2, alpha = 0.9 with labels; loss and all
gradients. linear_candidates.py says what is measured.

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
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from benchmarks import linear_candidates
from benchmarks.linear_candidates import DTYPES, HIDDEN, LEFT_OUT, LOSSES, RUNS, Data, four_products, fused
from benchmarks.memory import added, printed_by
from benchmarks.timing import Candidate, medians
from kdfast import chunks

WARMUP = 8  # rows of the small call


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
        prog="python -m benchmarks.linear",
        description=__doc__,
        epilog=linear_candidates.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
