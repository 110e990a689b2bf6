"""What only rows on a GPU meet: offsets of 64 bits, labels that nobody waits to check, a kernel's most teachers.

The known faults of other libraries, by their public trackers' numbers, and the tests that would have found them: logits
rounded to bf16 (Liger#1432), a temperature on one side (trl#5731): test_calls.py. An ignore_index that is not used
(Liger#974), 0 / 0 of no row (LMOps#38): test_dropped_terms.py. NaN from -inf (trl#5594, Liger#1453): test_limits.py.
Phantom classes of a padded vocabulary (trl#3028, torchtune#2598): test_calls.py. Python's floats, which Triton hands to
a kernel as fp32: test_calls.py, in fp64.
"""

import re
from typing import Any

import emulated
import gpu
import pytest
import torch
from cases import BF16, F32, batch
from judge import run

import kdfast
from kdfast import rows
from kdfast.options import check_inputs, check_settings
from kdfast.row_math import Coefficients, table_columns

VOCABS = (1000, 40000)  # a row in registers; one in two sweeps, split over programs
SETTINGS: dict[str, Any] = {"backend": "triton"}

on_triton = pytest.mark.parametrize("backend", ("triton",), indirect=True)


@on_triton
@pytest.mark.parametrize("vocab", VOCABS)
def test_a_row_beyond_two_to_the_31_is_itself(backend: str, vocab: int) -> None:
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


@pytest.mark.parametrize("backend", ("triton", "cuda"), indirect=True)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("label", [-1, None, 2**32])  # None: V, behind the last; the last one would be 0 in 32 bits
def test_a_label_out_of_range_spoils_its_row_alone(
    backend: str, vocab: int, label: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nobody waits to raise: the row is NaN, and nothing else is lost."""
    monkeypatch.setattr(rows, "check_values", lambda *args: None)  # as for tensors of a GPU
    student, teacher, labels = batch(3, vocab, BF16)
    bad = labels.clone()
    bad[1] = vocab if label is None else label
    for settings in ({"backend": backend}, {"backend": backend, "alpha": 1.0}):
        loss, grad = run(student, teacher, bad, torch.ones(3), reduction="none", **settings)
        total, whole = run(student, teacher, bad, reduction="sum", **settings)
        assert total.isnan(), "it is seen"
        for found in (loss, grad, whole):
            assert found[1].isnan().all()
            assert found[[0, 2]].isfinite().all()
        want = run(student, teacher, labels, torch.ones(3), reduction="none", **settings)
        assert torch.equal(loss[[0, 2]], want[0][[0, 2]])
        assert torch.equal(grad[[0, 2]], want[1][[0, 2]])


# What PyTorch does without a launch on a GPU: where a result has another dtype the CPU alone makes a copy.
NO_LAUNCH = re.compile(
    "aten::(.*empty.*|.*view.*|.*reshape.*|.*copy_?|as_strided|contiguous|detach|to|fill_|expand|flatten|unbind)"
)


@pytest.mark.parametrize("backend", ("triton", "cuda"), indirect=True)
@pytest.mark.parametrize(
    ("size", "vocab"),
    [(3, 1000), (3, 50257), (65, 33000), (129, 20)],
    ids=["short", "few and long", "many and long", "many"],
)
def test_forward_takes_at_most_five_launches_and_backward_one(
    backend: str, size: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two, of few rows, whose weights each of Triton's programs adds up itself; four where it splits long ones."""
    monkeypatch.setattr(rows, "check_values", lambda *args: None)  # as for tensors of a GPU
    student, teacher, labels = batch(size, vocab, BF16)
    student.requires_grad_()
    for weight in (None, torch.rand(size), torch.rand(size) > 0.5):
        with emulated.kernels(run=False) if backend == "cuda" else gpu.kernels() as reports:
            with torch.autograd.profiler.profile() as profile:
                loss = kdfast.kd_loss(student, teacher, labels, row_weight=weight, temperature=2, backend=backend)
            forward = len(reports)
            loss.backward()
        names = [event.name for event in profile.function_events if event.name.startswith("aten::")]
        by_torch = [name for name in names if not NO_LAUNCH.fullmatch(name)]
        few = backend == "triton" and size <= 128
        assert forward + len(by_torch) in ((4 if vocab > 32768 else 2,) if few else (3, 4, 5)), by_torch
        assert len(reports) - forward <= 1


# Of one kind each: a table of two offsets and totals; of several; of moments; of a gradient at the label.
TABLES: dict[str, tuple[int, dict[str, Any]]] = {
    "short": (1000, {}),
    "long": (40001, {}),
    "ensemble": (1000, {"divergence": "reverse_kl", "ensemble": "arithmetic"}),
    "split ensemble": (40001, {"ensemble": "arithmetic"}),
    "dkd": (1000, {"divergence": "dkd"}),
    "standardize": (1000, {"divergence": "jsd", "standardize": True, "label_smoothing": 0.1, "softcap": 30.0}),
}


@on_triton
@pytest.mark.parametrize("case", TABLES)
def test_backward_takes_a_rows_numbers_from_the_table_and_computes_none_again(backend: str, case: str) -> None:
    vocab, more = TABLES[case]
    student, teacher, labels = batch(3, vocab, F32)
    several = "ensemble" in more
    options = kdfast.kd_loss.__kwdefaults__ | {"temperature": 2.0, "reduction": "none"} | more
    given = [teacher, batch(3, vocab, F32, seed=1).teacher] if several else teacher
    inputs, settings = check_inputs(student, given, labels, options, check_settings(options, has_labels=True))
    _, table, _ = torch.ops.kdfast_triton.stats(student, *inputs, *settings)
    assert table.shape[1] == table_columns("kdfast_triton", "cpu", 1 + several)
    zeros = table.clone()
    for name in ("level", "slope", "teacher", "soft", "hard", "label", "uniform", "tilt", "at_label"):
        zeros[:, Coefficients._fields.index(name)] = 0

    def grad(table: torch.Tensor) -> torch.Tensor:
        return torch.ops.kdfast_triton.grad(student, table, torch.ones(3), *inputs, *settings)

    of_table, of_another = grad(table), grad(table[[1, 0, 2]])
    assert torch.equal(of_another[2], of_table[2])
    assert not torch.allclose(of_another[:2], of_table[:2], rtol=1e-3)
    assert not grad(zeros).any()
    if several:
        other = table.clone()
        other[:, len(Coefficients._fields)] += 1  # a further teacher's offset, which halves its exps
        assert not torch.allclose(grad(other), of_table, rtol=1e-3)
