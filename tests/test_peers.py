"""docs/migrating.md's tables of other libraries' losses: kdfast has their loss and gradient, in fp64."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import F64, batch
from torch import Tensor

from kdfast import kd_loss, linear_kd_loss

PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"

V, N = 11, 6
S, T, Y = batch(N, V, F64)
Y[2] = -100  # a masked token
KEPT = Y != -100
HARD = Y.clamp_min(0)  # for libraries that mask none
# The table's numbers, by their names there; no two are equal.
TAU, A, B, H, R, E, C, Z, LAM, COUNT = 3.0, 0.6, 0.8, 0.75, 0.3, 0.1, 2.5, 1e-2, 0.2, 40
MASK = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=F64)
DECAY = torch.tensor([1.0, 0.8, 0.7, 0.64, 0.5, 0.4], dtype=F64)
P = torch.softmax(T / TAU, -1)
NAMES = {"T": TAU, "a": A, "b": B, "h": H, "r": R, "e": E, "c": C, "z": Z, "lam": LAM, "n": COUNT}
NAMES |= {"t": T, "p": P, "mask": MASK, "decay": DECAY, "kd_loss": kd_loss}


@functools.cache
def table(heading: str = "# From other libraries") -> dict[str, tuple[str, str]]:
    """The rows below a heading: the other library's loss, our arguments after the student's, and the note."""
    section = PAGE.read_text().split(f"{heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {there.strip(): (here.strip(" `"), "".join(note).strip()) for there, here, *note in lines[1:]}


def _kl_div(s: Tensor, t: Tensor = T, tau: float = TAU, reduction: str = "batchmean") -> Tensor:
    return F.kl_div(F.log_softmax(s / tau, -1), F.softmax(t / tau, -1), reduction=reduction)


def _soft(s: Tensor) -> Tensor:
    return TAU**2 * _kl_div(s)


def _kept(x: Tensor) -> Tensor:
    """The sum of terms (rows, V) over the kept rows, divided by their number."""
    return (x.sum(-1) * KEPT).sum() / KEPT.sum()


def _generalized_jsd(s: Tensor, t: Tensor = T, beta: float = B) -> Tensor:
    """TRL's and Liger's terms: the mixture is a logsumexp."""
    q, p = F.log_softmax(s / TAU, -1), F.log_softmax(t / TAU, -1)
    m = torch.logsumexp(torch.stack([q + math.log(1 - beta), p + math.log(beta)]), 0)
    to_teacher = F.kl_div(m, p, reduction="none", log_target=True)
    to_student = F.kl_div(m, q, reduction="none", log_target=True)
    return beta * to_teacher + (1 - beta) * to_student


def _capped(z: Tensor) -> Tensor:
    return C * torch.tanh(z / C)


def _liger_cross_entropy(s: Tensor) -> Tensor:
    """lse_square_scale multiplies the smoothed loss's own logsumexp, in the mean over the kept rows."""
    z = _capped(s)
    lse = torch.logsumexp(z, -1)
    target = z.gather(-1, HARD.unsqueeze(-1)).squeeze(-1)
    smooth = (-E / V * z).sum(-1) + E * lse
    return (((lse - target) * (1 - E) + smooth + Z * lse * lse) * KEPT).sum() / KEPT.sum()


def _tvd(s: Tensor, tau: float = 1.0) -> Tensor:
    return 0.5 * (F.softmax(s / tau, -1) - F.softmax(T / tau, -1)).abs()


def _forward(s: Tensor) -> Tensor:
    """ForwardKLLoss, and DistiLLM's and MiniLLM's: without the teacher's entropy."""
    return -_kept(F.softmax(T, -1) * F.log_softmax(s, -1))


def _reverse(s: Tensor) -> Tensor:
    return -_kept(F.softmax(s, -1) * (F.log_softmax(T, -1) - F.log_softmax(s, -1)))


def _standardized(z: Tensor) -> Tensor:
    return (z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True))


def _dkd(s: Tensor) -> Tensor:
    """mdistiller's dkd_loss: label against rest, then softmaxes without the label, masked by -1000."""
    label = F.one_hot(HARD, V).bool()

    def two(z: Tensor) -> Tensor:
        p = F.softmax(z / TAU, -1)
        return torch.stack([(p * label).sum(-1), (p * ~label).sum(-1)], -1)

    def rest(z: Tensor) -> Tensor:
        return z / TAU - 1000.0 * label

    target = F.kl_div(two(s).log(), two(T), reduction="sum") * TAU**2 / N
    return A * target + B * TAU**2 * _kl_div(rest(s), rest(T), tau=1)


def _js_distance(s: Tensor) -> Tensor:
    """DistiLLM's, whose lam is the student's weight."""
    q, p = F.softmax(s, -1), F.softmax(T, -1)
    m = (LAM * q + (1 - LAM) * p).log()
    return _kept(LAM * q * (q.log() - m) + (1 - LAM) * p * (p.log() - m))


def _skewed_forward(s: Tensor) -> Tensor:
    """DistiLLM's, without the teacher's entropy."""
    p = F.softmax(T, -1)
    return -_kept(p * (LAM * p + (1 - LAM) * F.softmax(s, -1)).log())


def _skewed_reverse(s: Tensor) -> Tensor:
    """DistiLLM's."""
    q = F.softmax(s, -1)
    return -_kept(q * ((1 - LAM) * F.softmax(T, -1) + LAM * q).log() - q * q.log())


def _automodel(s: Tensor) -> Tensor:
    soft = TAU**2 * _kl_div(s[KEPT], T[KEPT], reduction="sum") / COUNT
    return R * soft + (1 - R) * F.cross_entropy(s, Y, reduction="sum") / COUNT


def _fast_llm(s: Tensor) -> Tensor:
    """Only the teacher is divided by the temperature; the mask does not change the divisor."""
    x = F.kl_div(F.log_softmax(s, -1), F.log_softmax(T / TAU, -1), reduction="none", log_target=True).sum(-1)
    return (x * MASK).sum() / N


# By the first column of the table: losses that keep all rows, with y = HARD; losses that drop ignored rows; losses
# of a single row; and losses from hidden states.
Formulas = dict[str, Callable[[Tensor], Tensor]]
OF_ALL_ROWS: Formulas = {
    '`F.kl_div(q.log(), p, reduction="batchmean") * T**2`': _soft,
    '`F.kl_div(q.log(), p, reduction="sum")`': lambda s: _kl_div(s, reduction="sum"),
    '`F.kl_div(q.log(), p, reduction="mean")`': lambda s: _kl_div(s, reduction="mean"),
    "the textbook, Hugging Face's image guide, PyTorch's tutorial: `a * T**2 * kl_div + (1 - a) * cross_entropy`": (
        lambda s: A * _soft(s) + (1 - A) * F.cross_entropy(s, HARD)
    ),
    "a mean over a mask: `(kl * mask).sum() / mask.sum()`": lambda s: (
        (_kl_div(s, reduction="none").sum(-1) * MASK).sum() / MASK.sum()
    ),
    "a mean over all rows: `(kl * mask).mean()`": lambda s: (_kl_div(s, reduction="none").sum(-1) * MASK).mean(),
    "`F.cross_entropy(s, p)`": lambda s: F.cross_entropy(s, P),
    "`F.mse_loss` of centred logits, halved": lambda s: F.mse_loss(s - s.mean(-1, True), T - T.mean(-1, True)) / 2,
    "timm `LogitDistillationTask(task_loss_weight=a, distill_loss_weight=b)`": lambda s: (
        A * F.cross_entropy(s, HARD) + B * _soft(s)
    ),
    'DeiT `DistillationLoss("soft", alpha=a, tau=T)`': lambda s: (
        (1 - A) * F.cross_entropy(s, HARD) + A * TAU * TAU * _kl_div(s, reduction="sum") / s.numel()
    ),
    "TRL `generalized_jsd_loss` without labels": lambda s: _generalized_jsd(s).sum() / len(s),
    "TRL `DistillationTrainer(beta=b)`, `completion_mask=mask`": lambda s: (
        (_generalized_jsd(s).sum(-1) * MASK).sum() / MASK.sum()
    ),
    'Liger `LigerKLDIVLoss(reduction="batchmean")`': lambda s: _kl_div(s, tau=1),
    "torchdistill `KDLoss(temperature=T, alpha=a, beta=b)`": lambda s: A * F.cross_entropy(s, HARD) + B * _soft(s),
    "torchdistill `LogitStdKDLoss(temperature=T, alpha=a, beta=b)`, logit-standardization-KD": lambda s: (
        A * F.cross_entropy(s, HARD) + B * TAU**2 * _kl_div(_standardized(s), _standardized(T))
    ),
    "mdistiller `KD`: CE 0.1, KD 0.9, T = 4": lambda s: (
        0.1 * F.cross_entropy(s, HARD) + 0.9 * _kl_div(s, tau=4, reduction="none").sum(1).mean() * 16
    ),
    "mdistiller `dkd_loss(s, t, y, a, b, T)`": _dkd,
    "mdistiller `DKD`: CE 1.0 and the same": lambda s: F.cross_entropy(s, HARD) + _dkd(s),
    "DistillKit `KLDLoss(T)`": _soft,
    "DistillKit `JSDLoss(T)`": lambda s: TAU**2 * _generalized_jsd(s, beta=0.5).sum() / N,
    "DistillKit `TVDLoss(T)`": lambda s: TAU**2 * _tvd(s, TAU).sum(-1).mean(),
    "speculators `kl_div`, decay and mask": lambda s: (
        (_kl_div(s, tau=1, reduction="none").sum(-1) * MASK * DECAY).sum() / (MASK.sum() + 1e-5)
    ),
    "speculators `ce`": lambda s: F.cross_entropy(s, T.argmax(-1)),
    'Model-Optimizer `LogitsDistillationLoss(T, reduction="mean")`': lambda s: TAU**2 * _kl_div(s, reduction="mean"),
    "Model-Optimizer `MFTLoss(T)`": _soft,
    "Model-Optimizer, Megatron `LogitsKLLoss(T)`": lambda s: _kl_div(s, reduction="none").sum(-1),
    "Model-Optimizer, Megatron `LogitsKLLoss(T, reverse=True)`": lambda s: _kl_div(T, s, reduction="none").sum(-1),
    "Fast-LLM `forward_kl`, loss mask": _fast_llm,
}
OF_KEPT_ROWS: Formulas = {
    "`F.cross_entropy(s, y, label_smoothing=e)`": lambda s: F.cross_entropy(s, Y, label_smoothing=E),
    "TRL `GKDTrainer(beta=b)`, `generalized_jsd_loss`; Liger `LigerJSD(beta=b)`": lambda s: _kept(_generalized_jsd(s)),
    "TRL `generalized_jsd_loss(num_items_in_batch=n)`": lambda s: _generalized_jsd(s)[KEPT].sum() / COUNT,
    "TRL, models with `final_logit_softcapping=c`: Gemma": lambda s: _kept(_generalized_jsd(_capped(s), _capped(T))),
    "Liger `LigerFusedLinearKLDivLoss(temperature=T)`": lambda s: _kept(_kl_div(s, reduction="none")),
    "Liger `LigerTVDLoss`": lambda s: _kept(_tvd(s)),
    "Liger `LigerFusedCETVDLoss`, as `h * ce + a * tvd`": lambda s: (
        H * F.cross_entropy(s, Y, reduction="none") + A * _tvd(s).sum(-1) * KEPT
    ),
    "Liger `LigerCrossEntropyLoss(lse_square_scale=z, label_smoothing=e, softcap=c)`": _liger_cross_entropy,
    "torchtune `ForwardKLLoss`": _forward,
    "torchtune `ReverseKLLoss`": _reverse,
    "torchtune `SymmetricKLLoss(sym_kd_ratio=r)`": lambda s: R * _forward(s) + (1 - R) * _reverse(s),
    "torchtune, `kd_ratio=r`": lambda s: R * _forward(s) + (1 - R) * F.cross_entropy(s, Y),
    "DistiLLM, MiniLLM `forward_kl`, `get_distil_loss`, `kd_ratio=r`": lambda s: (
        R * _forward(s) + (1 - R) * F.cross_entropy(s, Y)
    ),
    "DistiLLM `js_distance(lam)`": _js_distance,
    "DistiLLM `skewed_forward_kl(lam)`": _skewed_forward,
    "DistiLLM `skewed_reverse_kl(lam)`": _skewed_reverse,
    "DistiLLM `tv_distance`": lambda s: _kept(_tvd(s)),
    "NeMo Automodel `KDLoss(T)`, `num_batch_labels=n`, `kd_ratio=r`": _automodel,
}
OF_ONE_ROW: Formulas = {
    '`F.kl_div(q.log(), p, reduction="batchmean")` of one row, 1-dim': lambda s: _kl_div(s, T[0]),
}
OF_HEADS: Formulas = {
    "Liger `LigerFusedLinearJSD(jsd_beta=b, temperature=T)`": lambda s: _kept(_generalized_jsd(s)),
    "Liger `LigerFusedLinearJSDLoss(weight_hard_loss=h, weight_soft_loss=a, beta=b, temperature=T)`": lambda s: (
        H * F.cross_entropy(s, Y) + A * _kept(_generalized_jsd(s))
    ),
    "Liger `LigerFusedLinearKLDivLoss(temperature=T)`, of probabilities p": lambda s: _kept(
        _kl_div(s, reduction="none")
    ),
    "TRL `DistillationTrainer(beta=b)`, `final_logit_softcapping=c`": lambda s: (
        (_generalized_jsd(_capped(s), _capped(T)).sum(-1) * MASK).sum() / MASK.sum()
    ),
}
PEERS = OF_ALL_ROWS | OF_KEPT_ROWS | OF_ONE_ROW

page = pytest.mark.skipif(not PAGE.exists(), reason="there is no checkout around the tests")


@page
def test_every_row_of_the_table_has_its_formula_here() -> None:
    assert table().keys() == PEERS.keys()
    assert table("## From hidden states").keys() == OF_HEADS.keys()


@page
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # F.kl_div's warning about "mean"
@pytest.mark.parametrize("peer", PEERS)
def test_kd_loss_gives_the_loss_of_another_library(peer: str) -> None:
    here, note = table()[peer]
    s, t = (S[0], T[0]) if peer in OF_ONE_ROW else (S, T)
    theirs, ours = s.clone().requires_grad_(), s.clone().requires_grad_()
    a = PEERS[peer](theirs)
    y = Y if peer in OF_KEPT_ROWS else HARD
    b = eval(f"kd_loss(s, {here}, backend='reference')", NAMES | {"s": ours, "t": t, "y": y})
    for loss in (a, b):
        loss.backward(torch.ones_like(a))
    # fp64, a few dozen operations on numbers of size 10
    if note.startswith("another value"):
        assert (a - b).abs() > 0.01
    else:
        torch.testing.assert_close(b.detach(), a.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-13, atol=1e-14)


@page
@pytest.mark.parametrize("peer", OF_HEADS)
def test_linear_kd_loss_gives_the_loss_of_another_library(peer: str) -> None:
    here, _ = table("## From hidden states")[peer]
    theirs, ours = S.clone().requires_grad_(), S.clone().requires_grad_()
    one = torch.eye(V, dtype=F64)  # a head whose logits are the hidden states
    names = NAMES | {"linear_kd_loss": linear_kd_loss, "hidden": ours, "weight": one, "u": T, "U": one, "y": Y}
    losses = OF_HEADS[peer](theirs), eval(f"linear_kd_loss(hidden, weight, {here}, backend='reference')", names)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1].detach(), losses[0].detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-13, atol=1e-14)
