"""Without a GPU and without the emulator of one Triton's own interpreter runs the kernels: here a part of the suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# A tail, rows of more than one tile, rows that are read twice, ensembles, rows that drop out.
SUBSET = (
    "test_numbers.py::test_every_length_and_dtype[triton-7-float32-float32]",
    "test_numbers.py::test_every_length_and_dtype[triton-1000-bfloat16-bfloat16]",
    "test_numbers.py::test_every_length_and_dtype[triton-4097-float32-float32]",
    "test_numbers.py::test_every_length_and_dtype[triton-2049-float64-float64]",
    "test_settings.py::test_every_divergence_of_every_teacher[triton-100-reverse_kl-logits-arithmetic-bfloat16]",
    "test_settings.py::test_every_divergence_of_every_teacher[triton-40000-reverse_kl-log_probs-geometric-float32]",
    "test_dropped_terms.py::test_dropped_rows_may_hold_anything[triton-nan-mean-bfloat16]",
)


def test_a_part_of_the_suite_passes_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"KDFAST_TEST_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / test) for test in SUBSET)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    outcome = done.stdout.splitlines()[-1]
    assert outcome.startswith(f"{len(SUBSET)} passed"), f"thinned out, so name another of its grid: {outcome}"
