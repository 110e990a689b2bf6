"""README and docs: README stays one screen, what they show runs, and their links lead somewhere."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import kdfast

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="there is no checkout around the tests")

DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
# Pages whose blocks other tests run.
ELSEWHERE = {
    "CONTRIBUTING.md": "test_own_divergence.py",
    "sparse.md": "test_sparse_recipes.py",
    "tokens.md": "test_token_recipes.py",
    "trainers.md": "integrations",
}
SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")
ROWS, VOCAB, WIDTH = 6, 11, 5


def text_of(page: Path) -> str:
    """Without what is in fences and in code spans, where brackets are no links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`", "", text)


def test_readme_is_one_screen() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 100
    assert len(README.read_text().split()) <= 900


# --- links -------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What headings are called in links; and what api.md shows the docstrings of."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", x.lower()).strip().replace(" ", "-") for x in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda x: x.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = text_of(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_site_has_every_page() -> None:
    named = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert named == {page.name for page in DOCS}


def test_the_api_page_has_every_public_name() -> None:
    shown = anchors(ROOT / "docs" / "api.md")
    assert {f"kdfast.{name}" for name in kdfast.__all__} <= shown


def test_the_names_of_trainers_are_there() -> None:
    named = {match for page in PAGES for match in re.findall(r"kdfast\.integrations\.(\w+)\.(\w+)", page.read_text())}
    for module, name in named:
        place = ROOT / "kdfast" / "integrations" / module
        text = "".join(x.read_text() for x in ([*place.glob("*.py")] or [place.with_suffix(".py")]))
        assert re.search(rf"^(?:(?:def|class) {name}\b|{name}\b.* = )", text, flags=re.MULTILINE), f"{module}.{name}"
    assert len(named) > 8


def test_the_recipe_of_an_option_names_every_place_of_logit_scale() -> None:
    recipe = (ROOT / "CONTRIBUTING.md").read_text().split("## To add an option")[1].split("\n## ")[0]
    named = set(re.findall(r"`((?:kdfast|csrc)/[\w./]+\.\w+)`", recipe)) - {"kdfast/checks.py", "kdfast/gpu_choice.py"}
    files = [x for folder in ("kdfast", "csrc") for x in (ROOT / folder).rglob("*") if x.suffix in SOURCES]
    places = {x.relative_to(ROOT).as_posix() for x in files if "logit_scale" in x.read_text()}
    assert {x for x in places if not x.startswith("kdfast/integrations/")} == named


# --- code --------------------------------------------------------------------------------------------------------


class Trunk(nn.Embedding):
    """Its output is that of a transformers model."""

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=super().forward(tokens))


class Model(nn.Module):
    """A student or teacher as the pages have it: called, a trunk as `model`, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = Trunk(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens).last_hidden_state)


def names() -> dict[str, Any]:
    """What the pages' blocks take for granted."""
    student, teacher = Model(), Model()
    tokens, labels = torch.randint(VOCAB, (2, ROWS))
    logits, teacher_logits = torch.randn(ROWS, VOCAB, requires_grad=True), torch.randn(ROWS, VOCAB)
    return {
        "torch": torch, "F": F, "kdfast": kdfast, "kd_loss": kdfast.kd_loss, "T": 2.0, "alpha": 0.9, "steps": 4,
        "s": logits, "t": teacher_logits, "y": labels, "student_logits": logits, "teacher_logits": teacher_logits,
        "labels": labels, "tokens": tokens, "student": student, "teacher": teacher, "loader": [(tokens, labels)],
    }  # fmt: skip


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def run(page: Path, extra: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a page's blocks, each by itself; returns their names."""
    results = []
    for block in blocks(page):
        given = names() | extra
        exec(block, given)
        results.append(given)
    return results


@pytest.mark.parametrize("page", [x for x in PAGES if x.name in ELSEWHERE], ids=lambda x: x.name)
def test_pages_whose_code_runs_elsewhere_are_read_there(page: Path) -> None:
    place = ROOT / "tests" / ELSEWHERE[page.name]
    files = [place] if place.is_file() else list(place.glob("test_*.py"))
    assert not blocks(page) or any(page.name in x.read_text() for x in files)


SIMPLE = [x for x in PAGES if x.name not in ELSEWHERE and x.name not in ("parallel.md", "offline.md") and blocks(x)]


@pytest.mark.parametrize("page", SIMPLE, ids=lambda x: x.name)
def test_what_a_page_shows_runs(page: Path) -> None:
    for given in run(page, {}):
        assert "loss" not in given or given["loss"].isfinite()


def test_readme_has_twelve_lines_that_need_nothing_else() -> None:
    (block,) = (x for x in blocks(README) if "import" in x)
    assert len([line for line in block.splitlines() if line]) <= 12
    given: dict[str, Any] = {}
    exec(block, given)
    assert given["step"] == 9


def test_the_usual_recipe_has_the_loss_of_the_one_call() -> None:
    block = blocks(ROOT / "docs" / "index.md")[0]
    given = names()
    before, after = block.split("\n\n")
    exec(before, given)
    usual = given["loss"]
    exec(after, given)
    torch.testing.assert_close(given["loss"], usual)


def test_constant_factors_have_the_same_gradient_in_the_arguments() -> None:
    block = next(x for x in blocks(ROOT / "docs" / "arguments.md") if "steps" in x)
    grads = []
    for line in block.splitlines():
        given = names() | {"s": torch.arange(ROWS * VOCAB).view(ROWS, VOCAB).cos().requires_grad_()}
        given |= {"t": given["s"].detach().flip(0), "y": torch.arange(ROWS)}
        exec(line, given)
        grads.append(given["s"].grad)
    torch.testing.assert_close(*grads)


def test_the_ways_from_hidden_states_give_kd_loss() -> None:
    for given in run(ROOT / "docs" / "linear.md", {}):
        logits = [given[name](given["tokens"]).detach() for name in ("student", "teacher")]
        torch.testing.assert_close(given["loss"].detach(), kdfast.kd_loss(*logits, given["labels"], temperature=2.0))
        assert given["student"].lm_head.weight.grad is not None


def test_the_offline_page_writes_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors", reason="the extra 'cache' is not installed")
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "docs" / "offline.md")
    vocab = 152064
    extra = {
        "batches": [(torch.randint(vocab, (2, 4)), [4, 3])], "student": nn.Embedding(vocab, WIDTH),
        "teacher": lambda ids: torch.randn(*ids.shape, vocab), "head": torch.randn(vocab, WIDTH, requires_grad=True),
        "is_real": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }  # fmt: skip
    given = names() | extra
    exec(block.replace("num_workers=4, ", ""), given)  # two sequences need no processes of their own
    assert given["loss"].isfinite()


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """One process, which has all classes."""
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def test_the_parallel_page_runs_on_one_process(mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = Model()
    extra = {
        "mesh": mesh, "V": VOCAB, "tp": 1, "model": model, "ColwiseParallel": ColwiseParallel,
        "parallelize_module": parallelize_module, "head": nn.Linear(WIDTH, VOCAB),
        "teacher_head": nn.Linear(WIDTH, VOCAB).requires_grad_(False), "hidden": torch.randn(ROWS, WIDTH),
        "teacher_hidden": torch.randn(ROWS, WIDTH),
    }  # fmt: skip
    for given in run(ROOT / "docs" / "parallel.md", extra):
        assert given["loss"].isfinite()
