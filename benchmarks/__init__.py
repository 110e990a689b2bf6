"""How fast kdfast is beside a memory floor, eager PyTorch, torch.compile and Liger-Kernel."""
