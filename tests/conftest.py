"""What all tests share: the backends, the two tiers, the seed, the threads, and what GPU kernels run on."""

import datetime
import os
from collections.abc import Iterator

import emulated
import gpu  # before anything that imports Triton
import pytest
import torch
from cases import BACKENDS, ON_GPU, divergences_for

import kdfast

# Files with tests about kernels, which the cuda backend gets too. The others test code that all backends share, and use
# float64.
KERNEL_TESTS = {"test_" + name for name in (
    "autograd", "calls", "digits", "dropped_terms", "gpu_rows", "inplace", "layouts", "limits", "metrics",
    "narrow_gradients", "numbers", "on_device", "random", "row_math",
)}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every call on every backend, and the tests marked `full`")
    parser.addoption("--only-backend", choices=BACKENDS, help="only the tests of one backend")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("KDFAST_TEST_SEED", f"{datetime.date.today():%Y%m%d}")  # one for all processes
    config.addinivalue_line("markers", "beyond_cuda: of what only Triton's kernels support on a GPU")
    config.addinivalue_line("markers", "full: only in `make test-full`; another test has the same promise")


def pytest_report_header(config: pytest.Config) -> str:
    return f"kdfast: random calls are drawn from KDFAST_TEST_SEED={os.environ['KDFAST_TEST_SEED']}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    full, only = config.getoption("full"), config.getoption("only_backend")
    deselected = {item for item in items if _is_deselected(item, full, only)}
    config.hook.pytest_deselected(items=list(deselected))
    items[:] = [item for item in items if item not in deselected]


def _is_deselected(item: pytest.Item, full: bool, only: str | None) -> bool:
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    if backend == "cuda" and (item.module.__name__ not in KERNEL_TESTS or item.get_closest_marker("beyond_cuda")):
        return True
    if backend is not None and item.callspec.params.get("divergence") not in (None, *divergences_for(backend)):
        return True
    if only is not None and backend != only:
        return True
    return not full and item.get_closest_marker("full") is not None


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether this is `make test-full`."""
    return request.config.getoption("full")


def why_not(backend: str) -> str | None:
    """The backend's reason for not being usable here; None where it is usable."""
    if backend == "cuda" and not gpu.ON_DEVICE:
        return emulated.why_not()
    facts = kdfast.backends()[backend]
    return None if facts["usable"] else f"backend {backend!r} is not usable here: {facts['why_not']}"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, seed_and_threads: None) -> Iterator[str]:
    """Each backend's name; skipped with its reason where it is not usable."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    if request.param in ON_GPU:
        with emulated.kernels() if request.param == "cuda" and not gpu.ON_DEVICE else gpu.kernels():
            yield request.param
        return
    if request.param == "cpu":
        torch.set_num_threads(2)  # kernels split rows over threads, and a single row too
    yield request.param


@pytest.fixture
def cpu() -> str:
    """The cpu backend alone, for promises about its kernels."""
    if reason := why_not("cpu"):
        pytest.skip(reason)
    return "cpu"


@pytest.fixture(autouse=True)
def seed_and_threads() -> Iterator[None]:
    """A test draws the same numbers alone and among others, and leaves the number of threads as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread slows PyTorch's small operators down
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
