"""ms-swift's tests, in a process of their own.

The import of its GKDTrainer deletes the constructors of TRL's SFTTrainer and GKDTrainer, and changes what
transformers.Trainer reads of its arguments, so that other trainers do not work in the same process.
"""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def test_ms_swift() -> None:
    options = ["-p", "no:cacheprovider", "--confcutdir", str(FOLDER), "-q", "-W", "ignore"]
    tests = [str(FOLDER / name) for name in ("swift_loss_tests.py", "swift_process_tests.py", "swift_liger_tests.py")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests], capture_output=True, text=True, timeout=400
    )
    print(run.stdout, run.stderr)
    assert run.returncode == 0
