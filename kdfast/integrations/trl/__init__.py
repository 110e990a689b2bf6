"""TRL's distillation losses replaced by kdfast's: `kdfast.integrations.trl.patch()`."""

from collections.abc import Callable
from typing import Any

from kdfast.integrations.patching import Patch
from kdfast.integrations.trl import heads, logits, tokens

TESTED = "1.16.0"
_EXPERIMENTAL = "trl.experimental"

Replacement = Callable[[Any], Any]
REPLACED: list[tuple[str, str, Replacement]] = [
    ("trl.trainer.distillation_trainer", "_chunked_divergence_loss", heads.two_heads),
    (f"{_EXPERIMENTAL}.gkd.gkd_trainer", "GKDTrainer.generalized_jsd_loss", logits.generalized_jsd),
    (f"{_EXPERIMENTAL}.gold.gold_trainer", "GOLDTrainer.generalized_jsd_loss", logits.generalized_jsd),
    (f"{_EXPERIMENTAL}.iw_opd.iw_opd_trainer", "IWOPDTrainer.generalized_jsd_loss", logits.generalized_jsd),
    (
        f"{_EXPERIMENTAL}.iw_opd.iw_opd_trainer",
        "IWOPDTrainer._compute_local_sparse_top_1_divergence_loss",
        logits.local_top_1,
    ),
    (f"{_EXPERIMENTAL}.iw_opd.iw_opd_trainer", "IWOPDTrainer._compute_iw_opd_loss", tokens.importance_weighted),
    *(
        (f"{_EXPERIMENTAL}.{name}.{module}", f"compute_{which}_self_distillation_loss", replacement)
        for name in ("sdft", "sdpo")
        for module in ("loss_utils", f"{name}_trainer")
        for which, replacement in (
            ("full_logit", logits.full_logit),
            ("topk", logits.students_top_k),
            ("sampled_token", tokens.sampled_token),
        )
    ),
    (
        f"{_EXPERIMENTAL}.server_distillation.server_distillation_trainer",
        "ServerDistillationTrainer.compute_loss",
        tokens.from_server,
    ),
    (f"{_EXPERIMENTAL}.async_distillation.async_distillation_trainer", "_chunked_jsd_loss", heads.one_head),
    (
        f"{_EXPERIMENTAL}.async_distillation.async_distillation_trainer",
        "AsyncDistillationTrainer._compute_loss",
        heads.whole_head_for,
    ),
]


def patch() -> Patch:
    """Puts kdfast in the place of TRL's distillation losses, for all trainers of the process, made before or after.

    - DistillationTrainer: `_chunked_divergence_loss`, by `linear_kd_loss`
    - GKDTrainer, GOLDTrainer: `generalized_jsd_loss`, by `kd_loss`
    - IWOPDTrainer: the same with top_k and add_tail; its local top-1 loss; the log-probabilities of its sampled tokens
    - SDFTTrainer, SDPOTrainer: the losses of full logits, of the student's top k, and of sampled tokens
    - ServerDistillationTrainer: the student's log-probabilities, by `token_log_probs`
    - AsyncDistillationTrainer: `_chunked_jsd_loss`, by `linear_kd_loss`

    Objectives, reductions, metrics and what is returned stay TRL's. Losses are float32 where TRL's have the logits'
    16-bit dtype, and float64 where heads are float64. What kdfast does not compute goes to TRL's own code, with one
    `integrations.patching.FallbackWarning`.

    Returns:
        A `integrations.patching.Patch`: `undo()`, or the end of a `with` statement, puts TRL's
        functions back. Where they have been replaced before, nothing is, and nothing is put back.

    Raises:
        ImportError: there is no TRL, or a trainer needs a package that is not there.
        AttributeError: this version of TRL has no such function; the error names the version that was tested.

    Example:

        with kdfast.integrations.trl.patch():
            trainer = DistillationTrainer(model=student, teacher_model=teacher, args=args, train_dataset=dataset)
            trainer.train()
    """
    replaced = Patch("trl", TESTED)
    for module, name, replacement in REPLACED:
        replaced.replace(module, name, replacement)
    return replaced
