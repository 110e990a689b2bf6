"""linear_kd_loss with a sparse teacher: "conditional" alone reads the head's rows of the entries and no others."""

from typing import Any

import pytest
import torch
from cases import BF16, F16, F32, F64, REDUCTIONS, name
from linear_cases import HIDDEN, VOCAB, Case, check, fused_results
from sparse_cases import BETA, COMBINATIONS, FORMS, INF, NAN, is_form, options

import kdfast
from kdfast import TopKTargets, linear_sparse


def sparse(case: Case, k: int, *, gaps: bool = True) -> TopKTargets:
    """The teacher's top k; with `gaps` of each third row one entry less, of one row none."""
    log_probs, indices = torch.log_softmax(case.teacher_logits(F64), -1).topk(k, -1)
    if gaps:
        absent = (torch.arange(len(indices)) % 3 == 1).unsqueeze(-1) & (torch.arange(k) == k - 1)
        absent[4] = True
        log_probs, indices = log_probs.masked_fill(absent, -INF), indices.masked_fill(absent, -1)
    return TopKTargets(indices, log_probs.float())


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=name)
@pytest.mark.parametrize("missing", FORMS)
def test_every_form_is_that_of_the_heads_logits(backend: str, missing: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype in (F64, F16):
        pytest.skip("the row operators are held to their dtypes elsewhere")
    case = Case(dtype)
    settings = options(missing, temperature=2.0, backend=backend, chunk_rows=4)
    for labels, reduction in ((case.labels, "mean"), (None, "mean"), (None, "none")):
        check(case, labels, sparse(case, 5), reduction=reduction, **settings)


@pytest.mark.parametrize(("missing", "divergence"), [pair for pair in COMBINATIONS if pair[0] == "conditional"])
def test_conditional_takes_every_divergence(cpu: str, missing: str, divergence: str) -> None:
    case = Case()
    for k in (1, 5, VOCAB):
        check(case, None, sparse(case, k), temperature=2.0, backend=cpu, **options(missing, divergence))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", (F32, F16), ids=name)
def test_conditional_takes_weights_labels_temperatures_caps_and_scales(
    cpu: str, dtype: torch.dtype, reduction: str
) -> None:
    case = Case(dtype)
    rows = len(case.labels)
    for more in (
        {"row_weight": torch.linspace(0, 2, rows), "temperature": torch.linspace(0.5, 3, rows)},
        {"logit_scale": 0.5, "softcap": 3.0, "t_squared": False},
        {"labels": case.labels, "alpha": 1},  # of which one is ignored; no hard term
        {"labels": case.labels, "alpha": 0.7, "hard_weight": 0, "row_weight": torch.arange(rows) % 3},
        {"normalizer": 7} if reduction == "mean" else {},
        {"vocab_size": VOCAB - 10},
    ):
        labels = more.pop("labels", None)
        teacher = sparse(case, 5)
        teacher = teacher._replace(log_probs=teacher.log_probs.masked_fill(teacher.indices >= VOCAB - 10, -INF))
        check(case, labels, teacher, reduction=reduction, backend=cpu, **options("conditional", **more))


def test_metrics_are_those_of_the_heads_logits(backend: str) -> None:
    case = Case()
    for missing in FORMS:
        for labels in (case.labels, None):
            _, _, metrics = check(
                case, labels, sparse(case, 5), return_metrics=True, backend=backend, **options(missing, chunk_rows=4)
            )
            assert len(metrics) == 9


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of heads' products of chunks from now on."""
    from kdfast import products

    made: list[int] = []
    for kind in (products.Head, products.WidenedHead, products.OwnHead):
        whole = kind.logits
        monkeypatch.setattr(
            kind, "logits", lambda self, hidden, out, whole=whole: (made.append(len(out)), whole(self, hidden, out))
        )
    return made


def test_only_conditional_alone_makes_no_logits(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = Case(), counted(monkeypatch)
    teacher = sparse(case, 5)
    fused_results(case, None, teacher, missing="conditional")
    fused_results(case, case.labels, teacher, missing="conditional", hard_weight=0)
    assert not made
    for labels, settings in (
        (case.labels, {"missing": "conditional"}),
        (None, {"missing": "conditional", "z_loss": 0.1}),
        (None, {"missing": "conditional", "return_metrics": True}),
        (None, {"missing": "tail"}),
    ):
        fused_results(case, labels, teacher, **settings)
        assert made, settings
        made.clear()


@pytest.mark.parametrize("dtype", (F32, BF16), ids=name)
def test_classes_and_rows_that_are_not_wanted_may_hold_anything(cpu: str, dtype: torch.dtype) -> None:
    case = Case(dtype)
    teacher, weight = sparse(case, 5), torch.ones(len(case.hidden))
    weight[2] = 0
    settings = options("conditional", row_weight=weight)
    want = fused_results(case, None, teacher, **settings)
    present = teacher.log_probs != -INF
    present[2] = False
    named = teacher.indices[present].unique()
    unnamed = [i for i in range(VOCAB) if i not in named]
    assert unnamed
    case.weight[unnamed], case.bias[unnamed], case.hidden[2] = NAN, INF, NAN
    teacher.log_probs[2], teacher.indices[2] = NAN, 2**40
    got = fused_results(case, None, teacher, **settings)
    assert torch.equal(got[0], want[0])
    assert all(map(torch.equal, got[1], want[1]))
    assert (got[1][1][unnamed] == 0).all()


def test_gradients_have_the_same_bits_with_any_number_of_threads(cpu: str) -> None:
    """Every row names the same few classes, and others: their sums are long."""
    case = Case(rows=3000, vocab=9000)
    indices = torch.cat([torch.arange(20).expand(3000, 20), torch.randint(20, 9000, (3000, 1))], -1)
    teacher = TopKTargets(indices, torch.randn(3000, 21))
    found = []
    for threads in (1, 2, 1, 2):
        torch.set_num_threads(threads)
        found.append(fused_results(case, None, teacher, missing="conditional"))
    for each in found[1:]:
        assert all(map(torch.equal, each[1], found[0][1]))
    check(case, None, teacher, missing="conditional")


@pytest.mark.parametrize("frozen", ((0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)), ids=str)
def test_what_is_frozen_gets_no_gradient(cpu: str, frozen: tuple[int, ...]) -> None:
    case = Case()
    teacher = sparse(case, 5)
    want = fused_results(case, None, teacher, missing="conditional")[1]
    leaves = case.leaves()
    for i in frozen:
        leaves[i].requires_grad_(False)
    loss = case.loss(leaves, None, teacher, missing="conditional")
    if len(frozen) < 3:
        loss.backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (i in frozen)
        assert leaf.grad is None or torch.equal(leaf.grad, want[i])


@pytest.mark.parametrize("rows", (0, 1))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_there_may_be_few_rows(backend: str, rows: int, reduction: str) -> None:
    for missing in FORMS:
        case = Case()
        teacher = TopKTargets(*(x[:rows] for x in sparse(case, 5)))
        case.hidden = case.hidden[:rows]
        check(case, None, teacher, reduction=reduction, backend=backend, **options(missing))
    one = kdfast.linear_kd_loss(
        torch.randn(HIDDEN), case.weight, TopKTargets(torch.tensor([3]), torch.zeros(1)), None, missing="conditional"
    )
    assert one == 0


def test_wide_heads_are_read_piece_by_piece(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_sparse, "GATHERED", 1)  # a row at a time
    monkeypatch.setattr(linear_sparse, "SLICE", 16)  # four slices of the 50 classes
    case = Case(BF16)
    for reduction in ("mean", "none"):
        check(case, None, sparse(case, 5), reduction=reduction, backend=cpu, missing="conditional")


@pytest.mark.parametrize("dtype", (F32, F64, BF16, F16), ids=name)
def test_a_gpus_products_give_the_same_numbers(cpu: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_sparse, "_is_cpu", lambda x: False)
    case = Case(dtype)
    for reduction in ("mean", "none"):
        check(case, None, sparse(case, 5), reduction=reduction, backend=cpu, missing="conditional")


def test_wrong_entries_raise_before_any_product(cpu: str) -> None:
    case = Case()
    teacher = sparse(case, 5, gaps=False)
    for index, error, words in ((VOCAB, IndexError, "50 in row 3, entry 1"), (None, ValueError, "is twice in row 3")):
        indices = teacher.indices.clone()
        indices[3, 1] = indices[3, 0] if index is None else index
        with pytest.raises(error, match=f"^teacher.indices: .*{words}"):
            fused_results(case, None, TopKTargets(indices, teacher.log_probs), missing="conditional")


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_it_works_under_compile_and_checkpoint(cpu: str, reduction: str) -> None:
    from torch.utils.checkpoint import checkpoint

    case = Case()
    teacher = sparse(case, 5)
    settings: dict[str, Any] = options("conditional", reduction=reduction, temperature=2.0)
    want = fused_results(case, None, teacher, **settings)

    def loss(hidden, weight, bias, teacher):
        return kdfast.linear_kd_loss(hidden, weight, teacher, None, student_bias=bias, **settings)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (compiled, lambda *args: checkpoint(loss, *args, use_reentrant=False)):
        leaves = case.leaves()
        got = function(*leaves, teacher)
        got.backward(torch.linspace(-1, 2, got.numel()).view(got.shape) if got.dim() else None)
        torch.testing.assert_close(got.detach(), want[0])
        for leaf, grad in zip(leaves, want[1], strict=True):
            torch.testing.assert_close(leaf.grad, grad)


def test_forms_and_divergences_that_do_not_go_together_are_refused(cpu: str) -> None:
    case = Case()
    assert not is_form("truncate", "jsd")
    with pytest.raises(ValueError, match="'truncate'"):
        fused_results(case, None, sparse(case, 3), missing="truncate", divergence="jsd", beta=BETA["jsd"])


def test_metrics_alone_may_read_the_teacher(backend: str) -> None:
    """The table that forward makes then has columns that backward does not read."""
    case = Case()
    for missing in ("tail", "conditional"):
        settings = options(missing, alpha=0, reduction="none", return_metrics=True, backend=backend)
        check(case, case.labels, sparse(case, 5), **settings)
