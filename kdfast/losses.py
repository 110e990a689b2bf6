"""kd_loss: a loss from logits."""

from collections.abc import Sequence
from typing import Any, Literal, NoReturn, overload

from torch import Tensor
from typing_extensions import Unpack

from kdfast import choice
from kdfast.arguments import KDMetrics, Settings, SparseKDMetrics, as_metrics
from kdfast.autograd import row_loss
from kdfast.classes_last import classes_last
from kdfast.options import (
    DKD_WEIGHTS,
    Backend,
    CallOptions,
    Ensemble,
    Missing,
    Reduction,
    Target,
    check_inputs,
    check_names,
    check_settings,
)
from kdfast.overlap import check_inplace
from kdfast.sparse import TopKTargets
from kdfast.tensor_checks import is_dtensor

Teacher = Tensor | Sequence[Tensor] | TopKTargets | None


@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    dim: int = -1,
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
    dim: int = -1,
    inplace: bool = False,
    return_metrics: Literal[True],
    **options: Unpack[CallOptions],
) -> tuple[Tensor, KDMetrics | SparseKDMetrics]: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    dim: int = -1,
    inplace: bool = False,
    return_metrics: bool,
    **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, KDMetrics | SparseKDMetrics]: ...
def kd_loss(
    student_logits: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    alpha: float | Tensor | None = None,
    hard_weight: float | Tensor | None = None,
    divergence: str = "cross_entropy",
    beta: float | None = None,
    target: Target = "logits",
    missing: Missing = "tail",
    vocab_size: int | None = None,
    t_squared: bool = True,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    dim: int = -1,
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
    process_group: Any = None,
    vocab_start: int | None = None,
    backend: Backend | None = None,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, KDMetrics | SparseKDMetrics]:
    """The distillation loss of a student against a teacher, and against labels where they are given.

    With q = softmax(s / T), p = softmax(t / T) and q1 = softmax(s), a row (a token, an image) of weight w costs

        l = w * (alpha * T^2 * D(p, q)  +  hard_weight * CE(y, q1)  +  z_loss * logsumexp(s)^2)

    where D is the divergence: the objective of Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network"
    (2015), section 2, extended. T^2 keeps the size of the soft gradients independent of T.

    Examples:
        >>> student, teacher = torch.zeros(1, 3, requires_grad=True), torch.tensor([[4.0, 0.0, 0.0]])
        >>> kd_loss(student, teacher, temperature=2.0, divergence="forward_kl").detach()  # 4 * KL(p, q)
        tensor(1.7322)
        >>> loss = kd_loss(student, teacher, torch.tensor([0]), temperature=2.0, alpha=0.7)
        >>> loss.backward()
        >>> student.grad
        tensor([[-0.8351,  0.4176,  0.4176]])

    | divergence        | D(p, q)                                                        | source                     |
    |-------------------|----------------------------------------------------------------|----------------------------|
    | `cross_entropy`   | -sum p log q                                                   | Hinton et al. 2015         |
    | `forward_kl`      | KL(p, q) = sum p log(p / q); the gradient is cross_entropy's   | F.kl_div                   |
    | `reverse_kl`      | KL(q, p)                                                       | MiniLLM, Gu et al. 2024    |
    | `symmetric_kl`    | beta KL(p, q) + (1 - beta) KL(q, p)                            | Jeffreys 1946              |
    | `jsd`             | beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q | GKD, Agarwal et al. 2024   |
    | `skew_forward_kl` | KL(p, beta p + (1 - beta) q)                                   | DistiLLM, Ko et al. 2024   |
    | `skew_reverse_kl` | KL(q, beta q + (1 - beta) p)                                   | DistiLLM                   |
    | `tvd`             | 1/2 sum abs(p - q)                                             | f-distill, Wen et al. 2023 |
    | `hellinger`       | 1 - sum sqrt(p q)                                              | Hellinger 1909             |
    | `logit_mse`       | 1/(2V) sum (s - t)^2 on centred rows, the limit for high T     | Hinton et al., section 2.1 |
    | `dkd`             | w_0 KL((p_y, 1 - p_y), (q_y, 1 - q_y)) + w_1 KL(p', q')        | Zhao et al., CVPR 2022     |

    `logit_mse` has no temperature and no T^2. `dkd` needs labels y; p' and q' are over the classes other than y.
    At the ends of beta, jsd is forward_kl (0) and reverse_kl (1), as in TRL and Liger, although inside D goes to 0 with
    beta; symmetric_kl is reverse_kl (0) and forward_kl (1); the skew ones at 0 are the KL that they are named after.
    A class with p = 0 or q = 0 makes the KL that divides by it infinite; jsd, the skew ones, tvd and hellinger stay
    finite. A class masked with -inf on both sides adds 0 and gets gradient 0.

    Args:
        student_logits: (..., V), float32, bfloat16, float16 or float64. V = 1 has loss 0, since one class alone has
            probability 1. A sigmoid's logit z stands for two classes, `torch.stack((torch.zeros_like(z), z), -1)`,
            with labels 0 and 1: for one output, and for each of several (multi-label) ones.
        teacher: (..., V) of any of these dtypes, or a sequence of such tensors, an ensemble; or
            `TopKTargets`, a sparse teacher. It never gets a gradient. May be None where `alpha` is 0.
        labels: (...) int64 class indices, already shifted. None: no hard term.

    Args: Teacher
        target: what `teacher` holds: `"logits"`, `"probs"` or `"log_probs"`. Probabilities are at the
            temperature already and need not sum to exactly 1. A sparse teacher has log-probabilities always.
        teacher_weights: one number >= 0 for each teacher of a sequence, scaled to sum to 1. None: equal weights.
        ensemble: `"arithmetic"`: the weighted mean of the teachers' probabilities; `"geometric"`: the softmax of
            the weighted mean of their logits / T (the paper, sections 2 and 5).
        missing: what a sparse teacher's other classes have, with P the sum of its p_k. `"tail"`: 1 - P, as one class
            more, so that D >= 0; `"conditional"`: nothing, and the student's likewise, both renormalized over the K
            classes; `"renormalize"`: nothing, p_k / P; `"truncate"`: they are left out of the sum alone, which may
            be negative. `"tail"` and `"truncate"` need log-probabilities of the whole softmax at T; the others take
            any up to a constant, so that `log_probs * (T0 / T)` changes their temperature. See docs/sparse.md.

    Args: Weighting
        divergence: the name of D, in the table above.
        beta: the parameter of the divergences that have one, in [0, 1]. None: 0.5 for `"jsd"` and
            `"symmetric_kl"`, 0.1 for the skew ones, as in DistiLLM.
        dkd_weights: the two weights of `"dkd"`, w_0 and w_1 above.
        alpha: the weight of the soft term. None: 0.9 with labels, 1 without. In [0, 1] unless `hard_weight` is given.
            The paper found more than 0.5 best. A number, or a 0-dim tensor on the CPU; so is `hard_weight`.
        hard_weight: the weight of the hard term, a finite number >= 0. None: 1 - alpha.
        label_smoothing: in [0, 1], as in F.cross_entropy: this part of the hard term is the mean of CE over all
            classes. Needs labels.
        z_loss: the weight >= 0 of the square of logsumexp(s), which keeps logits from drifting (PaLM, Chowdhery et al.
            2022, section 5). It needs no labels, and alpha does not weigh it.
        t_squared: False leaves T^2 out.

    Args: Rows
        ignore_index: rows with this label are left out of both terms and of the mean, and get zero gradient, whatever
            they hold in any argument.
        row_weight: (...) weights of rows, >= 0, of any real dtype or bool. A row of weight 0 is treated as ignored.
        reduction: `"none"`: (...) row losses; `"sum"`; `"mean"`: the sum of l over the sum of w, rows that are
            not ignored only, and 0 if there are none; `"batchmean"`: the sum of l over the size of the first
            dimension (of the first one that is not `dim`).
        normalizer: a number > 0 or a 0-dim tensor that divides the sum of l in place of the mean's denominator, such as
            the number of tokens over all micro-batches and ranks. A tensor of 0, where no row is kept, gives loss 0.

    Args: Logits
        temperature: T > 0, a number, a 0-dim tensor, or a tensor (...) with one per row, detached. A tensor's values
            are checked on a CPU only; none of them needs a sync.
        teacher_temperature: the teacher's; None: `temperature`. T^2 stays the student's.
        logit_scale: a number > 0 that multiplies the student's logits before everything else: `logit_scale` of
            Cohere's models, 1 / `logits_scaling` of Granite. Logits from Hugging Face models are scaled already.
        teacher_logit_scale: the teacher's, which must be logits.
        softcap: the student's logits become cap * tanh(s / cap) before everything that follows (Gemma 2, section 2), in
            all terms and metrics. A masked class stays masked. None: no cap.
        teacher_softcap: the teacher's, which must be logits.
        standardize: the soft term takes (s - mean) / (1e-7 + deviation), with each row's sample deviation, and the same
            of each teacher (Logit Standardization, Sun et al., CVPR 2024). Needs `target="logits"`. A class that is
            -inf makes its row NaN.
        vocab_size: the number of real classes, where heads are padded, also to different sizes. The classes after them
            are left out, and their gradient is 0.
        dim: where the classes are, in the student's and the teacher's logits: 1 for the (N, C, H, W) and (N, C, L) of
            F.cross_entropy. (...) is then the shape without this dimension. Channels-last logits are read where they
            lie, others are copied; the gradient has the layout of the logits. Where all sizes are alike and there
            are no labels, a wrong `dim` cannot be noticed.

    Args: Output
        inplace: the gradient overwrites the storage of `student_logits`, which saves a tensor of that size. The
            logits must not be a leaf that requires grad, nor overlap themselves or another argument; a teacher that is
            the student's memory is fine, as each class is read before it is overwritten.
        return_metrics: also return `KDMetrics`, computed in the same pass. `soft` is there whenever there is a
            teacher, though alpha is 0, and `hard` whenever there are labels, though hard_weight is 0; these may take
            another pass.
        backend: None (by device), `"reference"`, `"cpu"`, `"triton"` or `"cuda"`; see
            `backends`. `"triton"` also takes CPU tensors where Triton can launch on them.
        process_group: the logits are some classes of all rows, and the processes of this torch.distributed group have
            the others (tensor parallel). The loss is that of all classes, the same bits in every process, and the
            gradient is that of the process's own: do not sum the loss over the group, nor divide it. Labels count all
            classes, as do `vocab_size` and a sparse teacher's indices; a dense teacher has the same classes in each
            process, or all of them. A DTensor whose classes are split, Shard(-1) on one mesh dimension and Replicate()
            on the others, needs no group. See docs/parallel.md.
        vocab_start: the first class of this process. None: the numbers of classes are exchanged. Needs a group.

    Returns:
        0-dim, or (...) with reduction `"none"`; float32, for float64 logits float64. With `return_metrics` a pair
        of it and KDMetrics, whose fields have the same shape and dtype. For a scalar loss the gradient is computed in
        forward (not for float16), and backward scales it where grad_output is not 1.

        Differentiable once: by backward, by torch.func.grad and vjp, and by forward-mode AD (torch.func.jvp, jacfwd,
        forward_ad). A derivative of the gradient (create_graph=True, torch.func.hessian) and torch.vmap, on which
        torch.func.jacrev is built, raise a RuntimeError.

    Raises:
        TypeError: an argument of a wrong Python type.
        ValueError: a shape, a number or a name that is not allowed, or arguments that exclude each other.
        RuntimeError: a wrong dtype or device, a backend that is not usable here, `inplace` on a leaf or on memory
            that overlaps.
        IndexError: a label outside [0, V) of a row that is kept. On a GPU, to avoid a sync, the loss and the gradient
            of its row become NaN instead, and no other row changes. A `dim` that the logits do not have.
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
        "missing": missing,
        "vocab_size": vocab_size,
        "t_squared": t_squared,
        "row_weight": row_weight,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "normalizer": normalizer,
        "dim": dim,
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
        "process_group": process_group,
        "vocab_start": vocab_start,
        "backend": backend,
    }
    settings = check_settings(options, labels is not None)
    return checked_loss(student_logits, teacher, labels, options, settings)


def checked_loss(
    student: Tensor, teacher: Teacher, labels: Tensor | None, options: dict[str, Any], settings: Settings
) -> Any:
    """kd_loss with the settings that check_settings made of the options."""
    if is_dtensor(student):
        from kdfast.dtensors import local_call

        student, teacher, labels, options = local_call(student, teacher, labels, options)
    if options["process_group"] is not None or options["vocab_start"] is not None:
        from kdfast.parallel import sharded_loss

        return sharded_loss(student, teacher, labels, options, settings)
    inputs, settings = check_inputs(student, teacher, labels, options, settings)
    inplace = options["inplace"]
    student = classes_last(student, options["dim"], inplace)
    if inplace:
        check_inplace(student, inputs)
    loss, metrics = row_loss(student, inputs, settings, choice.namespace(options["backend"], student), inplace)
    return (loss, as_metrics(metrics)) if settings.metrics else loss
