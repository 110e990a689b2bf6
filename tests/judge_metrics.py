"""How metrics are judged: by judge.py's rule, against the recipes of eager.py in fp64."""

import math
from typing import Any

import torch
from cases import F32, F64, to_device
from eager import (
    DEFAULTS,
    Logits,
    apply_scales,
    apply_softcap,
    eager,
    entropies,
    largest_z,
    mixture,
    standardize,
    temperatures,
)
from judge import in_fp64, one_thread, per_row_settings, real_classes, row_weights, sparse_options
from torch import Tensor

import kdfast

ALONE = {"hard_weight": 0, "z_loss": 0.0}  # the soft term without the others
FIELDS = ("soft", "hard", "kl", "student_entropy", "teacher_entropy", "agreement", "accuracy")
MASSES = ("student_mass", "teacher_mass")  # of a sparse teacher
NAN = math.nan


def compute_metrics(student: Tensor, teacher: Any, labels: Tensor | None = None, **settings: Any) -> dict[str, Tensor]:
    _, metrics = kdfast.kd_loss(student, teacher, labels, return_metrics=True, **settings)
    is_sparse = isinstance(teacher, kdfast.TopKTargets)
    assert isinstance(metrics, kdfast.SparseKDMetrics if is_sparse else kdfast.KDMetrics)
    assert metrics._fields == (FIELDS + MASSES if is_sparse else FIELDS)
    return metrics._asdict()


def row_metrics(
    student: Tensor, teachers: list[Tensor], labels: Tensor | None, settings: dict[str, Any], kind: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each row's metrics by the recipes of eager.py, each with A of judge.py, in eps."""
    o = DEFAULTS | settings
    if o["divergence"] == "logit_mse":
        o |= {"temperature": 1.0, "teacher_temperature": None, "t_squared": False}
    nan = torch.full_like(student[..., 0], NAN)
    nothing = (nan, nan)
    s, scaled_teachers = apply_scales(student, teachers, o)
    best, unclear = _argmax([s], o["softcap"], o, kind)
    found = dict.fromkeys(FIELDS, nothing)
    of_q, of_q_off, of_p, of_p_off = entropies(student, teachers, o, kind)
    found["student_entropy"] = of_q, of_q_off
    if labels is not None:
        found["hard"] = eager(student, [], labels, o | {"alpha": 0, "hard_weight": 1, "z_loss": 0}, kind)[:2]
        found["accuracy"] = (best == labels).to(nan.dtype), unclear.to(nan.dtype)
    if teachers:
        found["soft"] = eager(student, teachers, labels, o | ALONE | {"alpha": 1}, kind)[:2]
        kl = o | ALONE | {"alpha": 1, "divergence": "forward_kl", "beta": None, "t_squared": False}
        found["kl"] = eager(student, teachers, None, kl, kind)[:2]
        found["teacher_entropy"] = of_p, of_p_off
        best_of_p, p_unclear = _argmax(scaled_teachers, o["teacher_softcap"], o, kind)
        if "indices" in o:
            best_of_p = o["indices"].gather(-1, best_of_p.unsqueeze(-1)).squeeze(-1)
            best_of_p = torch.where((teachers[0] == -torch.inf).all(-1), -1, best_of_p)
            found |= _masses(apply_softcap(s, o["softcap"]), teachers[0], o)
        found["agreement"] = (best == best_of_p).to(nan.dtype), (unclear | p_unclear).to(nan.dtype)
    return {k: (value, off.nan_to_num(0)) for k, (value, off) in found.items()}


def _masses(s: Logits, log_p: Tensor, o: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """The sums of q and of p over the entries, with their errors."""
    absent, T = log_p == -torch.inf, temperatures(s.z, o)[0]
    log_q = torch.log_softmax(s.z / T, -1)
    off = (log_q.exp() * (8 + log_q.abs() + s.off / T)).nan_to_num(0) + 8 * log_q.exp()
    places = torch.where(absent, 0, o["indices"].long())
    q, q_off = (x.gather(-1, places).masked_fill(absent, 0).sum(-1) for x in (log_q.exp(), off))
    p = log_p.exp()
    return {"student_mass": (q, q_off), "teacher_mass": (p.sum(-1), (p * (8 + log_p.abs())).nan_to_num(0).sum(-1))}


def _argmax(logits: list[Tensor], cap: float | None, o: dict[str, Any], kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """The argmax of one side's logits, or of an ensemble's p; and whether the two largest are too close to tell apart:
    a saturated cap makes them equal."""
    z = [apply_softcap(x, cap) for x in logits]
    if len(z) > 1:
        z = [standardize(x) for x in z] if o["standardize"] else z
        shown = mixture(z, temperatures(logits[0], o)[1], o)[0]
    else:
        shown = z[0].z
    largest = shown.topk(min(2, shown.shape[-1]), -1).values
    near = largest[..., 0] - largest[..., -1] <= 64 * torch.finfo(kind).eps * largest[..., 0].abs()
    return (logits[0] if len(z) == 1 else shown).argmax(-1), near & bool(cap or len(z) > 1) & (shown.shape[-1] > 1)


def judge_metrics(
    student: Tensor, teacher: Any, labels: Tensor | None = None, *, backend: str, **settings: Any
) -> dict[str, Tensor]:
    """Judges every metric by the rule of judge.py; agreement and accuracy are exact."""
    got = compute_metrics(student, teacher, labels, backend=backend, **settings)
    kind = F64 if student.dtype == F64 else F32
    student, teacher, labels, settings = to_device((student, teacher, labels, settings), "cpu")
    settings = settings | sparse_options(teacher)
    s, teachers = real_classes(student, teacher, settings)
    weight = row_weights(student, labels, settings)
    keep = weight != 0
    with one_thread():
        truth = row_metrics(s.double(), [t.double() for t in teachers], labels, settings, kind)
        plain = row_metrics(s.float(), [t.float() for t in teachers], labels, settings, kind)
        if teachers:  # eager's own is NaN where a probability underflows
            rows = {k: v for k, v in per_row_settings(settings).items() if k not in ("return_metrics", "vocab_size")}
            rows |= ALONE | {"alpha": 1, "label_smoothing": 0.0, "row_weight": None, "backend": "reference"}
            given = [t.double() for t in teachers] if len(teachers) > 1 else teachers[0].double()
            if "indices" in settings:
                given = kdfast.TopKTargets(rows.pop("indices"), given)
            truth["soft"] = kdfast.kd_loss(s.double(), given, labels, **in_fp64(rows)), truth["soft"][1]
        rounded = largest_z(s, teachers, DEFAULTS | settings).squeeze(-1)
    for field, (want, off) in truth.items():
        assert got[field].dtype == kind, field
        assert not got[field].requires_grad, field
        allowed = off * torch.finfo(kind).eps
        # as in judge.py: eager's error, or the truth's own; agreement and accuracy have none
        allowed = allowed * (1 + rounded) if kind == F64 else allowed + (plain[field][0] - want).abs().nan_to_num(0)
        allowed = off if field in ("agreement", "accuracy") else allowed
        want = torch.where(keep, want, NAN)
        if settings.get("reduction") != "none":
            total = weight.sum()
            want, allowed = (torch.where(keep, x * weight, 0).sum() / total for x in (want, allowed))
            # rounding of the sum and of the quotient
            allowed = allowed + (4 + keep.numel() ** 0.5) * torch.finfo(kind).eps * want.abs().nan_to_num(0)
        assert got[field].shape == want.shape, field
        off_by = (got[field].cpu().double() - want).abs()
        right = (off_by <= allowed) | (want.isnan() & got[field].cpu().isnan())
        assert right.all(), f"{field}: {got[field]} instead of {want}, {allowed} allowed"
    return got
