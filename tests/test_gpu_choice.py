"""Which kernels CUDA tensors get: kdfast/gpu_choice.py's table, and devices that are too old for CUDA's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import BF16, F32, F64

from kdfast import choice, gpu_choice
from kdfast.arguments import Settings
from kdfast.modules import KDLoss

BOTH = ("cuda", "triton")


@pytest.mark.parametrize(
    ("usable", "capability", "rows", "vocab", "change", "expected"),
    [
        (BOTH, 90, 4096, 32000, {}, "cuda"),
        (BOTH, 90, 8, 151936, {}, "cuda"),
        (BOTH, 80, 4096, 151936, {}, "cuda"),
        (BOTH, 80, 8, 151936, {}, "triton"),  # rows are split over the device
        (BOTH, 80, 65, 151936, {}, "triton"),
        (BOTH, 80, 172, 151936, {}, "triton"),  # of 216 that are worked off at once
        (BOTH, 80, 173, 151936, {}, "cuda"),
        (BOTH, 80, 300, 151936, {}, "triton"),  # the last 84 would be alone
        (["cuda"], 80, 8, 151936, {}, "cuda"),  # the only choice
        (BOTH, 80, 8, 32000, {}, "cuda"),
        (BOTH, 90, 4096, 32000, {"dtype": F64}, "triton"),
        (BOTH, 90, 4096, 32000, {"divergence": "a program's own"}, "triton"),
        (BOTH, 90, 4096, 32000, {"divergence": "a program's own", "teachers": 0}, "cuda"),
        (BOTH, 90, 4096, 32000, {"teacher dtype": F32}, "triton"),
        (BOTH, 90, 4096, 32000, {"teachers": 2}, "triton"),
        (BOTH, 90, 4096, 32000, {"target": "probs"}, "triton"),
        (BOTH, 90, 4096, 32000, {"target": "probs", "teachers": 0}, "cuda"),
        (BOTH, 90, 4096, 32000, {"softcap": 30.0}, "triton"),
        (BOTH, 90, 4096, 32000, {"teacher_softcap": 30.0}, "triton"),
        (BOTH, 90, 4096, 32000, {"standardize": True}, "triton"),
        (BOTH, 90, 4096, 32000, {"divergence": "dkd"}, "triton"),
        (["cuda"], 90, 4096, 32000, {"softcap": 30.0}, "reference"),
        (BOTH, 90, 4096, 32000, {"label_smoothing": 0.1, "z_loss": 0.1, "metrics": True}, "cuda"),
        (BOTH, 90, 4096, 32000, {"teacher padding": 1}, "triton"),  # aligned differently
        (["cuda"], 90, 4096, 32000, {"teacher padding": 1}, "cuda"),
        (BOTH, 90, 4096, 32000, {"teacher padding": 8}, "cuda"),
        (BOTH, 90, 4096, 32001, {}, "cuda"),
        (BOTH, 75, 4096, 32000, {}, "triton"),
        (["cuda"], 75, 4096, 32000, {}, "reference"),
        (BOTH, 75, 4096, 32000, {"name": "scale_"}, "triton"),
        (BOTH, 90, 4096, 32000, {"name": "scale_"}, "cuda"),
        (BOTH, 90, 4096, 32000, {"name": "tempered_softmax"}, "triton"),  # has no CUDA kernel
        (["cuda"], 90, 5, 100, {"name": "tempered_softmax"}, "reference"),
        (["cuda"], 90, 5, 100, {"name": "sums"}, "reference"),  # nor have shards
        (["cuda"], 90, 5, 100, {"name": "token_grad_as"}, "reference"),  # nor tokens
        (["cuda"], 90, 5, 100, {"dtype": F64}, "reference"),
        (["triton"], 90, 5, 100, {}, "triton"),
        (["cuda"], 90, 5, 100, {}, "cuda"),
        ([], 90, 5, 100, {}, "reference"),
    ],
)
def test_one_table_chooses_cuda_or_triton_for_cuda_tensors(
    usable, capability, rows, vocab, change, expected, monkeypatch
):
    monkeypatch.setattr(gpu_choice, "capability", lambda device: capability)
    monkeypatch.setattr(gpu_choice, "multiprocessors", lambda device: 108)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type == "meta"))
    about = {"name": "loss_grad", "dtype": BF16, "divergence": "jsd", "teachers": 1} | change
    logits = torch.empty(rows, vocab, dtype=about["dtype"], device="meta")
    width, dtype = vocab + about.get("teacher padding", 0), about.get("teacher dtype", about["dtype"])
    teacher = torch.empty(rows, width, dtype=dtype, device="meta")[:, :vocab]
    settings = checked({k: v for k, v in about.items() if k in Settings._fields})
    plain = about["name"] in ("tempered_softmax", "scale_")
    given = ([], None) if plain else ([teacher] * about["teachers"], settings)
    assert gpu_choice.gpu_backend(usable, about["name"], logits, *given) == expected


def checked(change: dict[str, Any]) -> Settings:
    """The default settings but for a change."""
    return KDLoss().checked(True)[1]._replace(**change)


def test_a_gpu_before_sm_80_does_not_exclude_newer_ones(monkeypatch):
    """Two GPUs are simulated: an old one and an H100."""
    capabilities = {torch.device("cuda", 0): (7, 5), torch.device("cuda", 1): (9, 0), 0: (7, 5), 1: (9, 0)}
    library = SimpleNamespace(
        kdfast_cuda_version=lambda: 13000,
        kdfast_driver_version=lambda: 13000,
        kdfast_device_failure=lambda index: b"no image" if capabilities[index] == (12, 0) else b"",
    )
    for owner, name, value in (
        (choice, "cuda_is_compiled", lambda: True),
        (choice, "_load_library", lambda name: None),
        (choice.ctypes, "CDLL", lambda path: library),
        (torch.version, "cuda", "13.0"),
        (torch.cuda, "is_initialized", lambda: True),
        (torch.cuda, "device_count", lambda: 2),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", capabilities.__getitem__),
    ):
        monkeypatch.setattr(owner, name, value)
    caches = choice._load_cuda, choice._device_failure, gpu_choice.capability
    for cache in caches:
        cache.cache_clear()
    try:
        assert choice.cuda_failure("cuda") is None
        old, new = (SimpleNamespace(device=torch.device("cuda", i), is_cuda=True) for i in (0, 1))
        assert choice.namespace("cuda", new) is torch.ops.kdfast_cuda
        with pytest.raises(RuntimeError, match="'cuda' is not usable here: cuda:0 is sm_75, and sm_80 is the least"):
            choice.namespace("cuda", old)
        for newer, failure in (
            ((7, 0), "the best device here is sm_75, and sm_80 is the least"),  # both are old
            ((12, 0), "the best device here is sm_120, which loads no kernel: no image"),
        ):
            monkeypatch.setitem(capabilities, 1, newer)
            for cache in caches:
                cache.cache_clear()
            assert choice.cuda_failure("cuda") == failure
            assert "cuda" not in choice.usable_on(torch.device("cuda", 1))
    finally:
        for cache in caches:
            cache.cache_clear()
