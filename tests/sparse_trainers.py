"""The losses of trainers with sparse teachers, as their sources have them, on one batch."""

import math
from collections.abc import Callable

import torch
from cases import F64, batch
from sparse_cases import INF
from torch import Tensor

from kdfast import TopKTargets

N, V, K, T, B, COUNT = 7, 15, 4, 2.0, 0.3, 40  # no two numbers are equal
S, LOGITS, Y = batch(N, V, F64)
Y[2] = -100
KEPT = Y != -100
MASK = torch.tensor([1.0, 1, 0, 1, 1, 0, 1], dtype=F64)


def log_p(tau: float = T) -> Tensor:
    return torch.log_softmax(LOGITS / tau, -1)


def log_q(s: Tensor, tau: float = T) -> Tensor:
    return torch.log_softmax(s / tau, -1)


def top(tau: float = T) -> TopKTargets:
    values, indices = log_p(tau).topk(K, -1)
    return TopKTargets(indices, values)


def of(indices: Tensor, tau: float = T) -> TopKTargets:
    """Any classes; a class that is there again is masked."""
    before = torch.ones(indices.shape[-1], indices.shape[-1], dtype=torch.bool).tril(-1)
    again = ((indices.unsqueeze(-1) == indices.unsqueeze(-2)) & before).any(-1)
    return TopKTargets(indices, log_p(tau).gather(-1, indices).masked_fill(again, -INF))


def padded(teacher: TopKTargets, index: int) -> TopKTargets:
    """Row 1 has two entries, row 3 none."""
    absent = torch.zeros_like(teacher.indices, dtype=torch.bool)
    absent[1, 2:], absent[3] = True, True
    return TopKTargets(teacher.indices.masked_fill(absent, index), teacher.log_probs.masked_fill(absent, -INF))


SAMPLED = S.argmax(-1)
TEACHERS = {
    "top": top(),
    "at_1": top(1),
    "padded": padded(top(), 0),
    "of_student": of(S.topk(K, -1).indices, 1),
    "union": of(torch.cat([top().indices, S.topk(K, -1).indices], -1)),
    "served": padded(of(torch.cat([top().indices, SAMPLED.unsqueeze(-1)], -1)), -1),
}


# --- the trainers' formulas, as their sources have them ----------------------------------------------------------


def entries_of(s: Tensor, name: str, tau: float = T) -> tuple[Tensor, Tensor]:
    """log p and log q, (N, K), at the entries; -inf where absent, as TRL masks both sides."""
    teacher = TEACHERS[name]
    absent = teacher.log_probs == -INF
    q = log_q(s, tau).gather(-1, teacher.indices.clamp(min=0))
    return teacher.log_probs, q.masked_fill(absent, -INF)


def with_tail(log: Tensor) -> Tensor:
    """TRL's add_tail: the rest as a last class, of a mass clamped to 1 - 1e-7."""
    mass = torch.logsumexp(log, -1, keepdim=True)
    return torch.cat([log, torch.log(-torch.expm1(mass.clamp(max=math.log1p(-1e-7))))], -1)


def kl(a: Tensor, b: Tensor) -> Tensor:
    """sum of exp(a) (a - b), without classes that are -inf in both."""
    return torch.where(a == -INF, 0, a.exp() * (torch.where(a == -INF, 0, a) - torch.where(b == -INF, 0, b))).sum(-1)


def jsd(p: Tensor, q: Tensor, beta: float = B) -> Tensor:
    """Generalized: the mixture is beta p + (1 - beta) q."""
    m = torch.logaddexp(
        torch.where(p == -INF, -1e9, p) + math.log(beta), torch.where(q == -INF, -1e9, q) + math.log1p(-beta)
    )
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def normalized(log: Tensor) -> Tensor:
    return log - torch.logsumexp(log, -1, keepdim=True)


def trl_async(s: Tensor) -> Tensor:
    """Rows without any entry add nothing, and are counted."""
    p, q = entries_of(s, "served")
    some = (p > -INF).any(-1)
    losses = torch.zeros(N, dtype=F64)
    losses[some] = jsd(with_tail(p[some]), with_tail(q[some]))
    return (losses * KEPT).sum() / KEPT.sum()


def swift(s: Tensor) -> Tensor:
    """extract_active: rows without entries leave the sum and the count."""
    p, q = entries_of(s, "padded")
    some = (p > -INF).any(-1)
    return jsd(normalized(p[some]), normalized(q[some])).mean()


def conditional(s: Tensor, name: str = "top", tau: float = T) -> tuple[Tensor, Tensor]:
    """Both sides' logits are gathered and softmaxed; the teacher's own logits, as these trainers have them."""
    indices = TEACHERS[name].indices
    return tuple(torch.log_softmax(x.gather(-1, indices) / tau, -1) for x in (LOGITS, s))  # type: ignore[return-value]


def _nemo_mixed(s: Tensor) -> Tensor:
    p, q = conditional(s, "at_1", 1)
    return ((0.5 * kl(p, q) + 0.5 * kl(q, p)) * MASK).sum() / COUNT


def _renormalized(s: Tensor, name: str, tau: float, power: float = 1.0) -> Tensor:
    p, q = entries_of(s, name, tau)
    return kl(normalized(power * p), q)


def _ghost(s: Tensor, name: str, tau: float) -> Tensor:
    """The rest of both sides as one token more."""
    p, q = entries_of(s, name, tau)
    rest_p, rest_q = 1 - p.exp().sum(-1), 1 - q.exp().sum(-1)
    return kl(p, q) + rest_p * (rest_p.log() - rest_q.log())


def _mean_of_kept(x: Tensor) -> Tensor:
    return (x * KEPT).sum() / KEPT.sum()


FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "TRL IW-OPD `generalized_jsd_loss(beta=b, add_tail=True)`": lambda s: _mean_of_kept(
        jsd(*map(with_tail, entries_of(s, "union")))
    ),
    "TRL IW-OPD, beta = 0, `num_items_in_batch=n`": lambda s: (
        (kl(*map(with_tail, entries_of(s, "top"))) * KEPT).sum() / COUNT
    ),
    "TRL server distillation, beta = 0": lambda s: _mean_of_kept(kl(*map(with_tail, entries_of(s, "top")))),
    "TRL async distillation, `beta=b`": trl_async,
    "TRL SDFT, SDPO, `alpha=b, add_tail=False`": lambda s: jsd(*map(normalized, entries_of(s, "of_student", 1))),
    "Model-Optimizer `TopKLogitsKLLoss(T)`": lambda s: kl(*conditional(s)),
    "Model-Optimizer `TopKLogitsKLLoss(T, reverse=True)`": lambda s: kl(*reversed(conditional(s))),
    "ms-swift `gkd_loss(beta=b)`": swift,
    "NeMo-RL `DistillationLossFn`, mixed": _nemo_mixed,
    "NeMo-RL, forward, `zero_outside_topk`": lambda s: (_renormalized(s, "at_1", 1) * MASK).sum() / COUNT,
    "MaxText, tunix `LogitStrategy`": lambda s: T * T * kl(*conditional(s)).mean(),
    "axolotl, `kd_normalize_topk` unset": lambda s: T * T * (_renormalized(s, "top", T) * MASK).sum() / COUNT,
    "DistillKit, `ZERO`": lambda s: T * T * _renormalized(s, "at_1", T, 1 / T).mean(),
    "DistillKit, `SYMMETRIC_UNIFORM`": lambda s: T * T * _ghost(s, "top", T).mean(),
    "Megatron-LM `topk_kl_div(add_ghost_token=True)`": lambda s: _ghost(s, "at_1", 1),
    "VeOmni": lambda s: _mean_of_kept(kl(TEACHERS["at_1"].log_probs, entries_of(s, "at_1", T)[1])),
    "verl `compute_forward_kl_topk`": lambda s: (
        kl(*(x.clamp(min=-10) for x in entries_of(s, "at_1", 1))).clamp(min=0).clamp(-10, 10)
    ),
}
