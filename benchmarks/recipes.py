"""The peers' losses: the usual recipe, each divergence by its formula, and those of other libraries."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA = 0.9


def recipe(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Six lines of PyTorch. The gradient is kd_loss's, the value less by the teacher's entropy."""
    log_q = F.log_softmax(student / temperature, dim=-1)
    p = F.softmax(teacher / temperature, dim=-1)
    soft = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
    hard = F.cross_entropy(student, labels)
    return ALPHA * soft + (1 - ALPHA) * hard


def soft_terms(divergence: str, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """T^2 * D of each row by its formula, at the default beta."""
    if divergence == "logit_mse":
        difference = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
        return difference.square().mean(-1) / 2
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    p, q = log_p.exp(), log_q.exp()

    def kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        return (a * (log_a - log_b)).sum(-1)

    beta = 0.1 if divergence.startswith("skew") else 0.5
    terms: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": lambda: -(p * log_q).sum(-1),
        "forward_kl": lambda: kl(p, log_p, log_q),
        "reverse_kl": lambda: kl(q, log_q, log_p),
        "symmetric_kl": lambda: beta * kl(p, log_p, log_q) + (1 - beta) * kl(q, log_q, log_p),
        "jsd": lambda: _jsd(p, q, log_p, log_q, (beta * p + (1 - beta) * q).log(), beta),
        "skew_forward_kl": lambda: kl(p, log_p, (beta * p + (1 - beta) * q).log()),
        "skew_reverse_kl": lambda: kl(q, log_q, (beta * q + (1 - beta) * p).log()),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
        "hellinger": lambda: 1 - ((log_p + log_q) / 2).exp().sum(-1),
        "dkd": lambda: _dkd(student / temperature, teacher / temperature, labels),
    }
    return temperature**2 * terms[divergence]()


def _dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Decoupled KD with its published weights, as its authors wrote it: a softmax with the label masked."""
    label = F.one_hot(labels, student.shape[-1]).bool()
    parts = []
    for z in (student, teacher):
        p = (F.softmax(z, dim=-1) * label).sum(-1)
        parts.append((torch.stack([p, 1 - p], -1), F.log_softmax(z - 1000.0 * label, dim=-1)))
    (binary_q, log_q), (binary_p, log_p) = parts
    target = F.kl_div(binary_q.log(), binary_p, reduction="none").sum(-1)
    return target + 8.0 * F.kl_div(log_q, log_p.exp(), reduction="none").sum(-1)


def _jsd(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, log_m: Tensor, beta: float) -> Tensor:
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)


def trl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """generalized_jsd_loss (1.16) for beta = 0, which is forward KL, of the rows whose label is not -100."""
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    kept = labels != -100
    return terms[kept].sum() / kept.sum()


def family_recipe(divergence: str) -> Callable[..., Tensor]:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        soft = soft_terms(divergence, student, teacher, labels, temperature).mean()
        return ALPHA * soft + (1 - ALPHA) * F.cross_entropy(student, labels)

    return loss


def recipe_in_fp32(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return recipe(student.float(), teacher.float(), labels, temperature)


def liger_chunk(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, rows: int) -> Tensor:
    """LigerFusedLinearJSDLoss (0.8.5) without the head, for beta = 0, which is forward KL."""
    log_q1 = F.log_softmax(student.float(), dim=-1)
    hard = F.nll_loss(log_q1, labels, reduction="sum")
    log_q = F.log_softmax(student / temperature, dim=-1)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    soft = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1).sum()
    return (ALPHA * soft + (1 - ALPHA) * hard) / rows


def liger_divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The recipe with Liger-Kernel's divergence, in Triton: softmaxes and hard term stay PyTorch's."""
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    log_q = F.log_softmax(student / temperature, dim=-1)
    p = F.softmax(teacher / temperature, dim=-1)
    soft = LigerKLDIVLoss(reduction="batchmean")(log_q, p) * temperature**2
    return ALPHA * soft + (1 - ALPHA) * F.cross_entropy(student, labels)
