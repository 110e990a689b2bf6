"""kdfast.integrations.transformers in two gloo processes, as accelerate wraps the model there: DDP and FSDP2."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny_models
import torch
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trainer_cases import kd, losses, pair, parameters, plain_steps, same, texts, trained
from transformers.distributed import DistributedConfig

SECONDS = 120
HALF = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}


KINDS = {  # how the student is wrapped, and `linear`
    "ddp": ("", False),
    "ddp, linear": ("", True),
    "loaded by FSDP2": ("loaded", False),
    "loaded by FSDP2, linear": ("loaded", True),  # its plan shards the head apart
    "FSDP2 with a head that is not kept whole, linear": ("sharded", True),
}


def wrapped(kind: str, student: Any, folder: str) -> Any:
    """Trainer applies DDP itself. accelerate applies FSDP2 on GPUs alone, and from_pretrained does on CPUs too."""
    if kind == "loaded":
        config = DistributedConfig(fsdp_size=2)
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=config)
    if kind == "sharded":
        mesh = init_device_mesh("cpu", (2,))
        for module in (*student.model.layers, student.lm_head, student):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        student._is_distributed_loading_by_transformers = True
        student.config.distributed_config = SimpleNamespace(dp_replicate_size=1)
    return student


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach().clone()


def of_rank(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    found = {}
    for name, (kind, linear) in KINDS.items():
        student, teacher = pair(tiny_models.llama)
        student = wrapped(kind, student, folder)
        result = trained(student, teacher, texts(), HALF, kd=kd(return_metrics=True), linear=linear)
        evaluated = result.evaluate(texts(8))
        found[name] = (
            [whole(p) for p in result.model.parameters()],
            losses(result),
            losses(result, "kd_kl"),
            evaluated["eval_loss"],
            evaluated["eval_kd_kl"],
        )
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # as tests/ranks.py


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    (tmp_path / "port").write_text(str(free_port()))
    pair(tiny_models.llama)[0].save_pretrained(tmp_path)
    ranks = torch.multiprocessing.spawn(of_rank, (str(tmp_path),), nprocs=2, join=False)
    student, teacher = pair(tiny_models.llama)
    plain_losses = plain_steps(student, teacher, texts())
    want, _ = pair(tiny_models.llama)
    one = trained(want, teacher, texts(), kd=kd(return_metrics=True))
    same(parameters(want), parameters(student))
    evaluated = one.evaluate(texts(8))
    assert ranks.join(SECONDS) or ranks.join(SECONDS), f"two processes have not ended in {SECONDS} s"
    for rank in range(2):
        for name, (got, got_losses, kls, loss, kl) in torch.load(tmp_path / f"{rank}.pt").items():
            for x, y in zip(got, want.parameters(), strict=True):
                torch.testing.assert_close(x, y.detach(), rtol=0, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(got_losses, plain_losses, rtol=1e-6, atol=0)
            torch.testing.assert_close(kls, losses(one, "kd_kl"), rtol=1e-5, atol=0)
            torch.testing.assert_close([loss, kl], [evaluated["eval_loss"], evaluated["eval_kd_kl"]], rtol=1e-5, atol=0)
