"""What one process has compiled, the next one finds in Triton's cache on disk, whichever kernel it asks for first."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest

pytest.importorskip("triton")

KEYS = """
import json, sys
import triton
from kdfast.triton import ops, reductions, row_kernels, softmax_kernels, tiny_rows

functions = [f for module in (row_kernels, reductions, softmax_kernels, tiny_rows) for f in vars(module).values()]
functions = [f for f in functions if isinstance(f, triton.JITFunction)][:: int(sys.argv[1])]
print(json.dumps({f"{f.__module__}.{f.__name__}": f.cache_key for f in functions}))
"""

LAUNCHES = """
import json, sys
import gpu, kdfast, torch, triton
from cases import batch

found = {True: [], False: []}
triton.knobs.compilation.listener = lambda src, cache_hit, **others: found[cache_hit].append(src.name)
with gpu.kernels():
    student, teacher, labels = batch(2, 5)
    calls = [
        lambda: kdfast.kd_loss(student, teacher, labels, backend="triton"),
        lambda: torch.ops.kdfast_triton.tempered_softmax(student, None, 2.0, False, torch.float32),
    ]
    for call in calls[:: int(sys.argv[1])]:
        call()
print(json.dumps({"compiled": found[False], "in the cache": found[True]}))
"""


def processes(code: str, **environment: str) -> list[Any]:
    """What two processes print, of which the second goes through its list from the end; sets have another order too."""
    printed = []
    for step, seed in (("1", "1"), ("-1", "2")):
        environment["PYTHONHASHSEED"] = seed
        command = [sys.executable, "-c", code, step]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(json.loads(done.stdout))
    return printed


def test_every_function_has_the_same_key_in_all_processes() -> None:
    first, second = processes(KEYS, TRITON_INTERPRET="0")
    assert "kdfast.triton.row_kernels.loss_grad_short" in first
    assert first == second


@pytest.mark.skipif(gpu.INTERPRETED, reason=gpu.NEEDS_EMULATOR)
def test_nothing_is_compiled_that_another_process_has_compiled(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    first, second = processes(LAUNCHES, TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=path)
    assert set(first["compiled"]) == {"stats", "softmax_short"}
    assert second["compiled"] == []
    assert sorted(second["in the cache"]) == sorted(first["compiled"])
