"""What Liger's own kernels give for liger_cases, on a CPU.

``python liger_interpreted.py FILE`` writes it. Triton interprets the kernels, as TRITON_INTERPRET=1 asks, which has to
be set before Triton is imported.
"""

import functools
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from liger_cases import CASES, FALLBACKS, masked, run

from kdfast.integrations import liger
from kdfast.integrations.patching import FallbackWarning


@functools.cache
def interpreted() -> dict[str, Any]:
    """Liger's results, by case; kdfast's of the cases that run Liger's kernels, and their warnings."""
    here = Path(__file__)
    paths = [str(here.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.pt"
        command = [sys.executable, here, path]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return torch.load(path)


def _as_on_a_device() -> None:
    """Triton's interpreter leaves numbers as Python's, where a device gets float32, and has no libdevice."""
    import liger_kernel.ops.cross_entropy
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(
                interpreter.TensorHandle(interpreter.np.array([argument], "float32"), tl.float32), tl.float32
            )
        return convert(argument)

    def tanh(x: Any) -> Any:
        return 2 * tl.sigmoid(2 * x) - 1

    interpreter._implicit_cvt = with_floats
    liger_kernel.ops.cross_entropy.tanh = tanh


if __name__ == "__main__":
    import liger_kernel.transformers

    _as_on_a_device()
    theirs = {case.name: run(case, liger_kernel.transformers) for case in [*CASES, *FALLBACKS]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fallbacks = {case.name: run(case, liger) for case in FALLBACKS}
    messages = [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]
    results = {"theirs": theirs, "fallbacks": fallbacks, "warnings": messages}
    torch.save(results | {"masked": masked(liger_kernel.transformers)}, sys.argv[1])
