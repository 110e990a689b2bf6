"""The examples and benchmarks of the README run, print their tables and write their pictures."""

import csv
import importlib.util
import os
import re
from pathlib import Path

import pytest
from cases import PACKAGE, python_output

from kdfast.divergences import names

ROOT = Path(__file__).parent.parent
MISSING = [name for name in ("sklearn", "matplotlib", "rich", "tokenizers") if importlib.util.find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'kdfast[demo]'")


def run(folder: Path, *arguments: str) -> str:
    """What Python prints with these arguments in an empty folder."""
    path = os.pathsep.join([str(PACKAGE.parent), str(ROOT)])
    return python_output(*arguments, cwd=folder, PYTHONPATH=path, MPLBACKEND="Agg")


def assert_png(file: Path) -> None:
    assert file.read_bytes().startswith(b"\x89PNG"), f"{file} is not a PNG"
    assert file.stat().st_size > 5000, f"{file} is nearly empty"


@pytest.mark.parametrize(
    ("arguments", "words", "picture"),
    [
        pytest.param(("distill_digits.py",), ["teacher"], "distill_digits.png", id="digits"),
        pytest.param(
            ("distill_digits.py", "--compare", "--seeds", "2"), names(), "distill_digits_compare.png", id="compare"
        ),
        # the paper's test errors of teacher, student alone, distilled student
        pytest.param(("distill_mnist.py",), ["67", "146", "74"], None, id="mnist"),
    ],
)
def test_an_example_prints_a_table_and_writes_a_picture(tmp_path, arguments, words, picture):
    printed = run(tmp_path, str(ROOT / "examples" / arguments[0]), *arguments[1:], "--quick").lower()
    assert [word for word in words if word not in printed] == []
    if picture:
        assert_png(tmp_path / picture)


def test_both_losses_of_distill_lm_train_alike(tmp_path):
    printed = run(tmp_path, str(ROOT / "examples" / "distill_lm.py"), "--quick")
    (apart,) = re.findall("at most (.*) of the loss apart", printed)
    assert float(apart) < 1e-5
    assert_png(tmp_path / "distill_lm.png")


def test_a_student_trains_from_a_cache_that_was_interrupted(tmp_path):
    printed = run(tmp_path, str(ROOT / "examples" / "distill_offline.py"), "--quick")
    assert "interrupted, and resumed" in printed
    assert "nan" not in printed
    assert_png(tmp_path / "distill_offline.png")


def test_a_mesh_of_processes_trains_as_one_process_does(tmp_path):
    ranks = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"
    printed = run(tmp_path, *ranks, str(ROOT / "examples" / "distill_parallel.py"), "--quick")
    (apart,) = re.findall("at most (.*) of the loss apart", printed)
    assert float(apart) < 1e-5
    assert_png(tmp_path / "distill_parallel.png")


def test_the_linear_benchmark_prints_time_memory_and_shares(tmp_path):
    size = "--rows", "16", "--vocab", "300", "--rounds", "1"
    for dtype in ("fp32", "bf16"):
        printed = run(tmp_path, "-m", "benchmarks.linear", *size, "--dtype", dtype)
        for word in ("kdfast jsd", "chunked jsd", "MB", "row kernel"):
            assert word in printed
    assert "(16, 300) fp32: " in run(tmp_path, "-m", "benchmarks.linear", "--vocab", "300", "--growth", "16", "32")


def test_the_benchmark_of_two_checkouts_prints_a_ratio(tmp_path):
    printed = run(tmp_path, "-m", "benchmarks.compare", str(ROOT), "--case", "8x10", "--rounds", "3")
    (ratio,) = re.findall(r"kdfast +[\d.]+ +[\d.]+ +([\d.]+) \(", printed)
    assert float(ratio) > 0


# small cases and one round: they run; their speed means nothing
@pytest.mark.parametrize(
    "arguments",
    [
        ("--case", "8x10-fp32", "--only", "eager", "--rounds", "1"),
        ("--case", "4x300-bf16", "--dry-run", "--rounds", "1"),
    ],
    ids=["cpu", "gpu dry run"],
)
def test_benchmarks_write_tables_and_a_plot(tmp_path, arguments):
    if "--dry-run" in arguments:
        pytest.importorskip("triton")
    out = tmp_path / "results"
    assert arguments[1] in run(tmp_path, "-m", "benchmarks", *arguments, "--out", str(out))
    (page,) = out.glob("*.md")
    (table,) = out.glob("*.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    ours, eager = ([row for row in rows if row["candidate"].startswith(name)] for name in ("kdfast", "eager"))
    for row in (*ours, *eager):
        if row["median_ms"]:
            assert float(row["loss_error"]) < 2e-2
            assert float(row["gradient_error"]) < 2e-2
            assert row["machine"] in page.read_text()
    assert any(row["median_ms"] and float(row["eager_speedup"]) > 0 for row in ours)
    (png,) = out.glob("*.png")
    assert_png(png)
