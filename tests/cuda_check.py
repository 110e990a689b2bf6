"""Checks that the CUDA kernels' library loads into a CUDA build of torch and registers; `make cuda-check`."""

import ctypes
import os
from pathlib import Path

import torch

import kdfast
from kdfast.ops import CUDA_KERNELS

assert torch.version.cuda, f"torch {torch.__version__} is built without CUDA"
library = Path(kdfast.__file__).with_name("libkdfast_cuda.so")
assert library.exists(), "the CUDA kernels were not built: nvcc was not found, or KDFAST_CUDA is 0"
torch.ops.load_library(str(library))
for name in CUDA_KERNELS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kdfast_cuda_rows::{name}", "CUDA"), name
# as csrc/cuda/call.h looks it up, at the first call
torch_cuda = ctypes.CDLL("libtorch_cuda.so", os.RTLD_LAZY | os.RTLD_NOLOAD)
assert torch_cuda.aoti_torch_get_current_cuda_stream, "the function that knows the current stream"
facts = kdfast.backends()["cuda"]
assert facts["compiled"], facts
assert facts["usable"] == torch.cuda.is_available(), facts
print(f"{library.name} is loaded into torch {torch.__version__}; the cuda backend here: {facts['why_not'] or 'usable'}")
