"""TopKCache: a cache as a map-style dataset."""

import bisect
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdfast import checks
from kdfast.cache.format import CacheError, Manifest, Shard, file_sha256, open_shard, read_manifest, read_rows
from kdfast.sparse import TopKTargets


class CachedSequence(NamedTuple):
    """A sequence of S tokens. Row i of the targets is what the teacher says after token i."""

    token_ids: Tensor  # (S,) int64
    targets: TopKTargets  # of (S, k): int32, and float16 or float32


class TopKCache(torch.utils.data.Dataset[CachedSequence]):
    """Reads what `TopKWriter` has written: `cache[i]` is the i-th sequence, `cache[i, a:b]` a part of it.

    Only the rows that are asked for are read. Files are opened at their first use, in each process by itself, so a
    DataLoader's workers can share it.

    Args:
        path: the folder.
        verify: `"size"`: shards must have the bytes that the manifest says; `"sha256"`: and their contents, all of
            which are read; None: neither.

    Examples:
        >>> loader = torch.utils.data.DataLoader(cache, batch_size=2, collate_fn=cache.collate)
        >>> token_ids, targets = next(iter(loader))
    """

    def __init__(self, path: str | os.PathLike[str], verify: str | None = "size") -> None:
        if verify not in ("size", "sha256", None):
            raise ValueError(f"verify: {verify!r} is not one of 'size', 'sha256', None")
        manifest = read_manifest(Path(path))
        self._set_parts([(Path(path), manifest, shard) for shard in manifest.shards])
        self.manifest = manifest
        if verify:
            self.verify(verify == "sha256")

    def _set_parts(self, parts: list[tuple[Path, Manifest, Shard]]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(shard.sequences for _, _, shard in parts))
        self._open: dict[int, tuple[int, dict[str, int], np.ndarray]] = {}
        self._process = os.getpid()

    @classmethod
    def concat(cls, caches: Sequence["TopKCache"]) -> "TopKCache":
        """One cache of the sequences of several, which must have the same k, vocab_size and temperature."""
        if not caches:
            raise ValueError("caches: must be at least one")
        first = caches[0].manifest
        for cache in caches:
            for name in ("k", "vocab_size", "temperature", "dtype"):
                if getattr(cache.manifest, name) != getattr(first, name):
                    raise CacheError(
                        f"{name}: one cache has {getattr(first, name)!r}, another {getattr(cache.manifest, name)!r}"
                    )
        out = cls.__new__(cls)
        out._set_parts([part for cache in caches for part in cache._parts])
        out.manifest = first._replace(shards=[shard for _, _, shard in out._parts])
        return out

    def verify(self, contents: bool = True) -> None:
        """Raises `CacheError`, which names the shard, where a file is not as the manifest says."""
        for path, _, shard in self._parts:
            file = path / shard.file
            size = file.stat().st_size if file.exists() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, but the manifest says {shard.bytes}"
                raise CacheError(f"{file}: {found}")
            if contents and file_sha256(file) != shard.sha256:
                raise CacheError(f"{file}: its contents are not those that were written (sha256)")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def lengths(self) -> Tensor:
        """(len(self),) int64: the tokens of each sequence, as samplers that group by length want them."""
        parts = [np.diff(self._shard(at)[2]) for at in range(len(self._parts))]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]))

    def __getitem__(self, index: int | tuple[int, slice]) -> CachedSequence:
        index, part = index if isinstance(index, tuple) else (index, slice(None))
        at, begin, end = self._find(checks.as_integer("index", index))
        start, stop, step = part.indices(end - begin)
        if step != 1:
            raise ValueError(f"index: a slice of step {step}, but it must be 1")
        begin, end = begin + start, begin + max(start, stop)
        descriptor, starts, _ = self._shard(at)
        columns = self._parts[at][1].columns()
        tokens, indices, log_probs = (
            read_rows(descriptor, starts[name], *columns[name], begin, end)
            for name in ("token_ids", "indices", "log_probs")
        )
        wide = indices.astype(np.int32) if indices.dtype != np.int32 else indices
        return CachedSequence(
            torch.from_numpy(tokens.astype(np.int64)),
            TopKTargets(torch.from_numpy(wide), torch.from_numpy(log_probs)),
        )

    def check(self, index: int, token_ids: Tensor) -> None:
        """Raises `CacheError` unless the sequence begins with these tokens, (S,)."""
        at, begin, end = self._find(index)
        descriptor, starts, _ = self._shard(at)
        own = read_rows(descriptor, starts["token_ids"], *self._parts[at][1].columns()["token_ids"], begin, end)
        _compare(index, torch.from_numpy(own), token_ids)

    def collate(self, batch: Sequence[Any], length: int | None = None) -> tuple[Tensor, TopKTargets]:
        """A DataLoader's `collate_fn`: pads sequences with token 0 and entries (-1, -inf), which are absent.

        Args:
            batch: sequences of this cache; or pairs (i, token_ids), as a dataset of one's own yields them, whose
                sequences are read, and must be of these tokens.
            length: S of the result; longer sequences are cut. None: the longest's.

        Returns:
            token_ids (B, S) int64, and TopKTargets of (B, S, k). A row without entries has no soft term.
        """
        sequences = []
        for item in batch:
            if not isinstance(item, CachedSequence):
                index, token_ids = item
                item = self[index]
                _compare(index, item.token_ids, token_ids)
            sequences.append(item)
        longest = max([len(x.token_ids) for x in sequences] + [0]) if length is None else length
        shape = (len(sequences), longest)
        k, first = self.manifest.k, sequences[0].targets.log_probs.dtype if sequences else torch.float16
        token_ids = torch.zeros(shape, dtype=torch.int64)
        indices = torch.full((*shape, k), -1, dtype=torch.int32)
        log_probs = torch.full((*shape, k), -torch.inf, dtype=first)
        for row, (tokens, targets) in enumerate(sequences):
            n = min(len(tokens), longest)
            token_ids[row, :n], indices[row, :n], log_probs[row, :n] = (
                tokens[:n],
                targets.indices[:n],
                targets.log_probs[:n],
            )
        return token_ids, TopKTargets(indices, log_probs)

    def _find(self, index: int) -> tuple[int, int, int]:
        """The shard of a sequence, and its first row and its end in it."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index: {index} is out of range: the cache has {count} sequences")
        index %= count
        at = bisect.bisect_right(self._ends, index)
        offsets = self._shard(at)[2]
        within = index - (self._ends[at] - self._parts[at][2].sequences)
        return at, int(offsets[within]), int(offsets[within + 1])

    def _shard(self, at: int) -> tuple[int, dict[str, int], np.ndarray]:
        """A shard's file, where its tensors begin, and its offsets."""
        if self._process != os.getpid():  # a forked worker's own
            self._open, self._process = {}, os.getpid()
        if at not in self._open:
            path, manifest, shard = self._parts[at]
            descriptor, starts = open_shard(path, manifest, shard)
            offsets = read_rows(descriptor, starts["offsets"], np.dtype("<i8"), (), 0, shard.sequences + 1)
            if offsets[0] != 0 or offsets[-1] != shard.rows or (np.diff(offsets) < 0).any():
                os.close(descriptor)
                raise CacheError(f"{path / shard.file}: offsets are not in order, from 0 to {shard.rows}")
            self._open[at] = descriptor, starts, offsets
        return self._open[at]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __del__(self) -> None:
        if self.__dict__.get("_process") == os.getpid():
            for descriptor, _, _ in self._open.values():
                os.close(descriptor)


def _compare(index: int, own: Tensor, token_ids: Tensor) -> None:
    n = len(token_ids)
    differ = (own[:n].to(token_ids.dtype) != token_ids.cpu()[: len(own)]).nonzero()
    if len(differ):
        at = int(differ[0])
        raise CacheError(
            f"token_ids: sequence {index} has token {int(own[at])} at position {at} in the cache, but "
            f"{int(token_ids[at])} is given: the cache was made of another text or by another tokenizer"
        )
    if n > len(own):
        raise CacheError(f"token_ids: sequence {index} has {len(own)} tokens in the cache, but {n} are given")
