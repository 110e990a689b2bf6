"""A call of each kind of GPU kernel, small, for compute-sanitizer: `compute-sanitizer python tests/some_calls.py`."""

import itertools

import torch
from cases import batch

import kdfast

OPTIONS = {"label_smoothing": 0.1, "softcap": 20.0, "standardize": True, "return_metrics": True}

torch.set_default_device("cuda")
usable = [name for name in ("cuda", "triton") if kdfast.backends()[name]["usable"]]
kinds = ("cross_entropy", "symmetric_kl", "jsd", "logit_mse", "dkd")
for backend, divergence, vocab, options in itertools.product(usable, kinds, (100, 4099, 49_152, 70_001), ({}, OPTIONS)):
    for dtype, reduction in ((torch.bfloat16, "mean"), (torch.float32, "none")):
        student, teacher, labels = batch(3, vocab, dtype)
        settings = {"divergence": divergence, "temperature": 2, "reduction": reduction, "backend": backend, **options}
        found = kdfast.kd_loss(student.requires_grad_(), teacher, labels, **settings)
        (2 * (found[0] if options else found).sum()).backward()
torch.cuda.synchronize()
print("called:", ", ".join(usable))
