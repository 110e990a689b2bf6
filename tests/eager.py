"""The usual recipes in plain PyTorch, written from F.kl_div and its like, and how far off careful arithmetic may be."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "teacher_temperature": None,
    "alpha": None,
    "hard_weight": None,
    "divergence": "cross_entropy",
    "target": "logits",
    "t_squared": True,
    "teacher_weights": None,
    "ensemble": "arithmetic",
}


def eager(
    s: Tensor, teachers: list[Tensor], labels: Tensor | None, options: dict[str, Any], kind: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses (...), unweighted; A (...) and A_i (..., V) of judge.py for arithmetic in `kind`, in its eps."""
    o = options | {"smallest": torch.finfo(kind).tiny / torch.finfo(kind).eps}
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
    if o["divergence"] == "reverse_kl":  # psi = q * (log q - log p + 1)
        loss = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1, True)
        logs = 1 + log_q.abs() + log_p.abs()
        grad_off = _sized(q_off, logs) + q_off * _sized(q, logs).sum(-1, True)
        loss_off = _sized(q_off, 1 + (log_q - log_p).abs()) + _sized(q, logs)
    else:
        grad_off = p_off + q_off * p.sum(-1, True)
        if o["divergence"] == "forward_kl":
            loss = F.kl_div(log_q, p, reduction="none").sum(-1, True)
            loss_off = _sized(p_off, 1 + (log_p - log_q).abs()) + _sized(p, 1 + log_q.abs() + log_p.abs())
        else:
            loss = -(p * log_q).sum(-1, True)
            loss_off = _sized(p_off, 1 + log_q.abs())
    loss_off = loss_off.sum(-1, True)
    factor = T * T if o["t_squared"] else torch.ones_like(T)
    return (factor * loss).squeeze(-1), (factor * loss_off).squeeze(-1), factor / T * grad_off


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
