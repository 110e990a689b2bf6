"""What kdfast.integrations.transformers checks before training."""

import inspect
from typing import Any

from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kdfast.linear import LinearKDLoss
from kdfast.modules import KDLoss
from kdfast.tensor_checks import kind

IGNORED = -100  # Trainer counts the labels that are not


def check_options(trainer: Any) -> None:
    """Raises an error for options that have no meaning in a Trainer."""
    kd, args = trainer.kd, trainer.args
    if not isinstance(kd, (KDLoss, LinearKDLoss)):
        raise TypeError(f"kd: must be a KDLoss, not {kind(kd)}")
    if type(kd).forward not in (KDLoss.forward, LinearKDLoss.forward):
        raise TypeError(f"kd: must be a KDLoss, whose options are read; {kind(kd)} has a forward of its own")
    if isinstance(kd, LinearKDLoss) and not trainer.linear:
        raise TypeError("kd: a LinearKDLoss needs linear=True")
    for name, needed in (("reduction", "mean"), ("ignore_index", IGNORED), ("dim", -1)):
        if getattr(kd, name, needed) != needed:
            raise ValueError(f"kd: {name} must be {needed!r}, as Trainer counts labels, not {getattr(kd, name)!r}")
    if kd.label_smoothing and args.label_smoothing_factor not in (0, kd.label_smoothing):
        raise ValueError(
            f"label_smoothing_factor: {args.label_smoothing_factor!r}, but kd has label_smoothing "
            f"{kd.label_smoothing!r}; give one of them"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func: must be None; the loss is kd's")
    if args.n_gpu > 1:
        raise ValueError(
            "n_gpu: nn.DataParallel is not supported. Start one process for each GPU with torchrun or accelerate "
            "launch, or set CUDA_VISIBLE_DEVICES to one of them"
        )


def check_model(trainer: Any) -> None:
    """Raises an error for a model whose own loss is another one than a cross-entropy over classes."""
    config: Any = getattr(trainer.model, "config", None)
    if getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        raise ValueError(f"model: its problem_type is {config.problem_type!r}, and the loss is for classes")
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "model: output_router_logits adds an auxiliary loss of the experts, which is not computed here; set it "
            "to False"
        )
    if any(teacher is trainer.model for teacher in trainer.teachers):
        raise ValueError("teacher: must be another model than the student; pass copy.deepcopy(model)")


def shifts_labels(trainer: Any) -> bool:
    """Whether the model's own loss does. Trainer, which counts labels by it, knows it of some models only."""
    get_base = getattr(trainer.model, "get_base_model", None)  # of PEFT
    model: Any = trainer.model if get_base is None else get_base()
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    bases: list[Any] = [base for base in type(model).__mro__ if base.__name__ in known]  # FSDP2 derives a class
    if encodes:
        return trainer._loss_shifts_labels
    code = getattr(inspect.unwrap((bases or [type(model)])[0].forward), "__code__", None)
    if code is not None and "loss_function" in code.co_names:  # ForCausalLMLoss where the class's name says no other
        return bool(bases) or model.loss_function is ForCausalLMLoss
    if bases or (getattr(model, "loss_type", None) not in LOSS_MAPPING and _has_vocabulary(model)):
        raise ValueError(
            f"shift_labels: must be given for {kind(model)}, which has a loss of its own: True where position i "
            "predicts label i + 1, False where the labels are shifted already"
        )
    return trainer._loss_shifts_labels


def _has_vocabulary(model: Any) -> bool:
    get = getattr(model, "get_output_embeddings", None)
    return get is not None and get() is not None
