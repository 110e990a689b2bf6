"""Sparse teachers and tokens on a CPU: of a dense teacher's time, and beside the usual recipes. K = 64, T = 2.

    python -m benchmarks.sparse [--rows 1024] [--vocab 32000 151936]

Each round runs every case once, forward and backward, but for slow ones; the ratios are of medians.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kdfast
from benchmarks.timing import Candidate, medians
from kdfast import TopKTargets

K, T, ROUNDS = 64, 2.0, 7


def eager_tail(s: Tensor, teacher: TopKTargets) -> Tensor:
    """As TRL and Megatron-LM have it: log_softmax, gather, and the rest as a class."""
    log_q = torch.log_softmax(s.float() / T, -1).gather(-1, teacher.indices)
    log_q = torch.cat([log_q, torch.log1p(-log_q.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))], -1)
    log_p = teacher.log_probs
    log_p = torch.cat([log_p, torch.log1p(-log_p.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))], -1)
    return T * T * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def eager_tokens(s: Tensor, ids: Tensor) -> Tensor:
    log_q = torch.log_softmax(s.float(), -1)
    return log_q.gather(-1, ids.unsqueeze(-1)).sum() - (log_q.exp() * log_q).sum()


def fused_tokens(s: Tensor, ids: Tensor) -> Tensor:
    found = kdfast.token_log_probs(s, ids)
    return found.log_probs.sum() + found.entropy.sum()


def cases(s: Tensor, t: Tensor) -> dict[str, Callable[[], Any]]:
    """What each measures; s requires grad."""
    teacher, ids = kdfast.topk_targets(t, K, T), torch.randint(s.shape[-1], s.shape[:-1])

    def loss(teacher: Any, divergence: str, missing: str = "tail") -> Callable[[], Any]:
        options: dict[str, Any] = {"temperature": T, "divergence": divergence, "missing": missing}
        return lambda: kdfast.kd_loss(s, teacher, **options).backward()

    def without_gradient(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: function(s.detach(), ids)

    return {
        **{f"dense {d}": loss(t, d) for d in ("cross_entropy", "reverse_kl", "jsd")},
        **{f"tail {d}": loss(teacher, d) for d in ("cross_entropy", "reverse_kl", "jsd")},
        **{f"renormalize {d}": loss(teacher, d, "renormalize") for d in ("cross_entropy", "jsd")},
        "conditional cross_entropy": loss(teacher, "cross_entropy", "conditional"),
        "eager tail": lambda: eager_tail(s, teacher).backward(),
        "tokens forward": without_gradient(fused_tokens),
        "eager tokens forward": without_gradient(eager_tokens),
        "tokens": lambda: fused_tokens(s, ids).backward(),
        "eager tokens": lambda: eager_tokens(s, ids).backward(),
    }


RATIOS = (
    ("tail / dense, cross_entropy", "tail cross_entropy", "dense cross_entropy"),
    ("tail / dense, reverse_kl", "tail reverse_kl", "dense reverse_kl"),
    ("tail / dense, jsd", "tail jsd", "dense jsd"),
    ("renormalize / dense, cross_entropy", "renormalize cross_entropy", "dense cross_entropy"),
    ("renormalize / dense, jsd", "renormalize jsd", "dense jsd"),
    ("conditional / tail", "conditional cross_entropy", "tail cross_entropy"),
    ("eager recipe / tail", "eager tail", "tail cross_entropy"),
    ("eager / tokens, forward", "eager tokens forward", "tokens forward"),
    ("eager / tokens, forward + backward", "eager tokens", "tokens"),
)


def measure(rows: int, vocab: int, dtype: torch.dtype) -> dict[str, float]:
    """Median milliseconds of each case."""
    torch.manual_seed(0)
    s, t = (torch.randn(rows, vocab, dtype=dtype) for _ in range(2))
    run = cases(s.requires_grad_(), t)

    def forget() -> None:
        s.grad = None

    found = medians({name: Candidate(forget, lambda _, f=f: f()) for name, f in run.items()}, ROUNDS, cold=False)
    return {name: 1e3 * seconds for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 151936])
    args = parser.parse_args()
    table = Table("", title=f"{args.rows} rows, K = {K}, {torch.get_num_threads()} threads: ratios of times")
    columns = [(vocab, dtype) for vocab in args.vocab for dtype in (torch.float32, torch.bfloat16)]
    found = []
    for vocab, dtype in columns:
        table.add_column(f"{vocab}, {str(dtype).removeprefix('torch.')}", justify="right")
        found.append(measure(args.rows, vocab, dtype))
    for name, above, below in RATIOS:
        table.add_row(name, *(f"{each[above] / each[below]:.2f}" for each in found))
    table.add_row("tail cross_entropy, ms", *(f"{each['tail cross_entropy']:.1f}" for each in found))
    Console().print(table)


if __name__ == "__main__":
    main()
