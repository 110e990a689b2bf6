"""TopKWriter: a teacher's most probable classes, written to disk."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast import checks
from kdfast.cache.format import (
    MANIFEST,
    CacheError,
    Manifest,
    lock,
    read_manifest,
    write_manifest,
    write_shard,
)
from kdfast.cache.rounding import LEAST, round_down_to_a_distribution
from kdfast.sparse import TopKTargets, topk_targets
from kdfast.tensor_checks import kind

_BF16 = (
    "torch.bfloat16 is refused: a gradient is 1.1 to 33 % off by its log-probabilities, by float16's 0.2 to 5.3 % (a "
    "student at a KL of 8e-2 to 1e-4 from the teacher)"
)


class TopKWriter:
    """Writes a teacher's k log-probabilities of each token, with the tokens, into a folder.

    A context manager. It writes a shard whenever `rows_per_shard` rows are there, and the rest at its end. After a
    crash `resume=True` goes on: write the sequences from `sequences_done` on, and the cache will be the same, byte
    for byte, as one that was never interrupted.

    Args:
        path: a folder, which is made. One that holds a cache already is an error without `resume`.
        k: the entries of a row. Rows that have fewer are padded.
        vocab_size: V. Up to 65536 classes indices take 2 bytes, else 4.
        temperature: of the log-probabilities; `write` computes them of logits at it.
        dtype: torch.float16 or torch.float32, of log-probabilities. They never round up to a sum above 1.
        metadata: a dict of JSON's types, such as the teacher's name and the tokenizer's; it is kept with the cache.
        rows_per_shard: the rows after which a shard ends, with the sequence that has them.
        resume: go on with the cache at `path`, if there is one. `k`, `vocab_size`, `temperature`, `dtype` and
            `metadata` must be the same.

    Examples:
        >>> with TopKWriter(folder, k=4, vocab_size=100) as writer:
        ...     writer.write(torch.randn(2, 8, 100), torch.randint(100, (2, 8)), lengths=[8, 5])
        >>> len(TopKCache(folder))
        2
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        k: int,
        vocab_size: int,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float16,
        metadata: dict[str, Any] | None = None,
        rows_per_shard: int = 2**20,
        resume: bool = False,
    ) -> None:
        _need_safetensors()
        if dtype == torch.bfloat16:
            raise ValueError(f"dtype: {_BF16}")
        if dtype not in (torch.float16, torch.float32):
            raise ValueError(f"dtype: {dtype!r} is not torch.float16 or torch.float32")
        if not 1 <= checks.as_integer("vocab_size", vocab_size) < 2**31:
            raise ValueError(f"vocab_size: {vocab_size} must lie in [1, 2^31)")
        if not 1 <= checks.as_integer("k", k) <= vocab_size:
            raise ValueError(f"k: {k} must lie in [1, {vocab_size}], the number of classes")
        if checks.as_integer("rows_per_shard", rows_per_shard) < 1:
            raise ValueError(f"rows_per_shard: {rows_per_shard} must be at least 1")
        try:
            metadata = json.loads(json.dumps(metadata or {}, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"metadata: must be a dict of JSON's types: {error}") from None
        number = checks.check_positive("temperature", temperature)
        name = str(dtype).removeprefix("torch.")
        self.path, self.rows_per_shard = Path(path), rows_per_shard
        self._manifest = Manifest(k, vocab_size, number, name, metadata, [])
        self._rows: list[dict[str, np.ndarray[Any, Any]]] = []
        self._lengths: list[int] = []
        self._buffered = 0  # their sum
        self._open(resume)

    def _open(self, resume: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.path)
        try:
            if (self.path / MANIFEST).exists():
                if not resume:
                    raise FileExistsError(f"path: {self.path} holds a cache already; pass resume=True to go on with it")
                found = read_manifest(self.path)
                for name in ("k", "vocab_size", "temperature", "dtype", "metadata"):
                    old, new = getattr(found, name), getattr(self._manifest, name)
                    if old != new:
                        raise CacheError(f"{name}: {new!r}, but the cache at {self.path} has {old!r}")
                self._manifest = found
            for unfinished in self.path.glob("*.tmp"):
                unfinished.unlink()
            write_manifest(self.path, self._manifest)
        except BaseException:
            self._lock.close()
            raise

    @property
    def sequences_done(self) -> int:
        """How many sequences are on disk for good: where to go on after a crash."""
        return self._manifest.sequences

    def write(
        self, teacher: Tensor | TopKTargets, token_ids: Tensor, lengths: Tensor | list[int] | None = None
    ) -> None:
        """Adds the sequences of a batch.

        Args:
            teacher: (B, S, V) logits, whose classes from `vocab_size` on are padding; or TopKTargets of (B, S, K), K
                at most `k`, at the cache's temperature. Row i of a sequence is what the teacher says after token i.
            token_ids: (B, S) integers.
            lengths: (B,) the lengths of the sequences, of which the rest is padding. None: all are S.
        """
        if self._lock.closed:
            raise ValueError("write: the writer is closed")
        if isinstance(teacher, Tensor):
            m = self._manifest
            teacher = topk_targets(teacher, m.k, m.temperature, vocab_size=min(m.vocab_size, teacher.shape[-1]))
        if not isinstance(teacher, TopKTargets):
            raise TypeError(f"teacher: must be logits or kdfast.TopKTargets, not {kind(teacher)}")
        self._check_shapes(teacher, token_ids)
        batch, length = token_ids.shape
        ends = [length] * batch if lengths is None else [int(n) for n in lengths]
        if len(ends) != batch or not all(0 <= n <= length for n in ends):
            raise ValueError(f"lengths: must be {batch} numbers in [0, {length}], not {ends}")
        entries = teacher.indices.shape[-1]
        indices, log_probs = teacher.indices.detach().cpu().view(-1, entries), teacher.log_probs.detach().cpu()
        log_probs, tokens = log_probs.reshape(-1, entries), token_ids.detach().cpu().reshape(-1)
        if sum(ends) < len(tokens):  # padding may hold anything
            is_real = (torch.arange(length) < torch.tensor(ends).unsqueeze(-1)).view(-1)
            indices, log_probs, tokens = indices[is_real], log_probs[is_real], tokens[is_real]
        stored = self._as_stored(indices, log_probs, tokens)
        begin = 0
        for n in ends:
            self._rows.append({name: column[begin : begin + n] for name, column in stored.items()})
            self._lengths.append(n)
            begin += n
            self._buffered += n
            if self._buffered >= self.rows_per_shard:
                self._flush()

    def _check_shapes(self, targets: TopKTargets, token_ids: Tensor) -> None:
        if not isinstance(token_ids, Tensor) or token_ids.dim() != 2 or token_ids.is_floating_point():
            raise ValueError("token_ids: must be integers of shape (B, S)")
        shape = (*token_ids.shape, targets.indices.shape[-1] if targets.indices.dim() else 0)
        for name, value in targets._asdict().items():
            if value.shape != shape or not 1 <= shape[-1] <= self._manifest.k:
                raise ValueError(
                    f"teacher: {name} of shape {tuple(value.shape)} with token_ids of shape {tuple(token_ids.shape)} "
                    f"must be (B, S, K) with K in [1, {self._manifest.k}]"
                )

    def _as_stored(self, indices: Tensor, log_probs: Tensor, tokens: Tensor) -> dict[str, np.ndarray[Any, Any]]:
        """Rows as a shard has them; each (rows, K) or (rows,)."""
        m = self._manifest
        all_present = self._check_entries(indices, log_probs)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < 2**31:
            raise ValueError("token_ids: must be in [0, 2^31)")
        columns = m.columns()
        dtype = torch.float16 if m.dtype == "float16" else torch.float32
        values = round_down_to_a_distribution(log_probs, dtype, all_present)
        padding = ((0, 0), (0, m.k - indices.shape[-1]))
        classes = (indices if all_present else torch.where(values == -math.inf, 0, indices)).numpy()
        stored = {
            "indices": classes.astype(columns["indices"][0]),
            "log_probs": values.numpy(),
            "token_ids": tokens.numpy(),
        }
        if padding[1][1]:
            stored["indices"] = np.pad(stored["indices"], padding)
            stored["log_probs"] = np.pad(stored["log_probs"], padding, constant_values=-np.inf)
        return {name: column.astype(columns[name][0], copy=False) for name, column in stored.items()}

    def _check_entries(self, indices: Tensor, log_probs: Tensor) -> bool:
        """Whether all entries are present, so that nobody has to look for absent ones; raises for a bad one."""
        vocab = self._manifest.vocab_size
        if log_probs.numel():
            first, last = indices.aminmax()
            if first >= 0 and last < vocab and log_probs.amin() >= LEAST:  # a NaN is not
                return True
        bad = ((log_probs != -math.inf) & ((indices < 0) | (indices >= vocab))) | log_probs.isnan()
        if bad.any():
            row, entry = bad.nonzero()[0].tolist()
            what = f"{indices[row, entry].item()} with log-probability {log_probs[row, entry].item():g}"
            raise ValueError(
                f"teacher: class {what} in row {row} of the batch's real rows, entry {entry}; classes must be in "
                f"[0, {vocab - 1}], and log-probabilities no NaN"
            )
        return False

    def _flush(self) -> None:
        """Writes what is there as one shard."""
        m = self._manifest
        tensors = {"offsets": np.cumsum([0, *self._lengths], dtype=np.int64)}
        for name in ("indices", "log_probs", "token_ids"):
            tensors[name] = np.concatenate([rows[name] for rows in self._rows])
        try:
            shard = write_shard(self.path, f"shard-{len(m.shards):05}.safetensors", tensors)
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}: the cache at {self.path} holds {self.sequences_done} sequences"
            ) from error
        self._manifest = m._replace(shards=[*m.shards, shard])
        write_manifest(self.path, self._manifest)
        self._rows, self._lengths, self._buffered = [], [], 0

    def close(self) -> None:
        """Writes the rest."""
        if not self._lock.closed:
            try:
                if self._lengths:
                    self._flush()
            finally:
                self._lock.close()

    def __enter__(self) -> "TopKWriter":
        return self

    def __exit__(
        self, kind_of_error: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # a shorter shard would not be the one of a writer that was never interrupted
            self._lock.close()


def _need_safetensors() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise ImportError("kdfast.cache needs safetensors: pip install 'kdfast[cache]'") from None
