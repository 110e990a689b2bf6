"""Trainers' own losses beside kdfast's in their place, on a CPU, forward and backward: ratios of median times.

    python -m benchmarks.trainers [--client trl] [--rows 256] [--vocab 32000] [--hidden 256] [--rounds 5] [--processor]

It runs in the environment of `make integration-test`; a client that is not installed there is named and left out. Each
round runs every row's two losses once, one after the other. To add a client, write a function as trl() is, with the
Shape of the inputs as its argument and a list of Rows as its result, and name it in CLIENTS.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Shape(NamedTuple):
    """The inputs of a loss."""

    rows: int
    vocab: int
    hidden: int
    dtype: torch.dtype


class Row(NamedTuple):
    """One loss of a client; own() and kdfast() return it, and it is differentiated in `leaves`."""

    name: str
    leaves: list[Tensor]
    own: Callable[[], Tensor]
    kdfast: Callable[[], Tensor]


def made_logits(shape: Shape) -> tuple[Tensor, Tensor]:
    """A student's that require grad, and a teacher's: (1, rows, vocab)."""
    student, teacher = (torch.randn(1, shape.rows, shape.vocab, dtype=shape.dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def made_heads(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A student's hidden states and head that require grad, and a teacher's."""
    rows, head = (1, shape.rows, shape.hidden), (shape.vocab, shape.hidden)
    made = [torch.randn(*size, dtype=shape.dtype) for size in (rows, head, rows, head)]
    weights = shape.hidden**-0.5
    return made[0].requires_grad_(), (made[1] * weights).requires_grad_(), made[2], made[3] * weights


def trl(shape: Shape) -> list[Row]:
    """What kdfast.integrations.trl.patch() replaces."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import trl.experimental.async_distillation.async_distillation_trainer as async_distillation
    import trl.experimental.sdft.loss_utils as sdft
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.iw_opd.iw_opd_trainer import IWOPDTrainer
    from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer
    from trl.trainer import distillation_trainer

    import kdfast.integrations.trl

    kdfast.integrations.trl.patch()
    student, teacher = made_logits(shape)
    hidden, weight, teacher_hidden, teacher_weight = made_heads(shape)
    labels = torch.randint(shape.vocab, (1, shape.rows))
    top = torch.log_softmax(teacher.float(), -1).topk(64)

    def row(name: str, leaves: list[Tensor], function: Any, *args: Any, first: bool = False, **kwargs: Any) -> Row:
        def call(loss: Any) -> Callable[[], Tensor]:
            return lambda: loss(*args, **kwargs)[0] if first else loss(*args, **kwargs).sum()

        return Row(name, leaves, call(function.kdfast_original), call(function))

    rows = []
    for beta in (0.0, 0.5, 1.0):
        heads = hidden, teacher_hidden, weight, teacher_weight, torch.ones(1, shape.rows), beta
        loss = distillation_trainer._chunked_divergence_loss
        rows.append(row(f"Distillation, beta {beta}", [hidden, weight], loss, *heads, first=True))
    for beta in (0.0, 0.5, 1.0):
        loss = GKDTrainer.generalized_jsd_loss
        rows.append(row(f"GKD, GOLD, beta {beta}", [student], loss, student, teacher, labels, beta=beta))
    loss = IWOPDTrainer.generalized_jsd_loss
    rows.append(row("IW-OPD, top 64, beta 0.5", [student], loss, student, teacher, labels, beta=0.5, top_k=64))
    loss, options = sdft.compute_full_logit_self_distillation_loss, {"distillation_alpha": 0.5}
    rows.append(row("SDFT, SDPO, full, alpha 0.5", [student], loss, student, teacher, **options))
    loss, options = sdft.compute_topk_self_distillation_loss, options | {"distillation_topk": 64}
    rows.append(
        row("SDFT, SDPO, top 64, alpha 0.5", [student], loss, student, teacher, distillation_add_tail=True, **options)
    )
    loss = sdft.compute_sampled_token_self_distillation_loss
    rows.append(row("SDFT, SDPO, sampled", [student], loss, student, teacher, labels, distillation_alpha=1.0))
    there = torch.ones_like(top.indices[0], dtype=torch.bool)
    head = hidden, weight, None, 1.0, None, top.indices[0], top.values[0], there, 0.0, 1.0, True, None, 1, 256
    loss = async_distillation._chunked_jsd_loss
    rows.append(row("Async, 64 candidates", [hidden, weight], loss, hidden[0], *head[1:], first=True))
    server, inputs = _server(ServerDistillationTrainer, labels, top)
    answer = SimpleNamespace(logits=student)
    loss = ServerDistillationTrainer.compute_loss
    rows.append(row("Server, top 64", [student], loss, server, lambda **given: answer, inputs))
    return rows


def _server(trainer: type, tokens: Tensor, top: Any) -> tuple[Any, dict[str, Tensor]]:
    """A ServerDistillationTrainer whose server has answered, and its inputs: a prompt of one token."""
    made: Any = object.__new__(trainer)
    answer = {"topk_token_ids": top.indices[:, :-1], "topk_logprobs": top.values[:, :-1]}
    answer["actual_logprobs"] = answer["topk_logprobs"][..., 0]
    made.__dict__ |= {"beta": 0.0, "temperature": 1.0, "loss_add_tail": True, "reverse_kl_top_1_mode": "sampled"}
    made.model = SimpleNamespace(training=False)
    made._get_teacher_token_logprobs_from_server = lambda inputs, start: answer
    parts = {"prompt": tokens[:, :1], "completion": tokens[:, 1:]}
    ids = {f"{name}_ids": part for name, part in parts.items()}
    return made, ids | {f"{name}_mask": torch.ones_like(part) for name, part in parts.items()}


def liger(shape: Shape) -> list[Row]:
    """The chunked loss; Liger's others need a GPU."""
    from liger_kernel import chunked_loss

    from kdfast.integrations import liger as fast

    inputs = *made_heads(shape), torch.randint(shape.vocab, (1, shape.rows))
    rows = []
    for hard in (0.0, 0.5):
        options = {"weight_hard_loss": hard, "weight_soft_loss": 1 - hard, "compiled": False}
        own, ours = (library.LigerFusedLinearJSDLoss(**options) for library in (chunked_loss, fast))
        name = f"chunked JSD, hard weight {hard}"
        rows.append(Row(name, list(inputs[:2]), partial(own, *inputs), partial(ours, *inputs)))
    return rows


def swift(shape: Shape) -> list[Row]:
    """ms-swift's function that its GKD trainers share."""
    from swift.rlhf_trainers import gkd_loss

    from kdfast.integrations.swift import replace_jsd_loss

    student, teacher = made_logits(shape)
    rows, own = [], gkd_loss.jsd_loss
    for beta in (0.0, 0.5, 1.0):
        inputs = student[0], teacher[0], beta
        rows.append(Row(f"GKD, beta {beta}", [student], partial(own, *inputs), partial(replace_jsd_loss(own), *inputs)))
    return rows


def modelopt(shape: Shape) -> list[Row]:
    from modelopt.torch.distill import losses

    from kdfast.integrations import modelopt as fast

    student, teacher = made_logits(shape)
    inputs = student[0], teacher[0]
    own, ours = (library.LogitsDistillationLoss(temperature=2.0) for library in (losses, fast))
    return [Row("LogitsDistillationLoss, T = 2", [student], partial(own, *inputs), partial(ours, *inputs))]


def speculators(shape: Shape) -> list[Row]:
    """The eager losses, which are what runs on a CPU."""
    from speculators.losses import eager

    from kdfast.integrations.speculators import LOSSES

    student, teacher = made_logits(shape)

    def row(name: str) -> Row:
        own, ours = getattr(eager, name.removeprefix("fused_").replace("nla", "neg_log_acceptance")), LOSSES[name]
        return Row(name, [student], lambda: own(student, teacher).sum(), lambda: ours(student, teacher).sum())

    return [row(name) for name in LOSSES]


CLIENTS: dict[str, Callable[[Shape], list[Row]]] = {
    "trl": trl,
    "liger": liger,
    "swift": swift,
    "modelopt": modelopt,
    "speculators": speculators,
}


def medians(rows: list[Row], rounds: int, clock: Callable[[], float]) -> list[tuple[float, float]]:
    """Milliseconds of own() and of kdfast() of each row."""
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in rows]
    for _ in range(rounds + 1):
        for row, each in zip(rows, times, strict=True):
            for function, found in zip((row.own, row.kdfast), each, strict=True):
                start = clock()
                torch.autograd.grad(function(), row.leaves)
                found.append(1e3 * (clock() - start))
    return [(statistics.median(own[1:]), statistics.median(ours[1:])) for own, ours in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor", action="store_true", help="one thread's processor time, on a busy machine")
    args = parser.parse_args()
    if args.processor:
        torch.set_num_threads(1)
    clock = time.process_time if args.processor else time.perf_counter
    print(f"{args.rows} rows, V = {args.vocab}, H = {args.hidden}, {torch.get_num_threads()} threads, medians")
    for client in args.client:
        for dtype in args.dtype:
            torch.manual_seed(0)
            try:
                rows = CLIENTS[client](Shape(args.rows, args.vocab, args.hidden, DTYPES[dtype]))
            except ImportError as error:
                print(f"\n{client}: left out, {error}")
                break
            print(f"\n{client}, {dtype}".ljust(36) + "own, ms".rjust(10) + "kdfast, ms".rjust(12) + "ratio".rjust(8))
            for row, (own, ours) in zip(rows, medians(rows, args.rounds, clock), strict=True):
                print(f"{row.name:35}{own:10.1f}{ours:12.1f}{own / ours:8.1f}")


if __name__ == "__main__":
    main()
