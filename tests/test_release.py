"""What a release says of itself is the same in every file, and workflows call what there is. Nothing is built."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import kdfast

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="there is no checkout around the tests")


def text(path: str) -> str:
    return (ROOT / path).read_text()


def pinned(extra: str) -> dict[str, str]:
    """The packages of an extra that have one version."""
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    return dict(requirement.split("==") for requirement in extras[extra] if "==" in requirement.split(";")[0])


# -- version -----------------------------------------------------------------------------------------------------------


def test_the_version_is_in_one_place():
    project = tomllib.loads(text("pyproject.toml"))
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "kdfast.__version__"}
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', text("kdfast/__init__.py"), re.MULTILINE)
    number = re.escape(kdfast.__version__)
    others = [
        path
        for path in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in")
        if re.search(number, text(path))
    ]
    assert others == []


def test_the_changelog_begins_with_this_version_and_every_version_has_a_date():
    sections = re.findall(r"^## \[(.*?)\](.*)$", text("CHANGELOG.md"), re.MULTILINE)
    versions = [version for version, _ in sections if version != "Unreleased"]
    assert versions[0] == kdfast.__version__
    assert versions == sorted(versions, key=lambda version: tuple(map(int, version.split("."))), reverse=True)
    assert [
        version
        for version, date in sections
        if version != "Unreleased" and not re.fullmatch(r" - \d{4}-\d\d-\d\d", date)
    ] == []


def test_security_says_that_this_version_is_supported():
    series = kdfast.__version__.rsplit(".", 1)[0]
    assert f"| {series} | yes |" in text("SECURITY.md")


# -- pre-commit --------------------------------------------------------------------------------------------------------


def test_pre_commit_has_the_versions_of_make_lint():
    repositories = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    revisions = {each["repo"].rsplit("/", 1)[1]: each["rev"] for each in repositories if each["repo"] != "local"}
    lint = pinned("lint")
    assert revisions == {"ruff-pre-commit": f"v{lint['ruff']}", "mirrors-clang-format": f"v{lint['clang-format']}"}
    local = next(each["hooks"] for each in repositories if each["repo"] == "local")
    assert [hook["entry"] for hook in local] == [".venv/bin/mypy"]  # the lint extra's own


def test_cuda_sources_are_formatted_by_pre_commit_and_by_make_lint():
    repositories = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    (hook,) = next(each["hooks"] for each in repositories if each["repo"].endswith("clang-format"))
    assert "cuda" in hook["types_or"]  # .cu and .cuh
    assert "-name '*.cu'" in text("Makefile") and "-name '*.cuh'" in text("Makefile")


# -- workflows ---------------------------------------------------------------------------------------------------------


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def steps(workflow: Path) -> list[dict]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


def test_there_are_workflows_for_ci_and_wheels():
    assert {"ci.yml", "wheels.yml"} <= {path.name for path in WORKFLOWS}
    commands = [step.get("run", "") for path in WORKFLOWS for step in steps(path)]
    assert {"bash .ci/run", "make wheels", "make build-check", "make hub-check"} <= set(commands)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_targets_and_files_that_exist(workflow):
    targets = set(re.findall(r"^([a-z][a-z-]*):", text("Makefile"), re.MULTILINE))
    for command in (step["run"] for step in steps(workflow) if "run" in step):
        assert set(re.findall(r"^make ([\w-]+)", command)) <= targets, command
        for path in re.findall(r"^(?:bash|python) (\S+)", command):
            assert (ROOT / path).exists(), command


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_commits_and_say_which_version_that_is(workflow):
    used = re.findall(r"uses: (.*)$", workflow.read_text(), re.MULTILINE)
    assert used
    assert [each for each in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each)] == []


def test_only_a_maintainer_starts_what_publishes():
    publish = yaml.safe_load(text(".github/workflows/wheels.yml"))["jobs"]["publish"]
    for condition in ("workflow_dispatch", "inputs.publish", "refs/tags/v"):
        assert condition in publish["if"]


# -- the Hub kernel ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    spec = importlib.util.spec_from_file_location("hub_kernel", ROOT / "tools" / "hub_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("hub") / "kdfast"
    module.write(folder)
    return folder


def test_a_hub_kernel_names_neither_the_package_nor_its_namespaces(hub):
    for path in (hub / "torch-ext").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("kdfast") for name in node.names), path
            if isinstance(node, ast.ImportFrom):
                assert node.level > 0 or not node.module.startswith("kdfast"), path
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.fullmatch(r"kdfast(_\w+)?(::.*)?", node.value), (path, node.value)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.ops":
                assert not node.attr.startswith("kdfast"), (path, node.attr)


def test_a_hub_kernel_imports_nothing_but_torch_triton_and_the_standard_library(hub):
    allowed = {*sys.stdlib_module_names, "torch", "triton", "typing_extensions"}
    for path in (hub / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {name.name.split(".")[0] for name in node.names} <= allowed, path
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, path


def test_build_toml_names_every_c_plus_plus_source_once(hub):
    settings = tomllib.loads((hub / "build.toml").read_text())
    named = [*settings["torch"]["src"], *(path for part in settings["kernel"].values() for path in part["src"])]
    there = {str(path.relative_to(hub)) for path in hub.rglob("*.cpp")} - {"csrc/cpu/row_kernels.cpp"}  # included
    assert sorted(named) == sorted(there)
