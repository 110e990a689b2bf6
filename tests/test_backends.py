"""backends(), and installs without fast kernels: one warning, and the same numbers."""

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import gpu  # before anything that imports Triton
import gpu_smoke
import pytest
import torch
from cases import BF16, F16, F32, F64, PACKAGE, batch, python_output, run_python
from torch._subclasses.fake_tensor import FakeTensorMode

import kdfast
from kdfast import choice


@pytest.fixture
def without_kernels(tmp_path: Path) -> Path:
    """A pure-Python install: the package without its compiled files."""
    shutil.copytree(PACKAGE, tmp_path / "kdfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_backends_reports_compiled_usable_and_why_not_of_each():
    facts = kdfast.backends()
    assert set(facts) == {"reference", "cpu", "triton", "cuda", "by_device"}
    for name in ("reference", "cpu", "triton", "cuda"):
        entry = facts[name]
        assert {type(entry["compiled"]), type(entry["usable"])} == {bool}
        assert (entry["why_not"] is None) == entry["usable"], "there is a reason exactly where it is not usable"
    assert facts["reference"] == {"compiled": True, "usable": True, "why_not": None}
    assert facts["by_device"]["cpu"] == ("cpu" if facts["cpu"]["usable"] else "reference")
    of_triton = "triton" if facts["triton"]["device"] == "cuda" else "reference"
    assert facts["by_device"]["cuda"] == ("cuda" if facts["cuda"]["usable"] else of_triton)
    assert {backend for backend, reason in facts["cuda"]["choice"] if reason} == {"cuda", "triton"}
    assert facts["triton"]["compiled"], "Triton compiles at the first call"
    assert (facts["triton"]["device"] is not None) == facts["triton"]["usable"]
    assert (facts["cpu"]["isa"] is not None) == facts["cpu"]["usable"]
    assert facts["cpu"]["build"]


def test_changing_the_result_of_backends_has_no_effect():
    kdfast.backends()["cpu"]["usable"] = "changed"
    kdfast.backends()["by_device"].clear()
    assert kdfast.backends()["cpu"]["usable"] != "changed"
    assert "cpu" in kdfast.backends()["by_device"]


def test_cpu_tensors_get_the_cpu_backend(cpu):
    s, t, y = batch(5, 1000)
    assert torch.equal(kdfast.kd_loss(s, t, y), kdfast.kd_loss(s, t, y, backend="cpu"))
    kinds = torch._C._dispatch_dump("kdfast::loss_grad")
    assert "CPU" in kinds, "the C++ kernels register for the CPU"


@pytest.mark.parametrize(
    ("backend", "device", "words"),
    [
        ("cpu", "meta", "takes CPU tensors, but student_logits is on meta"),
        ("cuda", "cpu", "is not usable here: it takes CUDA tensors, not cpu ones"),
    ],
)
def test_a_backend_refuses_tensors_of_another_device_and_names_it(backend, device, words, monkeypatch):
    monkeypatch.setattr(choice, "_load_cuda", lambda: None)
    s = torch.empty(2, 5, device=device)
    kdfast.KDLoss(backend="reference")(s, s)
    for loss in (kdfast.KDLoss(backend=backend), functools.partial(kdfast.kd_loss, backend=backend)):
        with pytest.raises(RuntimeError, match=f"^backend: '{backend}' {words}"):
            loss(s, s)


# why Triton may be unusable: the module that replaces it (None: the real one), and the error's words
UNUSABLE_TRITONS = {
    "missing": ("raise ImportError('there is none')", r"Triton could not be imported \(there is none\)"),
    "too old": ("__version__ = '3.6.0'", r"Triton 3\.6\.0 is too old, 3\.7 is the least: torch 2\.12 brings it"),
    "without a driver": (
        "from types import SimpleNamespace as Some\n"
        "class Driver:\n"
        "    @property\n"
        "    def active(self): raise RuntimeError('0 active drivers')\n"
        "__version__, knobs, runtime = '3.10.0', Some(runtime=Some(interpret=False)), Some(driver=Driver())",
        r"Triton 3\.10\.0 finds no GPU that it can launch on \(0 active drivers\)",
    ),
    "without a GPU": (None, r"Triton \S+ finds no GPU that it can launch on \("),
}


@pytest.mark.parametrize("what", UNUSABLE_TRITONS)
def test_an_unusable_triton_raises_only_where_it_is_asked_for(what: str, tmp_path: Path):
    stub, words = UNUSABLE_TRITONS[what]
    if stub:
        (tmp_path / "triton.py").write_text(stub)
    elif gpu.ON_DEVICE:
        pytest.skip("there is a GPU, on which Triton can launch")
    elif importlib.util.find_spec("triton") is None:
        pytest.skip("there is no Triton")
    search = os.pathsep.join(map(str, (tmp_path, PACKAGE.parent)))
    out = python_output(
        "-c",
        "import sys, torch, kdfast\n"
        "ones = torch.ones(2, 3)\n"
        "kdfast.kd_loss(ones, ones), kdfast.kd_loss(ones, ones, backend='reference')\n"
        "assert 'triton' not in sys.modules, 'imported though nothing asks for it'\n"
        "try: kdfast.kd_loss(ones, ones, backend='triton')\n"
        "except RuntimeError as error: print(error)\n"
        "facts = kdfast.backends()\n"
        "print(facts['triton']['why_not'])\n"
        "assert facts['triton'] == facts['triton'] | {'compiled': True, 'usable': False, 'device': None}\n"
        "usable = facts['cuda']['usable']\n"
        "assert facts['by_device']['cuda'] == ('cuda' if usable else 'reference')\n",
        PYTHONPATH=search,
        TRITON_INTERPRET="0",
    )
    assert re.match(rf"backend: 'triton' is not usable here: {words}.*\n{words}", out), out


def test_triton_refuses_tensors_of_a_device_it_does_not_launch_on(monkeypatch: pytest.MonkeyPatch):
    triton = pytest.importorskip("triton")
    on_gpus = SimpleNamespace(get_active_torch_device=lambda: torch.device("cuda", 0))
    monkeypatch.setattr(triton.runtime.driver, "_active", on_gpus)
    monkeypatch.setattr(choice, "_triton_takes", set())
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    s, t, _ = batch(2, 5)
    with pytest.raises(RuntimeError, match="backend: 'triton' is not usable here: Triton launches on cuda .*on cpu"):
        kdfast.kd_loss(s, t, backend="triton")
    for failure, expected in (("it is not usable", "triton"), (None, "cuda")):
        monkeypatch.setattr(choice, "cuda_failure", lambda *device, failure=failure: failure)
        facts = kdfast.backends()
        assert facts["triton"] == {"compiled": True, "usable": True, "why_not": None, "device": "cuda"}
        assert facts["by_device"] == facts["by_device"] | {"cuda": expected}


def test_backends_does_not_start_cuda_since_a_program_may_fork_afterwards(monkeypatch):
    pytest.importorskip("triton")
    from triton.backends.nvidia.driver import CudaUtils
    from triton.runtime import driver

    def start(*args: object) -> None:
        raise AssertionError("it starts CUDA")

    for name in ("_lazy_init", "current_device", "get_device_capability", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, start)
    for name, value in {"is_initialized": False, "device_count": 2}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    by_nvml = "PYTORCH_NVML_BASED_CUDA_CHECK"
    monkeypatch.delenv(by_nvml, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ.get(by_nvml) == "1" or start())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    library, load = SimpleNamespace(kdfast_cuda_version=lambda: 13000, kdfast_driver_version=lambda: 13000), ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: library if path.endswith("libkdfast_cuda.so") else load(path))
    monkeypatch.setattr(choice, "cuda_is_compiled", lambda: True)
    monkeypatch.setattr(choice, "_load_library", lambda name: None)
    monkeypatch.setattr(choice, "_load_cuda", choice._load_cuda.__wrapped__)  # which remembers nothing
    monkeypatch.setattr(CudaUtils, "__init__", lambda self: None)
    for name in ("_active", "_default"):
        monkeypatch.setattr(driver, name, None)
    facts = kdfast.backends()
    assert facts["cuda"]["usable"] and facts["triton"]["device"] == "cuda"
    assert by_nvml not in os.environ


def test_the_cuda_backend_says_why_it_is_not_usable():
    facts = kdfast.backends()["cuda"]
    if facts["usable"]:
        pytest.skip("it is usable here")
    if not facts["compiled"]:
        words = "it was built without nvcc, or with KDFAST_CUDA=0"
    elif torch.version.cuda is None:
        words = "built without CUDA"
    elif not torch.cuda.is_available():
        words = "torch sees no CUDA device"
    else:
        words = "could not be loaded|the driver supports CUDA|the best device here is"
    assert re.search(words, facts["why_not"])
    s, t, _ = batch(2, 5)
    with pytest.raises(RuntimeError, match=f"backend: 'cuda' is not usable here: .*({words})"):
        kdfast.kd_loss(s, t, backend="cuda")


def test_the_smoke_test_of_gpus_fails_where_a_backend_is_off_or_raises_or_is_not_usable(cpu, monkeypatch, capsys):
    assert gpu_smoke.check(cpu, "cpu", ((8, 1000),))
    right = gpu_smoke.loss_and_grad
    for wrong in (lambda loss, grad: (loss * 1.001, grad), lambda loss, grad: (loss, grad * 1.01), lambda loss: None):
        results = lambda *args, wrong=wrong: wrong(*right(*args)) if args[-1] == cpu else right(*args)  # noqa: E731
        monkeypatch.setattr(gpu_smoke, "loss_and_grad", results)
        assert not gpu_smoke.check(cpu, "cpu", ((8, 1000),))
    monkeypatch.setattr(choice, "_cpu_failure", "it was not built")
    assert not gpu_smoke.check(cpu, "cpu", ())
    printed = capsys.readouterr().out
    assert [printed.count(word) for word in ("  ok", "WRONG", "FAILED", "NOT USABLE: it was not built")] == [2, 4, 2, 1]


def test_a_library_that_fails_to_load_makes_the_backend_unusable(without_kernels):
    (without_kernels / "kdfast" / "libkdfast.so").write_bytes(b"not a library")
    out = python_output("-c", "import kdfast; print(kdfast.backends()['cpu'])", cwd=without_kernels)
    assert "'usable': False" in out
    assert "could not be loaded" in out


# prints the warnings of calls with backend="reference" and by default, then the error of backend="cpu"
WITHOUT_KERNELS = """
import warnings, torch, kdfast
assert not kdfast.backends()["cpu"]["usable"] and kdfast.backends()["by_device"]["cpu"] == "reference"
student, teacher = torch.randn(2, 4, 9)
student.requires_grad_()
for options in ({"backend": "reference"}, {}):
    print(options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kdfast.backends()
        for reduction in ("mean", "none", "mean", "none"):
            kdfast.kd_loss(student, teacher, reduction=reduction, **options).sum().backward()
        with torch.no_grad():
            kdfast.kd_loss(student, teacher, **options)
            if not options:
                kdfast.tempered_softmax(student)
    for warning in caught:
        print(warning.category.__name__, warning.message)
torch.testing.assert_close(kdfast.kd_loss(student, teacher), kdfast.kd_loss(student, teacher, backend="reference"))
try: kdfast.kd_loss(student, teacher, backend="cpu")
except RuntimeError as error: print(error)
"""


def test_without_kernels_default_calls_warn_once_and_named_ones_raise(without_kernels):
    printed = python_output("-c", WITHOUT_KERNELS, cwd=without_kernels)
    by_name, by_default, warning, error = printed.splitlines()
    assert (by_name, by_default) == ("{'backend': 'reference'}", "{}"), "by name the reference never warns"
    assert warning.startswith("UserWarning kdfast: no fast kernels for cpu tensors")
    assert error.startswith("backend: 'cpu' is not usable here: the compiled extension is missing")
    assert "pip install" in warning and "pip install" in error, "they say how to get the kernels"


def test_the_cpu_backend_never_warns(cpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s, t, y = batch(5, 100)
        kdfast.kd_loss(s.requires_grad_(), t, y).backward()
        kdfast.tempered_softmax(s).sum().backward()


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("where", ["meta", "fake"])
def test_meta_and_fake_tensors_give_right_shapes_dtypes_and_devices(where, dtype, recwarn):
    mode = FakeTensorMode() if where == "fake" else torch.device("meta")
    with mode:
        s = torch.empty(2, 3, 100, dtype=dtype, requires_grad=True)
        t = torch.empty(2, 3, 100)
        y = torch.empty(2, 3, dtype=torch.int64)
        for reduction in ("mean", "sum", "batchmean", "none"):
            s.grad = None
            loss = kdfast.kd_loss(s, [t, t], y, temperature=2.0, row_weight=torch.empty(2, 3), reduction=reduction)
            loss.sum().backward()
            assert loss.shape == ((2, 3) if reduction == "none" else ())
            assert loss.dtype == (F64 if dtype == F64 else F32)
            assert (s.grad.shape, s.grad.dtype, s.grad.device) == (s.shape, dtype, s.device)
        p = kdfast.tempered_softmax(s, 2.0, out_dtype=F32)
        assert (p.shape, p.dtype, p.device) == (s.shape, F32, s.device)
    assert not [str(w.message) for w in recwarn if "kdfast" in str(w.message)]


def test_importing_kdfast_warns_nothing_and_loads_no_further_package():
    """Triton and Dynamo, which take longer to import than kdfast, are imported at the first call that needs them."""
    code = "import sys, torch; before = set(sys.modules); import kdfast; print(*set(sys.modules) - before)"
    done = run_python("-W", "error", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = done.stdout.split()
    assert "kdfast.ops" in loaded
    assert not [name for name in loaded if name.split(".")[0] not in ("kdfast", *sys.stdlib_module_names)]
