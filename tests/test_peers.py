"""What other libraries' losses are in kd_loss, by README's table: their plain formulas, loss and gradient, in fp64."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import F64, batch
from torch import Tensor

from kdfast import kd_loss

README = Path(__file__).parents[1] / "README.md"

V, N = 11, 6
S, T, Y = batch(N, V, F64)
Y[2] = -100  # a masked token
KEPT = Y != -100
HARD = Y.clamp_min(0)  # for those who mask none
# The numbers of the table, by their names there; one value for all rows, no two alike.
TAU, A, B, H, R, E, C, Z, LAM, COUNT = 3.0, 0.6, 0.8, 0.75, 0.3, 0.1, 2.5, 1e-2, 0.2, 40
MASK = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=F64)
DECAY = torch.tensor([1.0, 0.8, 0.7, 0.64, 0.5, 0.4], dtype=F64)
P = torch.softmax(T / TAU, -1)
NAMES = {"T": TAU, "a": A, "b": B, "h": H, "r": R, "e": E, "c": C, "z": Z, "lam": LAM, "n": COUNT}
NAMES |= {"t": T, "p": P, "mask": MASK, "decay": DECAY, "kd_loss": kd_loss}


@functools.cache
def table() -> dict[str, tuple[str, str]]:
    """README's rows: what is there, our arguments after the student's logits, and the note beside them."""
    section = README.read_text().split("## From other libraries")[1].split("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {there.strip(): (here.strip(" `"), note.strip()) for there, here, note in lines[1:]}


def _kl_div(s: Tensor, t: Tensor, tau: float, reduction: str) -> Tensor:
    return F.kl_div(F.log_softmax(s / tau, -1), F.softmax(t / tau, -1), reduction=reduction)


def _kept(x: Tensor) -> Tensor:
    """Of terms (rows, V): their sum over the kept rows by the number of these."""
    return (x.sum(-1) * KEPT).sum() / KEPT.sum()


def _generalized_jsd(s: Tensor, t: Tensor = T) -> Tensor:
    """TRL's and Liger's terms: the mixture by logsumexp of weighted logs."""
    q, p = F.log_softmax(s / TAU, -1), F.log_softmax(t / TAU, -1)
    beta = torch.tensor(B, dtype=F64)
    m = torch.logsumexp(torch.stack([q + torch.log1p(-beta), p + torch.log(beta)]), 0)
    to_teacher = F.kl_div(m, p, reduction="none", log_target=True)
    to_student = F.kl_div(m, q, reduction="none", log_target=True)
    return beta * to_teacher + (1 - beta) * to_student


def _capped(z: Tensor) -> Tensor:
    return C * torch.tanh(z / C)


def _liger_cross_entropy(s: Tensor) -> Tensor:
    """lse_square_scale is of the smoothed loss's own logsumexp, and in the mean over the kept rows."""
    z = _capped(s)
    lse = torch.logsumexp(z, -1)
    target = z.gather(-1, HARD.unsqueeze(-1)).squeeze(-1)
    smooth = (-E / V * z).sum(-1) + E * lse
    return (((lse - target) * (1 - E) + smooth + Z * lse * lse) * KEPT).sum() / KEPT.sum()


def _tvd(s: Tensor, tau: float = 1.0) -> Tensor:
    return 0.5 * (F.softmax(s / tau, -1) - F.softmax(T / tau, -1)).abs()


def _torchtune_forward(s: Tensor) -> Tensor:
    """ForwardKLLoss, and DistiLLM's and MiniLLM's: the teacher's entropy is left out."""
    return -_kept(F.softmax(T, -1) * F.log_softmax(s, -1))


def _torchtune_reverse(s: Tensor) -> Tensor:
    return -_kept(F.softmax(s, -1) * (F.log_softmax(T, -1) - F.log_softmax(s, -1)))


def _standardized(z: Tensor) -> Tensor:
    return (z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True))


def _dkd(s: Tensor) -> Tensor:
    """mdistiller's dkd_loss: label against rest, then softmaxes without the label, which -1000 takes out."""
    label = F.one_hot(HARD, V).bool()

    def two(z: Tensor) -> Tensor:
        p = F.softmax(z / TAU, -1)
        return torch.stack([(p * label).sum(-1), (p * ~label).sum(-1)], -1)

    def rest(z: Tensor) -> Tensor:
        return z / TAU - 1000.0 * label

    target = F.kl_div(two(s).log(), two(T), reduction="sum") * TAU**2 / N
    others = F.kl_div(F.log_softmax(rest(s), -1), F.softmax(rest(T), -1), reduction="sum") * TAU**2 / N
    return A * target + B * others


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
    q = F.softmax(s, -1)
    return -_kept(q * ((1 - LAM) * F.softmax(T, -1) + LAM * q).log() - q * q.log())


def _distillkit_jsd(s: Tensor) -> Tensor:
    q, p = F.softmax(s / TAU, -1), F.softmax(T / TAU, -1)
    m = ((p + q) / 2).log()
    return TAU**2 * 0.5 * (F.kl_div(m, p, reduction="batchmean") + F.kl_div(m, q, reduction="batchmean"))


def _automodel(s: Tensor) -> Tensor:
    soft = TAU**2 * _kl_div(s[KEPT], T[KEPT], TAU, "sum") / COUNT
    return R * soft + (1 - R) * F.cross_entropy(s, Y, reduction="sum") / COUNT


def _fast_llm(s: Tensor) -> Tensor:
    """The teacher alone is divided by the temperature; the mask does not change the divisor."""
    x = F.kl_div(F.log_softmax(s, -1), F.log_softmax(T / TAU, -1), reduction="none", log_target=True).sum(-1)
    return (x * MASK).sum() / N


class Peer(NamedTuple):
    formula: Callable[[Tensor], Tensor]
    y: Tensor = HARD


# By the first column of README's table.
PEERS = {
    '`F.kl_div(q.log(), p, reduction="batchmean") * T**2`': Peer(lambda s: _kl_div(s, T, TAU, "batchmean") * TAU**2),
    '`F.kl_div(q.log(), p, reduction="sum")`': Peer(lambda s: _kl_div(s, T, TAU, "sum")),
    '`F.kl_div(q.log(), p, reduction="mean")`': Peer(lambda s: _kl_div(s, T, TAU, "mean")),
    "the textbook, Hugging Face's image guide, PyTorch's tutorial: `a * T**2 * kl_div + (1 - a) * cross_entropy`": Peer(
        lambda s: A * TAU**2 * _kl_div(s, T, TAU, "batchmean") + (1 - A) * F.cross_entropy(s, HARD)
    ),
    "`F.cross_entropy(s, p)`": Peer(lambda s: F.cross_entropy(s, P)),
    "`F.cross_entropy(s, y, label_smoothing=e)`": Peer(lambda s: F.cross_entropy(s, Y, label_smoothing=E), Y),
    "`F.mse_loss` of centred logits, halved": Peer(
        lambda s: F.mse_loss(s - s.mean(-1, True), T - T.mean(-1, True)) / 2
    ),
    "timm `LogitDistillationTask(task_loss_weight=a, distill_loss_weight=b)`": Peer(
        lambda s: A * F.cross_entropy(s, HARD) + B * TAU**2 * _kl_div(s, T, TAU, "batchmean")
    ),
    'DeiT `DistillationLoss("soft", alpha=a, tau=T)`': Peer(
        lambda s: (
            (1 - A) * F.cross_entropy(s, HARD)
            + A
            * F.kl_div(F.log_softmax(s / TAU, 1), F.log_softmax(T / TAU, 1), reduction="sum", log_target=True)
            * (TAU * TAU)
            / s.numel()
        )
    ),
    "TRL `GKDTrainer(beta=b)`, `generalized_jsd_loss`; Liger `LigerJSD(beta=b)`": Peer(
        lambda s: _kept(_generalized_jsd(s)), Y
    ),
    "TRL `generalized_jsd_loss` without labels": Peer(lambda s: _generalized_jsd(s).sum() / len(s)),
    "TRL `generalized_jsd_loss(num_items_in_batch=n)`": Peer(lambda s: _generalized_jsd(s)[KEPT].sum() / COUNT, Y),
    "TRL, models with `final_logit_softcapping=c`: Gemma": Peer(
        lambda s: _kept(_generalized_jsd(_capped(s), _capped(T))), Y
    ),
    'Liger `LigerKLDIVLoss(reduction="batchmean")`': Peer(lambda s: _kl_div(s, T, 1, "batchmean")),
    "Liger `LigerTVDLoss`": Peer(lambda s: _kept(_tvd(s)), Y),
    "Liger `LigerFusedCETVDLoss`, as `h * ce + a * tvd`": Peer(
        lambda s: H * F.cross_entropy(s, Y, reduction="none") + A * _tvd(s).sum(-1) * KEPT, Y
    ),
    "Liger `LigerCrossEntropyLoss(lse_square_scale=z, label_smoothing=e, softcap=c)`": Peer(_liger_cross_entropy, Y),
    "torchtune `ForwardKLLoss`": Peer(_torchtune_forward, Y),
    "torchtune `ReverseKLLoss`": Peer(_torchtune_reverse, Y),
    "torchtune `SymmetricKLLoss(sym_kd_ratio=r)`": Peer(
        lambda s: R * _torchtune_forward(s) + (1 - R) * _torchtune_reverse(s), Y
    ),
    "torchtune, `kd_ratio=r`": Peer(lambda s: R * _torchtune_forward(s) + (1 - R) * F.cross_entropy(s, Y), Y),
    "torchdistill `KDLoss(temperature=T, alpha=a, beta=b)`": Peer(
        lambda s: A * F.cross_entropy(s, HARD) + B * TAU**2 * _kl_div(s, T, TAU, "batchmean")
    ),
    "torchdistill `LogitStdKDLoss(temperature=T, alpha=a, beta=b)`, logit-standardization-KD": Peer(
        lambda s: (
            A * F.cross_entropy(s, HARD) + B * TAU**2 * _kl_div(_standardized(s), _standardized(T), TAU, "batchmean")
        )
    ),
    "mdistiller `KD`: CE 0.1, KD 0.9, T = 4": Peer(
        lambda s: (
            0.1 * F.cross_entropy(s, HARD)
            + 0.9 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(T / 4, 1), reduction="none").sum(1).mean() * 16
        )
    ),
    "mdistiller `dkd_loss(s, t, y, a, b, T)`": Peer(_dkd),
    "mdistiller `DKD`: CE 1.0 and the same": Peer(lambda s: F.cross_entropy(s, HARD) + _dkd(s)),
    "DistiLLM, MiniLLM `forward_kl`, `get_distil_loss`, `kd_ratio=r`": Peer(
        lambda s: (1 - R) * F.cross_entropy(s, Y) + R * _torchtune_forward(s), Y
    ),
    "DistiLLM `js_distance(lam)`": Peer(_js_distance, Y),
    "DistiLLM `skewed_forward_kl(lam)`": Peer(_skewed_forward, Y),
    "DistiLLM `skewed_reverse_kl(lam)`": Peer(_skewed_reverse, Y),
    "DistiLLM `tv_distance`": Peer(lambda s: _kept(_tvd(s)), Y),
    "DistillKit `KLDLoss(T)`": Peer(lambda s: TAU**2 * _kl_div(s, T, TAU, "batchmean")),
    "DistillKit `JSDLoss(T)`": Peer(_distillkit_jsd),
    "DistillKit `TVDLoss(T)`": Peer(lambda s: TAU**2 * _tvd(s, TAU).sum(-1).mean()),
    "speculators `kl_div`, decay and mask": Peer(
        lambda s: (
            (F.kl_div(F.log_softmax(s, -1), F.softmax(T, -1), reduction="none").sum(-1) * MASK * DECAY).sum()
            / (MASK.sum() + 1e-5)
        )
    ),
    "speculators `ce`": Peer(lambda s: F.cross_entropy(s, T.argmax(-1))),
    'Model-Optimizer `LogitsDistillationLoss(T, reduction="mean")`': Peer(
        lambda s: TAU**2 * _kl_div(s, T, TAU, "mean")
    ),
    "Model-Optimizer `MFTLoss(T)`": Peer(
        lambda s: TAU**2 * F.kl_div(F.log_softmax(s / TAU, -1), P, reduction="batchmean")
    ),
    "Model-Optimizer, Megatron `LogitsKLLoss(T)`": Peer(lambda s: _kl_div(s, T, TAU, "none").sum(-1)),
    "Model-Optimizer, Megatron `LogitsKLLoss(T, reverse=True)`": Peer(lambda s: _kl_div(T, s, TAU, "none").sum(-1)),
    "NeMo Automodel `KDLoss(T)`, `num_batch_labels=n`, `kd_ratio=r`": Peer(_automodel, Y),
    "Fast-LLM `forward_kl`, loss mask": Peer(_fast_llm),
}

readme = pytest.mark.skipif(not README.exists(), reason="there is no checkout around the tests")


@readme
def test_the_tables_rows_and_the_peers_are_the_same() -> None:
    assert list(table()) == list(PEERS)


@readme
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # F.kl_div's own, about its "mean"
@pytest.mark.parametrize("peer", PEERS)
def test_a_peers_loss_is_ours(peer: str) -> None:
    here, note = table()[peer]
    theirs, ours = S.clone().requires_grad_(), S.clone().requires_grad_()
    a = PEERS[peer].formula(theirs)
    b = eval(f"kd_loss(s, {here}, backend='reference')", NAMES | {"s": ours, "y": PEERS[peer].y})
    ones = torch.ones_like(a)
    a.backward(ones)
    b.backward(ones)
    # fp64, a few dozen operations on numbers of size 10
    if note.startswith("another value"):
        assert (a - b).abs() > 0.01
    else:
        torch.testing.assert_close(b.detach(), a.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-13, atol=1e-14)


def test_the_meanings_of_mean() -> None:
    """sum(l) / sum(w) over the rows kept; / the first dimension; / what the caller says."""
    w = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0, 0.25], dtype=F64)
    s, t, y = S.view(3, 2, V), T.view(3, 2, V), Y.view(3, 2)
    settings = {"temperature": 2, "weight": w.view(3, 2), "backend": "reference"}
    rows = kd_loss(s, t, y, reduction="none", **settings)
    unweighted = kd_loss(s, t, y, reduction="none", temperature=2, backend="reference")
    torch.testing.assert_close(rows, unweighted * w.view(3, 2))
    total = rows.sum()
    for reduction, divisor in (("sum", 1), ("batchmean", 3), ("mean", (w * KEPT).sum())):
        torch.testing.assert_close(kd_loss(s, t, y, reduction=reduction, **settings), total / divisor)
    torch.testing.assert_close(kd_loss(s, t, y, normalizer=7, **settings), total / 7)
    one = kd_loss(S[0], T[0], Y[0], reduction="batchmean", backend="reference")
    torch.testing.assert_close(one, kd_loss(S[0], T[0], Y[0], reduction="sum", backend="reference"))
    assert not torch.allclose(total / 3, total / (w * KEPT).sum())  # the meanings are told apart here
