"""A divergence is added by CONTRIBUTING.md's recipe: its snippets are read from there, run unchanged, and judged."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import eager
import pytest
import torch
from cases import BF16, F32, F64, batch, name
from judge import judge, run
from torch import Tensor
from torch.autograd import gradcheck

import kdfast
from kdfast import divergences

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "CONTRIBUTING.md"
NAME = "triangular"
COMPILER = shutil.which("c++")

pytestmark = pytest.mark.skipif(not RECIPE.exists(), reason="there is no checkout around the tests")
on_reference_and_triton = pytest.mark.parametrize("backend", ("reference", "triton"), indirect=True)


def snippet(place: str) -> str:
    """The code whose first line names this place."""
    (code,) = re.findall(rf"```\w+\n(?:#|//) {re.escape(place)}\n(.*?)```", RECIPE.read_text(), re.DOTALL)
    return code


def entry_of(place: str, namespace: dict[str, Any]) -> Any:
    """The value of a snippet that is an entry of a table."""
    return eval(f"{{{snippet(place)}}}", namespace)[NAME]


@pytest.fixture(autouse=True)
def triangular(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Adds the entries to the tables, from outside."""
    entry = entry_of("kdfast/divergences.py, in DIVERGENCES", vars(divergences))
    monkeypatch.setitem(divergences.DIVERGENCES, NAME, entry)
    namespace = dict(vars(eager))
    exec(snippet("tests/eager.py"), namespace)
    monkeypatch.setitem(eager._DIVERGENCES, NAME, entry_of("tests/eager.py, in _DIVERGENCES", namespace))
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton":
        from kdfast.triton import divergences as kernels

        file = tmp_path / "own_kernels.py"  # Triton reads the source of its functions
        imports = "import triton\nimport triton.language as tl\n\n\n"
        file.write_text(imports + snippet("kdfast/triton/divergences.py"))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        own = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(own)
        namespace = vars(own) | {"divergence": kernels.divergence}
        entry = entry_of("kdfast/triton/divergences.py, in DIVERGENCES", namespace)
        monkeypatch.setitem(kernels.DIVERGENCES, NAME, entry)


def gradient(p: Tensor, q: Tensor) -> Tensor:
    """dD/dz for q = softmax(z), from the derivative by hand: (q - p) (q + 3 p) / (p + q)^2."""
    psi = q * (q - p) * (q + 3 * p) / (p + q).square()
    return psi - q * psi.sum(-1, True)


@on_reference_and_triton
@pytest.mark.parametrize(("vocab", "dtype"), [(17, F32), (17, BF16), (17, F64), (2049, F32)], ids=name)
def test_an_added_divergence_is_as_accurate_as_the_others(backend: str, dtype: torch.dtype, vocab: int) -> None:
    settings = {"backend": backend, "divergence": NAME}
    judge(*batch(3, vocab, dtype), temperature=2, **settings)
    for scale in (30.0, 0.01):  # no lower T: Triton's interpreter has no fused multiply-add
        judge(*batch(3, vocab, dtype, scale=scale)[:2], temperature=3.7, **settings)


@on_reference_and_triton
def test_an_added_divergence_has_its_closed_form(backend: str) -> None:
    s, t, _ = batch(4, 17, F64)
    temperature = 3.0
    p, q = (torch.softmax(x / temperature, -1) for x in (t, s))
    settings = {"backend": backend, "divergence": NAME, "temperature": temperature, "reduction": "none"}
    loss, grad = run(s, t, None, torch.ones(4, dtype=F64), **settings)
    truth = eval(snippet("tests/test_reference.py, in truth").split(":")[1].rstrip(",\n"), {"p": p, "q": q})
    # fp64, a few dozen operations on numbers of size 1 times T^2
    torch.testing.assert_close(loss, temperature**2 * truth, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad, temperature * gradient(p, q), rtol=1e-13, atol=1e-13)
    psi = divergences.DIVERGENCES[NAME].psi(p, q, p.log(), q.log(), 0.0)  # may lack a multiple of q
    torch.testing.assert_close(psi - q * psi.sum(-1, True), gradient(p, q), rtol=1e-13, atol=1e-14)


@on_reference_and_triton
def test_an_added_divergence_is_0_at_equality_and_2_when_disjoint(backend: str) -> None:
    s, t, _ = batch(2, 17, F32)
    s[0] = t[0]
    s[1, :8] = t[1, 8:] = -torch.inf  # p = 0 or q = 0, never both
    s[:, 3] = t[:, 3] = -torch.inf  # a masked class: 0 / 0
    loss, grad = run(s, t, None, torch.ones(2), backend=backend, divergence=NAME, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 2.0]), rtol=0, atol=1e-6)
    assert grad.abs().max() <= 1e-7  # both are extremes of the divergence
    assert (grad[:, 3] == 0).all()


@pytest.mark.parametrize("target", ("logits", "probs"))
def test_an_added_divergence_passes_gradcheck(target: str) -> None:
    s, t, y = batch(4, 5, F64)
    teacher = t if target == "logits" else 0.97 * torch.softmax(t, -1)  # p need not sum to 1
    settings = {"divergence": NAME, "temperature": 3, "target": target, "backend": "reference"}
    assert gradcheck(lambda s: kdfast.kd_loss(s, teacher, y, **settings), s.requires_grad_())


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler was found")
def test_the_cpp_struct_of_an_added_divergence_has_the_same_values(tmp_path: Path) -> None:
    """In the CPU kernels' own pass over vectors, in fp64."""
    source = f"""
        #include <cstdio>
        #include "cpu/pointwise_sums.h"
        namespace kdfast {{ namespace {{
        {snippet("csrc/divergences.h")}
        #define X(name, Type) using name = Type;
        {snippet("csrc/divergence_names.h, in KDFAST_DIVERGENCES")}
        }} }}
        using namespace kdfast;
        int main() {{
          double p[Types<double>::kLanes], q[Types<double>::kLanes];
          while (std::scanf("%lf %lf", p, q) == 2) {{
            store(p, splat(p[0]));
            store(q, splat(q[0]));
            PointwiseSums<DoubleV> sums{{}};
            add_phi_and_psi<double, {NAME}>({{q, p, nullptr, p}}, 1, splat(1.0), splat(1.0), 0, sums);
            std::printf("%.17g %.17g\\n", sums.phi[0] + {NAME}::constant(1.0, 1.0), sums.psi[0]);
          }}
        }}"""
    (tmp_path / "own.cpp").write_text(source)
    program = tmp_path / "own"
    command = [COMPILER, "-std=c++17", "-w", f"-I{ROOT / 'csrc'}", tmp_path / "own.cpp", "-o", program]
    subprocess.run(command, check=True)
    pairs = [(0.25, 0.5), (0.5, 0.25), (0.3, 0.3), (0.0, 0.0), (0.0, 0.4), (0.4, 0.0), (1e-300, 0.1), (0.1, 1e-300)]
    fed = "\n".join(f"{p!r} {q!r}" for p, q in pairs)
    printed = subprocess.run([program], input=fed, capture_output=True, text=True, check=True).stdout
    got = torch.tensor([float(number) for number in printed.split()], dtype=F64).view(-1, 2)
    p, q = torch.tensor(pairs, dtype=F64).unbind(1)
    entry = divergences.DIVERGENCES[NAME]
    want = torch.stack([f(p, q, p.log(), q.log(), 0.0) for f in (entry.phi, entry.psi)], 1)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-16)


def test_the_cpu_backend_has_no_kernel_for_an_added_divergence(cpu: str) -> None:
    s, t, y = batch(2, 5)
    with pytest.raises(ValueError, match="no CPU kernel for 'triangular'"):
        kdfast.kd_loss(s, t, y, divergence=NAME, backend=cpu)
