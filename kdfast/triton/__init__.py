"""The Triton backend: the row kernels of csrc/cpu, for NVIDIA and AMD GPUs. Imported when it is first asked for."""
