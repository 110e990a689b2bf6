"""kdfast.integrations.head: the fused loss inside of a module's forward, alone and under DDP, FSDP2 and autocast."""

import doctest
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import F64
from largest import Largest
from ranks import gradients, results_of_ranks
from torch import Tensor, nn

import kdfast
from kdfast.integrations import head as head_module
from kdfast.integrations.head import StudentWithLoss

VOCAB, HIDDEN, TEACHER_HIDDEN = 101, 8, 12
ROWS = (4, 6)


class Output(NamedTuple):
    """As a Hugging Face model's."""

    past: None
    last_hidden_state: Tensor


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layer = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, tokens: Tensor, scale: float = 1.0) -> Any:
        return Output(None, torch.tanh(self.layer(self.embedding(tokens))) * scale)


def student(tied: bool = False, bias: bool = True, dtype: torch.dtype = F64, **options: Any) -> StudentWithLoss:
    torch.manual_seed(0)
    trunk, head = Trunk(), nn.Linear(HIDDEN, VOCAB, bias=bias)
    if tied:
        head.weight = trunk.embedding.weight
    return StudentWithLoss(trunk, head, kdfast.LinearKDLoss(temperature=2.0, chunk_rows=4, **options)).to(dtype)


class Batch:
    """Tokens with labels, of which some are ignored, and a teacher's hidden states and head."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(VOCAB, ROWS, generator=generator)
        self.labels = torch.randint(VOCAB, ROWS, generator=generator)
        self.labels[0, 2:] = -100  # the two halves have 8 and 12 labels
        self.hidden = torch.randn(*ROWS, TEACHER_HIDDEN, generator=generator).to(dtype)
        self.weight = torch.randn(VOCAB, TEACHER_HIDDEN, generator=generator).to(dtype)
        self.bias = torch.randn(VOCAB, generator=generator).to(dtype)

    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T + self.bias

    def teacher(self, kind: str) -> dict[str, Any]:
        if kind == "head":
            return {"teacher": self.hidden, "teacher_weight": self.weight, "teacher_bias": self.bias}
        if kind == "logits":
            return {"teacher": self.logits()}
        return {"teacher": kdfast.topk_targets(self.logits(), 5, 2.0)}


def want(model: StudentWithLoss, batch: Batch, kind: str) -> list[Tensor]:
    """The gradients of kd_loss from logits, in one process."""
    logits = model.head(model.trunk(batch.tokens).last_hidden_state)
    teacher = batch.teacher("logits" if kind == "head" else kind)["teacher"]
    kdfast.kd_loss(logits, teacher, batch.labels, temperature=2.0, backend="reference").backward()
    return gradients(model)


@pytest.mark.parametrize("kind", ["head", "logits", "top k"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_loss_and_its_gradients_are_those_of_kd_loss_from_logits(kind: str, tied: bool) -> None:
    batch, model = Batch(), student(tied)
    model(batch.tokens, labels=batch.labels, **batch.teacher(kind)).backward()
    torch.testing.assert_close(gradients(model), want(student(tied), batch, kind), rtol=1e-12, atol=1e-14)
    assert (model.head.weight is model.trunk.embedding.weight) == tied


def test_keywords_reach_trunk_and_loss(seed_and_threads: None) -> None:
    batch, model = Batch(), student(bias=False)
    hidden = model.trunk(batch.tokens, scale=3.0).last_hidden_state
    weight = torch.rand(ROWS, dtype=F64)
    rows = {"row_weight": weight, "normalizer": 7.0}
    got = model(batch.tokens, scale=3.0, labels=batch.labels, **batch.teacher("logits"), **rows)
    logits = hidden @ model.head.weight.T
    torch.testing.assert_close(got, kdfast.kd_loss(logits, batch.logits(), batch.labels, temperature=2.0, **rows))


def test_no_tensor_has_the_size_of_rows_by_classes() -> None:
    model = student()
    with Largest() as largest:
        tokens = torch.zeros(4, 100, dtype=torch.long)
        hidden, weight = torch.randn(4, 100, TEACHER_HIDDEN, dtype=F64), torch.randn(VOCAB, TEACHER_HIDDEN, dtype=F64)
        model(tokens, teacher=hidden, teacher_weight=weight, labels=tokens).backward()
    assert 0 < largest.bytes < 8 * 400 * VOCAB / 4
    with Largest() as largest:
        model.head(model.trunk(tokens).last_hidden_state)
    assert largest.bytes == 8 * 400 * VOCAB


def test_autocast_makes_the_heads_product_bfloat16() -> None:
    batch, model = Batch(torch.float32), student(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch.tokens, labels=batch.labels, **batch.teacher("head"))
        hidden = model.trunk(batch.tokens).last_hidden_state
    loss.backward()
    assert model.head.weight.grad.dtype == torch.float32
    leaf = model.head.weight.detach().bfloat16().requires_grad_()
    logits = hidden.bfloat16().float() @ leaf.float().T + model.head.bias.detach().bfloat16().float()
    rounded = Batch(torch.bfloat16)
    teacher = rounded.hidden.float() @ rounded.weight.float().T + rounded.bias.float()
    same = kdfast.kd_loss(logits, teacher, batch.labels, temperature=2.0)
    same.backward()
    torch.testing.assert_close(loss, same)
    torch.testing.assert_close(model.head.weight.grad, leaf.grad.float(), rtol=1e-2, atol=1e-5)


CASES = [(kind, tied) for kind in ("ddp", "fsdp") for tied in (False, True)]


def of_rank(rank: int) -> list[list[Tensor]]:
    """Each case's gradients of half of the batch. DDP and FSDP2 average them over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    batch, found = Batch(), []
    mine = slice(2 * rank, 2 * rank + 2)
    tokens = (batch.labels != -100).sum()
    for kind, tied in CASES:
        model: Any = student(tied)
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (2,))
            fully_shard(model.trunk.layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        teacher = {"teacher": batch.hidden[mine], "teacher_weight": batch.weight, "teacher_bias": batch.bias}
        model(batch.tokens[mine], labels=batch.labels[mine], normalizer=tokens / 2, **teacher).backward()
        found.append([g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients(model)])
    return found


def test_two_processes_under_ddp_and_fsdp2_have_the_gradients_of_one(tmp_path: Path) -> None:
    one = {tied: want(student(tied), Batch(), "head") for tied in (False, True)}
    for of_one_rank in results_of_ranks(tmp_path, of_rank):
        for (kind, tied), found in zip(CASES, of_one_rank, strict=True):
            name = f"{kind}, tied: {tied}"
            torch.testing.assert_close(found, one[tied], rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


def test_what_the_loss_cannot_use_is_an_error() -> None:
    class Adapter(nn.Module):
        base_layer = nn.Linear(HIDDEN, VOCAB)

    with pytest.raises(TypeError, match=r"^head: is wrapped by PEFT \(Adapter\)"):
        StudentWithLoss(Trunk(), Adapter())
    with pytest.raises(TypeError, match=r"^head: must be an nn.Linear, not "):
        StudentWithLoss(Trunk(), nn.Bilinear(2, 2, 2))
    with pytest.raises(TypeError, match=r"^loss: must be a LinearKDLoss, not "):
        StudentWithLoss(Trunk(), nn.Linear(HIDDEN, VOCAB), kdfast.KDLoss())
    batch, model = Batch(), student()
    with pytest.raises(TypeError, match=r"^normalizer: has dtype torch.bfloat16.*cast_forward_inputs=False"):
        model(batch.tokens, labels=batch.labels, normalizer=torch.tensor(20).bfloat16(), **batch.teacher("head"))
    model.trunk.forward = lambda tokens: None
    with pytest.raises(TypeError, match=r"^trunk: must return hidden states"):
        model(batch.tokens, labels=batch.labels, **batch.teacher("head"))


def test_the_loss_compiles_into_the_graph_of_the_model() -> None:
    torch._dynamo.reset()
    batch, model = Batch(), student()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(batch.tokens, labels=batch.labels, **batch.teacher("head")).backward()
    torch.testing.assert_close(gradients(model), want(student(), batch, "head"))


def test_the_example_runs_as_shown() -> None:
    names = {"torch": torch, "nn": nn, "LinearKDLoss": kdfast.LinearKDLoss, "StudentWithLoss": StudentWithLoss}
    examples = doctest.DocTestFinder().find(head_module, globs=names)
    examples = [example for example in examples if example.examples]
    assert examples
    for example in examples:
        assert doctest.DocTestRunner().run(example).failed == 0
