"""What all tests share: the backends, the seed, the threads, and what Triton's kernels run on."""

import inspect
from collections.abc import Iterator

import emulated
import gpu  # before anything that imports Triton
import pytest
import torch
from cases import BACKENDS, THINNED, takes

import kdfast

# Of the tests of all backends, those about kernels, which the cuda backend has too; the others are about what is
# written once for all, and have float64 in their midst.
OF_KERNELS = {"test_" + name for name in (
    "alpha", "autograd", "dropped_terms", "inplace", "layouts", "limits", "metrics", "numbers", "options", "settings",
)}  # fmt: skip


def why_not(backend: str) -> str | None:
    """Why a backend is not usable here, by its own account."""
    if backend == "cuda" and not gpu.ON_DEVICE:
        return emulated.why_not()
    facts = kdfast.backends()[backend]
    return None if facts["usable"] else f"backend {backend!r} is not usable here: {facts['why_not']}"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thinned_to(condition): for Triton and CUDA only these parameters, see cases.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = {item for item in items if _thinned_out(item)}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


def _thinned_out(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("backend") not in THINNED:
        return False
    if not all(takes(parameters["backend"], value) for value in parameters.values()):
        return True
    if parameters["backend"] == "cuda" and item.module.__name__ not in OF_KERNELS:
        return True
    if gpu.INTERPRETED and isinstance(vocab := parameters.get("vocab"), int) and vocab > 40_000:
        return True  # the interpreter takes a minute for such rows, and has had some that are split and read twice
    for mark in item.iter_markers("thinned_to"):
        (condition,) = mark.args
        wanted = inspect.signature(condition).parameters.keys() & parameters.keys()
        if not condition(**{name: parameters[name] for name in wanted}):
            return True
    return False


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, seed_and_threads: None) -> Iterator[str]:
    """The name of each backend in turn; skipped with the reason where it is not usable."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    if request.param in THINNED:
        with emulated.kernels() if request.param == "cuda" and not gpu.ON_DEVICE else gpu.kernels():
            yield request.param
        return
    if request.param == "cpu":
        torch.set_num_threads(2)  # kernels split rows over threads, and a single row too
    yield request.param


@pytest.fixture
def cpu() -> str:
    """The compiled backend alone, for promises that are about its kernels."""
    if reason := why_not("cpu"):
        pytest.skip(reason)
    return "cpu"


@pytest.fixture(autouse=True)
def seed_and_threads() -> Iterator[None]:
    """Every test draws the same numbers alone as in company, and leaves the number of threads as it found it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's own small operations are the slower for a second one, by far on a busy machine
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
