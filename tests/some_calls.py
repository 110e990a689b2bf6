"""A call of each kind of GPU kernel, small, for compute-sanitizer: `compute-sanitizer python tests/some_calls.py`."""

import itertools
from typing import Any

import torch
from cases import BF16, F32, batch, divergences_for

import kdfast

KINDS = ("cross_entropy", "symmetric_kl", "jsd", "logit_mse", "dkd")
VOCABS = (100, 4099, 49_152, 70_001, 1_000_001)  # a warp, a block, clusters, and more than an H100 keeps
IN_BOTH = {"label_smoothing": 0.1, "return_metrics": True}
OPTIONS = {"cuda": IN_BOTH, "triton": IN_BOTH | {"softcap": 20.0, "standardize": True}}
RESULTS: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (BF16, {}), (F32, {"reduction": "none"}), (BF16, {"inplace": True}),
)  # fmt: skip


def call(backend: str, vocabs: tuple[int, ...] = VOCABS) -> None:
    kinds = [kind for kind in KINDS if kind in divergences_for(backend)]
    calls = itertools.product(kinds, vocabs, ({}, OPTIONS[backend]), RESULTS)
    for divergence, vocab, options, (dtype, result) in calls:
        student, teacher, labels = batch(3, vocab, dtype)
        student.requires_grad_()
        logits = 1 * student if "inplace" in result else student  # a leaf cannot be overwritten
        settings = {"divergence": divergence, "temperature": 2, "backend": backend, **options, **result}
        found = kdfast.kd_loss(logits, teacher, labels, **settings)
        (2 * (found[0] if options else found).sum()).backward()


if __name__ == "__main__":
    torch.set_default_device("cuda")
    usable = [name for name in OPTIONS if kdfast.backends()[name]["usable"]]
    for name in usable:
        call(name)
    torch.cuda.synchronize()
    print("called:", ", ".join(usable))
