"""Without a GPU and without the emulator of one Triton's own interpreter runs the kernels: here a part of the suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hanging import SECONDS

HERE = Path(__file__).parent
# Limits and dropped rows: a tail and rows of several tiles; and calls of the list, by their numbers.
SUBSET = (
    "test_limits.py::test_a_given_probability_of_0_masks_its_class[triton-jsd-probs-5000]",
    "test_dropped_terms.py::test_the_values_of_dropped_rows_have_no_effect[triton-reverse_kl]",
    "test_dropped_terms.py::test_a_teacher_of_weight_0_is_not_read[triton-geometric]",
    "test_layouts.py::test_logits_may_have_any_number_of_dimensions[triton-shape2]",
)


def test_a_part_of_the_suite_passes_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"KDFAST_TEST_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / test) for test in SUBSET)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    outcome = done.stdout.splitlines()[-1]
    assert outcome.startswith(f"{len(SUBSET)} passed"), outcome
