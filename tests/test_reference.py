"""The reference is the truth: it is tested with finite differences, closed forms and identities, in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import DIVERGENCES, ENSEMBLES, F64, TARGETS, as_target, batch, labels_for
from torch import Tensor
from torch.autograd import gradcheck

from kdfast import divergences, kd_loss

S, T, Y = batch(4, 5, F64)  # small: gradcheck takes a difference for every number
TEMPERATURE = 3.0


def loss_of(s: Tensor, *args, **settings) -> Tensor:
    loss = kd_loss(s, *args, backend="reference", **settings)
    return loss[0] if settings.get("return_metrics") else loss


def grad_of(s: Tensor, *args, **settings) -> Tensor:
    leaf = s.detach().requires_grad_()
    loss_of(leaf, *args, **settings).backward()
    return leaf.grad


def close(a: Tensor, b: Tensor, digits: float = 64 * torch.finfo(F64).eps) -> None:
    """Equal up to fp64's rounding in a few dozen operations, relative to the largest number."""
    torch.testing.assert_close(a, b, rtol=0, atol=digits * max(1.0, b.abs().max().item()))


# --- finite differences ------------------------------------------------------------------------------------------


OPTIONS = {
    "no labels": {"labels": None},
    "hard only": {"alpha": 0},
    "soft only": {"alpha": 1},
    "weights of both": {"alpha": 0.7, "hard_weight": 2.0},
    "without T^2": {"t_squared": False},
    "teacher's temperature": {"teacher_temperature": 1.5},
    "temperature per row": {"temperature": torch.tensor([1.0, 2.0, 0.5, 20.0], dtype=F64)},
    "row weights": {"row_weight": torch.tensor([1.0, 0.5, 0.0, 3.0], dtype=F64)},
    "ignored row": {"ignore_index": int(Y[1])},
    "vocab_size": {"vocab_size": 3, "labels": Y.clamp_max(2)},
    "sum": {"reduction": "sum"},
    "batchmean": {"reduction": "batchmean"},
    "normalizer": {"normalizer": 17.0},
    "label_smoothing": {"label_smoothing": 0.3},
    "all smoothed away": {"label_smoothing": 1.0, "alpha": 0.5},
    "z_loss": {"z_loss": 0.7},
    "z_loss alone": {"z_loss": 0.7, "alpha": 0, "hard_weight": 0},
    "logit_scale": {"logit_scale": 0.4, "teacher_logit_scale": 2.0, "z_loss": 0.1, "softcap": 3.0},
    "softcap": {"softcap": 3.0},
    "softcap, all terms": {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.1, "vocab_size": 4, "labels": Y % 4},
    "teacher_softcap": {"teacher_softcap": 1.5},
    "standardize": {"standardize": True},
    "standardize, geometric": {"standardize": True, "teacher": [T, T.flip(-1)], "ensemble": "geometric"},
    "standardize, capped": {"standardize": True, "softcap": 3.0, "teacher_softcap": 3.0, "z_loss": 0.1},
    "return_metrics": {"return_metrics": True},
}
for target, reduction in itertools.product(TARGETS, ("mean", "none")):  # gradients computed in forward, and in backward
    given = {"target": target, "reduction": reduction}
    teachers = [as_target(t, target, TEMPERATURE) for t in (T, T.flip(-1))]
    OPTIONS[f"{target}, {reduction}"] = given | {"teacher": teachers[0]}
    for ensemble in ENSEMBLES:
        several = {"teacher": teachers, "ensemble": ensemble, "teacher_weights": [1, 3]}
        OPTIONS[f"{ensemble} {target}, {reduction}"] = given | several
OF_P = [option for option in OPTIONS if "arithmetic" in option or "probs" in option]  # logit_mse has no p


@pytest.mark.parametrize(
    ("divergence", "option"), [(d, o) for d in DIVERGENCES for o in OPTIONS if d != "logit_mse" or o not in OF_P]
)
def test_gradients_match_finite_differences(divergence: str, option: str) -> None:
    settings = {"teacher": T, "labels": Y, "temperature": TEMPERATURE, "divergence": divergence} | OPTIONS[option]
    settings["labels"] = labels_for(divergence, Y) if settings["labels"] is None else settings["labels"]
    assert gradcheck(lambda s: loss_of(s, **settings), S.clone().requires_grad_())


# --- closed forms ------------------------------------------------------------------------------------------------


def test_high_temperatures_approach_logit_mse() -> None:
    """T * (q_i - p_i) -> (s_i - t_i) / V on centred rows (the paper's equation 4), off by a term in 1 / T."""
    s, t = S - S.mean(-1, True), T - T.mean(-1, True)
    limit = (s - t) / s.shape[-1]
    off = {}
    for temperature in (1e2, 1e3, 1e4):
        gradient = grad_of(s, t, temperature=temperature, reduction="sum")
        off[temperature] = (gradient - limit).abs().max().item()
    # ten times the temperature, a tenth of the distance, up to a term in 1 / T^2
    assert off[1e2] / off[1e3] == pytest.approx(10, rel=0.05)
    assert off[1e3] / off[1e4] == pytest.approx(10, rel=0.05)
    close(grad_of(S, T, divergence="logit_mse", reduction="sum"), limit)
    # so do the losses: T^2 * KL -> 1 / (2 V) * sum (s_i - t_i)^2
    mse = loss_of(S, T, divergence="logit_mse", reduction="sum")
    kl = loss_of(S, T, divergence="forward_kl", temperature=1e5, reduction="sum")
    torch.testing.assert_close(kl, mse, rtol=1e-4, atol=0)  # 1 / T, times the size of the logits
    # logit_mse has no temperature and no T^2
    close(loss_of(S, T, divergence="logit_mse", temperature=5, teacher_temperature=2, reduction="sum"), mse)


def test_dkds_two_parts_add_up_to_forward_kl() -> None:
    """KL = KL of (y, not y) + (1 - p_y) * KL of the rest, as in the paper."""
    settings = {"temperature": TEMPERATURE, "alpha": 1, "reduction": "none"}
    target, among = (loss_of(S, T, Y, divergence="dkd", dkd_weights=w, **settings) for w in ((1, 0), (0, 1)))
    p_y = torch.softmax(T / TEMPERATURE, -1).gather(-1, Y.unsqueeze(-1)).squeeze(-1)
    close(target + (1 - p_y) * among, loss_of(S, T, divergence="forward_kl", **settings))


def test_z_loss_is_weighted_by_the_rows_weight_alone() -> None:
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=F64)
    settings = {"row_weight": weight, "temperature": TEMPERATURE, "alpha": 0.3, "reduction": "none"}
    z_loss = loss_of(S, T, Y, z_loss=0.3, **settings) - loss_of(S, T, Y, **settings)
    close(z_loss, 0.3 * weight * torch.logsumexp(S, -1).square())


def test_softcaps_are_applied_before_everything_else() -> None:
    settings = {"temperature": TEMPERATURE, "z_loss": 0.1, "label_smoothing": 0.1}
    capped, teacher = 2 * torch.tanh(S / 2), 3 * torch.tanh(T / 3)
    close(loss_of(S, T, Y, softcap=2, teacher_softcap=3, **settings), loss_of(capped, teacher, Y, **settings))


def test_logit_scales_are_applied_before_softcaps() -> None:
    settings = {"temperature": TEMPERATURE, "z_loss": 0.1, "label_smoothing": 0.1, "softcap": 2, "teacher_softcap": 3}
    scaled = loss_of(S, T, Y, logit_scale=0.5, teacher_logit_scale=1.5, **settings)
    close(scaled, loss_of(0.5 * S, 1.5 * T, Y, **settings))


def standardize(z: Tensor) -> Tensor:
    return (z - z.mean(-1, True)) / (1e-7 + z.std(-1, keepdim=True))  # as published


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_standardize_changes_the_soft_term_alone(divergence: str) -> None:
    settings = {"divergence": divergence, "temperature": TEMPERATURE}
    soft = loss_of(standardize(S), standardize(T), Y, alpha=1, **settings)
    others = loss_of(S, None, Y, alpha=0, hard_weight=0.6, z_loss=0.1)
    close(loss_of(S, T, Y, standardize=True, alpha=0.4, z_loss=0.1, **settings), 0.4 * soft + others)


def test_metrics_have_their_closed_forms() -> None:
    p, q = torch.softmax(T / TEMPERATURE, -1), torch.softmax(S / TEMPERATURE, -1)
    settings = {"temperature": TEMPERATURE, "label_smoothing": 0.2, "return_metrics": True, "backend": "reference"}
    _, metrics = kd_loss(S, T, Y, reduction="none", alpha=0.3, **settings)
    student_entropy, teacher_entropy = (-(x * x.log()).sum(-1) for x in (q, p))
    kl = (p * (p / q).log()).sum(-1)
    close(metrics.student_entropy, student_entropy)
    close(metrics.teacher_entropy, teacher_entropy)
    close(metrics.kl, kl)
    close(metrics.soft, TEMPERATURE**2 * (kl + teacher_entropy))  # cross_entropy = KL + the teacher's entropy
    close(metrics.hard, F.cross_entropy(S, Y, label_smoothing=0.2, reduction="none"))
    close(metrics.accuracy, (S.argmax(-1) == Y).double())
    close(metrics.agreement, (S.argmax(-1) == T.argmax(-1)).double())
    loss, means = kd_loss(S, T, Y, **settings)
    close(0.9 * means.soft + 0.1 * means.hard, loss)  # the default alpha
    close(torch.stack(means), torch.stack(metrics).mean(-1))


# --- the table of divergences ------------------------------------------------------------------------------------


BETA = 0.3


@pytest.mark.parametrize("divergence", divergences.DIVERGENCES)
@pytest.mark.parametrize("mass", [1.0, 0.97])  # soft targets need not sum to 1
def test_phi_is_the_divergence_and_psi_its_gradient(divergence: str, mass: float) -> None:
    p, q = mass * torch.softmax(T, -1), torch.softmax(S / TEMPERATURE, -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    b = BETA
    m = b * p + (1 - b) * q
    truth = {
        "cross_entropy": -(p * q.log()).sum(-1),
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "symmetric_kl": b * kl(p, q) + (1 - b) * kl(q, p),
        "jsd": b * kl(p, m) + (1 - b) * kl(q, m),
        "skew_forward_kl": kl(p, m),
        "skew_reverse_kl": kl(q, b * q + (1 - b) * p),
        "tvd": (p - q).abs().sum(-1) / 2,
        "hellinger": 1 - (p * q).sqrt().sum(-1),
    }
    entry = divergences.DIVERGENCES[divergence]
    psi = entry.psi(p, q, p.log(), q.log(), b)
    rule = (psi - q * psi.sum(-1, True)) / TEMPERATURE
    settings = {"divergence": divergence, "target": "probs", "temperature": TEMPERATURE}
    settings["beta"] = b if entry.beta else None
    for t_squared, factor in ((True, TEMPERATURE**2), (False, 1)):
        settings["t_squared"] = t_squared
        close(loss_of(S, p, reduction="none", **settings), factor * truth[divergence])
        close(grad_of(S, p, reduction="sum", **settings), factor * rule)


@pytest.mark.parametrize(
    "divergence, beta, same",
    [
        ("symmetric_kl", 0, "reverse_kl"),
        ("symmetric_kl", 1, "forward_kl"),
        ("jsd", 0, "forward_kl"),
        ("jsd", 1, "reverse_kl"),
        ("skew_forward_kl", 0, "forward_kl"),
        ("skew_reverse_kl", 0, "reverse_kl"),
    ],
)
def test_beta_0_or_1_makes_another_divergence_exactly(divergence: str, beta: int, same: str) -> None:
    s, t = S.clone(), T.clone()
    s[0, 0] = t[1, 1] = s[2, 2] = t[2, 2] = -torch.inf
    settings = {"temperature": TEMPERATURE, "reduction": "none"}
    got, want = loss_of(s, t, divergence=divergence, beta=beta, **settings), loss_of(s, t, divergence=same, **settings)
    assert torch.equal(got, want)
    assert got.isinf().sum() == 1, "as the KL has"
    assert torch.equal(grad_of(S, T, divergence=divergence, beta=beta), grad_of(S, T, divergence=same))


@pytest.mark.parametrize("divergence", ["skew_forward_kl", "skew_reverse_kl"])
def test_a_skew_kl_with_beta_1_is_0(divergence: str) -> None:
    close(loss_of(S, T, divergence=divergence, beta=1, reduction="none"), torch.zeros(4, dtype=F64))
    close(grad_of(S, T, divergence=divergence, beta=1), torch.zeros_like(S))


# --- identities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_shifting_a_rows_logits_changes_nothing(divergence: str) -> None:
    shift = torch.tensor([[1.0], [-2.0], [0.5], [8.0]], dtype=F64)  # exact in fp64
    settings = {"divergence": divergence, "temperature": TEMPERATURE}
    for s, t in ((S + shift, T), (S, T - shift), (S + shift, T - 2 * shift)):
        close(loss_of(s, t, Y, **settings), loss_of(S, T, Y, **settings))
        close(grad_of(s, t, Y, **settings), grad_of(S, T, Y, **settings))


@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_a_divergence_is_0_at_equality_and_positive_elsewhere(divergence: str) -> None:
    settings = {"labels": labels_for(divergence, Y), "alpha": 1, "divergence": divergence}
    close(loss_of(T, T, reduction="none", **settings), torch.zeros(4, dtype=F64))
    close(grad_of(T, T, **settings), torch.zeros_like(T))
    assert loss_of(S, T, reduction="none", **settings).min() > 0
