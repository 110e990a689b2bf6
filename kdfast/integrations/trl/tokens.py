"""Losses of TRL that need the student at a few tokens of each row: of IW-OPD, SDFT, SDPO and server distillation."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast import token_log_probs
from kdfast.integrations.patching import warn_fallback
from kdfast.integrations.trl.logits import IGNORED

Loss = Callable[..., Any]


def sampled_token(original: Loss) -> Loss:
    """compute_sampled_token_self_distillation_loss of SDFT and SDPO: reverse KL's gradient, from one token a row."""

    @functools.wraps(original)
    def loss(
        student_logits: Tensor,  # (B, T, V)
        teacher_logits: Tensor,
        completion_ids: Tensor,  # (B, T)
        *,
        distillation_alpha: float,
    ) -> Tensor:
        if distillation_alpha != 1:  # an error of TRL's
            return original(student_logits, teacher_logits, completion_ids, distillation_alpha=distillation_alpha)
        log_q = token_log_probs(student_logits, completion_ids, entropy=False).log_probs
        log_p = token_log_probs(teacher_logits.detach(), completion_ids, entropy=False).log_probs
        return (log_q - log_p).detach() * log_q

    return loss


def importance_weighted(original: Loss) -> Loss:
    """IWOPDTrainer._compute_iw_opd_loss, which needs no class but the sampled one.

    TRL's own code gets logits of two classes, the sampled token and all others together. Their softmax at its
    temperature has the same log-probability and the same gradient. Its weights, metrics and errors stay.
    """

    @functools.wraps(original)
    def loss(
        self: Any,
        student_logits: Tensor,  # (B, T, V)
        completion_tokens: Tensor,  # (B, T)
        labels: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        ids = completion_tokens.masked_fill(labels == IGNORED, IGNORED)
        found = token_log_probs(student_logits, ids, temperature=self.temperature, entropy=False)
        pair = torch.stack([found.log_probs, found.log_rest], -1) * self.temperature
        return original(self, pair, torch.zeros_like(completion_tokens), labels, *args, **kwargs)

    return loss


def from_server(original: Loss) -> Loss:
    """ServerDistillationTrainer.compute_loss, whose teacher is known at K tokens a row, and at the sampled one.

    TRL's own losses get the student's log-probabilities of these K + 1 tokens, and their places among them as token
    ids. So errors, tails, reductions, and methods that a subclass overrides stay.
    """
    from trl.extras.profiling import profiling_decorator

    @functools.wraps(original)
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.beta > 0 and self.reverse_kl_top_1_mode != "sampled":
            warn_fallback("trl's ServerDistillationTrainer.compute_loss", "a server's loss at the student's argmax")
            return original(self, model, inputs, return_outputs, num_items_in_batch)
        batch = _with_labels(inputs)
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        start = self._compute_prompt_length(batch)
        teacher = self._get_teacher_token_logprobs_from_server(batch, start)
        served = teacher["topk_token_ids"]  # (B, T, K)
        rows = slice(start, start + served.shape[1])
        tokens, labels = batch["input_ids"][:, rows], batch["labels"][:, rows]
        log_q = _at_tokens(
            outputs.logits, torch.cat([served, tokens.unsqueeze(-1)], -1), labels, start, self.temperature
        )
        places = torch.arange(served.shape[-1], device=served.device)
        is_served = served == tokens.unsqueeze(-1)
        sampled = torch.where(is_served.any(-1), is_served.byte().argmax(-1), len(places))
        known = teacher | {"topk_token_ids": places.expand_as(served)}
        if self.beta > 0:
            loss = self._compute_server_sparse_top_1_divergence_loss(
                teacher_result=known, student_log_probs=log_q, completion_tokens=sampled, labels=labels
            )
        else:
            loss = self._compute_server_forward_kl_loss(teacher_result=known, student_log_probs=log_q, labels=labels)
        if self.model.training:
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    return profiling_decorator(compute_loss)


def _with_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs as TRL's methods take them: whole sequences, and labels of completions alone."""
    prompt, completion, mask = inputs["prompt_ids"], inputs["completion_ids"], inputs["completion_mask"]
    labels = completion.masked_fill(~mask.bool(), IGNORED)
    return {
        **inputs,
        "input_ids": torch.cat([prompt, completion], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], mask], 1),
        "labels": torch.cat([torch.full_like(prompt, IGNORED), labels], 1),
        "prompt_attention_mask": inputs["prompt_mask"],
    }


def _at_tokens(logits: Tensor, ids: Tensor, labels: Tensor, start: int, temperature: float) -> Tensor:
    """log q of (B, T, K) ids; those of token `start` are predicted by row start - 1.

    All rows of the logits are given, and ignored but for these: the gradient of a slice would be copied.
    """
    padded = ids.new_full((*logits.shape[:2], ids.shape[-1]), IGNORED)
    rows = slice(start - 1, start - 1 + ids.shape[1])
    padded[:, rows] = ids.masked_fill((labels == IGNORED).unsqueeze(-1), IGNORED)
    return token_log_probs(logits, padded, temperature=temperature, entropy=False).log_probs[:, rows]
