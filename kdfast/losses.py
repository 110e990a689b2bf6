"""kd_loss and KDLoss: a loss from logits, as a function and as a module."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NoReturn, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from kdfast import checks, choice
from kdfast.arguments import KDMetrics, Settings
from kdfast.autograd import row_loss
from kdfast.options import (
    DKD_WEIGHTS,
    Backend,
    CallOptions,
    Ensemble,
    Options,
    Reduction,
    Target,
    check_inputs,
    check_names,
    check_settings,
)

Teacher = Tensor | Sequence[Tensor] | None


@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    inplace: bool = False,
    return_metrics: Literal[False] = False,
    **options: Unpack[CallOptions],
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    inplace: bool = False,
    return_metrics: Literal[True],
    **options: Unpack[CallOptions],
) -> tuple[Tensor, KDMetrics]: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    inplace: bool = False,
    return_metrics: bool,
    **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, KDMetrics]: ...
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    alpha: float | None = None,
    hard_weight: float | None = None,
    divergence: str = "cross_entropy",
    beta: float | None = None,
    target: Target = "logits",
    vocab_size: int | None = None,
    t_squared: bool = True,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    standardize: bool = False,
    teacher_weights: Sequence[float] | None = None,
    ensemble: Ensemble = "arithmetic",
    inplace: bool = False,
    return_metrics: bool = False,
    dkd_weights: tuple[float, float] = DKD_WEIGHTS,
    backend: Backend | None = None,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, KDMetrics]:
    r"""The distillation loss of a student against a teacher, and against labels where there are any.

    With :math:`q = \mathrm{softmax}(s / T)`, :math:`p = \mathrm{softmax}(t / T)` and :math:`q^1 = \mathrm{softmax}(s)`,
    a row (a token, an image) of weight w costs

    .. math:: l = w \, [ \, \alpha T^2 D(p, q) + h \, \mathrm{CE}(y, q^1) + z \log^2 \textstyle\sum_i e^{s_i} \, ]

    with D the divergence, h = ``hard_weight`` and z = ``z_loss``, by default 0: the objective of Hinton, Vinyals &
    Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2, whose factor :math:`T^2` keeps the size of
    the soft gradients whatever T.

    Args:
        student_logits: (..., V), float32, bfloat16, float16 or float64.
        teacher: (..., V) of any of these dtypes, or a sequence of such tensors, an ensemble. It never gets a gradient.
            May be None where ``alpha`` is 0.
        labels: (...) int64 class indices, already shifted. None: no hard term.
        temperature: T > 0, a number or a tensor (...) of one per row, which gets no gradient and whose values are
            checked on a CPU, where they are used.
        teacher_temperature: the same for the teacher; None: ``temperature``. :math:`T^2` stays the student's.
        alpha: the weight of the soft term. None: 0.9 with labels, 1 without. In [0, 1] unless ``hard_weight`` is given;
            the paper found more than 0.5 best.
        hard_weight: the weight of the hard term. None: 1 - alpha; given: any finite number >= 0, and alpha likewise.
        divergence: the name of D, see the table below.
        beta: of the divergences that have one, in [0, 1]. None: 0.5 for ``"jsd"`` and ``"symmetric_kl"``, 0.1 for the
            two skew ones (DistiLLM's).
        target: what ``teacher`` holds: ``"logits"``, ``"probs"`` or ``"log_probs"``. The latter two are at the
            temperature already and need not sum to exactly 1.
        vocab_size: how many of the first classes are real, where heads are padded (to different sizes, it may be). The
            others take no part, and their gradient is 0.
        t_squared: False leaves :math:`T^2` out.
        row_weight: (...) weights of rows, >= 0, of any real dtype. A row of weight 0 is treated as an ignored one.
        ignore_index: rows with this label drop out of both terms and of the mean, and get zero gradient.
        reduction: ``"none"``: (...) row losses; ``"sum"``; ``"mean"``: :math:`\sum l / \sum w` over the rows not
            ignored, 0 if there are none; ``"batchmean"``: :math:`\sum l` / the size of the first dimension.
        normalizer: a number > 0 or a 0-dim tensor that :math:`\sum l` is divided by in place of the mean's denominator:
            the number of tokens over all micro-batches and ranks.
        label_smoothing: in [0, 1]; this part of the hard term is the mean of CE over all classes, as F.cross_entropy
            has it. Needs labels.
        z_loss: the weight >= 0 of the square of log(sum exp s), which keeps logits from drifting: PaLM, Chowdhery et
            al. 2022, section 5. It needs no labels, and alpha does not weigh it.
        logit_scale: a number > 0 that the student's logits are multiplied by before anything else (Cohere's
            ``logit_scale``, 1 / ``logits_scaling`` of Granite). Logits of a Hugging Face model carry it already.
        teacher_logit_scale: the same for the teacher's, which must be logits.
        softcap: the student's logits are cap * tanh(s / cap) before all that follows (Gemma 2, section 2), all terms and
            metrics included; a masked class stays masked. None: as they are.
        teacher_softcap: the same for the teacher's, which must be logits.
        standardize: the soft term's logits are (s - mean) / (1e-7 + deviation), with the row's sample deviation, each
            teacher's by itself: Logit Standardization, Sun et al., CVPR 2024. Needs ``target="logits"``; a class that
            is -inf makes its row NaN.
        teacher_weights: one number >= 0 per teacher of a sequence, scaled to sum to 1. None: equal ones.
        ensemble: ``"arithmetic"``, the weighted mean of the teachers' probabilities, or ``"geometric"``, the softmax of
            the weighted mean of their logits / T (paper, section 2 and 5).
        inplace: the gradient overwrites the storage of ``student_logits``, which saves a tensor of that size; the
            logits must not be a leaf that requires grad.
        return_metrics: whether :class:`KDMetrics` of the same pass are returned too. They are as if both terms had a
            weight: ``soft`` where there is a teacher though alpha is 0, ``hard`` where there are labels though h is 0;
            these cases may take a pass of their own.
        dkd_weights: of ``"dkd"``: of the divergence of label against rest, and of that among the rest.
        backend: None (by the device), ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; see
            :func:`kdfast.backends`. ``"triton"`` takes CPU tensors too where Triton itself can launch on them.

    ====================  ============================================================  =========================
    divergence            D(p, q)                                                       from
    ====================  ============================================================  =========================
    ``cross_entropy``     :math:`-\sum p \log q`                                        Hinton et al. 2015
    ``forward_kl``        :math:`\sum p \log (p / q)`; cross_entropy's gradient         the same; F.kl_div
    ``reverse_kl``        :math:`\sum q \log (q / p)`                                    MiniLLM, Gu et al. 2024
    ``symmetric_kl``      :math:`\beta` forward_kl + (1 - :math:`\beta`) reverse_kl      Jeffreys 1946
    ``jsd``               :math:`\beta KL(p, m) + (1 - \beta) KL(q, m)`,                 GKD, Agarwal et al. 2024
                          :math:`m = \beta p + (1 - \beta) q`
    ``skew_forward_kl``   :math:`KL(p, \beta p + (1 - \beta) q)`                         DistiLLM, Ko et al. 2024
    ``skew_reverse_kl``   :math:`KL(q, \beta q + (1 - \beta) p)`                         the same
    ``tvd``               :math:`\frac{1}{2} \sum |p - q|`                               f-distill, Wen et al. 2023
    ``hellinger``         :math:`1 - \sum \sqrt{p q}`                                    Hellinger 1909
    ``logit_mse``         :math:`\frac{1}{2V} \sum (s_i - t_i)^2` on centred rows, the   Hinton et al., section 2.1
                          limit for high T; no temperature and no T^2
    ``dkd``               :math:`w_0 KL((p_y, 1 - p_y), (q_y, 1 - q_y)) + w_1            Zhao et al., CVPR 2022
                          KL(\hat p, \hat q)`, :math:`\hat p_i = p_i / (1 - p_y)` over
                          i != y; needs labels
    ====================  ============================================================  =========================

    At the ends of beta, jsd is forward_kl (0) and reverse_kl (1), as in TRL and Liger: a jump, for inside D goes to 0
    with beta. symmetric_kl is reverse_kl (0) and forward_kl (1), the skew ones at 0 are the KL they are named for. A
    class with p = 0 or q = 0 makes the KL that divides by it infinite; jsd, the skew ones, tvd and hellinger stay
    finite. A class masked with -inf on both sides adds 0 and gets gradient 0. dkd's second part is 0 where no class is
    left for it.

    Returns:
        0-dim, or (...) with reduction ``"none"``; float32, for float64 logits float64. With ``return_metrics`` a pair
        of it and KDMetrics, each of the same shape and dtype. Scalar losses of other than
        float16 logits compute the gradient in forward, and backward scales it where grad_output is not 1. Not twice
        differentiable.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: a shape, a number or a name that is not allowed, or arguments that exclude each other.
        RuntimeError: a wrong dtype or device, a backend that is not usable here, ``inplace`` on a leaf.
        IndexError: a label outside [0, V) that is not ``ignore_index``. On a GPU nobody waits to see it: loss and
            gradient of its row become NaN, and no other row is touched.
    """
    check_names("kd_loss", unknown, {})
    options = {
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "alpha": alpha,
        "hard_weight": hard_weight,
        "divergence": divergence,
        "beta": beta,
        "target": target,
        "vocab_size": vocab_size,
        "t_squared": t_squared,
        "row_weight": row_weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "normalizer": normalizer,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "logit_scale": logit_scale,
        "teacher_logit_scale": teacher_logit_scale,
        "softcap": softcap,
        "teacher_softcap": teacher_softcap,
        "standardize": standardize,
        "teacher_weights": teacher_weights,
        "ensemble": ensemble,
        "inplace": inplace,
        "return_metrics": return_metrics,
        "dkd_weights": dkd_weights,
        "backend": backend,
    }
    settings = check_settings(options, labels is not None)
    return checked_loss(student_logits, teacher, labels, options, settings)


def checked_loss(
    student: Tensor, teacher: Teacher, labels: Tensor | None, options: dict[str, Any], settings: Settings
) -> Any:
    """kd_loss with the settings that check_settings made of the options."""
    inputs, settings = check_inputs(student, teacher, labels, options, settings)
    inplace = options["inplace"]
    if inplace:
        checks.check_inplace(student)
    loss, metrics = row_loss(student, inputs, settings, choice.namespace(options["backend"], student), inplace)
    return (loss, KDMetrics(*metrics.unbind())) if settings.metrics else loss


class LossModule(nn.Module):
    """A loss as a module: what KDLoss and LinearKDLoss share. The options are plain attributes."""

    defaults: ClassVar[dict[str, Any]]  # of the options, by name

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        check_names(type(self).__name__, options, self.defaults)
        self.__dict__.update(self.defaults | options)
        self.checked_settings(True)  # a label is what may still be missing

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.defaults:  # a schedule: it is checked with the next call
            self.__dict__.pop("_checked", None)

    def options(self) -> dict[str, Any]:
        """The options as they are now."""
        return {name: getattr(self, name) for name in self.defaults}

    def checked_settings(self, has_labels: bool) -> Settings:
        """The settings of a call, which are checked when an option has changed."""
        if torch.compiler.is_compiling():
            return check_settings(self.options(), has_labels)
        checked = self.__dict__.setdefault("_checked", {})
        if has_labels not in checked:
            checked[has_labels] = check_settings(self.options(), has_labels)
        return checked[has_labels]

    def extra_repr(self) -> str:
        # identity first: a tensor of temperatures is not equal to anything
        default = self.defaults
        changed = {k: v for k, v in self.options().items() if v is not default[k] and (v == default[k]) is not True}
        shown = {name: getattr(self, name) for name in ("temperature", "alpha", "divergence")} | changed
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class KDLoss(LossModule):
    """:func:`kd_loss` as a module: its options are given and checked once, here; ``forward`` takes the tensors.

    Takes every keyword of :func:`kd_loss` but ``row_weight`` and ``normalizer``, which belong to a call. Has no
    parameters and no buffers. The options are plain attributes and can be changed between calls.
    """

    defaults: ClassVar[dict[str, Any]] = dict(kd_loss.__kwdefaults__ or {})
    del defaults["row_weight"], defaults["normalizer"]

    def __init__(self, *, inplace: bool = False, return_metrics: bool = False, **options: Unpack[Options]) -> None:
        super().__init__({"inplace": inplace, "return_metrics": return_metrics, **options})

    def forward(
        self,
        student_logits: Tensor,
        teacher: Teacher,
        labels: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:  # as kd_loss
        options = self.options() | {"row_weight": row_weight, "normalizer": normalizer}
        settings = self.checked_settings(labels is not None)
        return checked_loss(student_logits, teacher, labels, options, settings)
