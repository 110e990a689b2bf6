"""kdfast.integrations.liger: ignored rows, masked classes, padded heads, rounding, and what stays with Liger's code."""

import itertools
from typing import Any

import liger_cases
import liger_kernel.chunked_loss
import liger_kernel.functional
import liger_kernel.transformers
import pytest
import torch
from documentation import blocks
from liger_cases import CASES, F32, FALLBACKS, IGNORED, Case, chunked, inputs, run
from liger_interpreted import interpreted

from kdfast import kd_loss
from kdfast.integrations import liger
from kdfast.integrations.liger import distillation
from kdfast.integrations.patching import FallbackWarning


def test_the_chunked_loss_keeps_no_row_where_all_are_ignored() -> None:
    x = inputs(F32, F32)
    labels = torch.full_like(x.y, IGNORED)
    for hard in (0.0, 0.5):
        loss = liger.LigerFusedLinearJSDLoss(hard, ignore_index=IGNORED, return_soft_hard_loss=True)
        assert [value.item() for value in loss(x.h, x.w, x.ht, x.wt, labels)] == [0.0, 0.0, 0.0]


def test_the_loss_of_no_rows_is_0() -> None:
    p, q = torch.rand(2, 0, 5).unbind()
    for labels in (None, torch.zeros(0, dtype=torch.int64)):
        assert liger.LigerTVDLoss()(p, q, labels) == liger.LigerJSD()(p.log(), q.log(), labels) == 0
    assert liger.LigerKLDIVLoss()(p.log(), q) == 0


def test_labels_without_a_hard_term_need_not_be_classes() -> None:
    """As those of a vision model's image tokens, or -1 for kept ones."""
    x = inputs(F32, F32)
    strange = x.y.masked_fill(x.y != IGNORED, 10**6)
    heads = x.h, x.w, x.ht, x.wt
    for loss in (
        liger.LigerFusedLinearJSD(0.3, IGNORED),
        liger.LigerFusedLinearJSDLoss(0.0, 1.0, 0.3, IGNORED),
    ):
        assert torch.equal(loss(*heads, strange), loss(*heads, x.y))


ROWS = [case for case in CASES if "kept rows" in case.name and case.dtype is F32]
ROWS += [case for case in CASES if case.name in ("LigerFusedCETVDLoss", "LigerCrossEntropyLoss, mean, plain")]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_an_ignored_row_may_hold_nan(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = run(case, liger)

    def with_nan(*arguments: Any) -> Any:
        x = inputs(*arguments)
        for tensor in (x.s, x.h, x.t, x.ht):
            tensor.data[2] = torch.nan
        return x

    monkeypatch.setattr(liger_cases, "inputs", with_nan)
    for name, value in run(case, liger).items():
        if name == "gradient s":  # log_softmax and softmax give a row of NaN for NaN
            value, clean[name] = value[torch.arange(6) != 2], clean[name][torch.arange(6) != 2]
        torch.testing.assert_close(value, clean[name])


def test_classes_masked_on_both_sides_add_nothing_where_ligers_jsd_is_nan() -> None:
    assert all(value.isnan().all() for value in interpreted()["masked"].values())
    ours = liger_cases.masked(liger)
    x = inputs(F32, F32)
    rest = liger.LigerJSD(0.3)(x.s[:, 1:].log_softmax(-1), x.t[:, 1:].log_softmax(-1))
    rest.backward()
    torch.testing.assert_close(ours["loss"], rest.detach())
    torch.testing.assert_close(ours["gradient"][:, 1:], x.s.grad[:, 1:])
    assert (ours["gradient"][:, 0] == 0).all()


def test_a_teachers_padding_is_left_out_where_liger_gives_the_student_logits_of_zero() -> None:
    x = inputs(F32, F32)
    few = x.w.detach()[:8]
    call = x.h, few, x.ht, x.wt, x.y
    loss = dict(weight_hard_loss=0.0, weight_soft_loss=1.0, ignore_index=IGNORED, compiled=False)
    with pytest.warns(UserWarning, match="teacher has 11 classes and the student 8"):
        ours = liger.LigerFusedLinearJSDLoss(**loss)(*call)
    padded = torch.cat([few, torch.zeros(3, few.shape[1])])  # a student with three classes more
    theirs = liger_kernel.chunked_loss.LigerFusedLinearJSDLoss(**loss)(*call)
    torch.testing.assert_close(theirs, liger.LigerFusedLinearJSDLoss(**loss)(x.h, padded, *call[2:]))
    kept = x.y != IGNORED
    expected = kd_loss(x.h @ few.T, x.ht @ x.wt[:8].T, row_weight=kept, divergence="jsd")
    torch.testing.assert_close(ours, expected)
    assert abs(ours - theirs) > 0.005


def test_gradients_keep_their_digits_where_ligers_losses_round_logits_to_bfloat16() -> None:
    """A student close to its teacher: the gradient is a difference of numbers that are almost equal."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 64, generator=generator).bfloat16() for n in (16, 97))
    change = 0.05 * torch.randn(97, 64, generator=generator)

    def gradient(library: Any, dtype: torch.dtype) -> torch.Tensor:
        weight = (head + change).bfloat16().to(dtype).requires_grad_()
        loss = library.LigerFusedLinearJSDLoss(0.0, 1.0, 0.5, compiled=False)
        loss(hidden.to(dtype), weight, hidden.to(dtype), head.to(dtype), torch.zeros(16, dtype=torch.int64)).backward()
        return weight.grad.double()

    exact = gradient(liger, torch.float64)
    ours, theirs = (
        (gradient(library, torch.bfloat16) - exact).norm() / exact.norm()
        for library in (liger, liger_kernel.chunked_loss)
    )
    assert ours < 2**-8 and theirs > 0.04


@pytest.mark.parametrize("case", FALLBACKS, ids=str)
def test_what_kdfast_does_not_compute_runs_ligers_kernels(case: Case) -> None:
    ours, theirs = interpreted()["fallbacks"][case.name], interpreted()["theirs"][case.name]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(interpreted()["warnings"]) == len(FALLBACKS)
    with pytest.raises(NotImplementedError, match="Liger's own kernels need a GPU"):
        run(case, liger)


def test_negative_weights_run_ligers_chunked_loss() -> None:
    options = -0.5, 1.0, 0.3, IGNORED
    with pytest.warns(FallbackWarning, match="LigerFusedLinearJSDLoss: kdfast does not compute negative weights"):
        ours = chunked(liger, F32, options)
    with liger.patch():  # the patch does not call itself
        patched = chunked(liger_kernel.chunked_loss, F32, options)
    for a, b, c in zip(ours, chunked(liger_kernel.chunked_loss, F32, options), patched, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_classes_have_ligers_arguments() -> None:
    for name in liger.__all__:
        ours = getattr(liger, name)
        if name != "patch":
            assert ours.__init__ is ours.__mro__[1].__init__, name


def test_an_implementation_that_a_call_names_is_not_replaced() -> None:
    x = inputs(F32, F32)
    log_q, log_p = x.s.log_softmax(-1), x.t.log_softmax(-1)
    with liger.patch():
        liger_kernel.functional.jsd(log_q, log_p)
        with pytest.raises(RuntimeError, match="active drivers"):  # Triton's: a CPU is no device to it
            liger_kernel.functional.jsd(log_q, log_p, impl="nvidia-triton")


def test_a_chunk_size_that_was_chosen_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's counts sequences where there are some, and kdfast's rows."""
    x = inputs(F32, F32)
    chunks = []
    monkeypatch.setattr(distillation, "linear_kd_loss", lambda *_, chunk_rows, **__: chunks.append(chunk_rows))
    for options in ({}, {"chunk_size": 4}):
        loss = liger.LigerFusedLinearJSDLoss(**options)
        loss(x.h.view(3, 2, -1), x.w, x.ht.view(3, 2, -1), x.wt, x.y.view(3, 2))
        loss(x.h, x.w, x.ht, x.wt, x.y)
    assert chunks == [None, None, 8, 4]


def test_the_documented_lines_run() -> None:
    x = inputs(F32, F32)
    names: dict[str, Any] = {"hidden": x.h, "head": x.w, "teacher_hidden": x.ht, "teacher_head": x.wt}
    names["shift_labels"] = x.y
    for code in blocks("Liger-Kernel"):
        exec(code, names)
    theirs = liger_kernel.transformers.LigerFusedLinearJSD(0.1, temperature=2.0)(x.h, x.w, x.ht, x.wt, x.y)
    names["patched"].undo()
    assert torch.equal(names["loss"], theirs)


def test_wrong_arguments_are_errors() -> None:
    x = inputs(F32, F32)
    with pytest.raises(ValueError, match="reduction: 'none' is not one of"):
        liger.LigerFusedLinearKLDivLoss("none")(x.h, x.w, x.t.softmax(-1))
    with pytest.raises(AssertionError, match="temperature cannot be 0"):
        liger.LigerFusedLinearJSD(temperature=0)
    with pytest.raises(IndexError, match="labels"):
        liger.LigerCrossEntropyLoss()(x.s, x.y + 100)


def test_gradient_accumulation_of_a_sum_is_one_batchs() -> None:
    """Liger's means are of a call's own rows; its reduction "sum" lets the caller divide by all rows."""
    x = inputs(torch.float64, torch.float64)
    loss = liger.LigerFusedLinearKLDivLoss("sum", IGNORED)
    p = x.t.softmax(-1)
    loss(x.h, x.w, p, x.y).backward()
    whole, x.w.grad = x.w.grad, None
    for part in itertools.pairwise((0, 1, 4, 6)):
        rows = slice(*part)
        loss(x.h[rows], x.w, p[rows], x.y[rows]).backward()
    torch.testing.assert_close(x.w.grad, whole, rtol=1e-13, atol=1e-14)
