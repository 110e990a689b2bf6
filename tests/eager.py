"""The usual recipes in plain PyTorch, written with F.kl_div and so on, and how far off careful arithmetic may be."""

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import kd_loss
from kdfast.divergences import resolve_beta

DEFAULTS = {name: setting.default for name, setting in inspect.signature(kd_loss).parameters.items()}


def eager(
    s: Tensor, teachers: list[Tensor], labels: Tensor | None, options: dict[str, Any], kind: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses (...), unweighted; A (...) and A_i (..., V) of judge.py for arithmetic in `kind`, in its eps.

    A sparse teacher's log-probabilities are the only teacher, and its indices are an option.
    """
    o = _resolve(options, kind)
    s, teachers = apply_scales(s, teachers, o)
    alpha = (1.0 if labels is None else 0.9) if o["alpha"] is None else o["alpha"]
    hard = (1.0 - alpha) if o["hard_weight"] is None else o["hard_weight"]
    # ignored rows may have any label: their weight is 0
    index = None if labels is None else labels.clamp(0, s.shape[-1] - 1).unsqueeze(-1)
    capped = apply_softcap(s, o["softcap"])
    nothing = 0 * s[..., 0].nan_to_num(0, 0, 0)  # with a graph
    parts = [[nothing, nothing, torch.zeros_like(s)]]
    if alpha:
        student, *z = soft_logits(capped, teachers, o)
        if o["divergence"] == "logit_mse":
            loss, loss_off, grad_off = _logit_mse(student, weighted_logits(z, o["teacher_weights"]))
        elif "indices" in o:
            from eager_sparse import soft_sparse  # it is made of this file's pieces

            loss, loss_off, grad_off = soft_sparse(student, z[0].z, o)
        else:
            loss, loss_off, grad_off = _soft(student, z, index, o)
        if o["standardize"]:
            grad_off = _off_after_standardize(grad_off, capped)
        parts.append([alpha * x for x in (loss, loss_off, grad_off)])
    if index is not None and hard:
        parts.append([hard * x for x in _hard(capped, index, o)])
    if o["z_loss"]:
        parts.append([o["z_loss"] * x for x in _z_loss(capped, o)])
    loss, loss_off, grad_off = (sum(x) for x in zip(*parts, strict=True))
    if o["softcap"]:
        grad_off = _off_after_softcap(grad_off, s, o["softcap"])
    return loss, loss_off.detach(), o["logit_scale"] * grad_off.detach()


def _resolve(options: dict[str, Any], kind: torch.dtype) -> dict[str, Any]:
    info = torch.finfo(kind)
    divergence, beta = resolve_beta(options["divergence"], options["beta"])
    return options | {"divergence": divergence, "beta": beta, "kind": kind, "smallest": info.tiny / info.eps}


def entropies(
    s: Tensor, teachers: list[Tensor], options: dict[str, Any], kind: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The entropies of q and p, (...), each with its error; without a teacher q's twice."""
    o = _resolve(options, kind)
    s, teachers = apply_scales(s, teachers, o)
    student, *logits = soft_logits(apply_softcap(s, o["softcap"]), teachers, o)
    is_dense = teachers and "indices" not in o
    x, _ = pair(student, logits if is_dense else [student], o if is_dense else o | {"target": "logits"})
    pairs = [x.swapped, x]
    if "indices" in o:
        from eager_sparse import sparse_pair

        pairs[1] = sparse_pair(student, logits[0].z, o)[0]
    found = []
    for each in pairs:
        off = _times(each.p_off, 1 + each.log_p.abs()) + _times(each.p, each.p_more)
        found += [-_times(each.p, each.log_p).sum(-1), off.sum(-1)]
    return tuple(found)  # type: ignore[return-value]


class Logits(NamedTuple):
    """Logits (..., V) and their error in eps, beyond their own rounding: 0 for logits as they are given."""

    z: Tensor
    off: Tensor | float


def apply_scales(s: Tensor, teachers: list[Tensor], o: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The logits times their scales, which are part of 1 / T and of 1 / cap and add no rounding of their own."""
    k, teacher_k = o["logit_scale"], o["teacher_logit_scale"]
    return (s if k == 1 else k * s), (teachers if teacher_k == 1 else [teacher_k * t for t in teachers])


def apply_softcap(z: Tensor, cap: float | None) -> Logits:
    """cap * tanh(z / cap); tanh may be off by 3 eps, and each of two roundings by half an eps."""
    if not cap:
        return Logits(z, 0.0)
    capped = cap * torch.tanh(z / cap)
    return Logits(capped.masked_fill(z == -torch.inf, -torch.inf), 4 * capped.detach().abs())


def soft_logits(student: Logits, teachers: list[Tensor], o: dict[str, Any]) -> list[Logits]:
    """The logits of the student, capped before, and of the teachers, as the soft term has them."""
    capped = [student, *(apply_softcap(t, o["teacher_softcap"]) for t in teachers)]
    return [standardize(x) for x in capped] if o["standardize"] else capped


def _off_after_softcap(grad_off: Tensor, s: Tensor, cap: float) -> Tensor:
    """A_i times 1 - tanh^2; this factor is off by an eps and by 2 tanh times tanh's 4, times a term: A_i / 8."""
    squared = torch.tanh(s.detach() / cap).square()
    return grad_off * (1 - squared + (1 + 8 * squared) / 8)


def _deviation(x: Logits) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z - mean and its error; 1e-7 + deviation and its relative error."""
    z = x.z.detach()
    mean, size = z.mean(-1, True), z.abs()
    deviation = 1e-7 + z.std(-1, correction=min(1, z.shape[-1] - 1), keepdim=True)
    off = x.off + size + 4 * size.mean(-1, True)  # z itself, and the mean as a sum
    off = off + (x.off.mean(-1, True) if isinstance(x.off, Tensor) else 0)
    return z - mean, off, deviation, 4 + off.square().mean(-1, True).sqrt() / deviation


def standardize(x: Logits) -> Logits:
    std = x.z.std(-1, correction=min(1, x.z.shape[-1] - 1), keepdim=True)
    z = (x.z - x.z.mean(-1, keepdim=True)) / (1e-7 + std)
    _, off, deviation, deviation_off = _deviation(x)
    return Logits(z, off / deviation + z.detach().abs() * deviation_off)


def _off_after_standardize(grad_off: Tensor, x: Logits) -> Tensor:
    """A_i of g, for (g_i - mean g - z_i sum_j g_j z_j / (V - 1)) / deviation, whose terms are A_i / 8."""
    centred, _, deviation, deviation_off = _deviation(x)
    z, off = (centred / deviation).abs(), standardize(x).off
    mean, degrees = grad_off.mean(-1, True), max(1, z.shape[-1] - 1)
    along = (grad_off * z).sum(-1, True) / degrees
    along_off = 2 * along + (grad_off * off).sum(-1, True) / degrees / 8
    size = grad_off + mean + z * along
    return (grad_off + mean + z * along_off + off * along / 8 + deviation_off * size / 8) / deviation


def _soft(
    student: Logits, teachers: list[Logits], index: Tensor | None, o: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    x, T = pair(student, teachers, o)
    if o["divergence"] == "dkd":
        t = x.log_p
        if o["target"] == "logits" and (len(teachers) == 1 or o["ensemble"] == "geometric"):
            t = weighted_logits(teachers, o["teacher_weights"]).z / temperatures(student.z, o)[1]
        loss, loss_off, grad_off = _dkd(x, student.z / T, t, index)  # type: ignore[arg-type]
    else:
        phi, phi_off, psi_size, psi_off = terms_of(x)
        loss, loss_off = phi.sum(-1, True), phi_off.sum(-1, True)
        grad_off = psi_off + x.q_off * psi_size.sum(-1, True)
    factor = T * T if o["t_squared"] else torch.ones_like(T)
    return (factor * loss).squeeze(-1), (factor * loss_off).squeeze(-1), factor / T * grad_off


def pair(student: Logits, teachers: list[Logits], o: dict[str, Any]) -> tuple["Pair", Tensor]:
    """The pair that a divergence compares, and T."""
    T, at = temperatures(student.z, o)
    p, log_p, p_shift = mixture(teachers, at, o)
    log_q = F.log_softmax(student.z / T, -1)
    return Pair(p, log_q.exp(), log_p, log_q, p_shift, student.off / T, o), T


class Pair:
    """What a divergence compares, each (..., V), and the errors of the logits of p and q, in eps."""

    def __init__(
        self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, p_shift: Tensor, q_shift: Tensor, o: dict[str, Any]
    ) -> None:
        self.p, self.q, self.log_p, self.log_q, self.p_shift, self.q_shift = p, q, log_p, log_q, p_shift, q_shift
        self.options, self.beta = o, o["beta"]
        # the errors of log p and log q that follow, and those of p and q
        self.p_more, self.q_more = (shift + mean(x, shift) for x, shift in ((p, p_shift), (q, q_shift)))
        self.p_off, self.q_off = _probability_off(p, log_p, o, self.p_more), _probability_off(q, log_q, o, self.q_more)
        self.logs = 1 + log_q.abs() + log_p.abs()  # the size of a term with both logarithms
        self.logs_off = self.logs + self.p_more + self.q_more  # the error of their difference

    @property
    def swapped(self) -> "Pair":
        return Pair(self.q, self.p, self.log_q, self.log_p, self.q_shift, self.p_shift, self.options)


# phi, its error, the size of psi's terms, psi's error
Terms = tuple[Tensor, Tensor, Tensor, Tensor]


def _cross_entropy(x: Pair) -> Terms:
    off = _times(x.p_off, 1 + x.log_q.abs()) + _times(x.p, x.q_more)
    return -(x.p * x.log_q), off, x.p, x.p_off


def _kl(x: Pair) -> Terms:
    off = _times(x.p_off, 1 + (x.log_p - x.log_q).abs()) + _times(x.p, x.logs_off)
    return F.kl_div(x.log_q, x.p, reduction="none"), off, x.p, x.p_off


def _reverse_kl(x: Pair) -> Terms:
    loss = F.kl_div(x.log_p, x.log_q, reduction="none", log_target=True)
    off = _times(x.q_off, 1 + (x.log_q - x.log_p).abs()) + _times(x.q, x.logs_off)
    return loss, off, _times(x.q, x.logs), _times(x.q_off, x.logs) + _times(x.q, x.p_more)


def _symmetric_kl(x: Pair) -> Terms:
    return tuple(x.beta * a + (1 - x.beta) * b for a, b in zip(_kl(x), _reverse_kl(x), strict=True))  # type: ignore


def _to_mixture(x: Pair, share: float) -> Terms:
    """p log(p / m) with m = share * p + (1 - share) * q; psi as if it were p's."""
    m = share * x.p + (1 - share) * x.q
    log_m = torch.where(m == 0, 1, m).log()
    ratio, logs = torch.where(x.p == 0, 0, x.log_p - log_m), 1 + x.log_p.abs() + log_m.abs()
    more = x.p_more + torch.maximum(x.p_more, x.q_more)  # log p's, and log m's
    off = _times(x.p_off, 1 + ratio.abs()) + _times(x.p, logs + more)
    return x.p * ratio, off, _times(x.p, logs), _times(x.p_off, logs) + _times(x.p, more)


def _jsd(x: Pair) -> Terms:
    p_part, q_part = _to_mixture(x, x.beta), _to_mixture(x.swapped, 1 - x.beta)
    loss, off = (x.beta * a + (1 - x.beta) * b for a, b in zip(p_part[:2], q_part[:2], strict=True))
    return loss, off, (1 - x.beta) * q_part[2], (1 - x.beta) * q_part[3]


def _skew_forward_kl(x: Pair) -> Terms:
    m = x.beta * x.p + (1 - x.beta) * x.q
    m = torch.where(m == 0, 1, m)
    psi_off = 2 * (1 - x.beta) * (x.p_off * (x.q / m) + x.q_off * (x.p / m))  # twice: m has an error too
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
    off = _times(root, 8 + x.log_p.abs() + x.log_q.abs() + x.p_more + x.q_more) / 2
    off = off + info.tiny**0.5 / info.eps * (x.p.sqrt() + x.q.sqrt())  # where p or q is near the smallest number
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


def terms_of(x: Pair) -> Terms:
    return _DIVERGENCES[x.options["divergence"]](x)


def _dkd(x: Pair, s: Tensor, t: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As mdistiller writes it, but masked by -inf, not by -1000: loss and A, (..., 1), and A_i for gradients in s."""
    is_label = torch.zeros_like(x.p, dtype=torch.bool).scatter(-1, index, True)
    p, q = (torch.cat([y.gather(-1, index), y.masked_fill(is_label, 0).sum(-1, True)], -1) for y in (x.p, x.q))
    logs = [F.log_softmax(y.masked_fill(is_label, -torch.inf), -1) for y in (t, s)]
    among = Pair(logs[0].exp(), logs[1].exp(), *logs, x.p_shift, x.q_shift, x.options)
    p_shift, q_shift = (
        torch.cat([a.expand(b.shape).gather(-1, index), mean(b, a)], -1)
        for a, b in ((x.p_shift, among.p), (x.q_shift, among.q))
    )
    binary = Pair(p, q, p.log(), q.log(), p_shift, q_shift, x.options)
    w, v = x.options["dkd_weights"]
    others = F.kl_div(among.log_q.masked_fill(is_label, 0), among.p, reduction="none").sum(-1, True)
    loss = w * F.kl_div(binary.log_q, p, reduction="none").sum(-1, True) + v * others
    off = w * _kl(binary)[1].sum(-1, True) + v * _kl(among)[1].sum(-1, True)
    # w (q_y - p_y) at y; at the others v (q_i - p_i) - w (q_y - p_y) q_i, with p_i and q_i those among them, where
    # q_y - p_y may be that of the rest
    gap_off = binary.p_off + binary.q_off
    others_off = w * (gap_off.sum(-1, True) * among.q + 2 * among.q_off)
    others_off = others_off + v * (among.p_off + among.q_off)
    return loss, off, torch.where(is_label, w * gap_off[..., :1], others_off)


def _hard_softmax(s: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """log q1, q1, and the error of the mean logit under q1 that the logits' errors make."""
    log_q = F.log_softmax(s.z, -1)
    q = log_q.detach().exp()
    return log_q, q, mean(q, s.off)


def _hard(s: Logits, index: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    e = o["label_smoothing"]
    log_q, q, mean_off = _hard_softmax(s)
    loss = -log_q.gather(-1, index)
    if e:
        loss = (1 - e) * loss - e * log_q.mean(-1, True)
    target = torch.zeros_like(q).scatter(-1, index, 1 - e) + e / q.shape[-1]
    more = s.off + mean_off
    loss_off = 8 + loss + (target * more).sum(-1, True)
    return loss.squeeze(-1), loss_off.squeeze(-1), _probability_off(q, log_q, o, more) + 8 * target


def _z_loss(s: Logits, o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """logsumexp(s)^2, whose gradient is 2 logsumexp(s) q1."""
    log_q, q, mean_off = _hard_softmax(s)
    z = torch.logsumexp(s.z, -1, True)
    z_off = 8 + z.abs() + s.z.amax(-1, True).abs() + mean_off  # log of a sum, and the maximum
    loss_off = z_off * 2 * z.abs() + z.square()
    grad_off = 2 * (z_off * q + z.abs() * _probability_off(q, log_q, o, s.off + mean_off))
    return z.square().squeeze(-1), loss_off.squeeze(-1), grad_off


def _logit_mse(s: Logits, t: Logits) -> tuple[Tensor, Tensor, Tensor]:
    difference = (s.z - s.z.mean(-1, True)) - (t.z - t.z.mean(-1, True))
    size = 8 * (s.z.abs() + t.z.abs() + (s.z.abs() + t.z.abs()).mean(-1, True))
    off = s.off + t.off
    size = size + off + (off.mean(-1, True) if isinstance(off, Tensor) else 0)
    return difference.square().mean(-1) / 2, (size * difference.abs()).mean(-1), size / s.z.shape[-1]


def _probability_off(p: Tensor, log_p: Tensor, o: dict[str, Any], more: Tensor | float) -> Tensor:
    """The error of a probability; one below the smallest normal number may be 0."""
    return _times(p, 8 + log_p.abs() + more) + o["smallest"]


def _times(p: Tensor, log: Tensor | float) -> Tensor:
    """p * log, and 0 where p is 0."""
    return (p * log).nan_to_num(0, 0)


def mean(p: Tensor, x: Tensor | float) -> Tensor:
    """The mean of x under p, (..., 1)."""
    return _times(p, x).sum(-1, True)


def temperatures(s: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """T and the teacher's, 0-dim or as columns (..., 1)."""
    at = o["temperature"] if o["teacher_temperature"] is None else o["teacher_temperature"]
    values = (o["temperature"], at)
    T, at = (v.to(s.dtype).unsqueeze(-1) if isinstance(v, Tensor) else s.new_tensor(v) for v in values)
    return T, at


def weightedmean(tensors: list[Tensor], weights: list[float] | None) -> Tensor:
    weights = weights or [1.0] * len(tensors)
    return sum((w / sum(weights) * x for w, x in zip(weights, tensors, strict=True)), torch.zeros_like(tensors[0]))


def weighted_logits(teachers: list[Logits], weights: list[float] | None) -> Logits:
    return Logits(weightedmean([t.z for t in teachers], weights), _largest_off(teachers))


def _largest_off(logits: list[Logits]) -> Tensor | float:
    offs = [x.off for x in logits]
    return torch.stack(offs).amax(0) if isinstance(offs[0], Tensor) else 0.0


def mixture(teachers: list[Logits], at: Tensor, o: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """p and log p, (..., V), of one teacher or several, and the largest error of their logits."""
    if o["target"] == "logits":
        logs = [F.log_softmax(t.z / at, -1) for t in teachers]
    else:
        logs = [t.z.log() if o["target"] == "probs" else t.z for t in teachers]
    shift = _largest_off(teachers) / at
    if len(teachers) == 1:
        return (teachers[0].z if o["target"] == "probs" else logs[0].exp()), logs[0], shift
    if o["ensemble"] == "geometric":
        log_p = F.log_softmax(weightedmean(logs, o["teacher_weights"]), -1)
        # K weights, K products and K - 1 additions, half an eps each, of terms that may be larger than log p
        size = weightedmean([x.detach().abs() for x in logs], o["teacher_weights"])
        return log_p.exp(), log_p, shift + (len(logs) + 1) / 2 * size
    p = weightedmean([x.exp() for x in logs], o["teacher_weights"])
    return p, p.log(), shift


def largest_z(s: Tensor, teachers: list[Tensor], o: dict[str, Any]) -> Tensor:
    """The largest |z| of each row, (..., 1), of student and teachers, where the probability is not 0; at least 1."""
    T, at = temperatures(s.double(), o)
    s, teachers = apply_scales(s.double(), [t.double() for t in teachers], o)
    capped = apply_softcap(s, o["softcap"])
    student, *logits = soft_logits(capped, teachers, o)
    zs = [capped.z]  # the hard term's and z-loss's
    if o["divergence"] == "logit_mse":
        zs.append(torch.ones_like(s))
    else:
        zs.append(student.z / T)
        zs += [t.z / at for t in logits] if o["target"] == "logits" else []
    sizes = [torch.where(F.softmax(z, -1) > 0, z.abs(), 1).amax(-1, True) for z in zs]
    return torch.stack(sizes).amax(0)
