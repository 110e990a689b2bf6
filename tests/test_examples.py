"""What the README gives a reader to run, runs, and leaves behind what it says."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hanging import SECONDS

import kdfast
from kdfast.divergences import names

ROOT = Path(__file__).parent.parent
MISSING = [name for name in ("sklearn", "matplotlib", "rich", "tokenizers") if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'kdfast[demo]'")


def run(folder: Path, *arguments: str) -> str:
    """Runs Python with these arguments in an empty folder, and returns what it printed."""
    path = os.pathsep.join([str(Path(kdfast.__file__).parent.parent), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def assert_png(file: Path) -> None:
    assert file.read_bytes().startswith(b"\x89PNG"), f"{file} is no PNG"
    assert file.stat().st_size > 5000, f"{file} is next to empty"


def test_distill_digits_ends_with_a_table_and_a_picture(tmp_path):
    printed = run(tmp_path, str(ROOT / "examples" / "distill_digits.py"), "--quick")
    assert "teacher" in printed.lower()
    assert_png(tmp_path / "distill_digits.png")


def test_distill_digits_compares_every_divergence(tmp_path):
    printed = run(tmp_path, str(ROOT / "examples" / "distill_digits.py"), "--compare", "--quick", "--seeds", "2")
    for name in names():
        assert name in printed
    assert_png(tmp_path / "distill_digits_compare.png")


def test_distill_mnist_sets_its_figures_beside_the_papers(tmp_path):
    printed = run(tmp_path, str(ROOT / "examples" / "distill_mnist.py"), "--quick")
    for figure in ("67", "146", "74"):  # the paper's test errors of teacher, student alone, distilled student
        assert figure in printed


def test_distill_lm_has_two_curves_that_lie_on_each_other(tmp_path):
    printed = run(tmp_path, str(ROOT / "examples" / "distill_lm.py"), "--quick")
    (apart,) = re.findall("at most (.*) of the loss apart", printed)
    assert float(apart) < 1e-5
    assert_png(tmp_path / "distill_lm.png")


def test_the_linear_benchmark_says_time_memory_and_shares(tmp_path):
    size = "--rows", "16", "--vocab", "300", "--rounds", "1"
    for dtype in ("fp32", "bf16"):
        printed = run(tmp_path, "-m", "benchmarks.linear", *size, "--dtype", dtype)
        for word in ("kdfast jsd", "chunked jsd", "MB", "row kernel"):
            assert word in printed
    assert "(16, 300) fp32: " in run(tmp_path, "-m", "benchmarks.linear", "--vocab", "300", "--growth", "16", "32")


def test_benchmarks_write_a_table_a_csv_and_a_plot(tmp_path):
    # one small case, its floor alone, one round: that it runs, not how fast
    out = tmp_path / "results"
    printed = run(
        tmp_path, "-m", "benchmarks", "--case", "8x10-fp32", "--only", "eager", "--rounds", "1", "--out", str(out)
    )
    assert "8x10" in printed
    (csv,) = out.glob("*.csv")
    assert len(csv.read_text().splitlines()) >= 2, "a head and a line"
    (png,) = out.glob("*.png")
    assert_png(png)


def test_the_gpu_benchmark_runs_dry(tmp_path):
    pytest.importorskip("triton")
    printed = run(tmp_path, "-m", "benchmarks.gpu", "--dry-run", "--case", "4x300-bf16", "--repeats", "1", "--out", ".")
    assert "4x300" in printed
    for kind in ("md", "csv", "png"):
        assert list(tmp_path.glob(f"*.{kind}")), f"no report as {kind}"
    (png,) = tmp_path.glob("*.png")
    assert_png(png)
