"""The speed of kdfast, compared with a memory floor, eager PyTorch, torch.compile and Liger-Kernel."""
