"""Sparse teachers: log-probabilities of K classes a row. sparse_rows.py has their mathematics."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast import checks
from kdfast.arguments import OTHER_SHARD, Inputs, Settings
from kdfast.rows import kept_rows
from kdfast.tensor_checks import check_dense, check_floating, check_logits, kind


class TopKTargets(NamedTuple):
    """A teacher known at K classes a row, such as its top k: their indices, and their log-probabilities.

    An entry of log-probability -inf is absent, whatever its index: that is the padding where K varies. The classes may
    be the teacher's, the student's or anybody's; a class may be there once. `missing` of `kd_loss` says what is assumed
    of all others.

    Attributes:
        indices: (..., K) int32 or int64.
        log_probs: (..., K), floating.

    Examples:
        >>> teacher = TopKTargets(torch.tensor([[5, 2], [7, -1]]), torch.tensor([[0.6, 0.3], [0.8, 0.0]]).log())
        >>> kd_loss(torch.randn(2, 10), teacher).shape
        torch.Size([])
    """

    indices: Tensor
    log_probs: Tensor

    def to(self, *args: Any, **kwargs: Any) -> "TopKTargets":
        """Both by Tensor.to; a dtype is for log_probs alone.

        Examples:
            >>> topk_targets(torch.randn(2, 8), 3).to(torch.float16).log_probs.dtype
            torch.float16
        """
        log_probs = self.log_probs.to(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name in ("non_blocking", "copy")}
        return TopKTargets(self.indices.to(log_probs.device, **kwargs), log_probs)

    @classmethod
    def from_vllm(
        cls, prompt_logprobs: Sequence[Mapping[Any, Any] | None], k: int | None = None, *, device: Any = None
    ) -> "TopKTargets":
        """From the `prompt_logprobs` of one vLLM request, as objects or as parsed JSON.

        Its entry i scores token i, given the tokens before it, and the first entry is None. Row i of the result belongs
        to logits[i], which predict token i + 1: of n tokens it has n - 1 rows.

        Args:
            prompt_logprobs: a sequence whose entries map token ids to objects with `logprob`, or to dicts with this
                key, or to numbers.
            k: how many entries a row keeps, those of the highest log-probabilities. None: all; vLLM then adds the
                prompt's own token to its top k where it is not among them.
            device: the result's.

        Returns:
            TopKTargets of (n - 1, K) int64 and float32; shorter rows are padded with (-1, -inf).

        Examples:
            >>> TopKTargets.from_vllm([None, {7: {"logprob": -0.5}, 3: {"logprob": -1.5}}], k=1)
            TopKTargets(indices=tensor([[7]]), log_probs=tensor([[-0.5000]]))
        """
        if k is not None and checks.as_integer("k", k) < 1:
            raise ValueError(f"k: {k} must be at least 1")
        rows = []
        for at, entry in enumerate(prompt_logprobs):
            if entry is None:
                if at:
                    raise ValueError(f"prompt_logprobs: entry {at} is None, but only the first may be")
                continue
            if not isinstance(entry, Mapping):
                raise TypeError(f"prompt_logprobs: entry {at} must map token ids to numbers, not {kind(entry)}")
            try:
                pairs = [(_log_prob(value), int(token)) for token, value in entry.items()]
            except (TypeError, ValueError, KeyError):
                raise ValueError(
                    f"prompt_logprobs: entry {at} must map token ids to numbers, or to objects or dicts with "
                    f"'logprob', but it is {str(entry)[:80]}"
                ) from None
            rows.append(sorted(pairs, key=lambda pair: -pair[0])[:k])
        width = max([len(row) for row in rows] + [1])
        padded = [row + [(-math.inf, -1)] * (width - len(row)) for row in rows]
        indices = torch.tensor([[token for _, token in row] for row in padded], dtype=torch.int64, device=device)
        log_probs = torch.tensor([[value for value, _ in row] for row in padded], dtype=torch.float32, device=device)
        return cls(indices.view(-1, width), log_probs.view(-1, width))


def _log_prob(value: Any) -> float:
    if isinstance(value, Mapping):
        return float(value["logprob"])
    return float(getattr(value, "logprob", value))


def topk_targets(
    teacher_logits: Tensor,
    k: int,
    temperature: float | Tensor = 1.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> TopKTargets:
    """A teacher's k most probable classes, with their log-probabilities of the whole softmax at T.

    Args:
        teacher_logits: (..., V), float32, bfloat16, float16 or float64.
        k: in [1, V].
        temperature, logit_scale, softcap, vocab_size: the teacher's, as in `kd_loss`.

    Returns:
        TopKTargets of (..., k) int64 and float32 (for float64 logits float64), in descending order. Nothing else of
        size V is made.

    Raises:
        TypeError, ValueError, RuntimeError: as `kd_loss` for its arguments of these names.

    Examples:
        >>> teacher = topk_targets(torch.randn(6, 100), 8, temperature=2.0)
        >>> kd_loss(torch.randn(6, 100), teacher, temperature=2.0).shape
        torch.Size([])
    """
    from kdfast.tokens import check_numbers, hide_dynamic, token_values

    check_logits("teacher_logits", teacher_logits)
    call = check_numbers(teacher_logits, "teacher_logits", temperature, logit_scale, softcap, vocab_size, False)
    vocab = teacher_logits.shape[-1] if vocab_size is None else vocab_size
    if not 1 <= checks.as_integer("k", k) <= vocab:
        raise ValueError(f"k: {k} must lie in [1, {vocab}], the number of classes")
    logits = teacher_logits.detach()
    indices = logits[..., :vocab].topk(k, -1).indices
    values = token_values(logits, indices, *hide_dynamic(logits, *call), torch.ops.kdfast)
    return TopKTargets(indices, values[0])


def check_targets(
    teacher: TopKTargets, student: Tensor, dim: int, has_all_classes: bool = True
) -> tuple[Tensor, Tensor]:
    """The indices and log-probabilities, each (..., K). dim: of the K classes, as the student's are in its logits."""
    indices, log_probs = teacher
    for name, value in (("indices", indices), ("log_probs", log_probs)):
        if not isinstance(value, Tensor):
            raise TypeError(f"teacher.{name}: must be a tensor, not {kind(value)}")
        check_dense(f"teacher.{name}", value)
        if value.device != student.device:
            raise RuntimeError(f"teacher.{name}: is on {value.device}, but student_logits is on {student.device}")
    if indices.is_floating_point() and not log_probs.is_floating_point():
        raise RuntimeError(
            f"teacher: has indices of dtype {indices.dtype} and log_probs of dtype {log_probs.dtype}; TopKTargets "
            "takes (indices, log_probs), and torch.topk returns them in the other order"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"teacher.indices: has dtype {indices.dtype}, but it must be torch.int32 or torch.int64")
    check_floating("teacher.log_probs", log_probs)
    if indices.shape != log_probs.shape:
        raise ValueError(
            f"teacher: indices of shape {tuple(indices.shape)} and log_probs of shape {tuple(log_probs.shape)} must "
            "have the same shape"
        )
    rows = (*student.shape[:dim], *student.shape[dim + 1 :])
    if indices.dim() != student.dim() or (*indices.shape[:dim], *indices.shape[dim + 1 :]) != rows:
        raise ValueError(
            f"teacher.indices: has shape {tuple(indices.shape)}, but with student_logits of shape "
            f"{tuple(student.shape)} it must be ({', '.join(map(str, (*rows[:dim], 'K', *rows[dim:])))})"
        )
    if not indices.shape[dim] >= 1 or (has_all_classes and indices.shape[dim] > student.shape[dim]):
        raise ValueError(
            f"teacher.indices: has shape {tuple(indices.shape)}, but K must lie in [1, {student.shape[dim]}], the "
            "classes of student_logits"
        )
    if dim != student.dim() - 1:
        indices, log_probs = indices.movedim(dim, -1), log_probs.movedim(dim, -1)
    return indices, log_probs.detach()


def check_options(options: Mapping[str, Any], settings: Settings) -> None:
    """Raises for options that a sparse teacher does not go with."""
    missing, divergence = options["missing"], options["divergence"]
    if options["teacher_weights"] is not None:
        raise ValueError("teacher_weights: given with one teacher; it is for a sequence of teachers")
    if options["target"] == "probs":
        raise ValueError("target: 'probs' with a sparse teacher, which has log-probabilities")
    if divergence in ("dkd", "logit_mse"):
        raise ValueError(f"divergence: {divergence!r} takes no sparse teacher, as it needs logits of all classes")
    if settings.standardize:
        raise ValueError("standardize: must be False with a sparse teacher, which has no logits")
    for name, unset in (("teacher_temperature", None), ("teacher_softcap", None), ("teacher_logit_scale", 1.0)):
        if options[name] != unset:
            raise ValueError(f"{name}: given with a sparse teacher, whose log-probabilities have it already")
    resolved = settings.divergence
    if missing == "renormalize" and resolved in ("reverse_kl", "symmetric_kl"):
        raise ValueError(
            f"divergence: {divergence!r} with missing='renormalize' is always infinite, as the teacher has probability "
            "0 where the student has some; use missing='tail' or 'conditional'"
        )
    if missing == "truncate" and resolved not in ("cross_entropy", "forward_kl"):
        raise ValueError(
            f"divergence: {divergence!r} with missing='truncate', which takes 'cross_entropy' and 'forward_kl' alone; "
            "use missing='tail' or 'conditional'"
        )


def check_entries(student: Tensor, inputs: Inputs, settings: Settings, vocab: int | None) -> None:
    """Raises for an index out of range and for a class that is there twice, of rows that are kept. On a CPU only.

    vocab: None where the number of all classes is not known, as over shards.
    """
    indices, log_probs = inputs.indices, inputs.teachers[0]
    assert indices is not None
    entries = indices.shape[-1]
    kept = kept_rows(student, inputs, settings).reshape(-1, 1)
    indices = indices.reshape(-1, entries).long()
    present = kept & (log_probs.reshape(-1, entries) != -math.inf) & (indices != OTHER_SHARD)
    limit = math.inf if vocab is None else vocab
    bad = present & ((indices < 0) | (indices >= limit))
    if bad.any():
        row, entry = bad.nonzero()[0].tolist()
        allowed = f"with V = {vocab} it must be in [0, {vocab - 1}]" if vocab is not None else "it must be at least 0"
        raise IndexError(
            f"teacher.indices: {indices[row, entry].item()} in row {row}, entry {entry} is out of range: {allowed}; a "
            "log-probability of -inf marks an entry as absent"
        )
    absent = -1 - torch.arange(entries)
    ordered, order = torch.where(present, indices, absent).sort(dim=-1, stable=True)
    twice = (ordered[:, 1:] == ordered[:, :-1]).nonzero()
    if len(twice):
        row, at = twice[0].tolist()
        raise ValueError(
            f"teacher.indices: class {ordered[row, at].item()} is twice in row {row}, as entries "
            f"{order[row, at].item()} and {order[row, at + 1].item()}"
        )
