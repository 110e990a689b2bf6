"""Emulator for PTX kernels on numpy: runs Triton and CUDA kernels without a device and checks their accesses."""

from . import memops as _memops  # noqa: F401  registers the memory instructions
from .errors import PTXError
from .machine import Options
from .report import LaunchReport

__all__ = ["PTXError", "Options", "LaunchReport"]
