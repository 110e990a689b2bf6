"""NeMo-RL's distillation loss as a formula, and batches for it.

NeMo-RL is not on PyPI. The formula is that of v0.7.0: get_distillation_topk_logprobs_from_logits in
nemo_rl/distributed/model_utils.py, DistillationLossFn in nemo_rl/algorithms/loss/loss_functions.py and masked_mean in
nemo_rl/algorithms/utils.py.
"""

from typing import Any

import torch
from torch import Tensor

BATCH, POSITIONS, VOCABULARY, TOP_K = 3, 8, 20, 4
CONFIGS = [
    {"kl_type": kl_type, "mixed_kl_weight": 0.3, "zero_outside_topk": outside}
    for kl_type in ("forward", "reverse", "mixed")
    for outside in (False, True)
]


def nemo_rl_loss(logits: Tensor, data: dict[str, Tensor], config: dict[str, Any], valid_tokens: Any) -> Tensor:
    """The formula, in the logits' dtype."""
    whole = logits.log_softmax(-1)
    chosen = data["teacher_topk_indices"]
    log_q = whole.gather(-1, chosen) if config["zero_outside_topk"] else logits.gather(-1, chosen).log_softmax(-1)
    log_p = data["teacher_topk_logits"].to(logits.dtype).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    if config["zero_outside_topk"]:
        rest = (whole.exp() * whole).sum(-1) - (q * log_q).sum(-1)
        reverse = reverse + rest + 100 * (1 - q.sum(-1))
    weight = {"forward": 1, "reverse": 0, "mixed": config["mixed_kl_weight"]}[config["kl_type"]]
    rows = (weight * forward + (1 - weight) * reverse)[:, :-1]
    if "token_mask" not in data:
        return rows.mean()
    mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
    return (rows * mask).sum() / (valid_tokens + 1e-8)


def batch(logits: Tensor) -> dict[str, Tensor]:
    """A teacher's top k, prompts that are masked, and a sample that does not count."""
    teacher = torch.randn_like(logits, dtype=torch.float32) * 2
    values, indices = teacher.topk(TOP_K)
    token_mask = torch.ones(logits.shape[:2])
    token_mask[:, :2] = 0
    token_mask[0, 6:] = 0
    sample_mask = torch.ones(len(logits))
    sample_mask[1] = 0
    return {
        "input_ids": torch.randint(logits.shape[-1], logits.shape[:2]),
        "teacher_topk_logits": values,
        "teacher_topk_indices": indices,
        "token_mask": token_mask,
        "sample_mask": sample_mask,
    }


def spoil_dropped(data: dict[str, Tensor]) -> Tensor:
    """Gives the teacher NaN in positions that do not count, and the indices of a padded batch; returns which."""
    dropped = torch.ones(data["token_mask"].shape, dtype=torch.bool)
    dropped[:, :-1] = (data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)) == 0
    data["teacher_topk_logits"] = torch.where(dropped.unsqueeze(-1), torch.nan, data["teacher_topk_logits"])
    data["teacher_topk_indices"] = torch.where(dropped.unsqueeze(-1), 0, data["teacher_topk_indices"])
    return dropped


def valid_tokens(data: dict[str, Tensor]) -> Tensor:
    return (data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)).sum()


def random_logits() -> Tensor:
    return (torch.randn(BATCH, POSITIONS, VOCABULARY, dtype=torch.float64) * 2).requires_grad_()
