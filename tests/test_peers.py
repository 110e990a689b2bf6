"""What other libraries' losses are in kd_loss: their plain formulas, loss and gradient, in fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import F64, batch
from torch import Tensor

from kdfast import kd_loss

V, N, TAU = 11, 6, 3.0
S, T, Y = batch(N, V, F64)
Y[2] = -100  # a masked token
KEPT = Y != -100
HARD = Y.clamp_min(0)
P = torch.softmax(T, -1)
DECAY = torch.tensor([1.0, 0.8, 0.0, 0.64, 0.5, 0.4], dtype=F64)


def _kl_div(s: Tensor, t: Tensor, tau: float, reduction: str) -> Tensor:
    return F.kl_div(F.log_softmax(s / tau, -1), F.softmax(t / tau, -1), reduction=reduction)


def _torchtune_forward(s: Tensor) -> Tensor:
    """ForwardKLLoss: the teacher's entropy is left out, the mean is over the kept tokens."""
    x = (F.softmax(T, -1) * F.log_softmax(s, -1)).sum(-1)
    return -(x * KEPT).sum() / KEPT.sum()


def _torchtune_reverse(s: Tensor) -> Tensor:
    x = (F.softmax(s, -1) * (F.log_softmax(T, -1) - F.log_softmax(s, -1))).sum(-1)
    return -(x * KEPT).sum() / KEPT.sum()


def _gkd(s: Tensor, reverse: bool) -> Tensor:
    """TRL's generalized_jsd_loss at its ends, batchmean over the kept tokens."""
    a, b = F.log_softmax(s / TAU, -1), F.log_softmax(T / TAU, -1)
    x = (
        F.kl_div(b, a, reduction="none", log_target=True)
        if reverse
        else F.kl_div(a, b, reduction="none", log_target=True)
    )
    return x[KEPT].sum() / KEPT.sum()


def _fast_llm(s: Tensor) -> Tensor:
    """The teacher alone is divided by the temperature; the mask does not change the divisor."""
    x = F.kl_div(F.log_softmax(s, -1), F.log_softmax(T / TAU, -1), reduction="none", log_target=True).sum(-1)
    return (x * (DECAY > 0)).sum() / N


def _gkd_inside(s: Tensor, beta: float) -> Tensor:
    """TRL's generalized_jsd_loss and Liger's JSD inside (0, 1): the mixture by logsumexp of weighted logs."""
    a, b = F.log_softmax(s / TAU, -1), F.log_softmax(T / TAU, -1)
    weights = torch.tensor(beta, dtype=F64)
    m = torch.logsumexp(torch.stack([a + torch.log1p(-weights), b + torch.log(weights)]), 0)
    to_teacher = F.kl_div(m, b, reduction="none", log_target=True)
    to_student = F.kl_div(m, a, reduction="none", log_target=True)
    return (beta * to_teacher + (1 - beta) * to_student)[KEPT].sum() / KEPT.sum()


def _mean_of_kept(x: Tensor) -> Tensor:
    """DistiLLM's: of sums over classes, (rows, V), the mean over the tokens of mask 1."""
    return (x.sum(-1) * KEPT).sum() / KEPT.sum()


def _distillm_js(s: Tensor, lam: float) -> Tensor:
    """js_distance, whose lam is the student's weight."""
    q = F.softmax(s, -1)
    m = (lam * q + (1 - lam) * P).log()
    return _mean_of_kept(lam * q * (q.log() - m) + (1 - lam) * P * (P.log() - m))


def _distillm_skew(s: Tensor, lam: float) -> Tensor:
    """skewed_forward_kl, without the teacher's entropy."""
    return -_mean_of_kept(P * (lam * P + (1 - lam) * F.softmax(s, -1)).log())


def _distillm_skew_reverse(s: Tensor, lam: float) -> Tensor:
    q = F.softmax(s, -1)
    return -_mean_of_kept(q * ((1 - lam) * P + lam * q).log() - q * q.log())


# Their values lack the teacher's entropy: the gradient is the same.
ANOTHER_VALUE = ("torchtune, symmetric", "DistiLLM, skewed forward")

# name: (their formula, our arguments after the student's logits)
PEERS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "F.kl_div batchmean * T**2": (
        lambda s: _kl_div(s, T, TAU, "batchmean") * TAU**2,
        (T,),
        {"divergence": "forward_kl", "temperature": TAU, "reduction": "batchmean"},
    ),
    "F.kl_div mean": (
        lambda s: _kl_div(s, T, TAU, "mean"),
        (T,),
        {"divergence": "forward_kl", "temperature": TAU, "normalizer": S.numel(), "t_squared": False},
    ),
    "F.kl_div sum": (
        lambda s: _kl_div(s, T, 1, "sum"),
        (T,),
        {"divergence": "forward_kl", "reduction": "sum"},
    ),
    "Hugging Face's image recipe": (
        lambda s: 0.6 * TAU**2 * _kl_div(s, T, TAU, "batchmean") + 0.4 * F.cross_entropy(s, HARD),
        (T, HARD),
        {"divergence": "forward_kl", "temperature": TAU, "alpha": 0.6},
    ),
    "PyTorch's tutorial": (
        lambda s: 0.25 * (P2 * (P2.log() - F.log_softmax(s / 2, -1))).sum() / N * 4 + 0.75 * F.cross_entropy(s, HARD),
        (T, HARD),
        {"divergence": "forward_kl", "temperature": 2, "alpha": 0.25},
    ),
    "F.cross_entropy with probabilities": (lambda s: F.cross_entropy(s, P), (P,), {"target": "probs"}),
    "F.cross_entropy with labels": (
        lambda s: F.cross_entropy(s, Y),
        (None, Y),
        {"alpha": 0},
    ),
    "F.cross_entropy by row": (
        lambda s: F.cross_entropy(s, Y, reduction="none"),
        (None, Y),
        {"alpha": 0, "reduction": "none"},
    ),
    "F.mse_loss of centred logits": (
        lambda s: F.mse_loss(s - s.mean(-1, True), T - T.mean(-1, True)) / 2,
        (T,),
        {"divergence": "logit_mse"},
    ),
    "timm": (
        lambda s: 0.7 * F.cross_entropy(s, HARD) + 0.9 * TAU**2 * _kl_div(s, T, TAU, "batchmean"),
        (T, HARD),
        {"divergence": "forward_kl", "temperature": TAU, "alpha": 0.9, "hard_weight": 0.7},
    ),
    "DeiT, soft": (
        lambda s: (
            0.5 * F.cross_entropy(s, HARD)
            + 0.5
            * F.kl_div(F.log_softmax(s / TAU, 1), F.log_softmax(T / TAU, 1), reduction="sum", log_target=True)
            * (TAU * TAU)
            / s.numel()
        ),
        (T, HARD),
        {"divergence": "forward_kl", "temperature": TAU, "alpha": 0.5 / V, "hard_weight": 0.5},
    ),
    "torchdistill": (  # its alpha is the hard term's
        lambda s: 0.3 * F.cross_entropy(s, HARD) + 0.8 * TAU**2 * _kl_div(s, T, TAU, "batchmean"),
        (T, HARD),
        {"divergence": "forward_kl", "temperature": TAU, "alpha": 0.8, "hard_weight": 0.3},
    ),
    "mdistiller": (
        lambda s: (
            0.1 * F.cross_entropy(s, HARD)
            + 0.9 * F.kl_div(F.log_softmax(s / 4, 1), F.softmax(T / 4, 1), reduction="none").sum(1).mean() * 16
        ),
        (T, HARD),
        {"divergence": "forward_kl", "temperature": 4, "alpha": 0.9},
    ),
    "TRL's GKD at beta 0": (
        lambda s: _gkd(s, False),
        (T, Y),
        {"divergence": "forward_kl", "temperature": TAU, "alpha": 1.0, "t_squared": False},
    ),
    "TRL's GKD at beta 1": (
        lambda s: _gkd(s, True),
        (T, Y),
        {"divergence": "reverse_kl", "temperature": TAU, "alpha": 1.0, "t_squared": False},
    ),
    "TRL's GKD, Liger's JSD at beta 0.3": (
        lambda s: _gkd_inside(s, 0.3),
        (T, Y),
        {"divergence": "jsd", "beta": 0.3, "temperature": TAU, "alpha": 1.0, "t_squared": False},
    ),
    "torchtune, symmetric": (
        lambda s: 0.3 * _torchtune_forward(s) + 0.7 * _torchtune_reverse(s),
        (T, Y),
        {"alpha": 1.0, "divergence": "symmetric_kl", "beta": 0.3},
    ),
    "DistiLLM, JS": (lambda s: _distillm_js(s, 0.9), (T, Y), {"alpha": 1.0, "divergence": "jsd", "beta": 0.1}),
    "DistiLLM, skewed forward": (
        lambda s: _distillm_skew(s, 0.2),
        (T, Y),
        {"alpha": 1.0, "divergence": "skew_forward_kl", "beta": 0.2},
    ),
    "DistiLLM, skewed reverse": (
        lambda s: _distillm_skew_reverse(s, 0.2),
        (T, Y),
        {"alpha": 1.0, "divergence": "skew_reverse_kl", "beta": 0.2},
    ),
    "DistiLLM, total variation": (
        lambda s: 0.5 * _mean_of_kept((P - F.softmax(s, -1)).abs()),
        (T, Y),
        {"alpha": 1.0, "divergence": "tvd"},
    ),
    "DistillKit's TVD": (  # with T^2
        lambda s: 0.5 * TAU**2 * (F.softmax(s / TAU, -1) - F.softmax(T / TAU, -1)).abs().sum(-1).mean(),
        (T,),
        {"divergence": "tvd", "temperature": TAU},
    ),
    "torchtune, forward": (_torchtune_forward, (T, Y), {"alpha": 1.0}),
    "torchtune, reverse": (_torchtune_reverse, (T, Y), {"alpha": 1.0, "divergence": "reverse_kl"}),
    "torchtune's recipe": (
        lambda s: 0.5 * _torchtune_forward(s) + 0.5 * F.cross_entropy(s, Y),
        (T, Y),
        {"alpha": 0.5},
    ),
    "speculators, with decay and mask": (
        lambda s: (
            (F.kl_div(F.log_softmax(s, -1), F.softmax(T, -1), reduction="none").sum(-1) * DECAY).sum() / (5 + 1e-5)
        ),
        (T,),
        {"divergence": "forward_kl", "weight": DECAY, "normalizer": 5 + 1e-5},
    ),
    "ModelOpt": (
        lambda s: TAU**2 * _kl_div(s, T, TAU, "mean"),
        (T,),
        {"divergence": "forward_kl", "temperature": TAU, "normalizer": S.numel()},
    ),
    "NeMo Automodel": (
        lambda s: (
            0.4 * TAU**2 * _kl_div(s[KEPT], T[KEPT], TAU, "sum") / 40
            + 0.6 * F.cross_entropy(s, Y, reduction="sum") / 40
        ),
        (T, Y),
        {"divergence": "forward_kl", "temperature": TAU, "alpha": 0.4, "normalizer": 40},
    ),
    "Fast-LLM": (
        _fast_llm,
        (T,),
        {"divergence": "forward_kl", "teacher_temperature": TAU, "weight": DECAY > 0, "normalizer": N},
    ),
}
P2 = torch.softmax(T / 2, -1)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # F.kl_div's own, about its "mean"
@pytest.mark.parametrize("peer", PEERS)
def test_a_peers_loss_is_ours(peer: str) -> None:
    theirs, arguments, settings = PEERS[peer]
    want, got = S.clone().requires_grad_(), S.clone().requires_grad_()
    a = theirs(want)
    b = kd_loss(got, *arguments, backend="reference", **settings)
    ones = torch.ones_like(a)
    a.backward(ones)
    b.backward(ones)
    # fp64, a few dozen operations on numbers of size 10
    if peer in ANOTHER_VALUE:
        assert (a - b).abs() > 0.01
    else:
        torch.testing.assert_close(b.detach(), a.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.grad, want.grad, rtol=1e-13, atol=1e-14)


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
