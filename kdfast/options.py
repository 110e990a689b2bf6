"""The keywords that all losses share: their types, their checks, and the operators' arguments made of them."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from kdfast import checks, divergences, tensor_checks
from kdfast.arguments import Inputs, Settings, drop_unused, hide_dynamic
from kdfast.sparse import TopKTargets, check_options, check_targets
from kdfast.teachers import check_teachers

DKD_WEIGHTS = (1.0, 8.0)  # as published for CIFAR-100

Target = Literal["logits", "probs", "log_probs"]
Missing = Literal["tail", "conditional", "renormalize", "truncate"]
Reduction = Literal["mean", "sum", "batchmean", "none"]
Ensemble = Literal["arithmetic", "geometric"]
Backend = Literal["reference", "cpu", "triton", "cuda"]


class Options(TypedDict, total=False):
    """The options of a module."""

    temperature: float | Tensor
    teacher_temperature: float | Tensor | None
    alpha: float | Tensor | None
    hard_weight: float | Tensor | None
    divergence: str  # a built-in one, or one that a program has added
    beta: float | None
    target: Target
    missing: Missing
    vocab_size: int | None
    t_squared: bool
    ignore_index: int
    reduction: Reduction
    label_smoothing: float
    z_loss: float
    logit_scale: float
    teacher_logit_scale: float
    softcap: float | None
    teacher_softcap: float | None
    standardize: bool
    teacher_weights: Sequence[float] | None
    ensemble: Ensemble
    dkd_weights: tuple[float, float]
    process_group: Any
    vocab_start: int | None
    backend: Backend | None


_of_settings = operator.itemgetter(
    *(name for name in Options.__annotations__ if name not in ("process_group", "vocab_start")),
    *("inplace", "return_metrics"),
)


class CallOptions(Options, total=False):
    """The options of a call: a module's forward takes the last two."""

    row_weight: Tensor | None
    normalizer: float | Tensor | None


def check_names(function: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises Python's TypeError for a keyword that a function does not take."""
    for name in options:
        if name not in known:
            hint = "; weights of rows are called row_weight" if name == "weight" else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


_checked: list[tuple[tuple[Any, ...], Settings]] = []  # the objects that some calls gave, and what came of them
_NEVER_CHANGE = {type(None), bool, int, float, str}


def check_settings(options: Mapping[str, Any], has_labels: bool) -> Settings:
    """Checks the options that need no tensor of a call, and makes Settings of them; the same objects only once."""
    if torch.compiler.is_compiling():
        return _check_settings(options, has_labels)
    values = (*_of_settings(options), has_labels, divergences.DIVERGENCES.get(str(options["divergence"])))
    for known, settings in _checked:
        if all(map(operator.is_, values, known)):  # not ==, to which 1 is True
            return settings
    settings = _check_settings(options, has_labels)
    if all(type(value) in _NEVER_CHANGE or value is DKD_WEIGHTS for value in values[:-1]):
        if len(_checked) >= 8:
            _checked.clear()
        _checked.append((values, settings))
    return settings


def _check_settings(options: Mapping[str, Any], has_labels: bool) -> Settings:
    divergence, target = options["divergence"], options["target"]
    for name in ("divergence", "target", "missing", "reduction", "ensemble", "backend"):
        checks.check_choice(name, options[name])
    for name in ("t_squared", "return_metrics", "standardize", "inplace"):
        checks.check_bool(name, options[name])
    alpha = tensor_checks.as_scalar("alpha", options["alpha"])
    hard_weight = tensor_checks.as_scalar("hard_weight", options["hard_weight"])
    alpha, hard_weight = checks.check_mix(alpha, hard_weight, has_labels)
    temperature = teacher_temperature = tensor_checks.check_temperature("temperature", options["temperature"])
    if options["teacher_temperature"] is not None:
        if target != "logits":
            raise ValueError(f"teacher_temperature: given with target={target!r}, which is at its temperature already")
        teacher_temperature = tensor_checks.check_temperature("teacher_temperature", options["teacher_temperature"])
    for name, unset in (("standardize", False), ("teacher_softcap", None), ("teacher_logit_scale", 1)):
        if options[name] != unset and target != "logits":
            raise ValueError(f"{name}: needs target='logits', not {target!r}")
    mse = divergence == "logit_mse"
    if mse and target != "logits":
        raise ValueError(f"divergence: 'logit_mse' needs target='logits', not {target!r}")
    resolved, beta = checks.check_beta(divergence, options["beta"])
    return Settings(
        temperature=1.0 if mse else temperature,
        teacher_temperature=1.0 if mse else teacher_temperature,
        alpha=alpha,
        hard_weight=hard_weight,
        t_squared=options["t_squared"] and not mse,
        divergence=resolved,
        beta=beta,
        target=target,
        missing="",
        ensemble=options["ensemble"],
        teacher_weights=[1.0],  # of one teacher
        vocab_size=checks.check_vocab(options["vocab_size"]),
        ignore_index=checks.check_ignore_index(options["ignore_index"]),
        reduction=options["reduction"],
        divisor=0.0,
        label_smoothing=checks.check_smoothing(options["label_smoothing"], has_labels),
        z_loss=checks.check_size("z_loss", options["z_loss"]),
        logit_scale=checks.check_positive("logit_scale", options["logit_scale"]),
        teacher_logit_scale=checks.check_positive("teacher_logit_scale", options["teacher_logit_scale"]),
        softcap=checks.check_cap("softcap", options["softcap"]),
        teacher_softcap=checks.check_cap("teacher_softcap", options["teacher_softcap"]),
        standardize=options["standardize"],
        dkd_weights=checks.check_dkd(divergence, options["dkd_weights"], DKD_WEIGHTS, has_labels),
        metrics=options["return_metrics"],
    )


def check_inputs(
    student: Tensor,
    teacher: Any,
    labels: Tensor | None,
    options: Mapping[str, Any],
    settings: Settings,
    least: int = 1,
) -> tuple[Inputs, Settings]:
    """Checks the tensors of a call, and completes its settings. Uses only shape, dtype and device of the student.

    The teachers' classes are moved to the last dimension. least: the number of classes, 0 where others have some.
    """
    dim = checks.as_integer("dim", options.get("dim", -1))
    dim = tensor_checks.check_logits("student_logits", student, dim, least)
    shape, vocab_size = tensor_checks.without(student.shape, dim), options["vocab_size"]
    if settings.vocab_size > student.shape[dim]:
        raise ValueError(
            f"vocab_size: {vocab_size} must lie in [1, {student.shape[dim]}], the classes of student_logits"
        )
    if labels is not None:
        tensor_checks.check_rows("labels", labels, shape, student, integer=True)
    row_weight = options["row_weight"]
    if row_weight is not None:
        tensor_checks.check_rows("row_weight", row_weight, shape, student)
        tensor_checks.check_constant("row_weight", row_weight)
    temperatures = tensor_checks.check_temperatures("temperature", options["temperature"], shape, student)
    teacher_temperatures = temperatures
    if options["teacher_temperature"] is not None:
        value = options["teacher_temperature"]
        teacher_temperatures = tensor_checks.check_temperatures("teacher_temperature", value, shape, student)
    teachers: list[Tensor] = []
    weights: list[float] = []
    indices = None
    if isinstance(teacher, TopKTargets):
        check_options(options, settings)
        indices, log_probs = check_targets(teacher, student, dim, has_all_classes=least > 0)
        teachers, weights, teacher_temperatures = [log_probs], [1.0], None
        settings = settings._replace(target="log_probs", teacher_temperature=1.0, missing=options["missing"])
    elif teacher is not None and options["missing"] != "tail":
        raise ValueError(
            f"missing: {options['missing']!r} with a teacher that is not sparse; it is for kdfast.TopKTargets"
        )
    elif teacher is not None or settings.alpha != 0:
        teachers, weights = check_teachers(teacher, options["teacher_weights"], student, vocab_size, dim)
    if settings.divergence == "logit_mse":
        if len(teachers) > 1 and settings.ensemble != "geometric":
            raise ValueError("divergence: 'logit_mse' with several teachers needs ensemble='geometric'")
        temperatures = teacher_temperatures = None
    divisor, normalizer = tensor_checks.check_normalizer(options["normalizer"], settings.reduction, student)
    inputs = Inputs(teachers, labels, row_weight, normalizer, temperatures, teacher_temperatures, indices)
    if weights != settings.teacher_weights or divisor != settings.divisor:  # copying them takes 1 us
        settings = settings._replace(teacher_weights=weights, divisor=divisor)
    inputs, settings = drop_unused(inputs, settings)
    return hide_dynamic(inputs, settings) if torch.compiler.is_compiling() else (inputs, settings)
