"""verl's engine for FSDP on a CPU, without its workers: a tiny model, answers, and a teacher's log-probabilities."""

import functools
from types import SimpleNamespace
from typing import Any

import tiny_models
import torch
import verl.workers.engine.fsdp.transformer_impl as engine_file
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig

V, K, STEPS = tiny_models.VOCABULARY, 8, 5
PROMPTS, ANSWERS = (3, 5, 2, 4), (5, 3, 8, 2)  # even sums, which two processes of Megatron do not pad
LENGTHS = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
SUPERVISED = {"use_policy_gradient": False, "use_task_rewards": False, "loss_max_clamp": None}


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def loss_config(mode: str, **changes: Any) -> DistillationConfig:
    return DistillationConfig(distillation_loss=DistillationLossConfig(loss_mode=mode, topk=K, **changes))


def teacher(k: int, vocabulary: int = V, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and tokens of each sequence. As verl's teachers have it, the last token's row is padding."""
    made = torch.Generator().manual_seed(seed)
    log_p, ids = [], []
    for length in LENGTHS:
        whole = torch.log_softmax(4 * torch.randn(length, vocabulary, generator=made), -1)
        top = whole.topk(k, -1)
        top.values[-1], top.indices[-1] = 0, 0
        log_p.append(top.values)
        ids.append(top.indices.int())
    return log_p, ids


def batch(uses_topk: bool, seed: int) -> TensorDict:
    """Four sequences; some of their tokens are masked."""
    made = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, V, (n,), generator=made) for n in PROMPTS]
    answers = [torch.randint(3, V, (n,), generator=made) for n in ANSWERS]
    log_p, ids = teacher(K if uses_topk else 1, seed=seed)
    data = {
        "prompts": nested(prompts),
        "responses": nested(answers),
        "input_ids": nested([torch.cat(both) for both in zip(prompts, answers, strict=True)]),
        "position_ids": nested([torch.arange(n) for n in LENGTHS]),
        "response_mask": nested([torch.arange(n) % 4 != 1 for n in ANSWERS]),
        "teacher_logprobs": nested(log_p),
        "teacher_ids": nested(ids),
        "old_log_probs": nested([-5 + torch.rand(n, generator=made) for n in ANSWERS]),
        "advantages": nested([torch.randn(n, generator=made) for n in ANSWERS]),
    }
    made_batch = TensorDict(data, batch_size=[len(PROMPTS)])
    counts = {"dp_size": 1, "global_batch_size": len(PROMPTS), "batch_num_tokens": 13}
    tensordict_utils.assign_non_tensor(
        made_batch, use_remove_padding=False, distillation_use_topk=uses_topk, temperature=0.7, **counts
    )
    return made_batch


def parts(whole: TensorDict) -> list[TensorDict]:
    """A sequence each."""
    return [tensordict_utils.index_select_tensor_dict(whole, [i]) for i in range(len(PROMPTS))]


class Engine(engine_file.FSDPEngineWithLMHead):
    """What forward_step needs of an engine."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self._autocast_dtype = module, torch.float32
        self.pad_to_length, self.use_ulysses_sp = None, False
        self.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)

    def get_data_parallel_group(self) -> None:
        return None


class Run:
    """Steps of SGD of a Llama in float64."""

    def __init__(self, mode: str, accumulates: bool = False, entropy_coeff: float = 0, **changes: Any) -> None:
        torch.manual_seed(0)
        model = tiny_models.llama(initializer_range=0.1).double()
        self.before = [p.detach().clone() for p in model.parameters()]
        config = loss_config(mode, **changes)
        actor = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, entropy_coeff=entropy_coeff)
        loss_function = functools.partial(distillation_ppo_loss, config=actor, distillation_config=config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.losses, self.metrics = [], []
        for step in range(STEPS):
            whole = batch(config.distillation_loss.loss_settings.use_topk, step)
            tensordict_utils.assign_non_tensor(whole, calculate_entropy=entropy_coeff > 0)
            total = 0.0
            for each in parts(whole) if accumulates else [whole]:
                loss, output = Engine(model).forward_step(each, loss_function, False)
                loss.backward()
                total += loss.item()
            self.losses.append(total)
            self.metrics.append({name: number(value) for name, value in output["metrics"].items()})
            optimizer.step()
            optimizer.zero_grad()
        self.parameters = [p.detach() for p in model.parameters()]

    def moved(self) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(self.before, self.parameters, strict=True))


def number(value: Any) -> float:
    return float(value.aggregate() if hasattr(value, "aggregate") else value)
