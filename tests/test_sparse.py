"""Sparse teachers: the four forms, and the rest of kd_loss with them. test_sparse_entries.py has their entries."""

import pytest
import torch
from cases import BF16, F16, F32, F64, ON_GPU, batch
from sparse_cases import (
    CLOSE,
    COMBINATIONS,
    FORMS,
    INFINITE,
    NAN,
    OF_P_AND_Q,
    gradient,
    is_form,
    kd,
    options,
    plain_losses,
    skip_most,
    sparse_batch,
)
from torch import Tensor

from kdfast import KDLoss, TopKTargets, kd_loss

# --- the forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("missing", "divergence"), COMBINATIONS)
def test_a_form_is_its_formula_over_whole_rows(backend: str, missing: str, divergence: str, full: bool) -> None:
    skip_most(backend, full, divergence)
    for k in (1, 4, 12) if backend not in ON_GPU else (4,):
        student, teacher, _ = sparse_batch(7, 12, k, temperature=2.0, gaps=True)
        want = gradient(lambda s, t=teacher: 4 * plain_losses(s / 2, t, missing, divergence), student)
        got = kd(student, teacher, temperature=2.0, reduction="none", backend=backend, **options(missing, divergence))
        torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("divergence", OF_P_AND_Q)
def test_a_whole_teacher_given_sparsely_is_the_dense_one(backend: str, divergence: str, full: bool) -> None:
    skip_most(backend, full, divergence)
    student, logits, labels = batch(5, 12, F64)
    log_probs = torch.log_softmax(logits / 2, -1)
    indices = torch.rand(5, 12).argsort(-1)
    teacher = TopKTargets(indices, log_probs.gather(-1, indices))
    settings = {"temperature": 2.0, "alpha": 0.7, "backend": backend, "divergence": divergence}
    want = kd(student, logits, labels, **settings)
    for missing in FORMS:
        if is_form(missing, divergence):
            torch.testing.assert_close(kd(student, teacher, labels, missing=missing, **settings), want, **CLOSE)


@pytest.mark.parametrize("missing", FORMS)
def test_labels_smoothing_z_loss_caps_and_scales_are_those_of_a_dense_loss(backend: str, missing: str) -> None:
    """The soft term sees the scaled and capped logits; the other terms do not see the teacher."""
    student, teacher, labels = sparse_batch(5, 12, 4, gaps=True)
    more = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": 1.5, "softcap": 20.0, "reduction": "none"}

    def plain(s: Tensor) -> Tensor:
        z = 20 * torch.tanh(1.5 * s / 20)
        hard = torch.nn.functional.cross_entropy(z, labels, label_smoothing=0.1, reduction="none")
        soft = plain_losses(z / 2, teacher, missing, options(missing)["divergence"])
        return 0.6 * 4 * soft + 0.4 * hard + 0.01 * torch.logsumexp(z, -1).square()

    got = kd(student, teacher, labels, temperature=2.0, alpha=0.6, backend=backend, **more, **options(missing))
    torch.testing.assert_close(got, gradient(plain, student), **CLOSE)


@pytest.mark.parametrize("missing", FORMS)
def test_the_references_gradient_is_that_of_finite_differences(missing: str) -> None:
    for divergence in OF_P_AND_Q:
        if is_form(missing, divergence) and divergence != "tvd":  # which has corners
            student, teacher, labels = sparse_batch(4, 9, 3, temperature=1.5, gaps=True)
            settings = options(missing, divergence, temperature=1.5, reduction="none", backend="reference")
            assert torch.autograd.gradcheck(
                lambda s, t=teacher, y=labels, o=settings: kd_loss(s, t, y, **o), student.requires_grad_()
            )


# --- the rest of kd_loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", FORMS)
@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
def test_16_bit_logits_get_a_gradient_that_is_rounded_once(backend: str, missing: str, dtype: torch.dtype) -> None:
    student, teacher, _ = sparse_batch(5, 300, 4, F32, gaps=True)
    student = student.to(dtype)
    settings = options(missing, backend=backend)
    loss, grad = kd(student, TopKTargets(teacher.indices.int(), teacher.log_probs), **settings)
    wide_loss, wide = kd(student.float(), teacher, **settings)
    assert loss.dtype == F32
    assert grad.dtype == dtype
    torch.testing.assert_close(loss, wide_loss)
    torch.testing.assert_close(grad.float(), wide, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("missing", FORMS)
def test_with_dim_1_the_entries_stand_where_the_classes_stand(backend: str, missing: str) -> None:
    student, teacher, labels = sparse_batch(6, 12, 4)
    settings = options(missing, backend=backend)
    for reduction in ("mean", "none"):
        want = kd(student, teacher, labels, reduction=reduction, **settings)

        def moved(x: Tensor) -> Tensor:  # (6, n) as (2, n, 3)
            return x.view(2, 3, -1).transpose(1, 2).contiguous()

        moved_teacher = TopKTargets(*map(moved, teacher))
        got = kd(moved(student), moved_teacher, labels.view(2, 3), reduction=reduction, dim=1, **settings)
        torch.testing.assert_close(got[0].flatten(), want[0].flatten(), **CLOSE)
        torch.testing.assert_close(got[1], moved(want[1]), **CLOSE)


@pytest.mark.parametrize("missing", FORMS)
def test_padding_of_the_vocabulary_is_no_part_of_the_rest(backend: str, missing: str) -> None:
    student, teacher, labels = sparse_batch(5, 12, 4, F32)
    settings = options(missing, backend=backend)
    want = kd(student, teacher, labels, **settings)
    padded = torch.nn.functional.pad(student, (0, 5), value=1e4)
    for inplace in (False, True):
        got = kd(padded, teacher, labels, vocab_size=12, inplace=inplace, **settings)
        torch.testing.assert_close(got[0], want[0])
        torch.testing.assert_close(got[1][:, :12], want[1])
        assert (got[1][:, 12:] == 0).all()


@pytest.mark.parametrize("missing", FORMS)
def test_in_place_the_gradient_is_the_same(backend: str, missing: str) -> None:
    student, teacher, labels = sparse_batch(5, 300, 4, F32, gaps=True)
    for reduction in ("mean", "none"):
        settings = options(missing, reduction=reduction, backend=backend)
        want = kd(student, teacher, labels, **settings)
        got = kd(student, teacher, labels, inplace=True, **settings)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("missing", FORMS)
def test_every_reduction_is_one_of_the_rows_losses(backend: str, missing: str) -> None:
    student, teacher, labels = sparse_batch(6, 12, 4, F64, temperature=2.0, gaps=True)
    labels[2] = -100
    weight = torch.tensor([1.0, 2.0, 1.0, 0.5, 0.0, 1.0], dtype=F64)
    settings = options(missing, temperature=2.0, row_weight=weight, backend=backend)
    rows, grads = kd(student, teacher, labels, reduction="none", **settings)
    total = weight.sum() - weight[2]
    for more, divisor in (
        ({}, total),
        ({"reduction": "sum"}, 1),
        ({"reduction": "batchmean"}, 6),
        ({"normalizer": 7}, 7),
        ({"normalizer": torch.tensor(7.0)}, 7),
    ):
        loss, grad = kd(student, teacher, labels, **settings, **more)
        torch.testing.assert_close(loss, rows.sum() / divisor, **CLOSE)
        torch.testing.assert_close(grad, grads / divisor, **CLOSE)


def test_the_temperature_may_be_one_per_row(backend: str) -> None:
    temperature = torch.tensor([1.0, 2.0, 0.5, 3.0])
    student, teacher, _ = sparse_batch(4, 12, 3, temperature=temperature.double().unsqueeze(-1))
    got = kd(student, teacher, temperature=temperature, reduction="none", backend=backend, **options("tail", "jsd"))
    for row, T in enumerate(temperature.tolist()):
        one = TopKTargets(*(x[row : row + 1] for x in teacher))
        want = gradient(lambda s, t=one, T=T: T * T * plain_losses(s / T, t, "tail", "jsd"), student[row : row + 1])
        torch.testing.assert_close((got[0][row : row + 1], got[1][row : row + 1]), want, **CLOSE)


def test_other_temperatures_are_a_factor_of_the_log_probabilities(backend: str) -> None:
    """For the forms that softmax them: log-probabilities at 1 times 1 / T are those at T, up to a constant."""
    student, at_1, _ = sparse_batch(4, 12, 5)
    at_2 = sparse_batch(4, 12, 5, temperature=2.0)[1]
    for missing in ("conditional", "renormalize"):
        settings = options(missing, temperature=2.0, backend=backend)
        scaled = TopKTargets(at_1.indices, at_1.log_probs / 2 + 3.0)
        torch.testing.assert_close(kd(student, scaled, **settings), kd(student, at_2, **settings), **CLOSE)


def test_the_teacher_gets_no_gradient(backend: str) -> None:
    student, teacher, _ = sparse_batch(4, 12, 3, F32)
    teacher.log_probs.requires_grad_()
    kd(student, teacher, backend=backend)
    assert teacher.log_probs.grad is None


def test_alpha_0_reads_no_teacher(backend: str) -> None:
    student, teacher, labels = sparse_batch(4, 12, 3, F32)
    teacher.log_probs[:] = NAN
    for missing in FORMS:
        want = torch.nn.functional.cross_entropy(student, labels)
        settings = options(missing, alpha=0, backend=backend)
        torch.testing.assert_close(kd_loss(student, teacher, labels, **settings), want)
        torch.testing.assert_close(kd_loss(student, None, labels, **settings), want)


@pytest.mark.parametrize("rows", ((), (0,), (2, 0), (2, 1, 3)), ids=str)
def test_rows_may_have_any_shape(backend: str, rows: tuple[int, ...]) -> None:
    count = torch.Size(rows).numel()
    student, teacher, _ = sparse_batch(max(count, 1), 12, 3, F32)
    shaped = TopKTargets(*(x[:count].view(*rows, 3) for x in teacher))
    losses, grad = kd(student[:count].view(*rows, 12), shaped, reduction="none", backend=backend)
    assert losses.shape == rows
    want, want_grad = kd(student[:count], TopKTargets(*(x[:count] for x in teacher)), reduction="none", backend=backend)
    torch.testing.assert_close(losses.flatten(), want)
    torch.testing.assert_close(grad.view(count, 12), want_grad)


def test_a_module_takes_missing_and_checks_it_when_it_is_built(backend: str) -> None:
    student, teacher, labels = sparse_batch(4, 12, 3, F32)
    loss = KDLoss(missing="renormalize", backend=backend)
    want = kd_loss(student, teacher, labels, missing="renormalize", backend=backend)
    assert torch.equal(loss(student, teacher, labels), want)
    with pytest.raises(ValueError, match="missing: 'rest' is not one of 'tail', 'conditional'"):
        KDLoss(missing="rest")


def test_infinite_forms_are_refused_whatever_their_name(backend: str) -> None:
    """jsd at 1 is reverse_kl, and so on: the message has the name that was given."""
    student, teacher, _ = sparse_batch(2, 12, 3, F32)
    for divergence, beta in ((INFINITE[0], None), (INFINITE[1], 0.5), ("jsd", 1), ("skew_reverse_kl", 0)):
        with pytest.raises(ValueError, match=f"^divergence: '{divergence}' with missing='renormalize'"):
            kd_loss(student, teacher, divergence=divergence, beta=beta, missing="renormalize", backend=backend)
