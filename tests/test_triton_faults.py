"""The known faults of other libraries, each with the test that would have found it, on the Triton kernels.

Numbers of issues are those of the projects' public trackers.
"""

import math
from typing import Any

import gpu
import pytest
import torch
import torch.nn.functional as F
from cases import BF16, F32, F64, batch
from judge import judge, run

import kdfast

INF = math.inf
VOCABS = (1000, 40000)  # a row in registers; one in two sweeps, split over programs
SETTINGS: dict[str, Any] = {"backend": "triton"}


@pytest.fixture(autouse=True)
def kernels() -> Any:
    with gpu.kernels() as reports:
        yield reports


@pytest.mark.parametrize("vocab", VOCABS)
def test_temperature_is_on_both_sides(vocab: int) -> None:
    """Fast-LLM divides the teacher alone; TRL's GKD once tempered by another setting (trl#5731)."""
    student, teacher, _ = batch(2, vocab, F32)
    loss, grad = run(student, student, divergence="forward_kl", temperature=4, **SETTINGS)
    assert loss.abs() < 1e-5, "equal logits are at the minimum, at every temperature"
    assert grad.abs().max() < 1e-6
    loss, _ = run(student, teacher, divergence="forward_kl", temperature=4, teacher_temperature=1, **SETTINGS)
    p, log_q = torch.softmax(teacher.double(), -1), torch.log_softmax(student.double() / 4, -1)
    want = 16 * F.kl_div(log_q, p, reduction="batchmean")
    torch.testing.assert_close(loss.double().cpu(), want.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab", VOCABS)
def test_nothing_is_rounded_before_the_softmax(vocab: int) -> None:
    """Liger#1432: logits rounded to bf16 put the gradients off by 4 to 23 %, and the loss hid it."""
    student, teacher, labels = batch(2, vocab, F32, scale=8)
    _, grad = run(student, teacher, labels, temperature=2, **SETTINGS)
    _, rounded = run(student.bfloat16().float(), teacher.bfloat16().float(), labels, temperature=2, **SETTINGS)
    _, truth = run(student.double().cpu(), teacher.double().cpu(), labels.cpu(), temperature=2, backend="reference")
    size = truth.abs().max()
    assert (rounded.double().cpu() - truth).abs().max() / size > 1e-3, "the fault would show"
    assert (grad.double().cpu() - truth).abs().max() / size < 1e-5


@pytest.mark.parametrize("vocab", VOCABS)
def test_ignored_rows_count_in_no_mean(vocab: int) -> None:
    """Liger#974: an ignore_index that was taken and never used."""
    student, teacher, labels = batch(4, vocab, BF16)
    want, want_grad = run(student[::2].contiguous(), teacher[::2].contiguous(), labels[::2], **SETTINGS)
    labels = labels.clone()
    labels[1::2] = -100
    student[1::2] = math.nan
    loss, grad = run(student, teacher, labels, **SETTINGS)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    assert torch.equal(grad[::2], want_grad)
    assert grad[1::2].eq(0).all()


@pytest.mark.parametrize("vocab", VOCABS)
def test_every_row_ignored_is_a_loss_of_0_with_a_graph(vocab: int) -> None:
    """LMOps#38, torchtune, Automodel: 0 / 0."""
    student, teacher, labels = batch(3, vocab, BF16)
    loss, grad = run(student, teacher, torch.full_like(labels, -100), **SETTINGS)
    assert loss == 0
    assert grad.eq(0).all()


@pytest.mark.parametrize("divergence", ["cross_entropy", "forward_kl", "reverse_kl"])
@pytest.mark.parametrize("vocab", VOCABS)
def test_a_class_masked_in_both_makes_no_nan(vocab: int, divergence: str) -> None:
    """torchtune, DistiLLM, trl#5594, Liger#1453: NaN from -inf."""
    student, teacher, labels = batch(2, vocab, BF16)
    student[:, 5] = teacher[:, 5] = -INF
    student[0, : vocab // 2] = teacher[0, : vocab // 2] = -INF  # whole vectors, whole segments
    labels[:] = vocab - 1
    loss, grad = run(student, teacher, labels, divergence=divergence, **SETTINGS)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert grad[:, 5].eq(0).all()


@pytest.mark.parametrize("vocab", VOCABS)
def test_a_padded_vocabulary_takes_no_part(vocab: int) -> None:
    """Liger pads the student with zeros: phantom classes take mass (trl#3028, torchtune#2598)."""
    student, teacher, labels = batch(2, vocab, BF16)
    want, want_grad = run(student, teacher, labels, **SETTINGS)
    padded = F.pad(student, (0, 64), value=50.0)
    loss, grad = run(padded, F.pad(teacher, (0, 128), value=math.nan), labels, vocab_size=vocab, **SETTINGS)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    assert torch.equal(grad[:, :vocab], want_grad)
    assert grad[:, vocab:].eq(0).all()


@pytest.mark.parametrize("vocab", VOCABS)
def test_three_times_the_loss_has_three_times_the_gradient(vocab: int) -> None:
    """A gradient that is finished in forward has to be scaled by what comes back."""
    student, teacher, labels = batch(2, vocab, F32)
    _, grad = run(student, teacher, labels, **SETTINGS)
    leaf = student.clone().requires_grad_()
    (kdfast.kd_loss(leaf, teacher, labels, **SETTINGS) * 3).backward()
    torch.testing.assert_close(leaf.grad, 3 * grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("vocab", VOCABS)
def test_a_row_beyond_two_to_the_31_is_itself(vocab: int) -> None:
    """Row offsets of 32 bits wrap around."""
    student, teacher, labels = batch(2, vocab, BF16)
    loss, grad = run(student, teacher, labels, **SETTINGS)
    apart = torch.empty(2**31 + 2 * vocab, dtype=BF16)  # 4 GB, of which two rows are touched
    far = apart.as_strided((2, vocab), (2**31 + 16, 1))
    far.copy_(student)
    with gpu.kernels(stats=False, global_races=False):  # which would keep accounts of all 4 GB
        found = kdfast.kd_loss(far.requires_grad_(), teacher, labels, **SETTINGS)
        (found_grad,) = torch.autograd.grad(found, far)
    assert torch.equal(found, loss)
    assert torch.equal(found_grad, grad)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("label", [-1, 10**6, 2**32])  # the last one would be 0 in 32 bits
def test_a_label_out_of_range_spoils_its_row_alone(vocab: int, label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody waits to raise: the row is NaN, and nothing else is lost."""
    from kdfast import reference

    monkeypatch.setattr(reference, "check_values", lambda *args: None)  # as for tensors of a GPU
    student, teacher, labels = batch(3, vocab, BF16)
    ones = torch.ones(3)
    want, want_grad = run(student, teacher, labels, ones, reduction="none", **SETTINGS)
    labels = labels.clone()
    labels[1] = label
    for hard in ({}, {"alpha": 1.0}):
        loss, grad = run(student, teacher, labels, ones, reduction="none", **SETTINGS | hard)
        assert loss[1].isnan()
        assert grad[1].isnan().all()
        assert loss[[0, 2]].isfinite().all()
        total, whole = run(student, teacher, labels, reduction="sum", **SETTINGS | hard)
        assert total.isnan(), "it is seen"
        assert whole[1].isnan().all()
        assert torch.equal(whole[[0, 2]].isfinite(), torch.ones_like(whole[[0, 2]], dtype=torch.bool))
        if not hard:
            assert torch.equal(loss[[0, 2]], want[[0, 2]])
            assert torch.equal(grad[[0, 2]], want_grad[[0, 2]])


@pytest.mark.parametrize("vocab", VOCABS)
def test_more_teachers_than_fit_is_an_error_that_says_how_many_do(vocab: int) -> None:
    student, teacher, _ = batch(1, vocab, F32)
    kdfast.kd_loss(student, [teacher] * 8, backend="triton")
    with pytest.raises(ValueError, match="teacher: 9 teachers, but the Triton kernels take at most 8"):
        kdfast.kd_loss(student, [teacher] * 9, backend="triton")


def test_fp64_has_fp64s_digits() -> None:
    """Triton hands Python's floats to a kernel as fp32."""
    for vocab in (33, 20000):
        student, teacher, labels = batch(2, vocab, F64)
        others = [batch(2, vocab, F64, seed=seed).teacher for seed in (1, 2)]
        judge(student, [teacher, *others], labels, teacher_weights=[1, 1, 1], temperature=3.7, alpha=0.7, **SETTINGS)
