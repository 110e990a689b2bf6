"""The reference is the truth: finite differences, closed forms and the formulas of others say so, all in fp64."""

import pytest
import torch
import torch.nn.functional as F
from cases import DIVERGENCES, ENSEMBLES, F64, TARGETS, as_target, batch, labels_for
from torch import Tensor
from torch.autograd import gradcheck

from kdfast import divergences, kd_loss

WITH_TEMPERATURE = DIVERGENCES[:-1]
S, T, Y = batch(4, 5, F64)  # small: gradcheck differentiates by every number
TEMPERATURE = 3.0


def loss_of(s: Tensor, *args, **settings) -> Tensor:
    loss = kd_loss(s, *args, backend="reference", **settings)
    return loss[0] if settings.get("return_metrics") else loss


def grad_of(s: Tensor, *args, **settings) -> Tensor:
    leaf = s.detach().requires_grad_()
    loss_of(leaf, *args, **settings).backward()
    return leaf.grad


def close(a: Tensor, b: Tensor, digits: float = 64 * torch.finfo(F64).eps) -> None:
    """Equal but for fp64's rounding of a few dozen operations on a row, at the size of its largest number."""
    torch.testing.assert_close(a, b, rtol=0, atol=digits * max(1.0, b.abs().max().item()))


# --- finite differences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", WITH_TEMPERATURE)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("ensemble", [None, *ENSEMBLES])
@pytest.mark.parametrize("reduction", ["mean", "none"])  # gradients made in forward, and in backward
def test_gradients_are_finite_differences(divergence: str, target: str, ensemble: str | None, reduction: str) -> None:
    settings = {"divergence": divergence, "target": target, "reduction": reduction, "temperature": TEMPERATURE}
    teacher = as_target(T, target, TEMPERATURE)
    if ensemble:
        teacher = [teacher, as_target(T.flip(-1), target, TEMPERATURE)]
        settings |= {"ensemble": ensemble, "teacher_weights": [1, 3]}
    assert gradcheck(lambda s: loss_of(s, teacher, Y, **settings), S.clone().requires_grad_())


OPTIONS = {
    "no labels": {"labels": None},
    "hard only": {"alpha": 0},
    "soft only": {"alpha": 1},
    "weights of both": {"alpha": 0.7, "hard_weight": 2.0},
    "without T^2": {"t_squared": False},
    "teacher's temperature": {"teacher_temperature": 1.5},
    "temperature per row": {"temperature": torch.tensor([1.0, 2.0, 0.5, 20.0], dtype=F64)},
    "row weights": {"weight": torch.tensor([1.0, 0.5, 0.0, 3.0], dtype=F64)},
    "ignored row": {"ignore_index": int(Y[1])},
    "vocab_size": {"vocab_size": 3, "labels": Y.clamp_max(2)},
    "sum": {"reduction": "sum"},
    "batchmean": {"reduction": "batchmean"},
    "normalizer": {"normalizer": 17.0},
    "label_smoothing": {"label_smoothing": 0.3},
    "all smoothed away": {"label_smoothing": 1.0, "alpha": 0.5},
    "z_loss": {"z_loss": 0.7},
    "z_loss alone": {"z_loss": 0.7, "alpha": 0, "hard_weight": 0},
    "softcap": {"softcap": 3.0},
    "softcap, all terms": {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.1, "vocab_size": 4, "labels": Y % 4},
    "teacher_softcap": {"teacher_softcap": 1.5},
    "standardize": {"standardize": True},
    "standardize, geometric": {"standardize": True, "teacher": [T, T.flip(-1)], "ensemble": "geometric"},
    "standardize, capped": {"standardize": True, "softcap": 3.0, "teacher_softcap": 3.0, "z_loss": 0.1},
    "return_metrics": {"return_metrics": True},
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_are_finite_differences_under_every_option(divergence: str, option: str) -> None:
    settings = {"teacher": T, "labels": Y, "temperature": TEMPERATURE, "divergence": divergence} | OPTIONS[option]
    settings["labels"] = labels_for(divergence, Y) if settings["labels"] is None else settings["labels"]
    assert gradcheck(lambda s: loss_of(s, **settings), S.clone().requires_grad_())


# --- closed forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["cross_entropy", "forward_kl"])
@pytest.mark.parametrize("temperature", [1, 2, 3.7, 20])
def test_the_papers_gradient(divergence: str, temperature: float) -> None:
    p, q = torch.softmax(T / temperature, -1), torch.softmax(S / temperature, -1)
    hard = torch.softmax(S, -1) - F.one_hot(Y, S.shape[-1])
    rows = S.shape[0]
    soft = grad_of(S, T, divergence=divergence, temperature=temperature)
    close(soft, temperature * (q - p) / rows)
    close(grad_of(S, T, divergence=divergence, temperature=temperature, t_squared=False), (q - p) / temperature / rows)
    both = grad_of(S, T, Y, divergence=divergence, temperature=temperature, alpha=0.3)
    close(both, (0.3 * temperature * (q - p) + 0.7 * hard) / rows)


def test_the_limit_of_high_temperatures() -> None:
    """T * (q_i - p_i) -> (s_i - t_i) / V on centred rows (the paper's equation 4), off by a term in 1 / T."""
    s, t = S - S.mean(-1, True), T - T.mean(-1, True)
    limit = (s - t) / s.shape[-1]
    off = {}
    for temperature in (1e2, 1e3, 1e4):
        gradient = grad_of(s, t, temperature=temperature, reduction="sum")
        off[temperature] = (gradient - limit).abs().max().item()
    # ten times the temperature, a tenth of the distance; the next term, in 1 / T^2, is the few per cent
    assert off[1e2] / off[1e3] == pytest.approx(10, rel=0.05)
    assert off[1e3] / off[1e4] == pytest.approx(10, rel=0.05)
    close(grad_of(S, T, divergence="logit_mse", reduction="sum"), limit)
    # and so the losses: T^2 * KL -> 1 / (2 V) * sum (s_i - t_i)^2
    mse = loss_of(S, T, divergence="logit_mse", reduction="sum")
    kl = loss_of(S, T, divergence="forward_kl", temperature=1e5, reduction="sum")
    torch.testing.assert_close(kl, mse, rtol=1e-4, atol=0)  # 1 / T, times the size of the logits


def test_logit_mse_in_closed_form() -> None:
    s, t = S - S.mean(-1, True), T - T.mean(-1, True)
    close(loss_of(S, T, divergence="logit_mse"), F.mse_loss(s, t) / 2)
    close(grad_of(S, T, divergence="logit_mse"), (s - t) / s.numel())
    # it has no temperature and no T^2
    close(loss_of(S, T, divergence="logit_mse", temperature=5, teacher_temperature=2), F.mse_loss(s, t) / 2)


def mdistillers_dkd(s: Tensor, t: Tensor, y: Tensor, weights: tuple[float, float]) -> Tensor:
    """The published code, row by row, without its T^2."""
    label = F.one_hot(y, s.shape[-1]).bool()
    binary = [torch.stack([(p * label).sum(-1), (p * ~label).sum(-1)], -1) for p in (s.softmax(-1), t.softmax(-1))]
    target = F.kl_div(binary[0].log(), binary[1], reduction="none").sum(-1)
    log_q, p = F.log_softmax(s - 1000.0 * label, -1), F.softmax(t - 1000.0 * label, -1)
    return weights[0] * target + weights[1] * F.kl_div(log_q, p, reduction="none").sum(-1)


@pytest.mark.parametrize("weights", [(1.0, 8.0), (2.0, 0.5), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("temperature", [1, 4.0])
def test_dkd_in_closed_form(weights: tuple[float, float], temperature: float) -> None:
    settings = {"divergence": "dkd", "dkd_weights": weights, "temperature": temperature, "alpha": 1}
    want = temperature**2 * mdistillers_dkd(S / temperature, T / temperature, Y, weights)
    close(loss_of(S, T, Y, reduction="none", **settings), want)
    p, q = torch.softmax(T / temperature, -1), torch.softmax(S / temperature, -1)
    index = Y.unsqueeze(-1)
    p_y, q_y = p.gather(-1, index), q.gather(-1, index)
    p_among, q_among = p / (1 - p_y), q / (1 - q_y)
    gradient = weights[1] * (q_among - p_among) - weights[0] * (q_y - p_y) * q_among
    gradient = gradient.scatter(-1, index, weights[0] * (q_y - p_y))
    close(grad_of(S, T, Y, reduction="sum", **settings), temperature * gradient)


def test_dkd_with_the_weights_of_kl_is_kl() -> None:
    """KL = KL of (y, not y) + (1 - p_y) * KL among the rest, which is how the paper comes to decouple them."""
    settings = {"temperature": TEMPERATURE, "alpha": 1, "reduction": "none"}
    target, among = (loss_of(S, T, Y, divergence="dkd", dkd_weights=w, **settings) for w in ((1, 0), (0, 1)))
    p_y = torch.softmax(T / TEMPERATURE, -1).gather(-1, Y.unsqueeze(-1)).squeeze(-1)
    close(target + (1 - p_y) * among, loss_of(S, T, divergence="forward_kl", **settings))


@pytest.mark.parametrize("smoothing", [0.1, 0.6, 1.0])
def test_smoothing_in_closed_form(smoothing: float) -> None:
    target = (1 - smoothing) * F.one_hot(Y, S.shape[-1]).double() + smoothing / S.shape[-1]
    settings = {"alpha": 0, "label_smoothing": smoothing, "reduction": "sum"}
    close(loss_of(S, None, Y, **settings), F.cross_entropy(S, target, reduction="sum"))
    close(grad_of(S, None, Y, **settings), torch.softmax(S, -1) - target)


def test_z_loss_in_closed_form() -> None:
    z = torch.logsumexp(S, -1, keepdim=True)
    settings = {"alpha": 0, "hard_weight": 0, "z_loss": 0.3}
    close(loss_of(S, None, reduction="none", **settings), 0.3 * z.squeeze(-1).square())
    close(grad_of(S, None, reduction="sum", **settings), 0.3 * 2 * z * torch.softmax(S, -1))
    # which neither alpha nor a temperature weighs, but a row's weight does
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=F64)
    more = {"weight": weight, "temperature": TEMPERATURE, "alpha": 0.3, "reduction": "none"}
    close(loss_of(S, T, Y, z_loss=0.3, **more) - loss_of(S, T, Y, **more), 0.3 * weight * z.squeeze(-1).square())


def test_a_softcap_is_the_chain_rule() -> None:
    settings = {"temperature": TEMPERATURE, "z_loss": 0.1, "label_smoothing": 0.1, "reduction": "sum"}
    capped, teacher = 2 * torch.tanh(S / 2), 3 * torch.tanh(T / 3)
    close(loss_of(S, T, Y, softcap=2, teacher_softcap=3, **settings), loss_of(capped, teacher, Y, **settings))
    gradient = (1 - torch.tanh(S / 2).square()) * grad_of(capped, teacher, Y, **settings)
    close(grad_of(S, T, Y, softcap=2, teacher_softcap=3, **settings), gradient)


def standardised(z: Tensor) -> Tensor:
    return (z - z.mean(-1, True)) / (1e-7 + z.std(-1, keepdim=True))  # as published


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_standardised_logits_are_the_chain_rule(divergence: str) -> None:
    settings = {"divergence": divergence, "temperature": TEMPERATURE, "alpha": 1, "reduction": "sum"}
    z, teacher = standardised(S), standardised(T)
    close(loss_of(S, T, Y, standardize=True, **settings), loss_of(z, teacher, Y, **settings))
    g = grad_of(z, teacher, Y, **settings)
    chain = torch.autograd.functional.jacobian(standardised, S)  # (rows, V, rows, V)
    gradient = torch.einsum("ri,risj->sj", g, chain)
    close(grad_of(S, T, Y, standardize=True, **settings), gradient)
    along = (g * z).sum(-1, True) / (S.shape[-1] - 1)
    close(gradient, (g - g.mean(-1, True) - z * along) / S.std(-1, keepdim=True), digits=1e-6)  # but for the 1e-7
    # the hard term and z_loss see the logits as they are
    settings |= {"alpha": 0.4, "z_loss": 0.1}
    both = 0.4 * gradient + grad_of(S, None, Y, alpha=0, hard_weight=0.6, z_loss=0.1, reduction="sum")
    close(grad_of(S, T, Y, standardize=True, **settings), both)


def test_metrics_in_closed_form() -> None:
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
    loss, means = kd_loss(S, T, Y, alpha=0.3, **settings)
    close(0.3 * means.soft + 0.7 * means.hard, loss)
    close(torch.stack(means), torch.stack(metrics).mean(-1))


# --- the table of divergences ------------------------------------------------------------------------------------


BETA = 0.3


@pytest.mark.parametrize("divergence", divergences.DIVERGENCES)
def test_psi_is_q_times_the_derivative_of_phi_but_for_a_multiple_of_q(divergence: str) -> None:
    entry = divergences.DIVERGENCES[divergence]
    p = torch.softmax(T, -1)
    q = torch.softmax(S, -1).requires_grad_()
    (slope,) = torch.autograd.grad(entry.phi(p, q, p.log(), q.log(), BETA).sum(), q)
    psi, q = entry.psi(p, q, p.log(), q.log(), BETA).detach(), q.detach()
    close(psi - q * psi.sum(-1, True), q * slope - q * (q * slope).sum(-1, True))


@pytest.mark.parametrize("divergence", divergences.DIVERGENCES)
@pytest.mark.parametrize("mass", [1.0, 0.97])  # soft targets need not sum to 1
def test_one_rule_gives_every_gradient(divergence: str, mass: float) -> None:
    p, q = mass * torch.softmax(T, -1), torch.softmax(S / TEMPERATURE, -1)
    entry = divergences.DIVERGENCES[divergence]
    psi = entry.psi(p, q, p.log(), q.log(), BETA)
    rule = (psi - q * psi.sum(-1, True)) / TEMPERATURE
    settings = {"divergence": divergence, "target": "probs", "temperature": TEMPERATURE, "t_squared": False}
    settings |= {"beta": BETA} if entry.beta else {}
    close(grad_of(S, p, reduction="sum", **settings), rule)


@pytest.mark.parametrize("divergence", divergences.DIVERGENCES)
@pytest.mark.parametrize("mass", [1.0, 0.97])
def test_phi_is_the_divergence(divergence: str, mass: float) -> None:
    p, q = mass * torch.softmax(T, -1), torch.softmax(S, -1)

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
    settings = {"beta": b} if divergences.DIVERGENCES[divergence].beta else {}
    close(loss_of(S, p, divergence=divergence, target="probs", reduction="none", **settings), truth[divergence])


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
def test_at_its_ends_beta_makes_another_divergence_infinities_included(divergence: str, beta: int, same: str) -> None:
    s, t = S.clone(), T.clone()
    s[0, 0] = t[1, 1] = s[2, 2] = t[2, 2] = -torch.inf
    settings = {"temperature": TEMPERATURE, "reduction": "none"}
    got, want = loss_of(s, t, divergence=divergence, beta=beta, **settings), loss_of(s, t, divergence=same, **settings)
    assert torch.equal(got, want)
    assert got.isinf().sum() == 1, "the KL's"
    assert torch.equal(grad_of(S, T, divergence=divergence, beta=beta), grad_of(S, T, divergence=same))


@pytest.mark.parametrize("divergence", ["skew_forward_kl", "skew_reverse_kl"])
def test_a_skew_kl_is_0_where_its_mixture_is_its_own(divergence: str) -> None:
    close(loss_of(S, T, divergence=divergence, beta=1, reduction="none"), torch.zeros(4, dtype=F64))
    close(grad_of(S, T, divergence=divergence, beta=1), torch.zeros_like(S))


# --- identities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_shift_of_a_row_changes_nothing(divergence: str) -> None:
    shift = torch.tensor([[1.0], [-2.0], [0.5], [8.0]], dtype=F64)  # exact in fp64
    settings = {"divergence": divergence, "temperature": TEMPERATURE}
    for s, t in ((S + shift, T), (S, T - shift), (S + shift, T - 2 * shift)):
        close(loss_of(s, t, Y, **settings), loss_of(S, T, Y, **settings))
        close(grad_of(s, t, Y, **settings), grad_of(S, T, Y, **settings))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_rows_gradient_sums_to_0(divergence: str) -> None:
    grad = grad_of(S, T, Y, divergence=divergence, temperature=TEMPERATURE)
    close(grad.sum(-1), torch.zeros(4, dtype=F64))
    assert grad.abs().max() > 0.01


@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_a_divergence_is_0_where_the_student_is_its_teacher_and_positive_elsewhere(divergence: str) -> None:
    settings = {"labels": labels_for(divergence, Y), "alpha": 1, "divergence": divergence}
    close(loss_of(T, T, reduction="none", **settings), torch.zeros(4, dtype=F64))
    close(grad_of(T, T, **settings), torch.zeros_like(T))
    assert loss_of(S, T, reduction="none", **settings).min() > 0


def test_alpha_0_is_cross_entropy() -> None:
    leaf = S.clone().requires_grad_()
    want = F.cross_entropy(leaf, Y)
    want.backward()
    close(loss_of(S, None, Y, alpha=0), want.detach())
    close(grad_of(S, None, Y, alpha=0), leaf.grad)


def test_forward_kl_is_cross_entropy_less_the_teachers_entropy() -> None:
    p = torch.softmax(T / TEMPERATURE, -1)
    entropy = -(TEMPERATURE**2) * (p * p.log()).sum(-1)
    settings = {"temperature": TEMPERATURE, "reduction": "none"}
    cross_entropy = loss_of(S, T, divergence="cross_entropy", **settings)
    close(loss_of(S, T, divergence="forward_kl", **settings), cross_entropy - entropy)
    both = [grad_of(S, T, divergence=d, temperature=TEMPERATURE) for d in ("forward_kl", "cross_entropy")]
    close(*both)
