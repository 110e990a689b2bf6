"""The usual recipes in plain PyTorch, written from F.kl_div and its like, and how far off careful arithmetic may be."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "teacher_temperature": None,
    "alpha": None,
    "hard_weight": None,
    "divergence": "cross_entropy",
    "beta": None,
    "target": "logits",
    "t_squared": True,
    "teacher_weights": None,
    "ensemble": "arithmetic",
}


def eager(
    s: Tensor, teachers: list[Tensor], labels: Tensor | None, options: dict[str, Any], kind: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses (...), unweighted; A (...) and A_i (..., V) of judge.py for arithmetic in `kind`, in its eps."""
    o = options | {"smallest": torch.finfo(kind).tiny / torch.finfo(kind).eps, "kind": kind}
    alpha = (1.0 if labels is None else 0.9) if o["alpha"] is None else o["alpha"]
    hard = (1.0 - alpha) if o["hard_weight"] is None else o["hard_weight"]
    parts = []
    if alpha and o["divergence"] == "logit_mse":
        parts.append([alpha * x for x in _logit_mse(s, weighted_mean(teachers, o["teacher_weights"]))])
    elif alpha:
        parts.append([alpha * x for x in _soft(s, teachers, o)])
    if labels is not None and hard:
        parts.append([hard * x for x in _hard(s, labels, o)])
    parts = parts or [[0 * s[..., 0], 0 * s[..., 0], 0 * s]]
    loss, loss_off, grad_off = (sum(x) for x in zip(*parts, strict=True))
    return loss, loss_off.detach(), grad_off.detach()


def _soft(s: Tensor, teachers: list[Tensor], o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    T, at = temperatures(s, o)
    p, log_p = mixture(teachers, at, o)
    log_q = F.log_softmax(s / T, -1)
    q = log_q.exp()
    p_off, q_off = _off(p, log_p, o), _off(q, log_q, o)
    phi, phi_off, psi_size, psi_off = _DIVERGENCES[o["divergence"]](Pair(p, q, log_p, log_q, p_off, q_off, o))
    loss, loss_off = phi.sum(-1, True), phi_off.sum(-1, True)
    grad_off = psi_off + q_off * psi_size.sum(-1, True)
    factor = T * T if o["t_squared"] else torch.ones_like(T)
    return (factor * loss).squeeze(-1), (factor * loss_off).squeeze(-1), factor / T * grad_off


class Pair(NamedTuple):
    """What a divergence is over, each (..., V), and what p and q may be off by, in eps."""

    p: Tensor
    q: Tensor
    log_p: Tensor
    log_q: Tensor
    p_off: Tensor
    q_off: Tensor
    options: dict[str, Any]

    @property
    def beta(self) -> float:
        default = 0.1 if self.options["divergence"].startswith("skew") else 0.5
        return default if self.options["beta"] is None else self.options["beta"]

    @property
    def swapped(self) -> "Pair":
        return Pair(self.q, self.p, self.log_q, self.log_p, self.q_off, self.p_off, self.options)


Terms = tuple[
    Tensor, Tensor, Tensor, Tensor
]  # phi, what it may be off by, the size of psi's terms, and what psi may be


def _cross_entropy(x: Pair) -> Terms:
    return -(x.p * x.log_q), _sized(x.p_off, 1 + x.log_q.abs()), x.p, x.p_off


def _kl(x: Pair) -> Terms:
    off = _sized(x.p_off, 1 + (x.log_p - x.log_q).abs()) + _sized(x.p, 1 + x.log_q.abs() + x.log_p.abs())
    return F.kl_div(x.log_q, x.p, reduction="none"), off, x.p, x.p_off


def _reverse_kl(x: Pair) -> Terms:
    loss = F.kl_div(x.log_p, x.log_q, reduction="none", log_target=True)
    logs = 1 + x.log_q.abs() + x.log_p.abs()
    off = _sized(x.q_off, 1 + (x.log_q - x.log_p).abs()) + _sized(x.q, logs)
    return loss, off, _sized(x.q, logs), _sized(x.q_off, logs)


def _symmetric_kl(x: Pair) -> Terms:
    return tuple(x.beta * a + (1 - x.beta) * b for a, b in zip(_kl(x), _reverse_kl(x), strict=True))  # type: ignore


def _to_mixture(x: Pair, share: float) -> Terms:
    """p log(p / m) with m = share * p + (1 - share) * q; psi as if it were p's."""
    m = share * x.p + (1 - share) * x.q
    log_m = torch.where(m == 0, 1, m).log()
    ratio, logs = torch.where(x.p == 0, 0, x.log_p - log_m), 1 + x.log_p.abs() + log_m.abs()
    off = _sized(x.p_off, 1 + ratio.abs()) + _sized(x.p, logs)
    return x.p * ratio, off, _sized(x.p, logs), _sized(x.p_off, logs)


def _jsd(x: Pair) -> Terms:
    p_part, q_part = _to_mixture(x, x.beta), _to_mixture(x.swapped, 1 - x.beta)
    loss, off = (x.beta * a + (1 - x.beta) * b for a, b in zip(p_part[:2], q_part[:2], strict=True))
    return loss, off, (1 - x.beta) * q_part[2], (1 - x.beta) * q_part[3]


def _skew_forward_kl(x: Pair) -> Terms:
    m = x.beta * x.p + (1 - x.beta) * x.q
    m = torch.where(m == 0, 1, m)
    psi_off = 2 * (1 - x.beta) * (x.p_off * (x.q / m) + x.q_off * (x.p / m))  # twice: m is off as well
    return *_to_mixture(x, x.beta)[:2], psi_off / 8, psi_off


def _skew_reverse_kl(x: Pair) -> Terms:
    loss, off, size, psi_off = _to_mixture(x.swapped, x.beta)
    return loss, off, size + 2 * x.q, psi_off + 2 * x.q_off


def _tvd(x: Pair) -> Terms:
    eps = torch.finfo(x.options["kind"]).eps
    open_sign = (x.p - x.q).abs() <= eps * (x.p_off + x.q_off)
    psi_off = x.q_off / 2 + torch.where(open_sign, x.q / eps, 0)
    return (x.p - x.q).abs() / 2, (x.p_off + x.q_off) / 2, psi_off / 8, psi_off


def _hellinger(x: Pair) -> Terms:
    root = ((x.log_p + x.log_q) / 2).exp()
    info = torch.finfo(x.options["kind"])
    off = _sized(root, 8 + x.log_p.abs() + x.log_q.abs()) / 2
    off = off + info.tiny**0.5 / info.eps * (x.p.sqrt() + x.q.sqrt())  # where p or q is of the smallest
    return x.q.detach() - root, off + x.q_off, off / 8, off


_DIVERGENCES = {
    "cross_entropy": _cross_entropy,
    "forward_kl": _kl,
    "reverse_kl": _reverse_kl,
    "symmetric_kl": _symmetric_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
    "hellinger": _hellinger,
}


def _hard(s: Tensor, labels: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    index = labels.clamp(0, s.shape[-1] - 1).unsqueeze(-1)  # of ignored rows any: their weight is 0
    log_q = F.log_softmax(s, -1)
    loss = -log_q.gather(-1, index).squeeze(-1)
    return loss, 8 + loss, _off(log_q.exp(), log_q, o).scatter_add(-1, index, torch.full_like(loss, 8).unsqueeze(-1))


def _logit_mse(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    difference = (s - s.mean(-1, True)) - (t - t.mean(-1, True))
    size = 8 * (s.abs() + t.abs() + (s.abs() + t.abs()).mean(-1, True))
    return difference.square().mean(-1) / 2, (size * difference.abs()).mean(-1), size / s.shape[-1]


def _off(p: Tensor, log_p: Tensor, o: dict[str, Any]) -> Tensor:
    """What a probability may be off by; one below the smallest normal number may be 0."""
    return _sized(p, 8 + log_p.abs()) + o["smallest"]


def _sized(p: Tensor, log: Tensor) -> Tensor:
    """p * log, and 0 where p is 0."""
    return (p * log).nan_to_num(0, 0)


def temperatures(s: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """T and the teacher's, 0-dim or as columns (..., 1)."""
    at = o["temperature"] if o["teacher_temperature"] is None else o["teacher_temperature"]
    values = (o["temperature"], at)
    T, at = (v.to(s.dtype).unsqueeze(-1) if isinstance(v, Tensor) else s.new_tensor(v) for v in values)
    return T, at


def weighted_mean(tensors: list[Tensor], weights: list[float] | None) -> Tensor:
    weights = weights or [1.0] * len(tensors)
    return sum((w / sum(weights) * x for w, x in zip(weights, tensors, strict=True)), torch.zeros_like(tensors[0]))


def mixture(teachers: list[Tensor], at: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """p and log p, (..., V), of one teacher or several."""
    if o["target"] == "logits":
        logs = [F.log_softmax(t / at, -1) for t in teachers]
    else:
        logs = [t.log() if o["target"] == "probs" else t for t in teachers]
    if len(teachers) == 1:
        return (teachers[0] if o["target"] == "probs" else logs[0].exp()), logs[0]
    if o["ensemble"] == "geometric":
        log_p = F.log_softmax(weighted_mean(logs, o["teacher_weights"]), -1)
        return log_p.exp(), log_p
    p = weighted_mean([x.exp() for x in logs], o["teacher_weights"])
    return p, p.log()


def largest_z(s: Tensor, teachers: list[Tensor], o: dict[str, Any]) -> Tensor:
    """The largest |z| of each row, (..., 1), of student and teachers, where the probability is not 0; at least 1."""
    if o["divergence"] == "logit_mse":
        return torch.ones_like(s[..., :1])
    T, at = temperatures(s.double(), o)
    zs = [s.double(), s.double() / T]
    zs += [t.double() / at for t in teachers] if o["target"] == "logits" else []
    return torch.stack([torch.where(F.softmax(z, -1) > 0, z.abs(), 1).amax(-1, True) for z in zs]).amax(0)
