"""Wrong arguments of kd_loss and their errors.

A row: argument, its value, further arguments -> error and words of its message: what it was, what it may be. Every
message begins with the argument's name and a colon.
"""

import re
from typing import Any, NamedTuple

import numpy as np
import torch
from cases import batch

from kdfast import TopKTargets

S, T, Y = batch(3, 5)  # three rows of five classes
NAN, INF = float("nan"), float("inf")
CAPS = ("softcap", "teacher_softcap")
SCALES = ("logit_scale", "teacher_logit_scale")
NOT_NONE = ("temperature", "label_smoothing", "z_loss", *SCALES)  # arguments that cannot be None
NESTED = torch.nested.nested_tensor([S[0, :2], S[1]], layout=torch.jagged)
META = torch.empty(3, 5, device="meta")  # another device than the logits'


# two entries a row, the last one absent
IDS, LP = torch.tensor([[0, 1], [2, 3], [4, -1]]), torch.tensor([[-0.5, -1.5], [-0.7, -1.2], [-0.1, -INF]])
SPARSE = TopKTargets(IDS, LP)


class ModelOutput(NamedTuple):
    """As torchvision's GoogLeNet returns it."""

    logits: torch.Tensor
    aux_logits: torch.Tensor


WRONG: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    # --- tensors: a wrong Python type is a TypeError, as PyTorch's own arguments raise it
    ("student_logits", [1.0], {}, TypeError, "must be a tensor, not list"),
    ("student_logits", None, {}, TypeError, "must be a tensor, not None"),
    ("student_logits", np.zeros((3, 5)), {}, TypeError, "must be a tensor, not ndarray"),
    *(
        (
            "teacher",
            value,
            {},
            TypeError,
            f"must be a tensor, a list or tuple of tensors, or kdfast.TopKTargets .*, not {type_}",
        )
        for value, type_ in (
            (None, "None"),
            ("logits", "str"),
            ({0: T}, "dict"),
            ((t for t in [T]), "generator"),
            (ModelOutput(T, T), "ModelOutput; pass its logits"),
        )
    ),  # fmt: skip
    ("teacher[1]", [T, None], {}, TypeError, "must be a tensor, not None"),
    ("labels", [0, 1, 2], {}, TypeError, "must be a tensor, not list"),
    ("row_weight", [1.0, 1.0, 1.0], {}, TypeError, "must be a tensor, not list"),
    # a dtype is a RuntimeError
    ("student_logits", S.long(), {}, RuntimeError, r"torch.int64, but it must be one of torch.float32, .*64"),
    ("student_logits", S.to(torch.complex64), {}, RuntimeError, "torch.complex64, but it must be one of torch.float32"),
    ("student_logits", S.to(torch.float8_e5m2), {}, RuntimeError, "torch.float8_e5m2, but it must be one of"),
    ("teacher", T.long(), {}, RuntimeError, "torch.int64, but it must be one of torch.float32"),
    ("teacher[0]", [T.bool(), T], {}, RuntimeError, "torch.bool, but it must be one of torch.float32"),
    ("labels", Y.int(), {}, RuntimeError, "torch.int32, but it must be torch.int64 class indices"),
    ("labels", Y.float(), {}, RuntimeError, "torch.float32, but it must be torch.int64 class indices"),
    ("row_weight", torch.ones(3, dtype=torch.complex64), {}, RuntimeError, "torch.complex64, but it must be real"),
    ("temperature", torch.ones(3, dtype=torch.complex64), {}, RuntimeError, "torch.complex64, but it must be real"),
    # so is a device, and what autograd cannot do
    ("teacher", META, {}, RuntimeError, "is on meta, but student_logits is on (cpu|cuda)"),
    ("teacher[1]", [T, META], {}, RuntimeError, "is on meta, but student_logits is on (cpu|cuda)"),
    ("labels", torch.empty(3, dtype=torch.int64, device="meta"), {}, RuntimeError, "on meta, but student_logits is on"),
    ("row_weight", torch.empty(3, device="meta"), {}, RuntimeError, "is on meta, but student_logits is on (cpu|cuda)"),
    ("temperature", torch.empty(3, device="meta"), {}, RuntimeError, "is on meta, but student_logits is on (cpu|cuda)"),
    ("normalizer", torch.empty((), device="meta"), {}, RuntimeError, "is on meta, but student_logits is on (cpu|cuda)"),
    *(
        (name, torch.ones(3, requires_grad=True), {}, RuntimeError, "requires grad, but .* no derivative.*detach")
        for name in ("row_weight", "temperature", "teacher_temperature")
    ),
    ("student_logits", NESTED, {}, TypeError, r"is a nested tensor; pass its values\(\)"),
    ("teacher", NESTED, {}, TypeError, r"is a nested tensor; pass its values\(\)"),
    ("labels", T.softmax(-1), {}, RuntimeError, r"torch.float32 and the shape of .*target=\"probs\""),
    # a shape is a ValueError
    ("student_logits", torch.tensor(1.0), {}, ValueError, r"has shape \(\), but it must be \(..., V\) with V >= 1"),
    ("student_logits", torch.empty(3, 0), {}, ValueError, r"has shape \(3, 0\), but it must be \(..., V\) with V >= 1"),
    ("teacher", T[:2], {}, ValueError, r"has shape \(2, 5\), but .* of shape \(3, 5\) it must be \(3, V\)"),
    ("teacher", T[0], {}, ValueError, r"has shape \(5,\), but .* of shape \(3, 5\) it must be \(3, V\)"),
    ("teacher", T[:, :4], {}, ValueError, "has 4 classes, but student_logits has 5; .*vocab_size"),
    ("teacher[1]", [T, T[:, :4]], {}, ValueError, "has 4 classes, but student_logits has 5; .*vocab_size"),
    ("teacher", [], {}, ValueError, "the sequence of teachers is empty"),
    ("labels", Y[:2], {}, ValueError, r"has shape \(2,\), but .* of shape \(3, 5\) it must be \(3,\)"),
    ("labels", Y[:, None], {}, ValueError, r"has shape \(3, 1\), but .* of shape \(3, 5\) it must be \(3,\)"),
    ("row_weight", torch.ones(3, 5), {}, ValueError, r"has shape \(3, 5\), but .* of shape \(3, 5\) it must be \(3,\)"),
    ("temperature", torch.ones(1), {}, ValueError, r"has shape \(1,\), but .* of shape \(3, 5\) it must be \(3,\)"),
    ("teacher_temperature", torch.ones(2), {}, ValueError, r"has shape \(2,\), but .* it must be \(3,\)"),
    ("normalizer", torch.ones(2), {}, ValueError, r"a number or a real tensor of one, not .* of shape \(2,\)"),
    # --- labels: out of range is an IndexError with label, row and V
    ("labels", torch.tensor([0, 5, 1]), {}, IndexError, r"label 5 in row 1 .*V = 5 .*\[0, 4\] or .*\(-100\)"),
    ("labels", torch.tensor([0, 1, -1]), {}, IndexError, r"label -1 in row 2 .*V = 5 .*\[0, 4\]"),
    ("labels", torch.tensor([-100, 1, 2]), {"ignore_index": 7}, IndexError, r"label -100 in row 0 .*\(7\)"),
    ("labels", torch.tensor([4, 0, 0]), {"vocab_size": 4}, IndexError, r"label 4 in row 0 .*V = 4 .*\[0, 3\]"),
    ("labels", torch.tensor([2**40, 0, 0]), {}, IndexError, f"label {2**40} in row 0"),
    ("labels", torch.tensor([0, 9, 0]), {"row_weight": torch.tensor([0.0, 1, 1])}, IndexError, "label 9 in row 1"),
    ("labels", torch.tensor([9, 0, 0]), {"alpha": 1}, IndexError, "label 9 in row 0"),
    # --- numbers
    *(
        (argument, value, {}, ValueError, re.escape(f"{value!r} must be finite and > 0"))
        for argument in ("temperature", "teacher_temperature", "normalizer", *CAPS, *SCALES)
        for value in (0, -1, -0.5, NAN, INF, 0.0)
    ),
    *(
        (argument, value, {}, TypeError, "must be a number.*, not " + re.escape(repr(value)))
        for argument in (*NOT_NONE, "alpha", "hard_weight", "normalizer", *CAPS)
        for value in ("2", True, [2.0], 1j, *([None] if argument in NOT_NONE else []))
    ),
    ("temperature", np.array([1.0, 2.0]), {}, TypeError, "must be a number"),
    ("alpha", torch.tensor([0.5]), {}, TypeError, "must be a number, not tensor"),
    *(
        (name, torch.tensor(0.5, requires_grad=True), {}, RuntimeError, "requires grad, but .* no derivative.*detach")
        for name in ("alpha", "hard_weight", "temperature", "teacher_temperature")
    ),
    *(
        (name, torch.empty((), device="meta"), {}, RuntimeError, rf"is on meta.*{name}\.item\(\)")
        for name in ("alpha", "hard_weight")
    ),
    ("temperature", torch.empty((), device="meta"), {}, RuntimeError, "is on meta, but student_logits is on"),
    ("temperature", torch.tensor([1.0, 0.0, 2.0]), {}, ValueError, "0 in row 1, but it must be finite and > 0"),
    ("teacher_temperature", torch.tensor([1.0, 2.0, NAN]), {}, ValueError, "nan in row 2, but .* finite and > 0"),
    ("row_weight", torch.tensor([1.0, -1.0, 2.0]), {}, ValueError, "-1 in row 1, but it must be finite and >= 0"),
    ("row_weight", torch.tensor([INF, 1.0, 2.0]), {}, ValueError, "inf in row 0, but it must be finite and >= 0"),
    ("alpha", -0.1, {}, ValueError, "-0.1 must be a finite number >= 0"),
    ("alpha", NAN, {}, ValueError, "nan must be a finite number >= 0"),
    ("alpha", INF, {"hard_weight": 0}, ValueError, "inf must be a finite number >= 0"),
    ("alpha", 1.5, {}, ValueError, r"1.5 must lie in \[0, 1\] where no hard_weight is given"),
    ("alpha", 0.5, {"labels": None}, ValueError, "0.5 without labels .*give labels, alpha=1, or hard_weight=0"),
    ("hard_weight", -1, {}, ValueError, "-1 must be a finite number >= 0"),
    ("hard_weight", INF, {}, ValueError, "inf must be a finite number >= 0"),
    ("hard_weight", 0.5, {"labels": None}, ValueError, "0.5 without labels; give labels or hard_weight=0"),
    ("beta", 0.5, {"divergence": "forward_kl"}, ValueError, "with divergence='forward_kl', which has none; .*'jsd'"),
    ("beta", 0.5, {"divergence": "logit_mse"}, ValueError, "with divergence='logit_mse', which has none"),
    ("beta", 0.5, {"divergence": "dkd"}, ValueError, "with divergence='dkd', which has none; it is for .*'jsd'"),
    ("beta", -0.1, {"divergence": "jsd"}, ValueError, r"-0.1 must lie in \[0, 1\]"),
    ("beta", NAN, {"divergence": "jsd"}, ValueError, r"nan must lie in \[0, 1\]"),
    ("beta", 1.5, {"divergence": "symmetric_kl"}, ValueError, r"1.5 must lie in \[0, 1\]"),
    ("beta", "half", {"divergence": "jsd"}, TypeError, "must be a number, not 'half'"),
    *(
        ("label_smoothing", value, {}, ValueError, re.escape(f"{value!r} must lie in [0, 1]"))
        for value in (-0.1, 1.5, NAN, INF)
    ),
    ("label_smoothing", 0.1, {"labels": None}, ValueError, "0.1 without labels; it is for the hard term"),
    *(("z_loss", value, {}, ValueError, f"{value!r} must be a finite number >= 0") for value in (-1e-4, NAN, INF)),
    ("softcap", torch.tensor(30.0), {}, TypeError, "must be a number, not tensor"),
    *(
        ("dkd_weights", value, {"divergence": "dkd"}, TypeError, "must be two numbers, of the target and of the other")
        for value in (1.0, None, (), (1.0,), (1.0, 8.0, 1.0), "18", (1.0, "8"), (1.0, None), torch.tensor([1.0, 8.0]))
    ),
    *(
        ("dkd_weights", (1.0, value), {"divergence": "dkd"}, ValueError, f"{value!r} must be a finite number >= 0")
        for value in (-1.0, NAN, INF)
    ),
    ("vocab_size", 0, {}, ValueError, "0 must be at least 1"),
    ("vocab_size", 6, {}, ValueError, r"6 must lie in \[1, 5\], the classes of student_logits"),
    ("vocab_size", 5, {"teacher": T[:, :4]}, ValueError, "5 is more than the 4 classes of teacher"),
    ("vocab_size", 5, {"teacher": [T, T[:, :4]]}, ValueError, r"5 is more than the 4 classes of teacher\[1\]"),
    ("vocab_size", 4.0, {}, TypeError, "must be an int, not 4.0"),
    ("vocab_size", True, {}, TypeError, "must be an int, not True"),
    ("ignore_index", 1.0, {}, TypeError, "must be an int, not 1.0"),
    ("ignore_index", None, {}, TypeError, "must be an int, not None"),
    # too large for a float; for an operator's int
    ("temperature", 10**400, {}, ValueError, "finite and > 0"),
    ("ignore_index", 2**70, {}, ValueError, "64 bits"),
    # --- names
    ("divergence", "kl", {}, ValueError, "'kl' is not one of 'cross_entropy', .*'logit_mse', 'dkd'"),
    ("divergence", None, {}, ValueError, "None is not one of 'cross_entropy'"),
    ("target", "probabilities", {}, ValueError, "'probabilities' is not one of 'logits', 'probs', 'log_probs'"),
    ("reduction", "avg", {}, ValueError, "'avg' is not one of 'mean', 'sum', 'batchmean', 'none'"),
    ("reduction", None, {}, ValueError, "None is not one of 'mean', 'sum', 'batchmean', 'none'"),
    ("reduction", np.array(["mean", "sum"]), {}, ValueError, "is not one of 'mean', 'sum', 'batchmean', 'none'"),
    ("ensemble", "mean", {}, ValueError, "'mean' is not one of 'arithmetic', 'geometric'"),
    ("backend", "gpu", {}, ValueError, "'gpu' is not one of None, 'reference', 'cpu', 'triton', 'cuda'"),
    # --- flags
    ("t_squared", "no", {}, TypeError, "must be a bool, not 'no'"),
    ("inplace", "no", {}, TypeError, "must be a bool, not 'no'"),
    ("standardize", 1, {}, TypeError, "must be a bool, not 1"),
    ("standardize", None, {}, TypeError, "must be a bool, not None"),
    ("return_metrics", 1, {}, TypeError, "must be a bool, not 1"),
    ("return_metrics", "kl", {}, TypeError, "must be a bool, not 'kl'"),
    # --- arguments that exclude each other
    ("teacher_temperature", 2.0, {"target": "probs"}, ValueError, "target='probs', which is at its"),
    ("teacher_temperature", 2.0, {"target": "log_probs"}, ValueError, "target='log_probs', which is at its"),
    ("teacher_weights", [1.0], {}, ValueError, "given with one tensor as the teacher; it is for a sequence"),
    ("divergence", "logit_mse", {"target": "probs"}, ValueError, "'logit_mse' needs target='logits', not 'probs'"),
    ("divergence", "logit_mse", {"teacher": [T, T]}, ValueError, "'logit_mse' with several .* ensemble='geometric'"),
    ("divergence", "dkd", {"labels": None}, ValueError, "'dkd' needs labels, which say what its target class is"),
    ("dkd_weights", (2.0, 1.0), {}, ValueError, "given with divergence='cross_entropy'; they are for 'dkd'"),
    *(
        (argument, value, {"target": target}, ValueError, f"needs target='logits', not '{target}'")
        for argument, value in (("standardize", True), ("teacher_softcap", 30.0), ("teacher_logit_scale", 0.5))
        for target in ("probs", "log_probs")
    ),
    ("normalizer", torch.tensor(2.0, requires_grad=True), {}, RuntimeError, "requires grad, but .* has no derivative"),
    ("normalizer", 3, {"reduction": "sum"}, ValueError, "given with reduction='sum'; it takes the place of the mean's"),
    ("normalizer", 3, {"reduction": "none"}, ValueError, "given with reduction='none'; it takes the place"),
    # --- ensembles
    *(
        ("teacher_weights", value, {"teacher": [T, T]}, ValueError, "must be 2 finite numbers >= 0, one per teacher")
        for value in ([1.0], [1.0, 2.0, 3.0], [-1.0, 2.0], [0.0, 0.0], [NAN, 1.0], [INF, 1.0], [])
    ),
    *(
        ("teacher_weights", value, {"teacher": [T, T]}, TypeError, "must be a sequence of 2 numbers, not ")
        for value in (0.5, [None, 1.0], "12")
    ),
    ("teacher_weights", torch.ones(2, requires_grad=True), {"teacher": [T, T]}, RuntimeError, "no derivative"),
    # --- sparse teachers
    *(
        (f"teacher.{name}", SPARSE._replace(**{name: value}), {}, error, words)
        for name, value, error, words in (
            ("indices", [[0, 1]], TypeError, "must be a tensor, not list"),
            ("log_probs", None, TypeError, "must be a tensor, not None"),
            ("indices", IDS.float(), RuntimeError, "torch.float32, but it must be torch.int32 or torch.int64"),
            ("indices", IDS.short(), RuntimeError, "torch.int16, but it must be torch.int32 or torch.int64"),
            ("log_probs", IDS, RuntimeError, "torch.int64, but it must be one of torch.float32"),
            ("indices", IDS.to("meta"), RuntimeError, "is on meta, but student_logits is on (cpu|cuda)"),
            ("log_probs", LP.to("meta"), RuntimeError, "is on meta, but student_logits is on (cpu|cuda)"),
            ("log_probs", NESTED, TypeError, r"is a nested tensor; pass its values\(\)"),
        )
    ),
    ("teacher", TopKTargets(IDS, LP[:, :1]), {}, ValueError, r"\(3, 2\) and log_probs of shape \(3, 1\) .* the same"),
    (
        "teacher",
        TopKTargets(LP, IDS),
        {},
        RuntimeError,
        r"indices of .*float32 .*int64; .*\(indices, log_probs\).*torch.topk",
    ),
    *(
        ("teacher.indices", TopKTargets(*(f(x) for x in SPARSE)), {}, ValueError, words)
        for f, words in (
            (lambda x: x[:2], r"\(2, 2\), but with student_logits of shape \(3, 5\) it must be \(3, K\)"),
            (lambda x: x[0], r"\(2,\), but with student_logits of shape \(3, 5\) it must be \(3, K\)"),
            (lambda x: x[None], r"\(1, 3, 2\), but with student_logits of shape \(3, 5\) it must be \(3, K\)"),
            (lambda x: x[:, :0], r"\(3, 0\), but K must lie in \[1, 5\], the classes of student_logits"),
            (lambda x: x.repeat(1, 3), r"\(3, 6\), but K must lie in \[1, 5\], the classes of student_logits"),
        )
    ),
    (
        "teacher.indices",
        TopKTargets(IDS.T, LP.T),
        {"dim": 0, "labels": None},
        ValueError,
        r"\(2, 3\), but .* it must be \(K, 5\)",
    ),
    *(
        ("teacher.indices", TopKTargets(torch.tensor([[0, 1], [2, index], [4, -1]]), LP), {}, IndexError, words)
        for index, words in (
            (5, r"5 in row 1, entry 1 .*V = 5 it must be in \[0, 4\]; a log-probability of -inf marks .* absent"),
            (-1, "-1 in row 1, entry 1 is out of range"),
            (2**40, f"{2**40} in row 1, entry 1 is out of range"),
        )
    ),
    (
        "teacher.indices",
        SPARSE,
        {"vocab_size": 4, "labels": None},
        IndexError,
        r"4 in row 2, entry 0 .*V = 4 .*\[0, 3\]",
    ),
    ("teacher.indices", TopKTargets(IDS // 2, LP), {}, ValueError, "class 0 is twice in row 0, as entries 0 and 1"),
    ("teacher[0]", [SPARSE, SPARSE], {}, TypeError, "must be a tensor, not TopKTargets; a sparse teacher goes alone"),
    ("teacher[1]", [T, SPARSE], {}, TypeError, "must be a tensor, not TopKTargets; a sparse teacher goes alone"),
    ("teacher", [SPARSE], {}, TypeError, "must be a tensor, not TopKTargets; a sparse teacher goes alone"),
    ("missing", "conditional", {}, ValueError, "'conditional' with a teacher that is not sparse; .*TopKTargets"),
    ("missing", "rest", {}, ValueError, "'rest' is not one of 'tail', 'conditional', 'renormalize', 'truncate'"),
    ("missing", None, {}, ValueError, "None is not one of 'tail', 'conditional', 'renormalize', 'truncate'"),
    *(
        (argument, value, {"teacher": SPARSE}, ValueError, words)
        for argument, value, words in (
            ("divergence", "dkd", "'dkd' takes no sparse teacher"),
            ("divergence", "logit_mse", "'logit_mse' takes no sparse teacher"),
            ("standardize", True, "must be False with a sparse teacher, which has no logits"),
            ("target", "probs", "'probs' with a sparse teacher, which has log-probabilities"),
            ("teacher_temperature", 2.0, "with a sparse teacher, whose log-probabilities have it already"),
            ("teacher_softcap", 30.0, "with a sparse teacher, whose log-probabilities have it already"),
            ("teacher_logit_scale", 0.5, "with a sparse teacher, whose log-probabilities have it already"),
            ("teacher_weights", [1.0], "given with one teacher; it is for a sequence"),
        )
    ),
    *(
        (
            "divergence",
            d,
            {"teacher": SPARSE, "missing": "renormalize"},
            ValueError,
            f"'{d}' .*'renormalize' .*'tail'",
        )
        for d in ("reverse_kl", "symmetric_kl")
    ),
    *(
        (
            "divergence",
            d,
            {"teacher": SPARSE, "missing": "truncate"},
            ValueError,
            f"'{d}' .*'truncate'.* use .*'tail'",
        )
        for d in ("reverse_kl", "symmetric_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "hellinger")
    ),
]
