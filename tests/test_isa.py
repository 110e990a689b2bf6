"""Every instruction set that this machine has gives the same care: the value tests in a process of its own for each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hanging import SECONDS

import kdfast
from kdfast import choice

HERE = Path(__file__).parent
FILES = [str(HERE / f"test_{name}.py") for name in ("calls", "limits")]


def _isas() -> list[str]:
    """All but the best one, which every other test runs on."""
    return list(choice.usable_isas())[:-1] if kdfast.backends()["cpu"]["usable"] else []


def _run(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"KDFAST_CPU_ISA": isa}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)


@pytest.mark.parametrize("isa", _isas())
def test_every_instruction_set_gives_the_right_numbers(cpu: str, isa: str) -> None:
    chosen = _run(isa, "-c", "import kdfast; print(kdfast.backends()['cpu']['isa'])")
    assert chosen.stdout.strip() == isa, chosen.stderr
    done = _run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", "--only-backend", "cpu", *FILES)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_an_instruction_set_that_is_not_there_is_an_error(cpu: str) -> None:
    done = _run("mmx", "-c", "import torch, kdfast; kdfast.kd_loss(torch.ones(2, 3), torch.ones(2, 3), backend='cpu')")
    assert done.returncode == 1  # an exception, not a crash
    assert "KDFAST_CPU_ISA" in done.stderr
    assert "mmx" in done.stderr
