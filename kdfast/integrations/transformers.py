"""Distillation in transformers.Trainer, and in trainers that are derived from it."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kdfast.integrations.after_head import AfterHead, after_head, probe, scaled
from kdfast.integrations.model_forward import (
    HeadInput,
    LossInsteadOfHead,
    LossOfLogits,
    Rows,
    accept_loss,
    has_plain_head,
    head_input,
    logits_of,
    output_head,
)
from kdfast.integrations.trainer_checks import IGNORED, check_model, check_options, shifts_labels
from kdfast.integrations.trainer_metrics import Metrics
from kdfast.linear import LinearKDLoss
from kdfast.modules import KDLoss

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # what Distill is mixed into


class Distill(Trainer):
    """A mixin that gives a Trainer a teacher: `class DistillTrainer(Distill, Trainer): pass`.

    The loss is `kd_loss` of the logits of student and teacher, and of the labels. It is the mean over the
    labels of all micro-batches and processes of an optimizer step, so that neither gradient accumulation nor the number
    of processes changes the gradient. Models, checkpoints, evaluation and generation stay as they are.

    Args:
        teacher: a model that takes the student's inputs, or a sequence of such models, an ensemble. It runs in eval
            mode, without gradients, on the student's device and under its autocast. None where `alpha` is 0, or where
            `teacher_targets` is overridden.
        kd: the options, a `KDLoss`; by default `KDLoss()`. With `linear` it may be a
            `LinearKDLoss`. They apply to the models' logits as the models return them, with their own
            scale and softcap. The options may change between steps: `trainer.kd.temperature = 1.0`. With
            `return_metrics=True` the metrics are logged, as "kd_soft" and so on.
        linear: compute the loss in the place of the student's head by `linear_kd_loss`, without logits of
            all tokens. The head must be an nn.Linear without an adapter. Evaluation makes logits where metrics need
            them.
        shift_labels: whether position i predicts label i + 1. None: as the model's own loss, which for causal language
            models it does.

    Raises:
        TypeError, ValueError: an option that has no meaning here, or a model that `linear` cannot work with.

    Example:

        class DistillTrainer(kdfast.integrations.transformers.Distill, Trainer):
            pass

        trainer = DistillTrainer(
            student, args, train_dataset=data, teacher=teacher, kd=kdfast.KDLoss(temperature=2.0), linear=True
        )
        trainer.train()
    """

    loss_is_scaled_for_ga = True  # the loss is divided by the labels of all micro-batches

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | Sequence[nn.Module] | None,
        kd: KDLoss | LinearKDLoss | None = None,
        linear: bool = False,
        shift_labels: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.kd = KDLoss() if kd is None else kd
        self.linear = linear
        self.teachers = [] if teacher is None else [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the labels
        # Trainer keeps these columns; else it drops the labels where the model's forward takes none
        self.label_names: list[str] = self.label_names or ["labels"]
        self._loss_shifts_labels = shifts_labels(self) if shift_labels is None else shift_labels
        check_options(self)
        check_model(self)
        if linear:
            output_head(self.model)
        accept_loss(self.model)
        self._move_teachers()
        self.label_smoother = None  # its factor is the hard term's
        self._kd_after_heads: WeakKeyDictionary[nn.Module, AfterHead] = WeakKeyDictionary()
        self._kd_loss_only = False
        self._kd_metrics = Metrics()

    def call_model_init(self, *args: Any, **kwargs: Any) -> Any:
        model = super().call_model_init(*args, **kwargs)
        accept_loss(model)
        return model

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.use_liger_kernel:  # which has just replaced the model's forward
            accept_loss(self.model)
        return super()._prepare_for_training(*args, **kwargs)

    def _move_teachers(self) -> None:
        for teacher in self.teachers:
            placed = getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)
            if not placed:
                teacher.to(self.args.device)
            teacher.eval()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs, labels, has_labels = self._without_labels(inputs)
        kept = labels != IGNORED
        normalizer = self._normalizer(kept, num_items_in_batch)
        rows = Rows(labels, None, normalizer) if has_labels else Rows(None, kept, normalizer)
        keep_outputs = return_outputs and not self._kd_loss_only
        teacher = self.teacher_targets(inputs, head=self.linear and not keep_outputs)
        call: LossInsteadOfHead | LossOfLogits
        if self.linear and not keep_outputs:
            call = self._loss_instead_of_head(model, inputs, teacher, rows)
        else:
            options = self._options(KDLoss, rows) | ({"inplace": False} if keep_outputs else {})
            call = LossOfLogits(teacher, rows, options, keep_outputs)
        outputs = model(**inputs, kdfast=call)
        loss = outputs["loss"]
        if "kd_metrics" in outputs:
            self._kd_metrics.add(outputs.pop("kd_metrics"), kept.sum(), model.training)
        if not model.training:  # as Trainer's own loss, so that it leaves this batch out of its mean
            loss = loss.masked_fill(rows.normalizer == 0, torch.nan)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def teacher_targets(self, inputs: dict[str, Any], head: bool) -> Any:
        """The teacher of these inputs, as kd_loss takes it: logits, a list of them, or a TopKTargets.

        Override it for a teacher that is no model, as one that is read from a disk; what it needs, it takes out of
        `inputs` before the student sees them.

        Args:
            inputs: the student's, without labels.
            head: what is returned may be a HeadInput, hidden states and a head in place of logits.
        """
        for teacher in self.teachers:
            if teacher.training:
                teacher.eval()
        if self.kd.alpha == 0 and not self.kd.return_metrics:
            return None
        with self.accelerator.autocast():
            if head and len(self.teachers) == 1 and has_plain_head(self.teachers[0]):
                return head_input(self.teachers[0], accepted(self.teachers[0], inputs))
            found = [logits_of(teacher(**accepted(teacher, inputs))) for teacher in self.teachers]
        return found[0] if len(found) == 1 else found or None

    def _without_labels(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, bool]:
        """The inputs that the models get; the labels, shifted, or those of _all_rows; and whether there are labels."""
        inputs = dict(inputs)
        inputs.pop("skip_logits", None)  # Trainer's word to Liger's forward, which then computes its own loss
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        has_labels = labels is not None or shifted is not None
        if not has_labels:
            labels = self._all_rows(inputs)
        model = self.accelerator.unwrap_model(self.model)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        if shifted is None:
            shifted = labels
            if self._loss_shifts_labels:  # the labels, as a slice of the logits would be copied
                shifted = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()
        return inputs, shifted.long(), has_labels

    def _all_rows(self, inputs: dict[str, Any]) -> Tensor:
        """In the place of labels: 0 for each token that is not padding, or for each example."""
        main = inputs[getattr(self.model, "main_input_name", "input_ids")]
        if not self._loss_shifts_labels:
            return main.new_zeros(len(main), dtype=torch.int64)
        mask = inputs.get("attention_mask")
        kept = torch.zeros_like(main, dtype=torch.int64)
        return kept if mask is None else kept.masked_fill(mask == 0, IGNORED)

    def _normalizer(self, kept: Tensor, num_items: Tensor | int | None) -> Tensor:
        """All labels of the step, by the number of the processes whose gradients are averaged."""
        if num_items is None:  # not called by Trainer
            return kept.sum()
        normalizer = torch.as_tensor(num_items, device=kept.device)
        if self.args.average_tokens_across_devices:
            normalizer = normalizer / (self.accelerator.num_processes // self.get_tp_size())
        return normalizer

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Trainer's own, which wants labels."""
        if batch_samples and "labels" not in batch_samples[0]:
            shifted = "shift_labels" in batch_samples[0]
            batch_samples = [
                {**x, "labels": x["shift_labels"] if shifted else self._all_rows(x)} for x in batch_samples
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _options(self, loss: type[KDLoss] | type[LinearKDLoss], rows: Rows) -> dict[str, Any]:
        options = {name: value for name, value in self.kd.options().items() if name in loss.defaults}
        if self.args.label_smoothing_factor and rows.labels is not None:
            options["label_smoothing"] = self.args.label_smoothing_factor
        return options

    def _loss_instead_of_head(
        self, model: nn.Module, inputs: dict[str, Any], teacher: Any, rows: Rows
    ) -> LossInsteadOfHead:
        options = self._options(LinearKDLoss, rows)
        options |= scaled("", options, self._after_head(model, inputs))
        if not isinstance(teacher, HeadInput):
            return LossInsteadOfHead(teacher, None, None, rows, options)
        options |= scaled("teacher_", options, self._after_head(self.teachers[0], inputs))
        return LossInsteadOfHead(*teacher, rows, options)

    def _after_head(self, model: nn.Module, inputs: dict[str, Any]) -> AfterHead:
        """What the model does after its head, measured once."""
        if model not in self._kd_after_heads:
            training = model.training
            model.eval()  # draws no random numbers
            with torch.no_grad():
                if model in self.teachers:
                    teacher_inputs = accepted(model, inputs)
                    outputs = probe(model, model.forward, (), teacher_inputs)
                else:
                    outputs = model(**inputs, kdfast=probe)
            model.train(training)
            self._kd_after_heads[model] = after_head(model, outputs["logits"])
        return self._kd_after_heads[model]

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        self._kd_loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self._kd_loss_only = False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        evaluates = any(name.startswith("eval_") for name in logs)
        if evaluates or "loss" in logs:
            logs.update(self._kd_metrics.take(not evaluates, self.accelerator))
        super().log(logs, *args, **kwargs)


def accepted(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that a teacher takes; without a cache, which is for generation."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    found = {name: x for name, x in inputs.items() if takes_all or name in parameters}
    if getattr(getattr(model, "config", None), "use_cache", False):
        found["use_cache"] = False
    return found
